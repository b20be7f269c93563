"""Classical models: mixtures, regressions, factor models."""

from pyro_genmodels.classical.gmm import GMM
from pyro_genmodels.classical.mixture import Mixture

__all__ = ["GMM", "Mixture"]
