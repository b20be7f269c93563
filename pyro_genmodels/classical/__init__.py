"""Classical models: mixtures, regressions, factor models."""

from pyro_genmodels.classical.gmm import GMM

__all__ = ["GMM"]
