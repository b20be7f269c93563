"""Diffusion: schedules, denoisers, an oracle that is exact, samplers and likelihoods that are held to it."""

from pyro_genmodels.diffusion import guidance, langevin, likelihood, posterior, samplers
from pyro_genmodels.diffusion.ddpm import DDPM
from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser, Given, Network
from pyro_genmodels.diffusion.energy import EnergyDistribution, EnergyModel
from pyro_genmodels.diffusion.flow import FlowPrior, ProbabilityFlow
from pyro_genmodels.diffusion.oracle import Oracle
from pyro_genmodels.diffusion.schedule import EDM, VE, VP, Betas, Cosine, Learned, Schedule, Sigmoid, Straight, SubVP
from pyro_genmodels.diffusion.score import ScoreModel
from pyro_genmodels.diffusion.scores import score_of, tweedie, tweedie_covariance
from pyro_genmodels.diffusion.surrogate import ScorePrior

__all__ = [
    "DDPM", "EDM", "VE", "VP", "Betas", "Cosine", "Denoised", "Denoiser", "EnergyDistribution", "EnergyModel",
    "FlowPrior", "Given", "Learned", "Network", "Oracle", "ProbabilityFlow", "Schedule", "ScoreModel",
    "ScorePrior", "Sigmoid", "Straight", "SubVP", "guidance", "langevin", "likelihood", "posterior", "samplers", "score_of",
    "tweedie", "tweedie_covariance",
]  # fmt: skip
