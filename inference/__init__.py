"""How to know what a generative program hides: SVI, EM, Gibbs, Metropolis-Hastings, HMC and NUTS on any
Pyro program.

    posterior = Gibbs(seed=0).fit(program, data)

Start reading at ``inference.contract``.
"""

from inference import calibration, markov, relabel, sampling
from inference.adversarial import Adversarial
from inference.blocks import (
    AdaptiveWalk,
    Conjugate,
    EllipticalSlice,
    Enumerate,
    Gaussian,
    GaussianChain,
    GuideDraw,
    Hamiltonian,
    PolyaGamma,
    PriorDraw,
    Slice,
)
from inference.bounds import ELBO, IWELBO, Cyclical, MultiplyIWELBO, Renyi, Warmup
from inference.contract import Backend, Draw, Unsupported
from inference.em import EM
from inference.games import Hinge, LeastSquares, Minimax, NonSaturating, Wasserstein
from inference.gibbs import Gibbs
from inference.hamiltonian import HMC
from inference.log import JSONLines
from inference.metropolis import Independence, Langevin, MetropolisHastings, Prior, RandomWalk
from inference.nuts import NUTS
from inference.posterior import Posterior
from inference.svi import SVI
from inference.until import Until

__all__ = [
    "ELBO",
    "EM",
    "HMC",
    "IWELBO",
    "NUTS",
    "SVI",
    "AdaptiveWalk",
    "Adversarial",
    "Backend",
    "Conjugate",
    "Cyclical",
    "Draw",
    "EllipticalSlice",
    "Enumerate",
    "Gaussian",
    "GaussianChain",
    "Gibbs",
    "GuideDraw",
    "Hamiltonian",
    "Hinge",
    "Independence",
    "JSONLines",
    "Langevin",
    "LeastSquares",
    "MetropolisHastings",
    "Minimax",
    "MultiplyIWELBO",
    "NonSaturating",
    "PolyaGamma",
    "Posterior",
    "Prior",
    "PriorDraw",
    "RandomWalk",
    "Renyi",
    "Slice",
    "Unsupported",
    "Until",
    "Warmup",
    "Wasserstein",
    "calibration",
    "markov",
    "relabel",
    "sampling",
]

__project__ = "pyro-genmodels"  # by which pyro_genmodels knows it from others of this name
