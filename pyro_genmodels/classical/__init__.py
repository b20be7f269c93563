"""Classical models: mixtures, regressions, factor models."""

from pyro_genmodels.classical.mixture import GMM

__all__ = ["GMM"]
