"""What a run had come to when it was last written down, wherever that was: a folder, or a posterior in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from inference import checkpoint, codec
from inference.distributed import ALONE, Processes
from inference.posterior import End, Posterior

__all__ = ["Past", "joined"]


class Past(NamedTuple):
    """What a run goes on from.

    Attributes:
        ends: Its state, and facts about it; of one of several processes, that of the first, and then what is its own.
        gathered: What it had gathered, in parts: "warmup", "draws" and "stats" as the buffers of ``inference.fit`` hold
            them, "history" as name to (step, …).
        folder: The checkpoint folder that it was read from; None for a posterior.
    """

    ends: tuple[End, ...]
    gathered: Iterator[dict[str, Any]]
    folder: str | os.PathLike[str] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Those of this process."""
        return self.ends[-1].facts

    def understood(self, in_words: type[Exception] | tuple[()] = ()) -> AbstractContextManager[None]:
        """See ``checkpoint.understood``."""
        return checkpoint.understood(self.folder or "This Posterior", "run", in_words)

    @classmethod
    def of(cls, source: str | os.PathLike[str] | Posterior, processes: Processes = ALONE) -> Past:
        """Reads a checkpoint folder, a saved posterior or a posterior; what is this process's part of it.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, does not hold the end of a run, or is that of another number of processes.
        """
        if isinstance(source, Posterior):
            return cls._of_posterior(source, processes)
        if not checkpoint.is_of_run(source):
            return cls._of_posterior(Posterior.load(source), processes)
        tensors, meta, parts = checkpoint.Journal(source, is_continued=True).read()
        gathered = (codec.decode(_own_rows(layout, held, processes), {}) for held, layout in parts)
        with checkpoint.understood(source, "run", in_words=ValueError):
            return cls(_own_ends(End(meta["facts"], meta["tree"], tensors), processes), gathered, source)

    @classmethod
    def _of_posterior(cls, posterior: Posterior, processes: Processes) -> Past:
        if not posterior._ends:
            raise ValueError(
                "This Posterior does not hold the end of its run: it was changed, saved by an earlier version, or its state "
                "cannot be written down. Start a new run from it: start=posterior."
            )
        ends = _own_ends(posterior._ends[0], processes)
        facts = ends[-1].facts
        read, improved = facts["read"], facts["improved"]
        own = processes.portion(posterior.shape[0]) if facts.get("is_split") else slice(None)
        draws: Any = {name: values[own, :read] for name, values in posterior.draws.items()}
        warmup: Any = {name: values[own, :improved] for name, values in posterior.warmup_draws.items()}
        if posterior.info.get("structure") == "changing":
            draws, warmup = _rows(draws), _rows(warmup)
        stats = {name: values[own, :read] for name, values in posterior.stats.items()}
        history = posterior.history
        if facts.get("is_split"):
            history = {name: values[:, own] for name, values in history.items()}
        return cls(ends, iter([{"draws": draws, "warmup": warmup, "stats": stats, "history": history}]))


def joined(ends: list[End]) -> End:
    """The ends of several processes as one; see ``Past``."""
    if len(ends) == 1:
        return ends[0]
    facts = {**ends[0].facts, "others": [end.facts for end in ends[1:]]}
    tensors = {f"{rank}/{name}": tensor for rank, end in enumerate(ends) for name, tensor in end.tensors.items()}
    return End(facts, {"processes": [end.tree for end in ends]}, tensors)


def _own_ends(end: End, processes: Processes) -> tuple[End, ...]:
    facts = [end.facts, *end.facts.get("others", ())]
    if len(facts) != processes.size:
        raise ValueError(
            f"The run was begun by {len(facts)} process(es), but there are {processes.size} now. Start as many as there "
            f"were: torchrun --nproc-per-node={len(facts)}, or none at all for one."
        )
    if len(facts) == 1:
        return (end,)
    ends = [End(facts[i], tree, _held(end.tensors, i)) for i, tree in enumerate(end.tree["processes"])]
    return tuple(ends[i] for i in dict.fromkeys((0, processes.rank)))


def _own_rows(layout: Any, tensors: dict[str, Tensor], processes: Processes) -> codec.Encoded:
    if not isinstance(layout, dict):
        return codec.Encoded(layout, tensors)
    i = min(processes.rank, len(layout["processes"]) - 1)
    return codec.Encoded(layout["processes"][i], _held(tensors, i))


def _held(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    prefix = f"{rank}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rows(draws: dict[str, Any]) -> list[dict[str, Any]]:
    count = min((values.shape[1] for values in draws.values()), default=0)
    return [{name: values[:, i] for name, values in draws.items()} for i in range(count)]
