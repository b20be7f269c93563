"""Classical models: mixtures, regressions, factor models."""

from pyro_genmodels.classical.mixture import GMM
from pyro_genmodels.classical.topics import LDA

__all__ = ["GMM", "LDA"]
