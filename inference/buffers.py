"""Where a run puts its draws: all that fit, on the CPU, readable at any time and in parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from inference.arrays import ragged

__all__ = ["Buffer", "RaggedBuffer"]

LARGEST = 2**30  # bytes of draws that are kept without being asked to


class Buffer:
    """Draws on the CPU, preallocated at the first one; sites that would not fit are left out.

    Args:
        count: Draws of a chain.
        keep: Names of the sites to keep whatever their size, or None.
        parts: Number of buffers like this one that are to be put together.
    """

    def __init__(self, count: int, keep: Any, parts: int = 1) -> None:
        self.count, self.keep, self.parts = count, keep, parts
        self.tensors: dict[str, Tensor] = {}
        self.filled, self.is_made = 0, False
        self.findings: list[str] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one draw of every chain: site to (chain, *site)."""
        if not self.is_made:
            self.is_made, kept = True, self._kept(values)
            self.tensors = {
                name: torch.empty((len(value), self.count, *value.shape[1:]), dtype=value.dtype)
                for name, value in values.items()
                if name in kept
            }
        for name, buffer in self.tensors.items():
            buffer[:, self.filled] = values[name].detach().cpu()
        self.filled += 1

    def extend(self, values: Mapping[str, Tensor], count: int) -> None:
        """Adds many draws, (chain, draw, ...); as many are counted where nothing is hidden."""
        self.add({name: value[:, 0] for name, value in values.items()})
        last = self.filled - 1 + count
        for name, buffer in self.tensors.items():
            buffer[:, self.filled : last] = values[name][:, 1:].detach().cpu()
        self.filled = last

    def _kept(self, values: Mapping[str, Tensor]) -> list[str]:
        if self.keep is not None:
            return [name for name in values if name in self.keep]
        sizes = {name: value.numel() * value.element_size() * self.count * self.parts for name, value in values.items()}
        kept = sorted(values, key=lambda name: sizes[name])
        while sum(sizes[name] for name in kept) > LARGEST:
            name = kept.pop()
            self.findings.append(_left_out(name, sizes[name]))
        return kept

    def read(self, first: int = 0) -> dict[str, Tensor]:
        """What there is from a draw on: site to (chain, draw, *site), no copies."""
        return {name: buffer[:, first : self.filled] for name, buffer in self.tensors.items()}

    since = read

    @property
    def facts(self) -> Any:
        """What json can hold beside the draws."""
        return self.findings

    def fill(self, parts: Iterable[Mapping[str, Tensor]], count: int, facts: Any) -> None:
        """Takes the draws of an earlier run, ``count`` of them in parts."""
        self.findings, self.is_made, first = [*facts], count > 0, 0
        for part in parts:
            for name, values in part.items():
                if name not in self.tensors:
                    shape = (len(values), self.count, *values.shape[2:])
                    self.tensors[name] = torch.empty(shape, dtype=values.dtype)
                self.tensors[name][:, first : first + values.shape[1]] = values
            first += max((values.shape[1] for values in part.values()), default=0)
        self.filled = count


class RaggedBuffer:
    """Draws whose sites and shapes change from one to the next: kept as they come, put together at the end.

    Sites are left out as soon as they would not fit, by the largest shape that they have had so far.
    """

    def __init__(self, count: int, keep: Any, parts: int = 1) -> None:
        self.count, self.keep, self.parts = count, keep, parts
        self.rows: list[dict[str, Tensor]] = []
        self.sizes: dict[str, int] = {}
        self.filled = 0
        self.left_out: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one draw; sites and their sizes may be other ones than before."""
        names = [name for name in values if name not in self.left_out and (self.keep is None or name in self.keep)]
        self.rows.append({name: values[name].detach().cpu() for name in names})
        self.filled += 1
        for name in names:
            size = values[name].numel() * values[name].element_size() * self.count * self.parts
            self.sizes[name] = max(size, self.sizes.get(name, 0))
        while self.keep is None and sum(self.sizes.values()) > LARGEST:
            largest = max(self.sizes, key=self.sizes.__getitem__)
            self.left_out[largest] = self.sizes.pop(largest)
            for row in self.rows:
                row.pop(largest, None)

    @property
    def findings(self) -> list[str]:
        """Sentences about what was left out, and about what ``keep`` names in vain."""
        unseen = [name for name in self.keep or () if name not in self.sizes]
        return [_left_out(name, size) for name, size in self.left_out.items()] + [
            f"keep= names '{name}', but no draw has such a site." for name in unseen
        ]

    def read(self) -> dict[str, Tensor]:
        """What there is, padded with NaN: site to (chain, draw, *largest shape)."""
        rows = ragged(self.since(0))
        return {name: values.transpose(0, 1).contiguous() for name, values in rows.items()}

    def since(self, first: int) -> list[dict[str, Tensor]]:
        """The draws from one on, as they were added."""
        return self.rows[first : self.filled]

    @property
    def facts(self) -> Any:
        """What ``fill`` needs besides the draws; json."""
        return self.left_out

    def fill(self, parts: Iterable[list[dict[str, Tensor]]], count: int, facts: Any) -> None:
        """Takes what another buffer had gathered, in parts."""
        self.left_out = dict(facts)
        for part in parts:
            for row in part:
                self.add(row)
        self.filled = count


def _left_out(name: str, size: int) -> str:
    return f"The draws of '{name}' would take {size / 2**30:.1f} GiB and were not kept. keep=[...] decides."
