"""Rows of the one table of benchmarks: a script adds what it measured, and shows the rows at its end; run.py collects them.

    rows = Rows()
    rows.add("seconds a step", "200,000 x 16 normals, float64", ours=0.2, theirs=0.9, peer="scikit-learn", target=1.5)
    rows.show()

Ratios and verdicts are worked out here, from the two numbers and the target, so that no script can say other than it
measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

__all__ = ["Row", "Rows", "read"]

_MARK = "row "
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Args:
        measured: What was measured, with its unit.
        on: The data, the model and the setting.
        ours: Our number.
        theirs: The peer's; None if there is none.
        peer: Whose it is.
        is_less_better: Whether less is better, as of seconds.
        is_difference: Whether to compare by the difference, as of log-likelihoods, and not by the ratio.
        target: What the gain must reach: how many times better, or better by how much. Without a peer, our number itself.
    """

    measured: str
    on: str
    ours: float
    theirs: float | None = None
    peer: str = ""
    is_less_better: bool = True
    is_difference: bool = False
    target: float | None = None

    @property
    def gain(self) -> float:
        """How many times better ours is, or better by how much; without a peer, our number."""
        if self.theirs is None:
            return self.ours
        worse, better = (self.theirs, self.ours) if self.is_less_better else (self.ours, self.theirs)
        if self.is_difference:
            return worse - better
        return worse / better if better else math.nan

    @property
    def verdict(self) -> str:
        """ "met" or "MISS"; "" without a target."""
        if self.target is None:
            return ""
        is_bound = self.theirs is None and self.is_less_better
        short = self.gain - self.target if is_bound else self.target - self.gain
        return "met" if short <= _ROUNDING * max(1.0, abs(self.target)) else "MISS"  # a NaN misses


class Rows(list[Row]):
    """What a script has measured."""

    def add(self, measured: str, on: str, ours: float, **others: object) -> None:
        """Adds a row; see ``Row``."""
        self.append(Row(measured=measured, on=on, ours=ours, **others))  # type: ignore[arg-type]

    def show(self) -> None:
        """Prints the rows for run.py, a line each."""
        print()
        for row in self:
            found = {
                name: float(f"{value:.12g}") if isinstance(value, float) else value for name, value in _said(row).items()
            }
            print(_MARK + json.dumps(found, ensure_ascii=False), flush=True)


def _said(row: Row) -> dict[str, object]:
    """The fields of a row that are not their defaults."""
    return {field.name: value for field in fields(row) if (value := getattr(row, field.name)) != field.default}


def read(lines: Iterable[str]) -> Rows:
    """The rows among the lines that a script printed."""
    return Rows(Row(**json.loads(line.removeprefix(_MARK))) for line in lines if line.startswith(_MARK + "{"))
