"""Networks that models have for defaults. Any ``nn.Module`` of the same signature takes their place."""

from pyro_genmodels.nets.conv import ConvDecoder, ConvEncoder
from pyro_genmodels.nets.mlp import MLP

__all__ = ["MLP", "ConvDecoder", "ConvEncoder"]
