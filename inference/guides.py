"""A Pyro guide of any kind: what runs it, and what makes a known distribution over unconstrained positions of it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map

from inference.contract import Unsupported
from inference.density import Unconstrained
from inference.handlers import Arithmetic, Drawing, Rescale, Substitute, Table, Weights, base, on_device, quiet, under
from inference.program import Program
from inference.sites import evaluate

__all__ = ["Guide", "GuideReference", "batched", "is_drawn", "is_plain", "log_prob", "mapped"]

_log = logging.getLogger("inference")

PARTICLES = "_particles"  # the plate of draws that are made at once


class _Owner(nn.Module):
    """Calls a method of a module with weights that can be replaced (``functional_call`` knows ``forward`` only)."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._call = [call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call[0](*args, **kwargs)


class Guide:
    """A Pyro guide of any kind: module, method of a module or function with ``pyro.param``.

    Args:
        call: The guide, callable with the arguments of the program.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        module = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
        self.owner = _Owner(module, call) if isinstance(module, nn.Module) else None
        self.table = Table()

    def trace(
        self,
        program: Program,
        values: Mapping[str, Tensor] | None = None,
        data: list[Tensor] | None = None,
        scale: float = 1.0,
        is_frozen: bool = False,
        dtype: torch.dtype | None = None,
        particles: tuple[int, int] | None = None,
        evaluated: bool = True,
    ) -> poutine.Trace:
        """Runs the guide.

        Args:
            program: The program, whose arguments it is given.
            values: Site to value, for sites that are not to be drawn.
            data: Tensors in place of those among the arguments.
            scale: Of the sites of the plates that hold the rows.
            is_frozen: Whether its weights are taken without gradients.
            dtype: Floating type that frozen weights are cast to; None leaves them.
            particles: How many draws are made at once, in a dimension left of this many others; None makes one.
            evaluated: Whether log-probabilities are computed.
        """
        args, kwargs = program.arguments(data)
        table, call = self.table, self.call
        if is_frozen:
            table = table.frozen(dtype)
            if self.owner is not None:
                owner, constants = self.owner, {n: w.detach() for n, w in self.owner.named_parameters()}
                if dtype is not None:
                    constants |= dict(owner.named_buffers())
                    constants = {n: w.to(dtype) if w.is_floating_point() else w for n, w in constants.items()}

                def call(*a: Any, **k: Any) -> Any:
                    return functional_call(owner, constants, a, k)

        handled = under(Weights(table), under(Substitute(values or {}), call))
        if scale != 1.0:
            handled = under(Rescale(program.row_plates, scale), handled)
        beside = (
            contextlib.nullcontext() if particles is None else pyro.plate(PARTICLES, particles[0], dim=-1 - particles[1])
        )
        with quiet(), on_device(program.device):
            tracer = poutine.trace(handled)
            with beside:
                trace = tracer.get_trace(*args, **kwargs)
            if evaluated:
                evaluate(trace, f"the guide of {program.name}")
        return trace

    def weights(self) -> dict[str, Tensor]:
        """Name to trainable leaf."""
        owned = {} if self.owner is None else {n.removeprefix("module."): w for n, w in self.owner.named_parameters()}
        return owned | self.table

    def seen(self, program: Program) -> dict[str, Tensor]:
        """Copies of the weights as a program sees them, under names that those of the program do not have."""
        is_own = self.owner is not None and self.owner.module is program.owner
        prefix = "" if is_own else "guide."
        return {prefix + name: self.table.seen(name, w).detach().clone() for name, w in self.weights().items()}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Weights and buffers as torch holds them, detached."""
        buffers = {} if self.owner is None else {n.removeprefix("module."): b for n, b in self.owner.named_buffers()}
        return {name: leaf.detach() for name, leaf in (self.weights() | buffers).items()}

    def has_path(self, trace: poutine.Trace, program: Program) -> bool:
        """Whether log q, at fixed values of what is drawn, has all its weights in the distributions of the draws.

        An automatic guide that draws standard noise has them in the Jacobian of its Delta sites instead; frozen weights
        would leave that out of the gradient. Nor may a second run of the guide differ from the first, as that of dropout
        does, or write to its module, as batch normalisation does.
        """
        values = {name: node["value"].detach() for name, node in trace.nodes.items() if is_drawn(node)}
        held = [] if self.owner is None else list(self.owner.buffers())
        before = [buffer.clone() for buffer in held]
        first, second = (self.trace(program, values, program.glimpse) for _ in range(2))
        is_written = not all(torch.equal(*pair) for pair in zip(held, before, strict=True))
        with torch.no_grad():
            for buffer, value in zip(held, before, strict=True):
                buffer.copy_(value)
        log_q = log_prob(first)
        is_repeated = torch.isclose(log_q, log_prob(second), rtol=100 * torch.finfo(log_q.dtype).eps, atol=0.0)
        fixed = [node for node in first.nodes.values() if _is_sampled(node) and not is_drawn(node)]
        return not is_written and bool(is_repeated) and not any(node["log_prob_sum"].requires_grad for node in fixed)

    def check(self, trace: poutine.Trace, program: Program) -> None:
        """Compares the sites of a run of the guide with those of the program.

        Raises:
            Unsupported: If the guide has a site too many, or lacks one that cannot be summed out.
        """
        guided = {
            name
            for name, node in trace.nodes.items()
            if _is_sampled(node) and not node["infer"].get("is_auxiliary") and not node["is_observed"]
        }
        extra = guided - set(program.latents)
        if extra:
            raise Unsupported(f"The guide samples '{min(extra)}', but {program.name} has no such latent site.")
        missing = [name for name in program.latents if name not in guided and name not in program.finite]
        if missing:
            raise Unsupported(f"The guide does not sample '{missing[0]}', a latent site of {program.name}.")


