"""Diffusion: schedules, denoisers, an oracle that is exact, samplers and likelihoods that are held to it."""

from pyro_genmodels.diffusion import langevin, likelihood, samplers
from pyro_genmodels.diffusion.ddpm import DDPM
from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser, Given, Network
from pyro_genmodels.diffusion.energy import EnergyDistribution, EnergyModel
from pyro_genmodels.diffusion.oracle import Oracle
from pyro_genmodels.diffusion.schedule import EDM, VE, VP, Betas, Cosine, Learned, Schedule, Sigmoid, Straight, SubVP
from pyro_genmodels.diffusion.score import FlowDistribution, ScoreModel
from pyro_genmodels.diffusion.scores import score_of, tweedie, tweedie_covariance

__all__ = [
    "DDPM", "EDM", "VE", "VP", "Betas", "Cosine", "Denoised", "Denoiser", "EnergyDistribution", "EnergyModel",
    "FlowDistribution", "Given", "Learned", "Network", "Oracle", "Schedule", "ScoreModel", "Sigmoid", "Straight", "SubVP",
    "langevin", "likelihood", "samplers", "score_of", "tweedie", "tweedie_covariance",
]  # fmt: skip
