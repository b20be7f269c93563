"""What is known of the statements of a program, read off the nodes of Pyro's traces."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform, Unit
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

import inference.transforms  # noqa: F401  (registers bijections)
from inference.contract import Linked, Unnormalised, Unsupported
from inference.handlers import base
from inference.transforms import bijection

__all__ = [
    "Plate", "Shape", "Site", "batch_shape_of", "evaluate", "firm", "frames_of", "is_constant", "is_statement", "kin",
    "kind_of", "largest", "latent_values", "loops", "moving", "resized", "shape_of", "site_of",
]  # fmt: skip


@dataclass(frozen=True)
class Plate:
    """A ``pyro.plate`` around a site: its name, its dimension (negative, counted in the batch shape) and its size."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Site:
    """What is known of one ``pyro.sample`` statement.

    Attributes:
        name: Its name.
        family: Class of its distribution without wrappers, such as "Normal".
        support: Constraint of its values.
        shape: Shape of one value, batch dimensions first.
        event_dim: How many of the last dimensions belong to one event.
        plates: The plates around it.
        dtype: Type of its values.
        choices: For a finite discrete site all values of one event, (K, *event); else None.
        is_flat: Whether its prior is improper.
        is_linked: Whether it is a sequence of states, each of which depends on the one before: its elements are those of a
            batch, but not independent.
        is_unnormalised: Whether nobody knows the constant of its log-density; see ``inference.contract.Unnormalised``.
    """

    name: str
    family: str
    support: Any
    shape: torch.Size
    event_dim: int
    plates: tuple[Plate, ...]
    dtype: torch.dtype
    choices: Tensor | None
    is_flat: bool
    is_linked: bool = False
    is_unnormalised: bool = False

    @property
    def flaw(self) -> str:
        """Why no exact draws of its prior can be had, to follow "a prior that is"; empty if they can."""
        return "improper" if self.is_flat else "known without its constant" if self.is_unnormalised else ""

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the independent events."""
        return self.shape[: len(self.shape) - self.event_dim]

    @cached_property
    def is_indexed(self) -> bool:
        """Whether the choices of a finite site are 0, 1, …, K − 1, so that a value is its own index."""
        if self.choices is None or self.event_dim:
            return False
        return torch.equal(self.choices.long(), torch.arange(len(self.choices), device=self.choices.device))

    @property
    def is_continuous(self) -> bool:
        """Whether its values are real numbers; infinitely many integers are neither this nor finite."""
        return self.choices is None and not self.support.is_discrete

    @cached_property
    def is_constant(self) -> bool:
        """Whether the support is a single point, such as the simplex of one element."""
        return self.is_continuous and not self.transform.inverse_shape(self.shape).numel()

    @cached_property
    def transform(self) -> Any:
        """Bijection from unconstrained values to the support."""
        try:
            return bijection(self.support)
        except NotImplementedError:
            raise Unsupported(
                f"Site '{self.name}' is {self.family}, whose support {self.support} has no unconstrained coordinates. "
                "Sample what it is made of and compute it, or rewrite the site with one of pyro.infer.reparam."
            ) from None


def shape_of(node: Mapping[str, Any]) -> torch.Size:
    """Shape of a statement's value: that of its distribution and of its data, broadcast.

    Raises:
        ValueError: If they do not fit.
    """
    distribution, value = node["fn"], node["value"]
    own = distribution.batch_shape + distribution.event_shape
    try:
        return torch.Size(torch.broadcast_shapes(value.shape, own))
    except RuntimeError:
        raise ValueError(
            f"Site '{node['name']}' is {type(base(distribution)).__name__} of shape {tuple(own)}, which does not fit its "
            f"{'data' if node['is_observed'] else 'value'} of shape {tuple(value.shape)}."
        ) from None


def site_of(name: str, node: Mapping[str, Any]) -> Site:
    """What a statement's node tells of a site.

    Raises:
        Unsupported: If it is a sequence of states in a plate, masked or with a batch of parameters.
    """
    distribution: Any = node["fn"]
    value = node["value"]
    choices = None
    if not node["is_observed"] and distribution.has_enumerate_support:
        try:
            choices = distribution.enumerate_support(expand=False)
            choices = choices.reshape(choices.shape[:1] + distribution.event_shape)
        except NotImplementedError:
            choices = None
    plates = [Plate(frame.name, frame.dim, frame.size) for frame in node["cond_indep_stack"] if frame.vectorized]
    inner = base(distribution)
    if not node["is_observed"] and isinstance(base(distribution), Linked):
        if not isinstance(distribution, Linked) or node["fn"].batch_shape:
            raise Unsupported(
                f"Site '{name}' is {type(base(distribution)).__name__} in a plate, masked or with a batch of parameters, "
                "but one site is one sequence of states. Sample each in a Python loop, and mask what depends on it."
            )
        family, states = type(distribution).__name__, torch.arange(len(distribution.links()[0]), device=value.device)
        return Site(name, family, node["fn"].support, shape_of(node), 0, (), value.dtype, states, False, True)
    return Site(
        name=name,
        family=type(inner).__name__,
        support=distribution.support,
        shape=shape_of(node),
        event_dim=distribution.event_dim,
        plates=tuple(sorted(plates, key=lambda plate: plate.dim)),
        dtype=value.dtype,
        choices=choices,
        is_flat=isinstance(inner, ImproperUniform),
        is_unnormalised=isinstance(inner, Unnormalised),
    )


def latent_values(trace: poutine.Trace, latents: Iterable[str]) -> dict[str, Tensor]:
    """The values of those of these sites that a run has."""
    return {name: trace.nodes[name]["value"] for name in latents if name in trace.nodes}


def largest(traces: list[poutine.Trace]) -> dict[str, Mapping[str, Any]]:
    """Statement to its node in the first of those runs in which its value is largest."""
    nodes: dict[str, Mapping[str, Any]] = {}
    for trace in traces:
        for name, node in trace.nodes.items():
            if is_statement(node) and (name not in nodes or _extent(node) > _extent(nodes[name])):
                nodes[name] = node
    return nodes


def resized(traces: list[poutine.Trace]) -> set[str]:
    """Names of the plates that have not the same size in all runs."""
    frames = [frame for trace in traces for node in trace.nodes.values() for frame in node.get("cond_indep_stack", ())]
    sizes = {(frame.name, frame.size) for frame in frames}
    return {name for name, size in sizes if any(name == other and size != its for other, its in sizes)}


def _extent(node: Mapping[str, Any]) -> tuple[int, int]:
    return node["value"].dim(), node["value"].numel()


def batch_shape_of(node: Mapping[str, Any]) -> torch.Size:
    """The batch shape of a statement; data without a plate may be wider than their distribution."""
    own, value = node["fn"].batch_shape, node["value"]
    if not node["is_observed"] and isinstance(node["fn"], Linked):
        return torch.Size(value.shape)
    if not node["is_observed"] or not isinstance(value, Tensor):
        return own
    return torch.broadcast_shapes(own, value.shape[: value.dim() - node["fn"].event_dim])


def frames_of(node: Mapping[str, Any]) -> dict[str, int]:
    """The plates around a statement to their dimensions."""
    return {frame.name: frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}


def _bounds(support: Any) -> list[tuple[str, Tensor]]:
    """The numbers that a constraint is made of, and what they are called."""
    found = []
    for name, value in sorted(vars(support).items()):
        if isinstance(value, (int, float, Tensor)):
            found.append((name, torch.as_tensor(value)))
        elif isinstance(value, Constraint):
            found += _bounds(value)
    return found


def moving(supports: Sequence[Any]) -> frozenset[str]:
    """Which numbers of a constraint change from run to run, such as the upper bound of Uniform(0, θ)."""
    if len({type(support) for support in supports}) > 1:
        return frozenset({"type"})
    first, *others = [_bounds(support) for support in supports]
    pairs = (pair for other in others for pair in zip(first, other, strict=True))
    return frozenset(name for (name, one), (_, other) in pairs if not torch.equal(one, other))


def firm(support: Any, moved: Collection[str]) -> Any:
    """What a constraint asks in every run: bounds that change are taken off; None if anything else changes."""
    if not moved:
        return support
    if not set(moved) <= {"lower_bound", "upper_bound"}:
        return None
    if hasattr(support, "base_constraint"):
        inner = firm(support.base_constraint, moved)
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    wider = copy.copy(support)
    for name in moved:
        setattr(wider, name, -math.inf if name == "lower_bound" else math.inf)
    return wider


def is_constant(support: Any) -> bool:
    """Whether a constraint is made of numbers alone, and so is the same wherever it is asked."""
    parts = vars(support).values()
    return all(is_constant(p) if isinstance(p, Constraint) else isinstance(p, (bool, int, float, str)) for p in parts)


def is_statement(node: Mapping[str, Any]) -> bool:
    """Whether a node of a Pyro trace is a statement of the program, and no sub-sample of a plate."""
    return node["type"] == "sample" and not poutine.util.site_is_subsample(node)


def evaluate(trace: poutine.Trace, owner: str) -> None:
    """Computes the log-probabilities of a trace.

    Raises:
        Unsupported: If a distribution says that it has none.
    """
    try:
        trace.compute_log_prob()
    except ValueError as error:  # in which Pyro wraps what a distribution says
        if not isinstance(error.__cause__, Unsupported):
            raise
        silent = [name for name, node in trace.nodes.items() if is_statement(node) and "log_prob" not in node]
        raise Unsupported(f"Site '{silent[0]}' of {owner}: {error.__cause__}") from None


def kind_of(node: Mapping[str, Any]) -> str:
    """What a statement is: "latent", "observed", "deterministic" or "factor"."""
    is_masked = getattr(node["fn"], "_mask", None) is False
    is_computed = node["is_observed"] and is_masked and isinstance(base(node["fn"]), Delta)  # what a reparam leaves behind
    if node["infer"].get("_deterministic") or is_computed:
        return "deterministic"
    if isinstance(base(node["fn"]), Unit):
        return "factor"
    return "observed" if node["is_observed"] else "latent"


class Shape(NamedTuple):
    """What a run of a program has: the sizes of its plates, and its latent sites; those of all runs, if there are more."""

    plates: dict[str, set[int]]
    latents: set[str]

    @classmethod
    def of(cls, traces: list[poutine.Trace]) -> Shape:
        """What these runs have: each size that a plate had, and the latent sites that all of them had."""
        plates: dict[str, set[int]] = {}
        seen = []
        for trace in traces:
            nodes = {name: node for name, node in trace.nodes.items() if is_statement(node)}
            seen.append({name for name, node in nodes.items() if kind_of(node) == "latent"})
            for frame in itertools.chain.from_iterable(node["cond_indep_stack"] for node in nodes.values()):
                if frame.vectorized:
                    plates.setdefault(frame.name, set()).add(frame.size)
        return cls(plates, set.intersection(*seen))


def _patterns(name: str) -> set[str]:
    return {f"{name[: found.start()]}#{name[found.end() :]}" for found in re.finditer(r"\d+", name)}


def kin(names: Collection[str], others: Collection[str]) -> set[str]:
    """Those of ``names`` that are one of ``others`` up to one number, as z_1 is z_7: statements of one Python loop."""
    known = set().union(*(_patterns(name) for name in others))
    return {name for name in names if known & _patterns(name)}


def loops(names: Collection[str], fewest: int) -> list[list[str]]:
    """Groups of at least ``fewest`` names that are the same up to one number, such as x_0, x_1, …, in their order."""
    members: dict[str, list[str]] = {}
    for name in names:
        for pattern in sorted(_patterns(name)):
            members.setdefault(pattern, []).append(name)
    groups, taken = [], set[str]()
    for group in sorted(members.values(), key=len, reverse=True):
        left = [name for name in group if name not in taken]
        if len(left) >= fewest:
            groups.append(left)
            taken.update(left)
    return groups
