"""Data that no run can use are refused before the first step, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from inference.contract import Unsupported
from inference.handlers import Arithmetic, base, quiet
from inference.sites import Site, firm

if TYPE_CHECKING:
    from inference.program import Program

__all__ = ["check_data", "check_support"]

_FEW = 12  # numbers of a value that an error spells out


def check_data(program: Program, traces: list[poutine.Trace], observed: Mapping[str, Tensor], first: int = 0) -> None:
    """Checks values of observed sites at some runs.

    Bounds of a support that follow what is hidden are not asked: data outside of them in these runs may be inside in others.

    Args:
        program: The program.
        traces: Its runs.
        observed: Observed site to value.
        first: The row that these rows begin with.

    Raises:
        Unsupported: If a distribution has no density.
        ValueError: If data have the wrong type or shape, or lie outside of a support.
    """
    for name, value in observed.items():
        nodes = [t.nodes[name] for t in traces if name in t.nodes and t.nodes[name]["value"].shape == value.shape]
        site, mask = program.observed_sites[name], nodes[0]["mask"]
        came = str(value.dtype).removeprefix("torch.")
        if not value.is_floating_point() and (not site.support.is_discrete or value.dtype == torch.bool):
            raise ValueError(
                f"Site '{name}' is {site.family}, which has numbers for values, but its data are {came}. Convert them "
                "first, for example by x.double()."
            )
        if mask is False:
            continue
        if not program.is_simulated:
            _check_fit(program, name, nodes[0])
        supports = [firm(node["fn"].support, program.moving[name]) for node in nodes]
        inside = [support.check(value) for support in supports if support is not None]
        if inside:
            check_support(program, name, value, torch.stack(inside).any(0), mask, first)


def check_support(program: Program, name: str, value: Tensor, inside: Tensor, mask: Tensor | None, first: int) -> None:
    """Raises if a value that is neither missing nor masked lies outside of the support.

    Args:
        program: The program.
        name: The observed site.
        value: Its value.
        inside: Which events are inside.
        mask: Which count; None: all.
        first: The row that these rows begin with.
    """
    site = program.observed_sites[name]
    if not bool(inside.all()):
        missing = value.isnan() if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)
        inside = inside | (missing.flatten(value.dim() - site.event_dim).any(-1) if site.event_dim else missing)
    bad = (~inside if mask is None else ~inside & mask).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        told = (where[0] + first, *where[1:])
        raise ValueError(
            f"Site '{name}' is {site.family}, but {len(bad)} of its data lie outside the support {site.support}; "
            f"the first, at {told}, is {_said(value[where])}.{_remedy(site, value)}"
        )


def _check_fit(program: Program, name: str, node: Mapping[str, Any]) -> None:
    """Raises a sentence if a distribution cannot tell the density of its data."""
    value, distribution = node["value"], node["fn"]
    try:
        with quiet(), Arithmetic():
            distribution.log_prob(value)
    except Unsupported as error:
        raise Unsupported(f"Site '{name}' of {program.name}: {error}") from None
    except (RuntimeError, ValueError, IndexError) as error:
        came = str(value.dtype).removeprefix("torch.")
        if not value.is_floating_point() and "cast" in str(error):
            raise ValueError(
                f"Site '{name}' is {type(base(distribution)).__name__}, whose density takes floating data, but its data "
                f"are {came}. Convert them first, for example by x.double()."
            ) from None
        shape = tuple(distribution.batch_shape + distribution.event_shape)
        raise ValueError(
            f"Site '{name}' is {type(base(distribution)).__name__} of shape {shape}, which has no density of data "
            f"of shape {tuple(value.shape)}: {str(error).splitlines()[0]}"
        ) from None


def _remedy(site: Site, value: Tensor) -> str:
    """What to do about grey values of a coin."""
    is_grey = site.family == "Bernoulli" and bool(((value >= 0.0) & (value <= 1.0)).all())
    return " Binarise them, x.round(), or anew at every visit, SVI(transform=torch.bernoulli)." if is_grey else ""


def _said(value: Tensor) -> str:
    """A value in words: its numbers if they are few, else how many there are and how far they reach."""
    if value.numel() <= _FEW:
        return str(value.tolist())
    known = value[~value.isnan()] if value.is_floating_point() else value.flatten()
    return f"{value.numel()} numbers from {known.min().item():g} to {known.max().item():g}"
