"""Programs and data that no run can use are refused before the first step, in words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from inference.contract import Unsupported
from inference.dependence import parameters_follow
from inference.handlers import Arithmetic, base, on_device, quiet
from inference.sites import Site, firm, is_statement, kind_of, moving, shape_of

if TYPE_CHECKING:
    from inference.program import Program

__all__ = [
    "check_constants",
    "check_data",
    "check_finite",
    "check_randomness",
    "check_structure",
    "check_support",
    "check_supports",
]

_FEW = 12  # numbers of a value that an error spells out


def check_structure(program: Program, traces: list[poutine.Trace]) -> None:
    """Whether runs have the same sites, of the same kinds and shapes, and there is something to infer.

    Raises:
        Unsupported: If not; a program that may change is noted to do so.
    """
    seen = [{name: kind_of(node) for name, node in t.nodes.items() if is_statement(node)} for t in traces]
    for name in dict.fromkeys(itertools.chain.from_iterable(seen)):
        kinds = sorted({sites[name] for sites in seen if name in sites})
        if len(kinds) > 1:
            raise Unsupported(
                f"Site '{name}' of {program.name} is {kinds[0]} in some runs, and {kinds[1]} in others. Give it two names."
            )
        if any(name not in sites for sites in seen):
            program.changes(
                f"Site '{name}' appears only in some runs of {program.name}, but this back-end needs each site on every "
                "run. Use MetropolisHastings(proposal=Prior()). Or sample it always, and choose with torch.where."
            )
        shapes = {shape_of(t.nodes[name]) for t in traces if name in t.nodes} if kinds[0] in ("latent", "observed") else ()
        if len(shapes) > 1:
            one, other, *_ = sorted(shapes)
            program.changes(
                f"The shape of '{name}' changes from run to run of {program.name}, such as from {tuple(one)} to "
                f"{tuple(other)}, but this back-end needs each site in one shape. Use "
                "MetropolisHastings(proposal=Prior()). Or take the largest shape always, and mask what is too much."
            )
    is_empty = not program.is_simulated and not any("latent" in sites.values() for sites in seen)
    if is_empty and not program.used_weights(program.owner):
        raise Unsupported(f"{program.name} has no latent site: there is nothing to infer.")
    for name, node in traces[0].nodes.items():
        if node["type"] == "sample" and poutine.util.site_is_subsample(node):
            size, kept = node["fn"].size, node["value"].shape[0]
            if kept < size:
                raise Unsupported(
                    f"Plate '{name}' takes {kept} of {size} rows at random. Write the program for all rows; "
                    "SVI(batch_size=...) sub-samples it."
                )


def check_supports(program: Program, traces: list[poutine.Trace]) -> None:
    """Whether supports of latent sites stay where they are from run to run, and can be made unconstrained.

    Raises:
        Unsupported: If not; a program that may change is noted to do so.
    """
    for name, site in program.latents.items():
        if program.is_changing or (program.is_fixed and not site.is_continuous):
            continue
        if site.is_continuous:
            _ = site.transform  # raises if there is none
        if moving([trace.nodes[name]["fn"].support for trace in traces]):
            program.changes(
                f"The support of '{name}' depends on other latent sites. Use MetropolisHastings(proposal=Prior()). Or "
                "sample it on a fixed support and scale it: u ~ Uniform(0, 1), x = low + (high - low) * u."
            )


def check_randomness(program: Program, settings: list[dict[str, Tensor]]) -> None:
    """Whether the same values have the same log-joint, and some have a finite one.

    Args:
        program: The program.
        settings: Values of its latent sites.

    Raises:
        Unsupported: If the program draws where Pyro does not see it.
        ValueError: If the data are not finite, and so the log-joint never is.
    """
    if not program.latents or program.is_simulated:
        return
    if program.is_changing and any(_latents_at(program, values) != values.keys() for values in settings):
        raise Unsupported(
            f"{program.name} has hidden randomness: at the same values it has other sites. Draw by pyro.sample only."
        )
    first, second = program.log_joint(settings[0]), program.log_joint(settings[0])
    if not torch.equal(first, second) and not (first.isnan() and second.isnan()):
        raise Unsupported(
            f"{program.name} has hidden randomness: its log-density at the same values is {first:.6g}, then {second:.6g}. "
            "Draw by pyro.sample only, and switch dropout off with .eval()."
        )
    check_finite(program, settings)


def check_finite(program: Program, settings: list[dict[str, Tensor]]) -> None:
    """Whether some values have a finite log-joint.

    Raises:
        ValueError: If the data are not finite, and so the log-joint never is.
    """
    bad = [(label, (~tensor.isfinite()).nonzero()) for label, tensor in program.tensors]
    bad = [(label, where) for label, where in bad if len(where)]
    if not bad or not program.latents or any(program.log_joint(values).isfinite() for values in settings):
        return
    label, where = bad[0]
    raise ValueError(
        f"{label} holds {len(where)} values that are NaN or infinite (the first at {tuple(where[0].tolist())}), and "
        f"{program.name} has no use for them. Remove those rows, or write the program with a mask."
    )


def _latents_at(program: Program, values: Mapping[str, Tensor]) -> set[str]:
    """Names of the latent sites that a run at these values has."""
    nodes = program.trace(values, evaluated=False).nodes
    return {name for name, node in nodes.items() if is_statement(node) and kind_of(node) == "latent"}


def check_constants(program: Program, who: str, takes_unnormalised: bool = False) -> None:
    """Whether no constant is missed that a log-density lacks.

    Raises:
        Unsupported: If one is needed, or if it changes, as it does with parameters that depend on what is hidden.
    """
    if program.is_simulated:  # draws alone are looked at
        return
    for name, site in (program.latents | program.observed_sites).items():
        if site.is_unnormalised and not takes_unnormalised:
            raise Unsupported(
                f"Site '{name}' is {site.family}, whose log_prob lacks a constant that nobody knows, but {who} needs a "
                "density that integrates to 1. Sample from it by HMC() or MetropolisHastings(), and train its weights "
                "by Denoising(loss=...)."
            )
        hidden = parameters_follow(program, name) if site.is_unnormalised or name in program.surrogates else ()
        if hidden:
            raise Unsupported(
                f"Site '{name}' is {site.family}, whose log_prob lacks a constant that changes with its parameters, and "
                f"they depend on '{min(hidden)}', which is hidden. Give that a fixed value, or '{name}' a density."
            )


def check_data(
    program: Program, traces: list[poutine.Trace], observed: Mapping[str, Tensor], first: int = 0, is_fitting: bool = False
) -> None:
    """Checks values of observed sites at some runs.

    Bounds of a support that follow what is hidden are not asked: data outside of them in these runs may be inside in others.

    Args:
        program: The program.
        traces: Its runs.
        observed: Observed site to value.
        first: The row that these rows begin with.
        is_fitting: Whether it is known already that the distributions have a density of such data.

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
        if not program.is_simulated and not is_fitting:
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
        with quiet(), on_device(program.device), Arithmetic():
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
