"""Which block updates which site, how exact that is, and the ladder that decides it.

    finite discrete -> enumerate | conjugate -> exact | other continuous -> one HMC block | other discrete -> random walk

A rung of the ladder is taken only if the block holds its certificate at several settings of all other sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from inference.contract import Unsupported

if TYPE_CHECKING:
    from inference.blocks import Block
    from inference.program import Program

__all__ = ["Plan", "Update", "assign"]

_TRIALS = 8  # settings of all sites at which an update is tried before it is trusted


class Update(NamedTuple):
    """How one group of sites is updated.

    Attributes:
        sites: Names of the sites that move together.
        update: "Normal", "Dirichlet", "Enumerate", "HMC" ...: the family of an exact conditional, or the kernel.
        acceptance: Share of proposals accepted after warm-up; NaN if nothing is proposed.
        certificate: Largest ``|log Metropolis-Hastings ratio|`` after warm-up, for updates that claim to be exact.
        note: Why this update and not one further up the ladder.
    """

    sites: tuple[str, ...]
    update: str
    acceptance: float = float("nan")
    certificate: float | None = None
    note: str = ""


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
            rows.append((", ".join(update.sites), update.update, acceptance, certificate, update.note))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )

    __repr__ = __str__


def assign(
    program: Program, blocks: Mapping[str | tuple[str, ...], Block] | None = None
) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """Blocks for all latent sites, in the order of a sweep, and a note for each.

    Args:
        program: The program.
        blocks: Overrides: a site, or a tuple of sites that move together, to its block.

    Returns:
        The bound blocks, and why each is not one further up the ladder ("" if it is at the top).

    Raises:
        Unsupported: If an override does not fit its sites.
        ValueError: If an override names an unknown site, or one twice.
    """
    from inference.blocks import AdaptiveWalk, Conjugate, Constant, Current, Enumerate, Hamiltonian
    from inference.density import Density
    from inference.start import starting_values

    density = Density(program, rung="vmapped")
    values = starting_values(program, _TRIALS, most=4) | program.chain_data(_TRIALS)
    trials = Current(values, density.joint(values))
    bound: list[Block] = []
    notes: list[str] = []
    left = dict.fromkeys(program.latents)
    for names, block in (blocks or {}).items():
        group = (names,) if isinstance(names, str) else tuple(names)
        for name in group:
            if name not in program.latents:
                raise ValueError(f"blocks= names '{name}', but the latent sites are {', '.join(program.latents)}.")
            if name not in left:
                raise ValueError(f"blocks= gives '{name}' two blocks.")
            del left[name]
        bound.append(block.bind(group, density, trials))
        notes.append("as asked")

    def take(block: Block, sites: Sequence[str], note: str = "") -> None:
        bound.append(block.bind(sites, density, trials))
        notes.append(note)
        for site in sites:
            del left[site]

    finite = [name for name in left if program.latents[name].choices is not None]
    if finite:
        try:
            take(Enumerate(), finite)
        except Unsupported as reason:
            for name in finite:
                take(Enumerate(), [name], f"alone: {reason}")
    for name in list(left):
        if program.latents[name].is_constant:
            take(Constant(), [name], "has one value only")
        elif program.latents[name].is_continuous:
            try:
                take(Conjugate(), [name])
            except Unsupported:
                continue
    rest = [name for name in left if program.latents[name].is_continuous]
    if rest:
        take(Hamiltonian(), rest, "no conjugate family")
    for name in list(left):
        take(AdaptiveWalk(), [name], "infinitely many values")
    order = {name: i for i, name in enumerate(program.latents)}
    ranked = sorted(zip(bound, notes, strict=True), key=lambda pair: _rank(pair[0], program, order))
    return tuple(block for block, _ in ranked), tuple(note for _, note in ranked)


def _rank(block: Block, program: Program, order: Mapping[str, int]) -> tuple[bool, int]:
    """Discrete sites first: they follow at once from the starting values of the others; then the program's order."""
    first = block.sites[0]
    return program.latents[first].is_continuous, order[first]
