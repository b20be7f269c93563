"""A data set is named tensors. Tables are read from files; a cell that is no number is refused, with its place."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.datasets.arrays import read_arrays

__all__ = ["Dataset", "parse_csv", "read_table"]

_MISSING = {"", "na", "n/a", "nan", "null", "none"}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Named tensors, and where they come from.

    Args:
        name: Short name.
        description: What was measured, and in which unit.
        source: Who published it.
        arrays: Name to tensor. A table with one row an observation is called "x", (n, d).
        columns: Names of the d columns of "x", or, without an "x", of the arrays.
    """

    name: str
    description: str
    source: str
    arrays: Mapping[str, Tensor]
    columns: tuple[str, ...]

    @property
    def x(self) -> Tensor:
        """The table of observations, (n, d).

        Raises:
            ValueError: There is none; the arrays have names of their own.
        """
        if "x" not in self.arrays:
            raise ValueError(f"'{self.name}' is no table of observations: take its {', '.join(self.arrays)}.")
        return self.arrays["x"]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]


def read_table(path: str | os.PathLike[str]) -> Dataset:
    """The table of numbers in a .csv, .npz or .npy file.

    A .csv is separated by commas; its first row is a header if no cell of it is a number. A .npz has one array, or one
    called "x"; an array of one dimension is one column.

    Args:
        path: The file.

    Returns:
        A data set with "x", (n, d) float64; columns without names are called x1, x2, ...

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no table of finite numbers; the message names the row, counted from 1 with the header,
            and the column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    match path.suffix.lower():
        case ".csv":
            try:
                # Spreadsheets put a byte-order mark before the first column's name.
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path.name} is not UTF-8 text: {error}.") from error
            x, columns = parse_csv(text, path.name)
        case ".npz" | ".npy":
            x, columns = _check_array(_load_array(path), path.name)
        case suffix:
            raise ValueError(f"{path.name} ends in '{suffix}', but a table is read from .csv, .npz or .npy.")
    return Dataset(path.stem, f"{x.shape[0]} rows, {x.shape[1]} columns", str(path), {"x": x}, columns)


def parse_csv(text: str, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """The numbers in a text of comma-separated values.

    Args:
        text: The text, with or without a header.
        name: What to call it in errors.

    Returns:
        The numbers, (n, d) float64, and the d names of the columns.

    Raises:
        ValueError: See ``read_table``.
    """
    try:
        lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(text, newline=""), strict=True)]
    except csv.Error as error:
        raise ValueError(f"{name} is not comma-separated text: {error}.") from error
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line not in ([], [""])]
    if not rows:
        raise ValueError(f"{name} is empty.")
    number, first = rows[0]
    if any(_is_number(cell) for cell in first) or all(cell.lower() in _MISSING for cell in first):
        columns = _default_columns(len(first))
    else:
        columns = tuple(first)
        del rows[0]
        if "" in columns:
            raise ValueError(
                f"{name}: column {columns.index('') + 1} has no name in row {number}. Name it, or leave it out if it "
                "only numbers the rows."
            )
    if not rows:
        raise ValueError(f"{name} has a header, but no rows of numbers.")
    for number, line in rows:
        if len(line) != len(columns):
            raise ValueError(f"{name}: row {number} has {len(line)} cells, but there are {len(columns)} columns.")
    values = [
        [_parse_number(cell, f"{name}: row {number}, column '{column}'") for cell, column in zip(line, columns)]
        for number, line in rows
    ]
    return torch.tensor(values, dtype=torch.float64), columns


def _parse_number(cell: str, place: str) -> float:
    if cell.lower() in _MISSING:
        raise ValueError(f"{place}: the value is missing. Fill it in, or leave the row out.")
    if not _is_number(cell):
        raise ValueError(f"{place}: '{cell}' is not a number.")
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError(f"{place}: '{cell}' is not finite.")
    return value


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _default_columns(count: int) -> tuple[str, ...]:
    return tuple(f"x{index}" for index in range(1, count + 1))


def _load_array(path: Path) -> np.ndarray:
    arrays, names = read_arrays(path, ("x",))
    if not arrays:
        raise ValueError(f"{path.name} has the arrays {list(names)}: call the table 'x', or leave the others out.")
    return next(iter(arrays.values()))


def _check_array(array: np.ndarray, name: str) -> tuple[Tensor, tuple[str, ...]]:
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has values of type {array.dtype}, but a table has real numbers.")
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {array.shape}, but a table has rows and columns: reshape it to (n, d).")
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}.")
    values = np.array(array.reshape(len(array), -1), dtype=np.float64, order="C")
    columns = _default_columns(values.shape[1])
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        what = "the value is missing" if np.isnan(values[row, column]) else "the value is not finite"
        raise ValueError(f"{name}: row {row + 1}, column '{columns[column]}': {what}.")
    return torch.from_numpy(values), columns
