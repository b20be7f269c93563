"""Blocks: the ways in which ``Gibbs`` moves a group of sites; one file each."""

from inference.blocks.block import Block, Current, Move
from inference.blocks.conjugate import Conjugate
from inference.blocks.constant import Constant
from inference.blocks.enumerate import Enumerate
from inference.blocks.hamiltonian import Hamiltonian
from inference.blocks.walk import AdaptiveWalk

__all__ = ["AdaptiveWalk", "Block", "Conjugate", "Constant", "Current", "Enumerate", "Hamiltonian", "Move"]
