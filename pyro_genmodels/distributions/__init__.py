"""Distributions that Pyro lacks, or has not where its own saturate."""

from pyro_genmodels.distributions.counts import LogPoisson, NegativeBinomial
from pyro_genmodels.distributions.gaps import Columns, Entries, Filled, PartialNormal
from pyro_genmodels.distributions.intervals import Beta, ContinuousBernoulli, Kumaraswamy
from pyro_genmodels.distributions.levels import DiscretisedLogistic
from pyro_genmodels.distributions.matrices import InverseWishart
from pyro_genmodels.distributions.mixtures import Classwise, LatentScaleT, Mixed
from pyro_genmodels.distributions.sequences import MarkovChain
from pyro_genmodels.distributions.spheres import HypersphericalUniform, PowerSpherical, VonMisesFisher

__all__ = [
    "Beta",
    "Classwise",
    "Columns",
    "ContinuousBernoulli",
    "DiscretisedLogistic",
    "Entries",
    "Filled",
    "HypersphericalUniform",
    "InverseWishart",
    "Kumaraswamy",
    "LatentScaleT",
    "LogPoisson",
    "MarkovChain",
    "Mixed",
    "NegativeBinomial",
    "PartialNormal",
    "PowerSpherical",
    "VonMisesFisher",
]
