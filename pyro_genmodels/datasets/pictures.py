"""Pictures to train networks on: the bundled digits, MNIST, Fashion-MNIST and CIFAR-10 from a folder of data, or a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.datasets import remote
from pyro_genmodels.datasets.arrays import read_arrays
from pyro_genmodels.datasets.bundled import digits

__all__ = ["PICTURES", "Pictures", "pictures"]

PICTURES = ("cifar10", "digits", "fashion_mnist", "mnist")
_FOLDER = "PYRO_GENMODELS_DATA"
_TEST = 297  # of the digits, the last ones


@dataclass(frozen=True, eq=False)
class Pictures:
    """Rows to train on, and rows to judge by.

    Args:
        name: Short name.
        train: (rows, *shape) float32; whole numbers of bytes are divided by 255.
        test: (rows, *shape); None if there are none.
    """

    name: str
    train: Tensor
    test: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        return tuple(self.train.shape[1:])


def pictures(name: str) -> Pictures:
    """Pictures by name, or from a file.

    "digits" come with the package. "mnist" and "fashion_mnist" are read from NAME.npz, with the arrays ``x_train`` and
    ``x_test``, in the folder that the environment variable PYRO_GENMODELS_DATA names, or where ``download`` puts them
    without it. So is any other .npz file, which may have one array ``x`` instead; a .npy file is that array. "cifar10",
    (rows, 3, 32, 32), is read from cifar10_train_0.npz to cifar10_train_4.npz and cifar10_test.npz in that folder, with the
    residuals ``res`` of a predictor.

    Args:
        name: "digits", "mnist", "fashion_mnist", "cifar10", or a path.

    Raises:
        FileNotFoundError: There is no such file; for a name, the message says where it was looked for.
        ValueError: The file has no such arrays, or they are no rows of finite numbers.

    Example:
        >>> pictures("digits").train.shape
        torch.Size([1500, 8, 8])
    """
    if name == "digits":
        x = (digits().x / 16.0).float().reshape(-1, 8, 8)
        return Pictures(name, x[:-_TEST], x[-_TEST:])
    if name == "cifar10":
        parts = [f"{name}_{part}" for part in ("train_0", "train_1", "train_2", "train_3", "train_4", "test")]
        x = torch.cat([_decoded(_found(part)) for part in parts])
        return Pictures(name, x[:-10000], x[-10000:])
    path = _found(name) if name in PICTURES else Path(name)
    if path.suffix.lower() not in (".npz", ".npy"):
        raise ValueError(f"There are no pictures '{name}'; there are {', '.join(PICTURES)}, or give a .npz or .npy file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    arrays, names = read_arrays(path, ("x", "x_train", "x_test"))
    train = next((arrays[key] for key in ("x_train", "x") if key in arrays), None)
    if train is None:
        raise ValueError(f"{path.name} has the arrays {', '.join(names)}: call the rows 'x', or 'x_train' and 'x_test'.")
    x, test = _rows(train, path.name), arrays.get("x_test")
    found = Pictures(path.stem, x, None if test is None else _rows(test, path.name))
    if found.test is not None and found.test.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"{path.name} has rows of shape {tuple(x.shape[1:])} to train on, but {tuple(found.test.shape[1:])} in x_test."
        )
    return found


def _found(name: str) -> Path:
    """The file of a set in the folder of data."""
    path = remote.folder() / f"{name}.npz"
    if path.is_file():
        return path
    unset = "" if _FOLDER in os.environ else f", as {_FOLDER} is not set"
    remedy = f"pyro_genmodels.datasets.download('{name}') puts it there"
    if name not in remote.SOURCES:
        remedy = "Put it there, with the residuals 'res'"
    raise FileNotFoundError(
        f"{name} is read from {name}.npz, but there is none in '{path.parent}'{unset}. {remedy}; the digits come along."
    )


def _decoded(path: Path) -> Tensor:
    """(rows, 3, 32, 32) from 0 to 1, of residuals: of G, R − G and B − G, of the median-edge predictor of JPEG-LS.

    References:
        M. Weinberger, G. Seroussi, G. Sapiro, The LOCO-I lossless image compression algorithm (2000).
    """
    residuals = torch.from_numpy(read_arrays(path, ("res",))[0]["res"]).short()
    planes = residuals.new_zeros(*residuals.shape[:2], residuals.shape[2] + 1, residuals.shape[3] + 1)
    for i, j in np.ndindex(*residuals.shape[2:]):
        left, upper, corner = planes[..., i + 1, j], planes[..., i, j + 1], planes[..., i, j]
        predicted = (left + upper - corner).clamp(torch.minimum(left, upper), torch.maximum(left, upper))
        planes[..., i + 1, j + 1] = (residuals[..., i, j] + predicted) % 256
    green, red, blue = planes[..., 1:, 1:]
    return torch.stack([(red + green - 128) % 256, green, (blue + green - 128) % 256], 1).float() / 255.0


def _rows(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind not in "biuf" or array.ndim < 2 or not array.size:
        raise ValueError(
            f"{name} has {array.dtype} of shape {array.shape}, but must have rows of numbers, (rows, height, width) or such."
        )
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.dtype == np.uint8:
        x = x / 255.0
    bad = (~x.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{name} has {len(bad)} values that are not finite, the first at {tuple(bad[0].tolist())}.")
    return x
