"""The log-joint term by term, and which elements of a site share a term: those that share none can move at the same time.

A term is one entry of the log-probability of one statement. Elements are coloured so that no term depends on two elements
of one colour; given the rest, the elements of a colour are then independent, and each has the sum of its own terms for its
log-density. What depends on what is found by trying: elements are changed, and the terms that change are theirs. First in
groups, bit by bit of an element's number, which tells the owner of every term in 2 log₂ n trials if no term has two; then,
if some term has, one element at a time.

References:
    J. Gonzalez et al., Parallel Gibbs sampling: from colored fields to thin junction trees (2011).
    R. Dorfman, The detection of defective members of large populations (1943): testing in groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.density import Density
from inference.program import Program
from inference.staging import Staged

__all__ = ["Coordinates", "Elements", "colour", "depends", "one_by_one", "term_values"]

MOST_ELEMENTS = 400  # more are not tried one by one
_ROWS = 256  # settings tried at a time


class Coordinates:
    """The values of some sites as one vector: continuous ones unconstrained, discrete ones as they are.

    Args:
        program: The program.
        sites: Names of the sites, in the order of the vector.
        is_constrained: Whether continuous sites are left as they are, too.

    Attributes:
        size: Length of the vector.
        batch: For every coordinate the number of its batch element, (size,); events move together.
        site: For every coordinate the number of its site, (size,).
        is_discrete: Which coordinates belong to discrete sites, (size,).
    """

    def __init__(self, program: Program, sites: Collection[str], is_constrained: bool = False) -> None:
        self.program, self.sites, self.is_constrained = program, tuple(sites), is_constrained
        self.transforms: dict[str, Any] = {}
        self.shapes: dict[str, torch.Size] = {}
        batches, kinds, count = [], [], 0
        for name in self.sites:
            site = program.latents[name]
            shape = site.shape
            if site.is_continuous and not is_constrained:
                self.transforms[name] = site.transform
                shape = site.transform.inverse_shape(shape)
            self.shapes[name] = shape
            elements = site.batch_shape.numel()
            numbers = torch.arange(elements).repeat_interleave(shape.numel() // max(elements, 1))
            batches.append(count + numbers)
            kinds.append(torch.full_like(numbers, not site.is_continuous, dtype=torch.bool))
            count += elements
        self.sizes = [self.shapes[name].numel() for name in self.sites]
        self.size = sum(self.sizes)
        self.batch = torch.cat(batches).to(program.device)
        self.is_discrete = torch.cat(kinds).to(program.device)
        self.site = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).to(program.device)

    def values(self, vector: Tensor) -> dict[str, Tensor]:
        """(…, size) -> site to value (…, *site)."""
        found = {}
        for name, part in zip(self.sites, vector.split(self.sizes, -1), strict=True):
            part = part.reshape(part.shape[:-1] + self.shapes[name])
            is_moved = name in self.transforms
            found[name] = self.transforms[name](part) if is_moved else part.to(self.program.latents[name].dtype)
        return found

    def vector(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site to value (chain, *site) -> (chain, size)."""
        parts = []
        for name in self.sites:
            value = values[name]
            value = self.transforms[name].inv(value) if name in self.transforms else value.to(self.program.dtype)
            parts.append(value.reshape(len(value), -1))
        return torch.cat(parts, -1)

    def is_inside(self, vector: Tensor) -> Tensor:
        """Which coordinates a program can be run on, same shape: no count below its least value, no label that is none."""
        found = []
        for name, part in zip(self.sites, vector.split(self.sizes, -1), strict=True):
            site = self.program.latents[name]
            if site.is_continuous:
                found.append(torch.ones_like(part, dtype=torch.bool))
            elif site.choices is not None:
                found.append((part >= site.choices.min()) & (part <= site.choices.max()))
            else:
                found.append(part >= getattr(site.support, "lower_bound", -torch.inf))
        return torch.cat(found, -1)

    def bumped(self, vector: Tensor) -> Tensor:
        """Discrete coordinates one higher, the highest of finitely many values the lowest; same shape."""
        found = []
        for name, part in zip(self.sites, vector.split(self.sizes, -1), strict=True):
            site = self.program.latents[name]
            if site.choices is not None and site.is_indexed:
                part = (part + 1) % len(site.choices)
            elif site.support.is_discrete and not site.event_dim:
                part = part + 1
            found.append(part)
        return torch.cat(found, -1)

    def log_jacobian(self, vector: Tensor) -> list[Tensor]:
        """Terms of log |d values / d vector| at a vector (size,)."""
        terms = []
        for name, part in zip(self.sites, vector.split(self.sizes, -1), strict=True):
            if name in self.transforms:
                transform, unconstrained = self.transforms[name], part.reshape(self.shapes[name])
                terms.append(transform.log_abs_det_jacobian(unconstrained, transform(unconstrained)).reshape(-1))
        return terms

    def terms(self, density: Density) -> Staged:
        """(vector (chain, size), other values) -> all terms of the log-density of the vector, (chain, term)."""

        def terms(vector: Tensor, others: Mapping[str, Tensor]) -> Tensor:
            values = {**others, **self.values(vector)}
            return torch.cat([*term_values(self.program, values, self.sites), *self.log_jacobian(vector)])

        return density.stage(("terms", self.sites, self.is_constrained), terms, (True, True))


