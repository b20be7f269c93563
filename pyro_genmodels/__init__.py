"""A zoo of generative models, each a Pyro program that every back-end of ``inference`` can run."""

from pyro_genmodels import companion  # noqa: F401 (first: it looks at what else is called inference)
from pyro_genmodels.autoencoders import CVAE, IWAE, VAE, Autoencoder, SemiSupervisedVAE, VaDE
from pyro_genmodels.base import GenerativeModel, StochasticModule
from pyro_genmodels.classical import (
    GMM,
    HMM,
    LDA,
    PPCA,
    FactorAnalysis,
    LinearRegression,
    LogisticRegression,
    MarginClassifier,
    Mixture,
    NaiveBayes,
    SoftmaxRegression,
)
from pyro_genmodels.diffusion import DDPM, EnergyModel, ScoreModel, tweedie
from pyro_genmodels.implicit import GAN, InfoGAN

__all__ = [
    "CVAE",
    "DDPM",
    "GAN",
    "GMM",
    "HMM",
    "IWAE",
    "LDA",
    "PPCA",
    "VAE",
    "Autoencoder",
    "EnergyModel",
    "FactorAnalysis",
    "GenerativeModel",
    "InfoGAN",
    "LinearRegression",
    "LogisticRegression",
    "MarginClassifier",
    "Mixture",
    "NaiveBayes",
    "ScoreModel",
    "SemiSupervisedVAE",
    "SoftmaxRegression",
    "StochasticModule",
    "VaDE",
    "tweedie",
]

__version__ = "0.1.0"
