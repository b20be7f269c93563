"""Classical models: mixtures, regressions, factor models."""

from pyro_genmodels.classical.mixture import GMM
from pyro_genmodels.classical.naive_bayes import NaiveBayes

__all__ = ["GMM", "NaiveBayes"]
