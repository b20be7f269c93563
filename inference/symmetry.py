"""Exchangeable labels, found by trying: does a permutation of the components leave the log-joint unchanged?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from inference.contract import Unsupported
from inference.enumeration import indices
from inference.handlers import isolated
from inference.program import Program
from inference.relabel import Axis

__all__ = ["exchangeable", "permuted"]


def permuted(
    values: Mapping[str, Tensor], symmetry: Mapping[str, Axis], permutation: Tensor, program: Program
) -> dict[str, Tensor]:
    """Values with component i renamed to where ``permutation`` puts it: new[i] = old[permutation[i]]."""
    inverse = permutation.argsort()
    renamed = dict(values)
    for name, axis in symmetry.items():
        if axis is not None:
            for each in (axis,) if isinstance(axis, int) else axis:
                renamed[name] = renamed[name].index_select(each, permutation)
        else:
            choices = program.latents[name].choices
            assert choices is not None
            renamed[name] = choices[inverse[indices(program, name, values[name])]]
    return renamed


def exchangeable(program: Program) -> dict[str, Axis]:
    """Site to the axis of its value along which labels are exchangeable; None for a site whose values are the labels.

    A plate of size K makes a guess: the sites in it along its axis (and along an event axis of size K, as of transitions
    from each state to the next), the sites outside it that have an event axis of size K, and the finite sites with K values.
    The guess holds if a swap and a cycle of labels, which generate all permutations, leave the log-joint unchanged at three
    draws from the prior. Elements that are independent given all other sites, such as missing values of rows that are alike,
    are no labels: each of them has a place that is its own. Where the structure of a program changes, nothing is tried.
    """
    if program.is_changing:
        return {}
    plates = {(plate.name, plate.size) for site in program.latents.values() for plate in site.plates}
    data_plates = {plate.name for site in program.observed_sites.values() for plate in site.plates}
    found: dict[str, Axis] = {}
    for name, size in sorted(plates):
        if size < 2 or name in data_plates:
            continue
        guess: dict[str, Axis] = {}
        squares: dict[str, Axis] = {}
        for site in program.latents.values():
            inside = [plate for plate in site.plates if plate.name == name]
            if inside:
                guess[site.name] = own = len(site.batch_shape) + inside[0].dim
                if site.event_dim == 1 and site.shape[-1] == size:
                    squares[site.name] = own, len(site.shape) - 1
            elif site.choices is not None and len(site.choices) == size:
                guess[site.name] = None
            elif site.event_dim == 1 and site.shape[-1] == size and site.choices is None:
                guess[site.name] = len(site.shape) - 1
        if not set(guess) & set(found):
            held = [each for each in ((guess | squares, guess) if squares else (guess,)) if _holds(program, each, size)]
            found |= held[0] if held else {}
    return found


def _holds(program: Program, guess: Mapping[str, Axis], size: int) -> bool:
    labels = torch.arange(size, device=program.device)
    permutations = (torch.cat([labels[:2].flip(0), labels[2:]]), labels.roll(1))
    shared = [name for name, site in program.latents.items() if not {p.name for p in site.plates} & set(program.row_plates)]
    with isolated(1, program.device):
        try:
            draws: list[dict[str, Tensor]] = [{}, {}, {}]
            for first, data in program.parts():
                draws = [program.drawn(known, data) for known in draws]
                if not all(_is_unchanged(program, guess, permutations, values, data) for values in draws):
                    return False
                if not first and None not in guess.values() and not _are_coupled(program, guess, draws, data):
                    return False
                draws = [{name: draws[0][name] for name in shared}]  # rows to come meet the same components
        except (Unsupported, RuntimeError, ValueError):
            return False
        return True


def _is_unchanged(
    program: Program,
    guess: Mapping[str, Axis],
    permutations: Iterable[Tensor],
    values: Mapping[str, Tensor],
    data: list[Tensor] | None,
) -> bool:
    before = program.log_joint(values, data)
    rounding = 1e-9 if before.dtype == torch.float64 else 1e-4
    afters = (program.log_joint(permuted(values, guess, permutation, program), data) for permutation in permutations)
    return all(torch.allclose(before, after, rtol=rounding) for after in afters)


def _are_coupled(
    program: Program,
    guess: Mapping[str, Axis],
    draws: Sequence[Mapping[str, Tensor]],
    data: list[Tensor] | None,
) -> bool:
    """Whether the log-joint is more than a sum over elements: f(a, b) − f(a, ·) − f(·, b) + f(·, ·) is not zero."""
    here, there, *_ = draws

    def moved(*elements: int) -> Tensor:
        values = dict(here)
        for name, axis in guess.items():
            index = torch.tensor(elements, dtype=torch.long, device=program.device)
            first = axis if isinstance(axis, int) else axis[0] if axis else 0
            values[name] = here[name].index_copy(first, index, there[name].index_select(first, index))
        return program.log_joint(values, data)

    terms = torch.stack([moved(0, 1), -moved(0), -moved(1), moved()])
    rounding = 1e-10 if terms.dtype == torch.float64 else 1e-4
    return not bool(terms.sum().abs() <= rounding * (100.0 + terms.abs().sum()))
