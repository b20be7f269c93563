"""How to know what a generative program hides: SVI, EM, Gibbs, Metropolis-Hastings, HMC and NUTS on any
Pyro program.

    posterior = Gibbs(seed=0).fit(program, data)

Start reading at ``inference.contract``.
"""

from inference import calibration, markov, noising, relabel, sampling, score_matching
from inference.adversarial import Adversarial
from inference.adversarial_vi import AdversarialVI
from inference.blocks import (
    AdaptiveWalk,
    Conjugate,
    Cycle,
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
from inference.contrastive import ContrastiveDivergence
from inference.denoising import Denoising
from inference.em import EM
from inference.games import Hinge, LeastSquares, Minimax, NonSaturating, Wasserstein
from inference.gibbs import Gibbs
from inference.hamiltonian import HMC
from inference.log import JSONLines
from inference.metropolis import Independence, Langevin, MetropolisHastings, Prior, RandomWalk, Unadjusted
from inference.noising import BoundLoss, HybridLoss, MinSNR, SimpleLoss
from inference.nuts import NUTS
from inference.posterior import Posterior
from inference.svi import SVI
from inference.training import PowerAverage
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
    "AdversarialVI",
    "Backend",
    "BoundLoss",
    "Conjugate",
    "ContrastiveDivergence",
    "Cycle",
    "Cyclical",
    "Denoising",
    "Draw",
    "EllipticalSlice",
    "Enumerate",
    "Gaussian",
    "GaussianChain",
    "Gibbs",
    "GuideDraw",
    "Hamiltonian",
    "Hinge",
    "HybridLoss",
    "Independence",
    "JSONLines",
    "Langevin",
    "LeastSquares",
    "MetropolisHastings",
    "MinSNR",
    "Minimax",
    "MultiplyIWELBO",
    "NonSaturating",
    "PolyaGamma",
    "Posterior",
    "PowerAverage",
    "Prior",
    "PriorDraw",
    "RandomWalk",
    "Renyi",
    "SimpleLoss",
    "Slice",
    "Unadjusted",
    "Unsupported",
    "Until",
    "Warmup",
    "Wasserstein",
    "calibration",
    "markov",
    "noising",
    "relabel",
    "sampling",
    "score_matching",
]

__project__ = "pyro-genmodels"  # by which pyro_genmodels knows it from others of this name