def _is_sampled(node: Mapping[str, Any]) -> bool:
    return node["type"] == "sample" and not poutine.util.site_is_subsample(node)


def is_drawn(node: Mapping[str, Any]) -> bool:
    """Whether a site is drawn from a distribution with a density, not set by a Delta or observed."""
    return _is_sampled(node) and not node["is_observed"] and type(base(node["fn"])).__name__ != "Delta"


def is_plain(node: Mapping[str, Any]) -> bool:
    """Whether the log-probability of a site is the density that it is drawn from: not masked, not scaled."""
    fn, is_masked = node["fn"], node["mask"] is not None
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        is_masked = is_masked or type(fn).__name__ == "MaskedDistribution"
        fn = fn.base_dist
    return not is_masked and bool(torch.as_tensor(node["scale"] == 1).all())


def log_prob(trace: poutine.Trace) -> Tensor:
    """log q of everything that a run of a guide drew, a scalar; 0 if nothing is hidden."""
    terms = [node["log_prob_sum"] for node in trace.nodes.values() if _is_sampled(node)]
    return torch.stack([torch.as_tensor(term) for term in terms]).sum() if terms else torch.zeros(())


def batched(function: Callable[[], Any], count: int) -> Any:
    """Results of ``count`` independent calls of a function that draws, stacked: at once if that can be, else in turn."""
    if count == 1:
        return tree_map(lambda part: part[None], function())
    with Drawing():
        return mapped(lambda _: function(), torch.empty(count))


def mapped(function: Callable[[Any], Any], rows: Any) -> Any:
    """Results of a function at every row of a tree of tensors, stacked: at once if that can be, else in turn."""
    count = len(tree_flatten(rows)[0][0])
    if count > 1:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # still faster than one by one
                return vmap(function, randomness="different")(rows)
        except Exception as error:  # whatever a program does that vmap refuses, such as a loop until acceptance
            _log.info("Not for many draws at once (%s); one after the other.", error)
    results = [function(tree_map(lambda leaf: leaf[i], rows)) for i in range(count)]  # noqa: B023
    return tree_map(lambda *parts: torch.stack(parts), *results)


