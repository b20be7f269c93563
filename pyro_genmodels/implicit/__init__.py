"""Distributions that are known through their draws, and the models that are made of them.

``ImplicitDistribution`` is the noun: x = f(ε). A ``Generator`` is one with weights, ``GAN`` and ``InfoGAN`` are programs
around it, and ``inference.Adversarial`` trains them with a critic. ``RatioLikelihood`` is the critic's own use: the
likelihood of a simulator.
"""

from pyro_genmodels.implicit.critics import ConvCritic, Critic, PackedCritic
from pyro_genmodels.implicit.distribution import ImplicitDistribution, NoiseReparam
from pyro_genmodels.implicit.gan import GAN
from pyro_genmodels.implicit.generator import Generator
from pyro_genmodels.implicit.infogan import InfoGAN
from pyro_genmodels.implicit.ratio import RatioDistribution, RatioLikelihood

__all__ = [
    "GAN",
    "ConvCritic",
    "Critic",
    "Generator",
    "ImplicitDistribution",
    "InfoGAN",
    "NoiseReparam",
    "PackedCritic",
    "RatioDistribution",
    "RatioLikelihood",
]
