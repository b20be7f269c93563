"""Log-probabilities of many statements at once: sites of one family, such as the steps of a Python loop, are stacked.

A loop over time writes thousands of statements of the same kind. Their parameters and values are stacked and evaluated as
one distribution, so that a graph of the density grows by a few cheap operations a statement instead of dozens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.rows import FEWEST, Known, Rows, gaussian, is_rewritten

__all__ = ["Stack", "log_probs"]

_FEWEST = 4  # statements; fewer are evaluated one by one

# Parameters that a distribution can be rebuilt from, the first set that it has, each with its event dimensions.
_PARAMETERS: dict[type, tuple[dict[str, int], ...]] = {
    dist.Bernoulli: ({"logits": 0}, {"probs": 0}),
    dist.Beta: ({"concentration1": 0, "concentration0": 0},),
    dist.Binomial: ({"total_count": 0, "logits": 0}, {"total_count": 0, "probs": 0}),
    dist.Categorical: ({"logits": 1}, {"probs": 1}),
    dist.Cauchy: ({"loc": 0, "scale": 0},),
    dist.Dirichlet: ({"concentration": 1},),
    dist.Exponential: ({"rate": 0},),
    dist.Gamma: ({"concentration": 0, "rate": 0},),
    dist.Geometric: ({"logits": 0}, {"probs": 0}),
    dist.HalfCauchy: ({"scale": 0},),
    dist.HalfNormal: ({"scale": 0},),
    dist.InverseGamma: ({"concentration": 0, "rate": 0},),
    dist.Laplace: ({"loc": 0, "scale": 0},),
    dist.LogNormal: ({"loc": 0, "scale": 0},),
    dist.MultivariateNormal: ({"loc": 1, "scale_tril": 2},),
    dist.Normal: ({"loc": 0, "scale": 0},),
    dist.Poisson: ({"rate": 0},),
    dist.StudentT: ({"df": 0, "loc": 0, "scale": 0},),
}


class Stack(NamedTuple):
    """Statements and their log-probabilities.

    Attributes:
        names: Their names.
        values: (statement, *shape of each); of a statement of many normal rows, what its table is a product of.
    """

    names: tuple[str, ...]
    values: Tensor | Rows

    @property
    def rows(self) -> Rows | None:
        """The values as a product of rows, if they are one."""
        return self.values if isinstance(self.values, Rows) else None

    @property
    def is_product(self) -> bool:
        """Whether its table is a product of matrices, which may have to be done row by row."""
        return self.rows is not None and self.rows.is_product

    @property
    def table(self) -> Tensor:
        """Log-probabilities, (statement, *shape of each)."""
        return self.values.table.unsqueeze(0) if isinstance(self.values, Rows) else self.values

    @property
    def shape(self) -> torch.Size:
        """Of the table."""
        return torch.Size((1, *self.values.shape)) if isinstance(self.values, Rows) else self.values.shape

    @property
    def total(self) -> Tensor:
        """Sum of all log-probabilities, a scalar."""
        return self.values.total() if isinstance(self.values, Rows) else self.values.sum()


class _Form(NamedTuple):
    """What stacked statements share: the family, how it is wrapped, and the shapes of parameters and value."""

    family: type
    names: tuple[str, ...]
    reinterpreted: int
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]
    value: tuple[torch.Size, torch.dtype]
    scale: float


def _form(node: Mapping[str, Any]) -> _Form | None:
    fn, value, scale = node["fn"], node["value"], node["scale"]
    reinterpreted = 0
    if isinstance(fn, dist.Independent):
        fn, reinterpreted = fn.base_dist, fn.reinterpreted_batch_ndims
    options = _PARAMETERS.get(type(fn))
    if options is None or node["mask"] is not None or not isinstance(scale, (int, float)) or not isinstance(value, Tensor):
        return None
    if node["args"] or node["kwargs"]:
        return None
    names = next(tuple(names) for names in options if len(options) == 1 or list(names)[-1] in vars(fn))
    parameters = [getattr(fn, name) for name in names]
    if not all(isinstance(parameter, Tensor) for parameter in parameters):
        return None
    shapes = tuple((parameter.shape, parameter.dtype) for parameter in parameters)
    return _Form(type(fn), names, reinterpreted, shapes, (value.shape, value.dtype), float(scale))


def _stacked(nodes: list[Mapping[str, Any]], form: _Form) -> Tensor:
    """Log-probabilities of statements of one form, (statement, *shape)."""
    count = len(nodes)
    events = next(option for option in _PARAMETERS[form.family] if tuple(option) == form.names)
    rank = max(len(shape) - events[name] for name, (shape, _) in zip(form.names, form.shapes))
    own = len(nodes[0]["fn"].event_shape) - form.reinterpreted
    rank = max(rank, len(form.value[0]) - own)

    def gather(parts: list[Tensor], event: int) -> Tensor:
        shape = parts[0].shape
        padding = (1,) * (rank - (len(shape) - event))
        return torch.stack(parts).reshape(count, *padding, *shape)

    def base(fn: Any) -> Any:
        return fn.base_dist if isinstance(fn, dist.Independent) else fn

    parameters = {name: gather([getattr(base(n["fn"]), name) for n in nodes], events[name]) for name in form.names}
    table = form.family(**parameters).log_prob(gather([n["value"] for n in nodes], own))
    if form.reinterpreted:
        table = table.flatten(-form.reinterpreted).sum(-1)
    return table if form.scale == 1.0 else table * form.scale


def log_probs(
    nodes: Mapping[str, Mapping[str, Any]],
    origin: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    known: Known | None = None,
) -> list[Stack]:
    """Log-probabilities of the statements of a trace, as ``poutine.trace`` computes them one by one.

    Args:
        nodes: Name to node of a Pyro trace; sub-samples of plates are left out.
        origin: What a tensor was before it was expanded.
        known: Statistics of rows from earlier traces.

    Returns:
        Stacks that together hold every statement once, in the order of their first statements.
    """
    groups: dict[Hashable, list[str]] = {}
    forms: dict[Hashable, _Form] = {}
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        form = _form(node)
        key: Hashable = name if form is None else form
        groups.setdefault(key, []).append(name)
        if form is not None:
            forms[key] = form
    stacks = []
    for key, names in groups.items():
        if key in forms and len(names) >= _FEWEST:
            stacks.append(Stack(tuple(names), _stacked([nodes[name] for name in names], forms[key])))
        else:
            stacks += [_alone(name, nodes[name], forms.get(key), origin, known) for name in names]
    return stacks


def _alone(
    name: str,
    node: Mapping[str, Any],
    form: _Form | None,
    origin: Callable[[Tensor], Tensor],
    known: Known | None,
) -> Stack:
    rows = gaussian(node, origin, known)
    if rows is None and form is not None and is_rewritten():
        rows = _repeated(node, form, origin)
    return Stack((name,), _log_prob(node, origin).unsqueeze(0) if rows is None else rows)


def _repeated(node: Mapping[str, Any], form: _Form, origin: Callable[[Tensor], Tensor]) -> Rows | None:
    """A statement that has the same log-probability in all of many rows, such as that of a label over all its values."""
    fn, value = node["fn"], node["value"]
    batch = value.shape[: value.dim() - len(fn.event_shape)]
    axes = [axis for axis in range(-len(fn.batch_shape), 0) if fn.batch_shape[axis] >= FEWEST]
    if form.reinterpreted or len(axes) != 1:
        return None
    (axis,) = axes
    events = next(option for option in _PARAMETERS[form.family] if tuple(option) == form.names)
    parameters = {name: origin(getattr(fn, name)) for name in form.names}
    shapes = [batch, *(shape[: len(shape) - events[name]] for name, shape in ((n, p.shape) for n, p in parameters.items()))]
    if any(len(shape) >= -axis and shape[axis] != 1 for shape in shapes):
        return None
    full = list(torch.broadcast_shapes(fn.batch_shape, batch))
    count, full[axis] = full[axis], 1
    constant = form.scale * form.family(**parameters).log_prob(value).expand(full).squeeze(axis)
    return Rows(constant.new_empty(count, 0), constant.new_zeros(*constant.shape, 0), constant, axis)


def _log_prob(node: Mapping[str, Any], origin: Callable[[Tensor], Tensor]) -> Tensor:
    log_prob = _looked_up(node, origin)
    if log_prob is None:
        log_prob = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
    scaled: Tensor = scale_and_mask(log_prob, node["scale"], node["mask"])
    return scaled


def _looked_up(node: Mapping[str, Any], origin: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Log-probabilities of labels whose probabilities are the same for a whole plate: looked up in one table.

    Pyro normalises and looks up in a table of its own for every element of the plate.
    """
    fn, value = node["fn"], node["value"]
    if type(fn) is not dist.Categorical or node["args"] or node["kwargs"] or not isinstance(value, Tensor):
        return None
    name = "logits" if "logits" in vars(fn) else "probs"
    table = origin(vars(fn)[name])
    if table.dim() != 1 or not fn.batch_shape:
        return None
    logits = dist.Categorical(**{name: table}, validate_args=False).logits
    return logits[value.long()].expand(torch.broadcast_shapes(value.shape, fn.batch_shape))
