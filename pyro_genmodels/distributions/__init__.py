"""Distributions that Pyro lacks."""

from pyro_genmodels.distributions.gaps import Columns, Entries, Filled, PartialNormal
from pyro_genmodels.distributions.matrices import InverseWishart
from pyro_genmodels.distributions.mixtures import Classwise, LatentScaleT, Mixed
from pyro_genmodels.distributions.sequences import MarkovChain

__all__ = [
    "Classwise",
    "Columns",
    "Entries",
    "Filled",
    "InverseWishart",
    "LatentScaleT",
    "MarkovChain",
    "Mixed",
    "PartialNormal",
]
