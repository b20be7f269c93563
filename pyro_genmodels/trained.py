"""Autoencoders by name, and a folder that holds a trained one: weights as safetensors, how it is made as json, no pickle."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from inference import checkpoint
from inference.fingerprint import versions
from pyro_genmodels.autoencoders import IWAE, VAE, likelihoods, priors
from pyro_genmodels.autoencoders.latent import LatentModel

__all__ = ["LIKELIHOODS", "MODELS", "PRIORS", "Recipe", "grid", "load", "sample", "save"]

LIKELIHOODS: dict[str, Callable[[], likelihoods.Likelihood]] = {
    "bernoulli": likelihoods.Bernoulli,
    "continuous-bernoulli": likelihoods.ContinuousBernoulli,
    "gaussian": likelihoods.Gaussian,
    "discretised-logistic": likelihoods.DiscretisedLogistic,
    "student-t": likelihoods.StudentT,
}
PRIORS: dict[str, Callable[[int, Sequence[int]], priors.Prior]] = {
    "normal": lambda features, shape: priors.StandardNormal(features),
    "mixture": lambda features, shape: priors.NormalMixture(features),
    "vamp": lambda features, shape: priors.VampPrior(features, 50, shape),
    "sphere": lambda features, shape: priors.Sphere(features),
    "cube": lambda features, shape: priors.Cube(features),
}
MODELS = ("vae", "iwae")
_KIND, _VERSION = "autoencoder", 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an autoencoder is made; json.

    Args:
        model: "vae", or "iwae" for the networks of Burda et al., with a normal prior.
        shape: Of one row.
        features: Numbers in the code.
        layers: Of hidden numbers, of "iwae": 1 or 2, the top one of half as many features.
        prior: Name of the prior, one of ``PRIORS``.
        likelihood: Name of the likelihood, one of ``LIKELIHOODS``.
        beta: Weight of the divergence in the bound.

    Raises:
        ValueError: If a name or a number is none of those.
    """

    model: str
    shape: tuple[int, ...]
    features: int = 20
    layers: int = 1
    prior: str = "normal"
    likelihood: str = "bernoulli"
    beta: float = 1.0

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("model", self.model, MODELS),
            ("prior", self.prior, tuple(PRIORS)),
            ("likelihood", self.likelihood, tuple(LIKELIHOODS)),
        ):
            if name not in known:
                raise ValueError(f"There is no {kind} '{name}'; there are {', '.join(known)}.")
        counts = {"features": self.features, "layers": self.layers, **{f"shape[{i}]": n for i, n in enumerate(self.shape)}}
        for name, count in counts.items():
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} is {count!r}, but must be an integer of at least 1.")
        if type(self.beta) not in (int, float) or not 0.0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta!r}, but must be a finite number that is not negative.")
        if self.model == "iwae" and (self.prior, self.beta) != ("normal", 1.0):
            raise ValueError(
                "iwae has a normal prior, and its divergence the weight 1: leave --prior and --beta out, or train a vae."
            )
        if self.model == "vae" and self.layers != 1:
            raise ValueError("vae has one layer of hidden numbers: leave --layers out, or train an iwae.")

    @property
    def is_binary(self) -> bool:
        """Whether rows are made black and white, at random by their grey levels and anew at every visit."""
        return self.likelihood == "bernoulli"

    def __str__(self) -> str:
        parts = [f"features={self.features}", f"prior={self.prior}", f"likelihood={self.likelihood}"]
        parts += [f"layers={self.layers}"] if self.layers > 1 else []
        parts += [f"beta={self.beta:g}"] if self.beta != 1.0 else []
        return f"{self.model}({', '.join(parts)})"

    @property
    def is_pictured(self) -> bool:
        """Whether a row is a picture, grey or in colours."""
        return len(self.shape) == 2 or (len(self.shape) == 3 and self.shape[0] in (1, 3))

    def build(self) -> LatentModel:
        """The model, its weights drawn by torch's global generator."""
        likelihood = LIKELIHOODS[self.likelihood]()
        if self.model == "iwae":
            sizes = (self.features, max(self.features // 2, 1))[: self.layers]
            return IWAE(self.shape, self.layers, sizes, likelihood=likelihood)
        prior = PRIORS[self.prior](self.features, self.shape)
        return VAE(self.shape, prior=prior, likelihood=likelihood, beta=self.beta)


def save(folder: str | os.PathLike[str], recipe: Recipe, model: LatentModel, facts: Mapping[str, Any]) -> None:
    """Writes a model down, whole or not at all; an earlier one is replaced.

    Args:
        folder: Where it goes.
        recipe: How it was made.
        model: Its weights.
        facts: What else is to be known of it; json.

    Raises:
        FileExistsError: If the folder holds anything else.
        OSError: If it cannot be written.
    """
    meta = {"kind": _KIND, "version": _VERSION, "recipe": asdict(recipe), "facts": dict(facts), "versions": versions()}
    checkpoint.write(folder, model.state_dict(), meta)


def load(folder: str | os.PathLike[str]) -> tuple[Recipe, LatentModel, dict[str, Any]]:
    """What ``save`` wrote: the recipe, the model and the facts.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it.
        ValueError: If it is damaged, holds something else, or was written by another version.
    """
    tensors, meta = checkpoint.read(folder)
    if meta.get("kind") != _KIND:
        raise ValueError(f"'{folder}' holds a posterior, and no autoencoder: genmodels diagnose reads it.")
    known = {field.name for field in fields(Recipe)}
    with checkpoint.understood(folder, "autoencoder"):
        recipe, facts = dict(meta["recipe"]), dict(meta["facts"])
        if meta["version"] == _VERSION and recipe.keys() <= known and recipe.get("model") in MODELS:
            made = Recipe(**{**recipe, "shape": tuple(recipe["shape"])})
            with torch.device("meta"):  # takes no memory, whatever size the json asks for
                _check_weights(made.build().state_dict(), tensors)
            model = made.build()
            model.load_state_dict(dict(tensors))
            return made, model.eval(), facts
        writer = dict(meta["versions"]).get("pyro-genmodels", "unknown")
    raise ValueError(
        f"'{folder}' holds a '{recipe.get('model')}' of version {meta['version']}, but this version of pyro-genmodels "
        f"knows {' and '.join(MODELS)} of version {_VERSION}. Read it with the version that wrote it, {writer}."
    )


@torch.no_grad()
def sample(model: LatentModel, size: int, seed: int = 0, is_drawn: bool = False) -> Tensor:
    """New rows of a model, (size, *shape): the means of the likelihood, or draws from it.

    Args:
        model: What was trained.
        size: How many.
        seed: Of torch's global generator.
        is_drawn: Whether to draw from the likelihood.
    """
    torch.manual_seed(seed)
    nodes = poutine.trace(model.model).get_trace(None, size=size).nodes
    x: Tensor = nodes["x"]["value"] if is_drawn else model.decoder.mean(nodes["z"]["value"])
    return x


def grid(x: Tensor) -> dict[str, Tensor]:
    """Rows as the lines of a square, for ``plots.images``."""
    return {" " * (i + 1): strip for i, strip in enumerate(x.split(math.ceil(math.sqrt(len(x)))))}


def _check_weights(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that do not fit a model that is made as their json says."""
    other = [
        name
        for name in own.keys() | tensors
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if other:
        raise ValueError(
            f"it has other weights than its json says: '{min(other)}' does not fit. Its networks are of another version"
        )
