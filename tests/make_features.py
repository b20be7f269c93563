"""Makes the networks of ``pyro_genmodels.metrics.images``: classifiers, whose last layer but one are the features.

    python tests/make_features.py            all of them; all but digits are read from PYRO_GENMODELS_DATA
    python tests/make_features.py digits     one of them, seconds

A classifier is a program that hides nothing: y ~ Categorical(network(x)). SVI trains it, on pictures that are moved by up to
a tenth of their width and have a little noise added, so that it learns strokes and not pixels. Then its features are scaled
to a variance of 1 in the mean, which its last layer makes up for.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import pyro_genmodels
from inference import SVI
from pyro_genmodels import datasets
from pyro_genmodels.metrics.images import FeatureNetwork

FOLDER = Path(pyro_genmodels.__file__).parent / "metrics" / "files"
SETTINGS = {  # name: channels, features, steps, type in the file
    "digits": ((16, 32), 32, 3000, torch.float32),
    "mnist": ((8, 16, 32), 32, 2500, torch.float32),
    "fashion_mnist": ((16, 32, 32), 32, 4000, torch.float16),
    "cifar10": ((16, 32, 32), 32, 8000, torch.float16),
}


class Classifier(nn.Module):
    """y_n ~ Categorical(network(x_n))."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network

    def model(self, x: Tensor, y: Tensor) -> None:
        logits = self.network.classify(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        pass


def moved(x: Tensor) -> Tensor:
    """Pictures (rows, …, height, width), each moved by up to a tenth of its width, with noise of one scale a picture."""
    planes = x.reshape(len(x), -1, *x.shape[-2:])
    shift = 0.2 * (2.0 * torch.rand(len(x), 2, 1) - 1.0)  # affine_grid goes from −1 to 1
    there = torch.cat([torch.eye(2).expand(len(x), 2, 2), shift], -1)
    grid = functional.affine_grid(there, [*planes.shape], align_corners=False)
    result = functional.grid_sample(planes, grid, align_corners=False)
    return (result + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(result)).clamp(0.0, 1.0).reshape(x.shape)


def labelled(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and their classes, to train on and to judge by."""
    found = datasets.pictures(name)
    assert found.test is not None
    if name == "digits":
        y = datasets.load("digits")["y"]
        return found.train, y[: len(found.train)], found.test, y[len(found.train) :]
    files, folder = [name], Path(os.environ["PYRO_GENMODELS_DATA"])
    if name == "cifar10":
        files = [f"{name}_train_{i}" for i in range(5)] + [f"{name}_test"]
    labels = []
    for file in files:
        with np.load(folder / f"{file}.npz") as arrays:
            labels += [arrays[key].astype(np.int64) for key in ("y", "y_train", "y_test") if key in arrays]
    y, new = torch.from_numpy(np.concatenate(labels)).split([len(found.train), len(found.test)])
    return found.train, y, found.test, new


def accuracy(network: FeatureNetwork, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(torch.cat([network.classify(part).argmax(-1) for part in x.split(1000)]).eq(y).double().mean())


def main(name: str) -> None:
    channels, features, steps, kind = SETTINGS[name]
    x, y, new, truth = labelled(name)
    torch.manual_seed(0)
    network = FeatureNetwork(x.shape[1:], channels=channels, features=features, name=name)
    fit = SVI(
        steps=steps, batch_size=100, learning_rate=2e-3, transform=moved, average=0.99, draws=1, seed=0, progress=False
    )
    fit.fit(Classifier(network), x, y)
    with torch.no_grad():
        scale = torch.cat([network(part) for part in x.split(1000)]).var(0).mean().sqrt()
        first, last = (network.network.head.layers[i] for i in (0, -1))
        for weight in (first.weight, first.bias):
            weight /= scale
        last.weight *= scale
        for weight in network.parameters():
            weight.copy_(weight.to(kind))
    about = (
        f"{len(x)} training pictures of {name} ({'x'.join(map(str, x.shape[1:]))}), {steps} steps of SVI with batches of "
        f"100, moved and noisy, seed 0; accuracy {accuracy(network, x, y):.3f} on them, "
        f"{accuracy(network, new, truth):.3f} on {len(new)} others; torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}"
    )
    told = {"about": about, "shape": " ".join(map(str, x.shape[1:])), "channels": " ".join(map(str, channels))}
    weights = {key: weight.detach().to(kind).contiguous() for key, weight in network.state_dict().items()}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_file(weights, path, told)
    path.chmod(0o644)
    print(f"{path.name}, {path.stat().st_size / 1000:.0f} kB: {about}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or SETTINGS:
        main(name)
