"""How to know what a generative program hides: SVI, EM, Gibbs, Metropolis-Hastings and HMC on any Pyro program.

    posterior = Gibbs(seed=0).fit(program, data)

Start reading at ``inference.contract``.
"""

from inference.blocks import AdaptiveWalk, Conjugate, Enumerate, Hamiltonian
from inference.contract import Backend, Draw, Unsupported
from inference.gibbs import Gibbs
from inference.hamiltonian import HMC
from inference.metropolis import MetropolisHastings, RandomWalk
from inference.posterior import Posterior

__all__ = [
    "HMC",
    "AdaptiveWalk",
    "Backend",
    "Conjugate",
    "Draw",
    "Enumerate",
    "Gibbs",
    "Hamiltonian",
    "MetropolisHastings",
    "Posterior",
    "RandomWalk",
    "Unsupported",
]
