"""Figures of merit: functions of labels, scores, probabilities and draws; and of any program with rows, by its guide.

Nothing here knows a model class or a back-end: ``density`` and ``codes`` take programs, ``images`` pictures and a network
whose features are compared, all others take numbers.
"""

from pyro_genmodels.metrics import (
    anomaly,
    bias_variance,
    calibration,
    clustering,
    codes,
    density,
    divergences,
    images,
    topics,
)

__all__ = ["anomaly", "bias_variance", "calibration", "clustering", "codes", "density", "divergences", "images", "topics"]