def term_values(program: Program, values: Mapping[str, Tensor], checked: Collection[str] = ()) -> list[Tensor]:
    """The terms of the log-joint, a vector for each statement.

    Args:
        program: The program.
        values: Site to value, for all latent sites.
        checked: Discrete sites whose values may lie outside their support, where their term is −∞ (torch's formulas give
            finite numbers there).
    """
    found = []
    for name, node in program.trace(values).nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        term = node["log_prob"].to(program.dtype)
        if name in checked and not program.latents[name].is_continuous:
            term = torch.where(node["fn"].support.check(node["value"]), term, -torch.inf)
        found.append(term.reshape(-1))
    return found


class Elements(NamedTuple):
    """Elements of some sites, coloured.

    Attributes:
        of: For every coordinate the number of its element, (size,).
        colours: For every colour the numbers of its elements.
        owners: For every colour the element that each term depends on, (term,); ``number`` where it depends on none.
        number: How many elements.
    """

    of: Tensor
    colours: tuple[Tensor, ...]
    owners: tuple[Tensor, ...]
    number: int

    @property
    def is_scan(self) -> bool:
        """Whether one element moves after the other, with all terms looked at: nothing is taken for independent."""
        return all(bool((owner == owner[0]).all()) and len(which) == 1 for owner, which in self.each())

    def each(self) -> list[tuple[Tensor, Tensor]]:
        """Owners and colours, group by group."""
        return list(zip(self.owners, self.colours, strict=True))

    def own(self, terms: Tensor, owner: Tensor) -> Tensor:
        """Sum of each element's terms: (chain, term) -> (chain, element). NaN counts as −∞."""
        sums = terms.new_zeros(len(terms), self.number + 1)
        return sums.index_add(1, owner, terms)[:, : self.number].nan_to_num(nan=-torch.inf)


def one_by_one(of: Tensor, terms: int) -> Elements:
    """Elements of which each is taken to depend on everything."""
    count = int(of.max()) + 1
    numbers = torch.arange(count, device=of.device)
    return Elements(of, tuple(numbers.split(1)), tuple(number.expand(terms) for number in numbers), count)


