"""What a run had come to when it was last written down, wherever that was: a folder, or a posterior in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from inference import checkpoint, codec
from inference.posterior import End, Posterior

__all__ = ["Past"]


class Past(NamedTuple):
    """What a run goes on from.

    Attributes:
        end: Its state, and facts about it.
        gathered: What it had gathered, in parts: "warmup", "draws" and "stats" as the buffers of ``inference.fit`` hold
            them, "history" as name to (step, …).
        folder: The checkpoint folder that it was read from; None for a posterior.
    """

    end: End
    gathered: Iterator[dict[str, Any]]
    folder: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, source: str | os.PathLike[str] | Posterior) -> Past:
        """Reads a checkpoint folder, a saved posterior or a posterior.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or does not hold the end of a run.
        """
        if isinstance(source, Posterior):
            return cls._of_posterior(source)
        if not checkpoint.is_of_run(source):
            return cls._of_posterior(Posterior.load(source))
        tensors, meta, parts = checkpoint.Journal(source, is_continued=True).read()
        gathered = (codec.decode(codec.Encoded(layout, held), {}) for held, layout in parts)
        return cls(End(meta["facts"], meta["tree"], tensors), gathered, source)

    @classmethod
    def _of_posterior(cls, posterior: Posterior) -> Past:
        if not posterior._ends:
            raise ValueError(
                "This Posterior does not hold the end of its run: it was changed, saved by an earlier version, or its state "
                "cannot be written down. Start a new run from it: start=posterior."
            )
        (end,) = posterior._ends
        read, improved = end.facts["read"], end.facts["improved"]
        draws: Any = {name: values[:, :read] for name, values in posterior.draws.items()}
        warmup: Any = {name: values[:, :improved] for name, values in posterior.warmup_draws.items()}
        if posterior.info.get("structure") == "changing":
            draws, warmup = _rows(draws), _rows(warmup)
        stats = {name: values[:, :read] for name, values in posterior.stats.items()}
        part = {"draws": draws, "warmup": warmup, "stats": stats, "history": posterior.history}
        return cls(end, iter([part]))


def _rows(draws: dict[str, Any]) -> list[dict[str, Any]]:
    count = min((values.shape[1] for values in draws.values()), default=0)
    return [{name: values[:, i] for name, values in draws.items()} for i in range(count)]
