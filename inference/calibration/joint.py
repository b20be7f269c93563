"""Latents and data, drawn jointly: how a program draws both, and the scalars of them that are looked at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from inference.arrays import label, spaced
from inference.contract import Backend, Movable, Programmed, Unsupported
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program
from inference.simulation import simulate

__all__ = ["Bench", "Model", "Quantities", "Quantity", "at_least", "check_level"]

Quantity = Callable[[dict[str, Tensor]], Tensor]
Model = Callable[..., Any] | Programmed

_ELEMENTS = 100  # looked at per site


class Bench:
    """A back-end, a program and the contexts of a run, in which SBC and Geweke's test work."""

    def __init__(self, backend: Backend[Any, Any], model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not isinstance(backend, Backend):
            raise TypeError(f"A back-end is an object such as Gibbs() or HMC(), but this is {backend!r}.")
        self.sampler: Any = backend
        self.name = type(backend).__name__
        if backend.kind != "samples" or not isinstance(backend, Movable):
            raise Unsupported(
                f"{self.name} is no sampler, and its draws are not meant to be calibrated. Use psis(posterior)."
            )
        self.seed = int.from_bytes(os.urandom(4), "little") if backend.seed is None else int(backend.seed)
        self.stack, self.started = ExitStack(), time.perf_counter()
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
        self.stack.enter_context(isolated(self.seed, device))
        try:
            self.program = Program(
                model,
                args,
                kwargs,
                dtype=backend.dtype,
                device=backend.device,
                evaluations=backend.schedule.evaluations,
                is_fixed=backend.changing is None,
            )
            if self.program.is_changing:
                raise Unsupported(
                    f"The structure of {self.program.name} changes from run to run, but a calibration compares the same "
                    "sites in every run. Sample them always, and choose with torch.where."
                )
            _check_generative(self.program)
            self.stack.enter_context(reproducible(self.program.dtype, self.program.device))
            self.stack.enter_context(quiet())
            torch.manual_seed(self.seed)
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def joint(self, count: int) -> dict[str, Tensor]:
        """Draws of all latent and observed sites, (count, *site)."""
        return simulate(self.program, {}, count)

    def data(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observed sites among values."""
        return {name: values[name] for name in self.program.observed_sites}

    def bar(self, total: int, what: str) -> tqdm[Any]:
        """A progress bar, if the sampler shows one."""
        return tqdm(total=total, desc=f"{self.name} {what}", disable=not self.sampler.progress, leave=False)


class Quantities:
    """Scalars of (latents, data) by which draws are compared.

    Elements of the latents, log p(latents, data) and log p(data | latents), which see what no latent shows alone, and the
    user's own.
    """

    def __init__(self, program: Program, sites: Collection[str] | None, own: Mapping[str, Quantity] | None) -> None:
        self.program, self.own = program, dict(own or {})
        unknown = [name for name in sites or () if name not in program.latents]
        if unknown:
            raise ValueError(f"sites= names '{unknown[0]}', but the latent sites are {', '.join(program.latents)}.")
        taken = [name for name in self.own if name in (*program.latents, "log_joint", "log_likelihood")]
        if taken:
            raise ValueError(f"quantities= gives '{taken[0]}' a meaning that it has already. Choose another name.")
        chosen = [n for n, site in program.latents.items() if not site.is_constant and (sites is None or n in sites)]
        self.elements = {name: spaced(program.latents[name].shape.numel(), _ELEMENTS) for name in chosen}
        self.labels = [label(name, i, program.latents[name].shape) for name, index in self.elements.items() for i in index]
        self.labels += ["log_joint", "log_likelihood"]
        self._is_complete = False

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of all latent and observed sites, (row, *site) -> (row, quantity)."""
        joint, likelihood = self.program.density.stage("log densities", self._log_densities, (True,))(dict(values))
        parts = [values[name].reshape(len(joint), -1)[:, index] for name, index in self.elements.items() if len(index)]
        parts += [joint.unsqueeze(1), likelihood.unsqueeze(1)]
        for name, function in self.own.items():
            value = torch.as_tensor(function(dict(values)))
            if value.dim() not in (1, 2) or len(value) != len(joint):
                raise ValueError(
                    f"Quantity '{name}' returned the shape {tuple(value.shape)}, but must return one number, or a vector, "
                    f"for each of the {len(joint)} rows that it was given."
                )
            parts.append(value.reshape(len(joint), -1))
            if not self._is_complete:
                count = parts[-1].shape[1]
                self.labels += [name] if value.dim() == 1 else [f"{name}[{i}]" for i in range(count)]
        self._is_complete = True
        return torch.cat([part.to(torch.float64) for part in parts], 1).cpu()

    def _log_densities(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        trace = self.program.trace(values)
        terms = {
            name: trace.nodes[name]["log_prob_sum"].to(self.program.dtype)
            for name in (*self.program.latents, *self.program.observed_sites)
        }
        return torch.stack([*terms.values()]).sum(), torch.stack([terms[n] for n in self.program.observed_sites]).sum()


def at_least(name: str, value: Any, least: int) -> None:
    """Refuses a setting that is no integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}.")


def check_level(level: float) -> None:
    """Refuses a level that is no probability strictly between 0 and 1."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level!r}: must lie between 0 and 1.")


def _check_generative(program: Program) -> None:
    """Raises unless the program's density is that of what it draws."""
    if not program.observed_sites:
        raise Unsupported(f"{program.name} has no observed site: there are no data to draw anew.")
    for name, site in (program.latents | program.observed_sites).items():
        if site.flaw:
            raise Unsupported(
                f"'{name}' has a law that is {site.flaw}, from which nothing can be drawn. Calibrate with a proper one in "
                "its place."
            )
    if program.factors:
        raise Unsupported(
            f"{program.name} has pyro.factor('{program.factors[0]}'), which changes its density, but not what it "
            "draws. Write it as an observed site with a distribution."
        )
    with isolated(0, program.device), reproducible(program.dtype, program.device):
        trace = program.trace({})
    for name in (*program.latents, *program.observed_sites):
        node = trace.nodes[name]
        if torch.as_tensor(node["scale"] != 1.0).any():
            raise Unsupported(f"The density of '{name}' is scaled (poutine.scale), which changes it, but not what is drawn.")
        mask = node["mask"]
        if name in program.latents and mask is not None and not torch.as_tensor(mask).all():
            raise Unsupported(f"The prior of '{name}' is masked in part, which makes it flat there: nothing can be drawn.")
