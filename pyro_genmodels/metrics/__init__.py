"""Figures of merit: plain functions of labels, scores, probabilities and draws; nothing here knows a model or a back-end."""

from pyro_genmodels.metrics import anomaly, bias_variance, calibration, clustering, topics

__all__ = ["anomaly", "bias_variance", "calibration", "clustering", "topics"]
