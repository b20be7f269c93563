"""What a run says of its steps, as JSON lines: a file that any tool reads while the run goes on."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.contract import Draw
from inference.distributed import processes

__all__ = ["JSONLines"]

_START = '{"step": '  # of every line


class JSONLines:
    """A callback, for every back-end, that writes one line of JSON every few steps.

        {"step": 40, "seconds": 0.61, "rows_per_second": 8400.0, "loss": 12345.6, "rate": 900.1, "distortion": 11445.5}

    ``step`` is the number of steps that are taken, and ``seconds`` what they took since the first one. What has one number
    for each chain is averaged over the chains; what is not finite is null; ``validation`` is there when it was looked at
    since the line before. A run that begins at its first step begins the file anew. One that is resumed goes on with it, in
    place of the lines of steps that it takes once more. Of several processes the first one writes.

    Args:
        path: The file. Folders are made.
        every: Steps from one line to the next; in between nothing is read from a GPU.

    Raises:
        ValueError: If ``every`` is no count.
        IsADirectoryError: If the path is a folder.

    Example:
        >>> import pathlib, pyro, pyro.distributions as dist, tempfile
        >>> from inference import SVI
        >>> def level():
        ...     pyro.sample("level", dist.Normal(0.0, 1.0))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = SVI(steps=40, seed=0, progress=False, callbacks=(JSONLines(path),)).fit(level)
        >>> [json.loads(line)["step"] for line in path.read_text().splitlines()]
        [20, 40]
    """

    is_passive = True  # a recorded step need not be looked at again after it

    def __init__(self, path: str | os.PathLike[str], every: int = 20) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}, but must be an integer of at least 1: the steps from line to line.")
        self.path, self.every = Path(path), every
        if self.path.is_dir():
            raise IsADirectoryError(
                f"'{self.path}' is a folder, but JSONLines writes a file: add a name, such as log.jsonl."
            )
        self._before: float | None = None  # seconds of the run before this call of fit or resume; None before its first step
        self._last, self._begun, self._counted = -1, 0.0, (0, 0.0)
        self._looked: list[Tensor] = []

    def __repr__(self) -> str:
        return f"JSONLines({str(self.path)!r}, every={self.every})"

    def __call__(self, step: int, info: Any) -> None:
        if not processes().is_first:
            return
        if self._before is None or step != self._last + 1:
            self._begin(step)
        self._last = step
        found = info.stats if isinstance(info, Draw) else info._asdict()
        if isinstance(found.get("validation"), Tensor):
            self._looked.append(found["validation"])
        if (step + 1) % self.every == 0:
            self._write(step + 1, found)

    def _begin(self, step: int) -> None:
        """At the first step of a fit, or where a resumed one goes on."""
        self._begun, self._before, self._looked = time.perf_counter(), 0.0, []
        self._counted = (step, self._begun)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if step == 0 else [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        if kept:
            self._before = float(json.loads(kept[-1])["seconds"])
        fresh = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.new")
        try:
            fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            fresh.replace(self.path)
        finally:
            fresh.unlink(missing_ok=True)

    def _write(self, step: int, found: Mapping[str, Any]) -> None:
        numbers = {name: _mean(value) for name, value in found.items() if _is_number(value) and name != "validation"}
        now = time.perf_counter()
        line: dict[str, Any] = {"step": step, "seconds": round((self._before or 0.0) + now - self._begun, 3)}
        rows, (first, since) = found.get("rows"), self._counted
        if isinstance(rows, int) and now > since:
            line["rows_per_second"] = round(rows * (step - first) / (now - since), 1)
        self._counted = step, now
        seen = [value for value in map(_mean, self._looked) if value is not None]
        self._looked.clear()
        line |= numbers | ({"validation": seen[-1]} if seen else {})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a run is worth more than its log
            warnings.warn(f"The log '{self.path}' misses step {step} ({error}). The run goes on.", stacklevel=2)


def _lines(path: Path) -> list[str]:
    """The lines of an earlier run that are whole: the last one may have been cut by a kill."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    whole = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and all(type(found.get(name)) in (int, float) for name in ("step", "seconds")):
            whole.append(line)
        elif number < len(lines) or not _START.startswith(line[: len(_START)]):
            raise ValueError(f"'{path}' is no log of JSONLines: see its line {number}. Give the log another name.")
    return whole


def _is_number(value: Any) -> bool:
    """Whether a value is one number, or one for each chain."""
    return isinstance(value, Tensor) and value.dim() <= 1 and value.numel() > 0 and not value.is_complex()


def _mean(value: Tensor) -> float | None:
    """The number, or the mean over chains; None where it is not finite, which JSON does not know."""
    mean = float(value.detach().to(torch.float64).mean())
    return mean if math.isfinite(mean) else None
