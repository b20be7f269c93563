"""A table by name, and its labels, as the command line reads them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pyro_genmodels import datasets
from pyro_genmodels.catalogue import MODELS
from pyro_genmodels.datasets import Dataset

__all__ = ["read"]

_LISTED = 30  # columns that a sentence names


def read(model: str, name: str, labels: str | None = None) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """The table that a model is to be fitted to.

    Args:
        model: Name of the model, one of ``catalogue.MODELS``.
        name: Name of a data set, or of a file.
        labels: The column to predict, of models that learn from labels.

    Returns:
        The table (rows, features), its labels (rows,) or None, and the names of its columns but theirs.

    Raises:
        ValueError: If there is no such data set or column, or the labels do not suit the model.
        OSError: If the file cannot be read.
    """
    entry, data = MODELS[model], _data(name)
    if not entry.labels:
        if labels is not None:
            raise ValueError(f"{model} learns from no labels: leave --labels out.")
        return data.x, None, data.columns
    beside = [key for key in data.arrays if key != "x"]
    known = (*(data.columns if len(data.columns) <= _LISTED else ()), *beside)
    if labels is None:
        raise ValueError(f"{model} learns from labels: give --labels COLUMN, one of {', '.join(known)}.")
    if labels in beside:
        x, y, columns = data.x, data[labels], data.columns
    elif labels in data.columns:
        place = data.columns.index(labels)
        rest = [j for j in range(len(data.columns)) if j != place]
        if not rest:
            raise ValueError(f"'{labels}' is the only column: there is nothing to predict it from.")
        x, y, columns = data.x[:, rest], data.x[:, place], tuple(data.columns[j] for j in rest)
    else:
        raise ValueError(f"There is no column '{labels}'; there are {', '.join(known)}.")
    return x, y.double() if entry.labels == "numbers" else _whole_labels(labels, y, model == "naive_bayes"), columns


def _whole_labels(name: str, y: Tensor, may_be_unknown: bool) -> Tensor:
    least = -1 if may_be_unknown else 0
    bad = (~((y == y.round()) & (y >= least))).nonzero()
    if len(bad):
        wanted = "whole numbers from 0 on" + (", or -1 where they are not known" if may_be_unknown else "")
        raise ValueError(
            f"Labels must be {wanted}, but '{name}' is {float(y[bad[0, 0]]):g} in row {int(bad[0])} of the table."
        )
    return y.long()


def _data(name: str) -> Dataset:
    if name in datasets.names():
        return datasets.load(name)
    if not Path(name).suffix and not Path(name).exists():
        raise ValueError(f"There is no data set '{name}'; there are {', '.join(datasets.names())}, or give a file.")
    return datasets.read_table(name)
