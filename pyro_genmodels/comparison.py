"""One model, one data set, several back-ends, one table; and what the command line knows by name.

Every back-end fits the same rows, starts on its own, and is seeded alike. Labels of all are then matched to one pivot, the
most probable point of the first, so that "the first component" is the same in every column.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import EM, HMC, SVI, Backend, Gibbs, MetropolisHastings, Posterior, arviz, relabel
from pyro_genmodels import plots
from pyro_genmodels.classical import GMM

__all__ = ["METHODS", "MODELS", "Comparison", "Entry", "Folder", "check_writable", "compare", "is_interrupted", "split"]


@dataclass(frozen=True)
class Entry:
    """A model that the command line knows by name.

    Args:
        description: What it is.
        build: Makes one, from the options that the user gave.
        options: Defaults of the options that ``build`` takes.
        methods: Names of the back-ends that run it.
        shown: Sites in the printed table, on which back-ends are held against each other.
        judged: Sites whose convergence is judged, and which are in the table that is saved.
        dims: Site to names of its dimensions; "features" takes the names of the columns.
    """

    description: str
    build: Callable[..., Any]
    options: Mapping[str, Any]
    methods: tuple[str, ...]
    shown: tuple[str, ...]
    judged: tuple[str, ...]
    dims: Mapping[str, tuple[str, ...]]


# Settings that suffice for a few thousand rows and a dozen unknowns: R-hat below 1.01 with room, seconds each. A random
# walk needs some 200 steps for an independent draw in 11 dimensions, hence the thinning.
METHODS: dict[str, Backend[Any, Any]] = {
    "svi": SVI(steps=1000, learning_rate=0.02, draws=2000),
    "em": EM(restarts=10),
    "gibbs": Gibbs(chains=8, warmup=200, draws=500),
    "mh": MetropolisHastings(chains=16, warmup=1000, draws=500, thin=20),
    "hmc": HMC(chains=8, warmup=300, draws=1000),
}

MODELS: dict[str, Entry] = {
    "gmm": Entry(
        description="Gaussian mixture",
        build=GMM,
        options={"components": 2, "covariance": "full"},
        methods=("svi", "em", "gibbs", "mh", "hmc"),
        shown=("weights", "means"),
        judged=("weights", "means", "covariances"),
        dims={"weights": ("components",), "means": ("components", "features")},
    ),
}

_SCORED = 1000  # draws that the held-out density averages over
_PRINTED = 24  # elements in the printed table


def split(x: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows held out, at random but the same for the same seed; both in their old order.

    Args:
        x: (rows, features).
        share: Share of the rows to hold out, in [0, 1).
        seed: Any integer from 0 on.

    Raises:
        ValueError: If no row would be left to fit.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"The share of rows to hold out is {share}, but must be at least 0 and less than 1.")
    count = round(share * len(x))
    if len(x) and count >= len(x):
        raise ValueError(f"Holding out {count} of {len(x)} rows leaves none to fit.")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    return x[order[count:].sort().values], x[order[:count].sort().values]


def is_interrupted(posterior: Posterior) -> bool:
    """Whether Ctrl-C cut the run short."""
    return any(finding.startswith("Stopped by Ctrl-C") for finding in posterior.info.get("findings", ()))


def compare(
    entry: Entry,
    options: Mapping[str, Any],
    x: Tensor,
    columns: Sequence[str],
    methods: Mapping[str, Backend[Any, Any]],
    *,
    held_out: float = 0.1,
    seed: int = 0,
    after: Callable[[str, Posterior], None] | None = None,
) -> Comparison:
    """Fits one model with several back-ends.

    Args:
        entry: The model's entry.
        options: Options for ``entry.build``.
        x: The table, (rows, features).
        columns: Names of the features.
        methods: Name to back-end, in the order in which they run.
        held_out: Share of the rows that no back-end sees.
        seed: Seed of the split.
        after: Called with a method's name and posterior as soon as it has been fitted.

    Returns:
        The comparison; after Ctrl-C, of what there is.

    Raises:
        ValueError: If every back-end refuses the model or the data: what the first one says.
    """
    training, test = split(x, held_out, seed)
    comparison = Comparison(entry=entry, model=entry.build(**options), x=training, test=test, columns=tuple(columns))
    for name, backend in methods.items():
        try:
            posterior = backend.fit(entry.build(**options), training)
        except KeyboardInterrupt:
            comparison.interrupted = name
            break
        except (ValueError, RuntimeError, ArithmeticError) as error:
            if not comparison.posteriors and name == [*methods][-1]:
                raise ValueError(next(iter(comparison.failures.values()), str(error))) from error
            comparison.failures[name] = str(error)
            continue
        comparison.add(name, posterior)
        if after is not None:
            after(name, comparison.posteriors[name])
        if is_interrupted(posterior):
            comparison.interrupted = name
            break
    return comparison