class GuideReference:
    """A guide as a distribution over the unconstrained positions of a program's continuous sites.

        log q(position) = log q(values) + log |d values / d position|

    Args:
        guide: The guide; its weights are taken as they are.
        program: The program that is to be sampled, whose arguments it is given.

    Raises:
        Unsupported: If the guide and the program disagree on sites, or the guide has no density over positions.
    """

    def __init__(self, guide: Guide, program: Program) -> None:
        self.guide, self.program = guide, program
        self.coordinates = Unconstrained(program, program.continuous)
        with torch.no_grad():
            trace = self._trace()
        guide.check(trace, program)
        is_automatic = isinstance(guide.call, AutoGuide)
        for name, node in trace.nodes.items():
            if not _is_sampled(node) or node["is_observed"]:
                continue
            if not is_plain(node):
                raise Unsupported(f"The guide scales or masks '{name}', so that its density is not known. Leave that out.")
            if name in program.finite:
                raise Unsupported(
                    f"The guide samples '{name}', which MetropolisHastings sums out. Leave it out of the guide: "
                    "poutine.block(guide, hide=[...]) does."
                )
            if name not in program.latents and not is_automatic:
                raise Unsupported(
                    f"The guide draws an auxiliary '{name}', so that its density at a given point is not known. "
                    "Use one of Pyro's automatic guides, or a guide that draws the sites themselves."
                )
            if name in program.latents:
                if node["value"].shape != program.latents[name].shape:
                    raise Unsupported(
                        f"The guide gives '{name}' the shape {tuple(node['value'].shape)}, but in {program.name} it is "
                        f"{tuple(program.latents[name].shape)}."
                    )
                if not is_automatic and not is_drawn(node):
                    raise Unsupported(f"The guide puts all its mass for '{name}' on one point. Use a guide with a density.")
        self.auxiliary = [name for name, node in trace.nodes.items() if is_drawn(node) and name not in program.latents]
        # what an automatic guide computes from them it computes again: our own bijection may differ in the last digit
        self.computed = [name for name in program.latents if name in trace.nodes and not is_drawn(trace.nodes[name])]
        if is_automatic and not self.auxiliary:
            kind = type(guide.call).__name__
            raise Unsupported(f"{kind} puts all its mass on one point. Use a guide with a density, such as AutoNormal.")

    def _trace(self, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        with Arithmetic():
            return self.guide.trace(self.program, values, is_frozen=True, dtype=self.program.dtype)

    @torch.no_grad()
    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws (count, D), and log q of each, (count,)."""

        def drawn() -> tuple[dict[str, Tensor], Tensor]:
            trace = self._trace()
            return {name: trace.nodes[name]["value"] for name in self.coordinates.sites}, log_prob(trace)

        values, log_q = batched(drawn, count)
        position = self.coordinates.position({name: value.to(self.program.dtype) for name, value in values.items()})
        return position, log_q.to(position) + vmap(self.coordinates.log_jacobian)(position)

    @torch.no_grad()
    def log_prob(self, position: Tensor) -> Tensor:
        """log q of positions (chain, D), (chain,).

        Raises:
            Unsupported: If an automatic guide keeps its density at a given point to itself.
        """
        staged = self.program.density.stage(
            ("guide", id(self.guide)), lambda values: log_prob(self._trace(values)), (True,), evaluations=0
        )
        values = self.coordinates.values(position)
        drawn = {name: value for name, value in values.items() if name not in self.computed}
        return staged(drawn | self._auxiliaries(position)) + vmap(self.coordinates.log_jacobian)(position)

    def _auxiliaries(self, position: Tensor) -> dict[str, Tensor]:
        """Values of what an automatic guide draws in place of the sites, (chain, ...)."""
        if not self.auxiliary:
            return {}
        parts = dict(zip(self.coordinates.sites, position.split(self.coordinates.sizes, -1), strict=True))
        call = self.guide.call
        if isinstance(call, AutoContinuous):
            order = [name for name, _ in call.prototype_trace.iter_stochastic_nodes()]
            return {self.auxiliary[0]: torch.cat([parts[name] for name in order], -1)}
        if {*self.auxiliary} == {f"{name}_unconstrained" for name in parts}:
            shapes = self.coordinates.shapes
            return {f"{n}_unconstrained": part.reshape(-1, *shapes[n]) for n, part in parts.items()}
        raise Unsupported(
            f"{type(call).__name__} does not tell its density at a given point. Leave start= out, or use AutoNormal or "
            "AutoMultivariateNormal."
        )
