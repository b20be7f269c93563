"""Blocks: the ways in which ``Gibbs`` moves a group of sites; one file each."""

from inference.blocks.block import Block, Current, Move
from inference.blocks.chain import GaussianChain
from inference.blocks.conjugate import Conjugate
from inference.blocks.constant import Constant
from inference.blocks.cycle import Cycle
from inference.blocks.elliptical import EllipticalSlice
from inference.blocks.enumerate import Enumerate
from inference.blocks.gaussian import Gaussian
from inference.blocks.guided import GuideDraw
from inference.blocks.hamiltonian import Hamiltonian
from inference.blocks.own import Own
from inference.blocks.polya_gamma import PolyaGamma
from inference.blocks.prior import PriorDraw
from inference.blocks.slice import Slice
from inference.blocks.walk import AdaptiveWalk

__all__ = [
    "AdaptiveWalk",
    "Block",
    "Conjugate",
    "Constant",
    "Current",
    "Cycle",
    "EllipticalSlice",
    "Enumerate",
    "Gaussian",
    "GaussianChain",
    "GuideDraw",
    "Hamiltonian",
    "Move",
    "Own",
    "PolyaGamma",
    "PriorDraw",
    "Slice",
]
