"""Which block updates which site, how exact that is, and the ladder that decides it.

    the model's own move (``inference.contract.Blocked``), if it brings one
    finite        enumerated: jointly, else in coupled groups, else one site, else one element at a time
    conjugate     exact; several real sites whose joint conditional is normal and that are coupled: one Gaussian block
    logistic      Pólya-Gamma
    wide, correlated normal prior: elliptical slice
    continuous    one HMC block; element by element by slices where the gradient misleads
    counts        slices; the site's own distribution where nothing else fits

A rung of the ladder is taken only if the block holds its certificate at several settings of all other sites. A block that
fails it later on, in warm-up, is taken down the ladder (``demoted``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from inference.contract import Unsupported
from inference.handlers import isolated

if TYPE_CHECKING:
    from inference.blocks import Block, Current
    from inference.program import Program

__all__ = ["Plan", "Update", "assign", "demoted"]

_log = logging.getLogger("inference")

_TRIALS = 8  # settings of all sites at which an update is tried before it is trusted
_DRAWN = 8  # draws from the prior for each of them
_WIDEST_JOINT = 200  # elements of sites that are joined without being asked to: each costs a gradient, and their cube a draw
_MOST_LISTED = 12  # names of sites in a row of a plan
_LEAST_ELLIPTICAL = 8  # elements of a correlated normal prior that are worth an elliptical slice
_MOST_COLOURS = 100  # coordinates that slices take in turn


class Update(NamedTuple):
    """How one group of sites is updated.

    Attributes:
        sites: Names of the sites that move together.
        update: "Normal", "Dirichlet", "Enumerate", "HMC" ...: the family of an exact conditional, or the kernel.
        acceptance: Share of proposals accepted after warm-up; NaN if nothing is proposed.
        certificate: Largest ``|log Metropolis-Hastings ratio|`` after warm-up, for updates that claim to be exact; for those
            that take elements one by one, the largest change of the log-joint that these leave unexplained.
        note: Why this update and not one further up the ladder.
        claim: "exact" or "independent", which of the two the certificate is about.
    """

    sites: tuple[str, ...]
    update: str
    acceptance: float = float("nan")
    certificate: float | None = None
    note: str = ""
    claim: str = "exact"


class Plan(Mapping[str, Update]):
    """Site to update, in the order of a sweep; prints as a table.

    Args:
        updates: The updates in the order in which they are made.
    """

    def __init__(self, updates: tuple[Update, ...]) -> None:
        self.updates = tuple(updates)
        self._by_site = {site: update for update in self.updates for site in update.sites}

    def __getitem__(self, site: str) -> Update:
        return self._by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def __len__(self) -> int:
        return len(self._by_site)

    def __str__(self) -> str:
        rows = [("sites", "update", "acceptance", "certificate", "")]
        for update in self.updates:
            acceptance = "" if update.acceptance != update.acceptance else f"{update.acceptance:.3f}"
            certificate = "" if update.certificate is None else f"{update.certificate:.1e}"
            rows.append((_listed(update.sites), update.update, acceptance, certificate, update.note))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )

    __repr__ = __str__


def _listed(sites: Sequence[str]) -> str:
    """Names of sites, the first and the last ones where they are many."""
    if len(sites) <= _MOST_LISTED:
        return ", ".join(sites)
    return f"{sites[0]}, {sites[1]}, …, {sites[-1]} ({len(sites)} sites)"


def assign(
    program: Program, blocks: Mapping[str | tuple[str, ...], Block] | None = None, with_own: bool = True
) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """Blocks for all latent sites, in the order of a sweep, and a note for each.

    Args:
        program: The program.
        blocks: Overrides: a site, or a tuple of sites that move together, to its block.
        with_own: Whether to take the moves that the model brings.

    Returns:
        The bound blocks, and why each is not one further up the ladder ("" if it is at the top).

    Raises:
        Unsupported: If an override does not fit its sites.
        ValueError: If an override names an unknown site, or one twice.
    """
    with isolated(0, program.device):  # the plan is one of the program, not of a seed
        ladder = _Ladder(program, _settings(program))
        for names, block in (blocks or {}).items():
            group = (names,) if isinstance(names, str) else tuple(names)
            for name in group:
                if name not in program.latents:
                    raise ValueError(f"blocks= names '{name}', but the latent sites are {', '.join(program.latents)}.")
                if name not in ladder.left:
                    raise ValueError(f"blocks= gives '{name}' two blocks.")
                del ladder.left[name]
            ladder.add(block.bind(group, ladder.density, ladder.trials), _ASKED)
        if with_own:
            ladder.own()
        ladder.climb()
    order = {name: i for i, name in enumerate(program.latents)}
    ranked = sorted(ladder.taken, key=lambda pair: _rank(pair[0], program, order))
    return tuple(block for block, _ in ranked), tuple(note for _, note in ranked)


def _settings(program: Program) -> Current:
    """The best of many draws of all sites: far from the mass, rounding can spoil what is exact."""
    from inference.blocks import Current
    from inference.density import Density
    from inference.start import starting_values

    count = _TRIALS * _DRAWN
    values = starting_values(program, count, most=1) | program.chain_data(count)
    log_joint = Density(program, rung="vmapped").joint(values)
    best = log_joint.nan_to_num(nan=-torch.inf, posinf=-torch.inf).topk(_TRIALS).indices
    return Current({name: value[best] for name, value in values.items()}, log_joint[best])


_ASKED = "as asked"


def demoted(program: Program, block: Block, note: str, certificate: float, trials: Current) -> list[tuple[Block, str]]:
    """What takes the place of a block that failed its certificate: the next that fits, further down the ladder.

    Sites that moved together are taken one at a time first; elements that moved at the same time, one after the other.
    What was asked for by name stays.

    Args:
        program: The program.
        block: The block.
        note: Its note.
        certificate: By how much it failed.
        trials: Settings of all sites at which it failed, to try others on.

    Returns:
        The new blocks and their notes; the old one if there is nothing below.
    """
    reason = f"demoted from {block.update}: certificate {certificate:.0e}"
    if block.elements is not None:
        return [(block, note) if block.is_scan else (block.scanning(), "; ".join(filter(None, (note, reason))))]
    if note.startswith(_ASKED):
        return [(block, note)]
    ladder = _Ladder(program, trials, dict.fromkeys(block.sites), reason)
    ladder.climb(failed=block)
    return ladder.taken


class _Ladder:
    """Takes sites from those left, and gives them to the first block that fits."""

    def __init__(self, program: Program, trials: Current, left: dict[str, None] | None = None, reason: str = "") -> None:
        from inference.density import Density

        self.program, self.trials, self.reason = program, trials, reason
        self.density = Density(program, rung="vmapped")
        self.left = dict.fromkeys(program.latents) if left is None else left
        self.taken: list[tuple[Block, str]] = []
        self.looped: set[str] = set()  # sites of long loops that have no exact draw together

    def add(self, block: Block, note: str = "") -> None:
        for site in block.sites:
            self.left.pop(site, None)
        self.taken.append((block, "; ".join(filter(None, (self.reason, note or block.note)))))

    def bound(self, block: Block, sites: Sequence[str]) -> Block | None:
        """The block for these sites, None if it does not fit."""
        try:
            return block.bind(sites, self.density, self.trials)
        except Unsupported:
            return None

    def own(self) -> None:
        """The moves that the model brings, where their certificates hold."""
        from inference.blocks import Own

        for sites in self.program.proposals:
            if not all(name in self.left for name in sites):
                continue
            try:
                self.add(Own().bind(sites, self.density, self.trials))
            except Unsupported as refusal:
                _log.warning("%s", refusal)

    def climb(self, failed: Block | None = None) -> None:
        """Finds blocks for all sites left, below the one that ``failed`` on them."""
        from inference.blocks import Conjugate, Constant, EllipticalSlice, Enumerate, Gaussian, Own, PolyaGamma

        is_first = failed is None
        for name in list(self.left):
            if self.program.latents[name].is_constant:
                self.add(Constant().bind([name], self.density, self.trials), "has one value only")
        if finite := [name for name in self.left if self.program.latents[name].choices is not None]:
            has_failed_alone = isinstance(failed, Enumerate) and len(finite) == 1
            self._enumerate([finite] if is_first else [[name] for name in finite], has_failed_alone)
        if is_first or isinstance(failed, (Conjugate, Gaussian, Own)):
            self._conjugate(is_first, failed.update if isinstance(failed, Conjugate) else "")
        is_below = isinstance(failed, EllipticalSlice) or (isinstance(failed, PolyaGamma) and len(failed.sites) == 1)
        if not is_below:
            self._polya_gamma(is_joint=not isinstance(failed, PolyaGamma))
        if not isinstance(failed, EllipticalSlice):
            self._elliptical()
        self._rest()

    # --------------------------------------------------------------------------------- finite sites
    def _enumerate(self, groups: list[list[str]], has_failed: bool) -> None:
        """Each group jointly, else in coupled parts, else one site, else (if that ``has_failed``) one element at a time."""
        from inference.blocks import Enumerate

        note = ""
        while groups:
            group = groups.pop(0)
            try:
                if has_failed:
                    raise Unsupported("the elements are coupled")
                self.add(Enumerate().bind(group, self.density, self.trials), note)
                continue
            except Unsupported as refusal:
                reason = str(refusal)
            if len(group) == 1:
                block = Enumerate(by_element=True).bind(group, self.density, self.trials)
                self.add(block, f"element by element: {reason}")
                continue
            parts = self._coupled(group)
            if len(parts) == 1:
                parts, note = [[name] for name in group], f"alone: {reason}"
            groups = parts + groups

    def _coupled(self, sites: Sequence[str]) -> list[list[str]]:
        """Groups of sites that share a term of the log-joint, directly or through others."""
        from inference.terms import Coordinates, depends

        coordinates = Coordinates(self.program, sites)
        touched = depends(self.density, coordinates, coordinates.site, self.trials.values).to(torch.float32)
        return _groups(sites, touched @ touched.T > 0)

    # ------------------------------------------------------------------------------ continuous sites
    def _real(self, names: Sequence[str]) -> list[str]:
        from inference.messages import kind_of

        latents = self.program.latents
        return [name for name in names if latents[name].is_continuous and kind_of(latents[name].support) == "real"]

    def _single(self, names: Iterable[str]) -> list[str]:
        """Those names that may be tried one by one."""
        return [name for name in names if name not in self.looped]

    def _size(self, names: Sequence[str]) -> int:
        return sum(self.program.latents[name].shape.numel() for name in names)

    def _conjugate(self, is_joint: bool, failed: str) -> None:
        """Exact draws; not from the family that has ``failed``."""
        from inference.blocks import Conjugate, Gaussian

        if is_joint:
            self._loops()
            self._join(Gaussian(), self._real(list(self.left)))
        found = {}
        for name in self._single(self.left):
            block = self.bound(Conjugate(), [name]) if self.program.latents[name].is_continuous else None
            if block is not None and block.update != failed:
                found[name] = block
        if is_joint:
            for group in self._merged(Gaussian(), self._real(list(found))):
                self._join(Gaussian(), group)
        for name, block in found.items():
            if name in self.left:
                self.add(block)

    def _loops(self) -> None:
        """Exact draws of the sites of each long loop, all at once; the others of them are not tried one by one."""
        from inference.blocks import Conjugate, GaussianChain
        from inference.chains import FEWEST
        from inference.sites import loops

        for group in loops([name for name in self.left if self.program.latents[name].is_continuous], FEWEST):
            is_real = len(self._real(group)) == len(group)
            block = self.bound(GaussianChain(), group) if is_real else None
            block = block or self.bound(Conjugate(), group)
            if block is not None:
                self.add(block)
            elif len(group) > _WIDEST_JOINT or not is_real:
                self.looped.update(group)

    def _join(self, block: Block, names: Sequence[str]) -> bool:
        """Gives all of the names to joint blocks, one for each coupled group, if one for all would fit."""
        from inference.blocks import Conjugate, Gaussian, PolyaGamma

        assert isinstance(block, (Gaussian, PolyaGamma))
        if len(names) < 2 or self._size(names) > _WIDEST_JOINT:
            return False
        joint = self.bound(block, names)
        if joint is None:
            return False
        assert isinstance(joint, (Gaussian, PolyaGamma))
        groups = _groups(names, joint.is_coupled(self.density, self.trials))
        for group in groups:  # not all of them need have to do with a logistic statement
            alone = self.bound(Conjugate(), group) if len(group) == 1 else None
            part = joint if len(groups) == 1 else alone or self.bound(block, group)
            self.add(part or Gaussian().bind(group, self.density, self.trials))
        return True

    def _merged(self, block: Block, names: Sequence[str]) -> list[list[str]]:
        """Groups of coupled sites whose joint conditional the block can draw, each as large as a greedy search makes it."""
        from inference.blocks import Gaussian, PolyaGamma

        groups: list[list[str]] = []
        for name in names:
            grown = [name]
            for group in list(groups):
                together = [*group, *grown]
                joint = self.bound(block, together) if self._size(together) <= _WIDEST_JOINT else None
                if isinstance(joint, (Gaussian, PolyaGamma)):
                    is_coupled = joint.is_coupled(self.density, self.trials)
                    if bool(is_coupled[: len(group), len(group) :].any()):
                        groups.remove(group)
                        grown = together
            groups.append(grown)
        return [group for group in groups if len(group) > 1]

    def _polya_gamma(self, is_joint: bool) -> None:
        from inference.blocks import Conjugate, Gaussian, PolyaGamma

        rest = self._single(self._real(list(self.left)))
        if not rest:
            return
        if is_joint:
            normal = [name for block, _ in self.taken if isinstance(block, (Conjugate, Gaussian)) for name in block.sites]
            before, normal = list(self.taken), self._real(normal)
            for names in ([*rest, *normal], rest):
                if not self._join(PolyaGamma(), names):
                    continue
                new = self.taken[len(before) :]
                is_new = {site for block, _ in new for site in block.sites}
                self.taken = [pair for pair in before if not is_new & set(pair[0].sites)] + new
                return
            for group in self._merged(PolyaGamma(), rest):
                self._join(PolyaGamma(), group)
        for name in self._single(self._real(list(self.left))):
            if block := self.bound(PolyaGamma(), [name]):
                self.add(block)

    def _elliptical(self) -> None:
        from inference.blocks import EllipticalSlice

        for name in self._real(list(self.left)):
            if self._size([name]) < _LEAST_ELLIPTICAL:
                continue
            block = self.bound(EllipticalSlice(), [name])
            if isinstance(block, EllipticalSlice) and block.is_correlated(self.density, self.trials):
                self.add(block, "no conjugate family")

    def _rest(self) -> None:
        from inference.blocks import AdaptiveWalk, Hamiltonian, PriorDraw, Slice
        from inference.blocks.hamiltonian import misled

        rest = [name for name in self.left if self.program.latents[name].is_continuous]
        if rest:
            wrong = misled(rest, self.density, self.trials)
            smooth = [name for name in rest if name not in wrong]
            if smooth:
                self.add(Hamiltonian().bind(smooth, self.density, self.trials), "no conjugate family")
            for name in wrong:
                block = self.bound(Slice(), [name])
                if not isinstance(block, Slice) or len(block.elements.colours) > _MOST_COLOURS:  # type: ignore[union-attr]
                    block = AdaptiveWalk().bind([name], self.density, self.trials)
                self.add(block, "the log-density jumps, or its gradient is wrong")
        for name in list(self.left):
            block = self.bound(Slice(), [name]) or self.bound(PriorDraw(), [name])
            self.add(block or AdaptiveWalk().bind([name], self.density, self.trials), "infinitely many values")


def _groups(names: Sequence[str], is_tied: Tensor) -> list[list[str]]:
    """Connected groups of names, in their order."""
    left, groups = dict.fromkeys(range(len(names))), []
    while left:
        group, frontier = [], [next(iter(left))]
        while frontier:
            i = frontier.pop()
            if i in left:
                del left[i]
                group.append(i)
                frontier += is_tied[i].nonzero().flatten().tolist()
        groups.append([names[i] for i in sorted(group)])
    return groups


def _rank(block: Block, program: Program, order: Mapping[str, int]) -> tuple[bool, int]:
    """Discrete sites first: they follow at once from the starting values of the others; then the program's order."""
    first = min(block.sites, key=order.__getitem__)
    return program.latents[first].is_continuous, order[first]