@dataclass
class _Trial:
    """Settings of all sites, and what terms change when elements are changed to what they are in another setting."""

    staged: Staged
    coordinates: Coordinates
    vector: Tensor
    others: dict[str, Tensor]
    of: Tensor

    def changed(self, masks: Tensor) -> Tensor:
        """Masks of elements (mask, element) -> (mask, term): whether a term changes in any setting."""
        settings = len(self.vector)
        found, bumped = [], self.coordinates.bumped(self.vector)
        base = self.staged(self.vector, self.others)
        scale = 1e-12 if base.dtype == torch.float64 else 1e-5
        for part in masks.split(max(_ROWS // settings, 1)):
            moved = torch.zeros(len(part), base.shape[1], dtype=torch.bool, device=base.device)
            # labels and small counts may be the same in all settings, so they are also moved on by one
            for other in (*(self.vector.roll(shift, 0) for shift in range(1, min(settings, 4))), bumped):
                vector = torch.where(part[:, None, self.of], other, self.vector).flatten(0, 1)
                others = {name: value.repeat(len(part), *(1,) * (value.dim() - 1)) for name, value in self.others.items()}
                terms = self.staged(vector, others).unflatten(0, (len(part), settings))
                is_same = (terms - base).abs() <= scale * (1.0 + base.abs())
                is_same = is_same | (terms == base) | (terms.isnan() & base.isnan())
                moved = moved | (~is_same).any(1)
            found.append(moved)
        return torch.cat(found)


def depends(density: Density, coordinates: Coordinates, of: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Which terms change with which elements, (element, term); for the arguments see ``colour``."""
    others = {name: value for name, value in values.items() if name not in coordinates.sites}
    trial = _Trial(coordinates.terms(density), coordinates, coordinates.vector(values), others, of)
    return trial.changed(torch.eye(int(of.max()) + 1, dtype=torch.bool, device=of.device))


def colour(density: Density, coordinates: Coordinates, of: Tensor, values: Mapping[str, Tensor]) -> Elements:
    """Elements by what they share.

    Args:
        density: The densities of the program.
        coordinates: The sites.
        of: For every coordinate the number of its element, (size,).
        values: A few settings of all sites, (setting, *site).

    Returns:
        The elements, in as few colours as a greedy search finds; one by one if there are too many to be tried.
    """
    others = {name: value for name, value in values.items() if name not in coordinates.sites}
    trial = _Trial(coordinates.terms(density), coordinates, coordinates.vector(values), others, of)
    count = int(of.max()) + 1
    terms = trial.staged(trial.vector, others).shape[1]
    numbers = torch.arange(count, device=of.device)
    if count == 1:
        return one_by_one(of, terms)
    bits = torch.stack([(numbers >> bit) % 2 == 1 for bit in range((count - 1).bit_length())])
    ones, zeros = trial.changed(torch.cat([bits, ~bits])).chunk(2)
    if not bool((ones & zeros).any()):
        powers = 2 ** torch.arange(len(bits), device=of.device)
        is_owned = (ones | zeros).all(0)
        owner = torch.where(is_owned, (ones * powers[:, None]).sum(0), count)
        # an element that shows in one bit only is not told apart: then all must be tried
        if bool((is_owned == (ones | zeros).any(0)).all()) and bool((owner <= count).all()):
            return Elements(of, (numbers,), (owner,), count)
    if count > MOST_ELEMENTS:
        return one_by_one(of, terms)
    touched = depends(density, coordinates, of, values)
    is_tied = (touched.to(torch.float32) @ touched.to(torch.float32).T) > 0
    shades = _greedy(is_tied.cpu())
    colours, owners = [], []
    for shade in range(int(shades.max()) + 1):
        which = (shades == shade).nonzero().squeeze(-1).to(of.device)
        owned = touched[which]
        colours.append(which)
        owners.append(torch.where(owned.any(0), which[owned.to(torch.uint8).argmax(0)], count))
    return Elements(of, tuple(colours), tuple(owners), count)


def _greedy(is_tied: Tensor) -> Tensor:
    """The first colour that no neighbour has, for the elements with most neighbours first."""
    shades = torch.full((len(is_tied),), -1, dtype=torch.long)
    for element in is_tied.sum(1).argsort(descending=True, stable=True).tolist():
        taken = set(shades[is_tied[element]].tolist())
        shades[element] = next(shade for shade in range(len(is_tied)) if shade not in taken)
    return shades
