"""Networks that models have for defaults. Any ``nn.Module`` of the same signature takes their place."""

from pyro_genmodels.nets.conv import ConvDecoder, ConvEncoder
from pyro_genmodels.nets.mlp import MLP
from pyro_genmodels.nets.points import PointNetwork
from pyro_genmodels.nets.unet import UNet

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "PointNetwork", "UNet"]
