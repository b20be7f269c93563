"""Autoencoders: models whose hidden numbers reach the data through a network."""

from pyro_genmodels.autoencoders import likelihoods, priors
from pyro_genmodels.autoencoders.autoencoder import Autoencoder
from pyro_genmodels.autoencoders.cvae import CVAE
from pyro_genmodels.autoencoders.iwae import IWAE
from pyro_genmodels.autoencoders.semi_supervised import SemiSupervisedVAE
from pyro_genmodels.autoencoders.vade import VaDE
from pyro_genmodels.autoencoders.vae import VAE

__all__ = ["CVAE", "IWAE", "VAE", "Autoencoder", "SemiSupervisedVAE", "VaDE", "likelihoods", "priors"]
