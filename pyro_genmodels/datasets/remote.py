"""Data sets that are too large for the package: downloaded on request, whole and as they were published, or not at all."""

from __future__ import annotations

import gzip
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["SOURCES", "Source", "download", "fetch", "folder"]

_FOLDER = "PYRO_GENMODELS_DATA"
_SECONDS = 30.0  # without a byte
_MAGIC = {1: 2049, 3: 2051}  # of IDX files of bytes, by their number of dimensions


class Source(NamedTuple):
    """A file that is published somewhere.

    Attributes:
        url: Where.
        sha256: Its checksum, hexadecimal.
    """

    url: str
    sha256: str


_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"  # plain: it is the checksum that counts
SOURCES: Mapping[str, Mapping[str, Source]] = {
    "mnist": {
        "": Source(
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
            "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
        )
    },
    "fashion_mnist": {
        "x_train": Source(
            f"{_FASHION}/train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        "y_train": Source(
            f"{_FASHION}/train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        "x_test": Source(
            f"{_FASHION}/t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        "y_test": Source(
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    },
}


def folder() -> Path:
    """Where data sets are looked for: what PYRO_GENMODELS_DATA names, else a folder of the user's cache."""
    if _FOLDER in os.environ:
        return Path(os.environ[_FOLDER])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro-genmodels"


def download(name: str, sources: Mapping[str, Mapping[str, Source]] = SOURCES) -> Path:
    """Puts NAME.npz into ``folder()``, with the arrays x_train, y_train, x_test and y_test; nothing if it is there.

    Args:
        name: "mnist" or "fashion_mnist".
        sources: Name to where its arrays are published, as gzipped IDX files, or, under "", all of them as one .npz.

    Returns:
        The file.

    Raises:
        ImportError: Pooch is not there.
        ValueError: There is no such data set; or what came is not what was published, and is thrown away.
        OSError: It cannot be reached, or not be written; the message says what to do.

    References:
        Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits (1998).
        H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning
        algorithms (2017), MIT licence.
    """
    if name not in sources:
        raise ValueError(f"There is nothing to download for '{name}'; there are {', '.join(sources)}.")
    target, parts = folder() / f"{name}.npz", sources[name]
    if target.is_file():
        return target
    if list(parts) == [""]:
        return fetch(parts[""], target)
    pieces = {key: target.with_name(f"{name}-{key}.gz") for key in parts}
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        for key, source in parts.items():
            fetch(source, pieces[key])
        arrays = {key: _idx(path) for key, path in pieces.items()}

        with fresh.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        fresh.replace(target)
    finally:
        for path in (fresh, *pieces.values()):
            path.unlink(missing_ok=True)
    return target


def fetch(source: Source, path: str | os.PathLike[str]) -> Path:
    """Downloads one file by Pooch (extra ``data``), which checks it, and only then gives it its name.

    Args:
        source: What, and how it is known to be whole.
        path: Where it goes. Folders are made; what is there is replaced by what was checked, or stays.

    Returns:
        The path.

    Raises:
        ImportError: Pooch is not there.
        ValueError: It has another checksum; it is thrown away.
        OSError: It cannot be reached, or not be written.
    """
    try:
        import pooch
    except ImportError as error:
        raise ImportError('Downloads need Pooch: pip install "pyro-genmodels[data]".') from error

    target = Path(path)
    downloader = pooch.HTTPDownloader(timeout=_SECONDS, stream=False)  # a stream would leave the connection open
    try:
        pooch.retrieve(source.url, f"sha256:{source.sha256}", target.name, target.parent, downloader=downloader)
    except OSError as error:  # those of requests are of this kind
        raise OSError(
            f"Cannot download {source.url} ({error}). Try again, or put the data into the folder '{target.parent}' by other "
            "means."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{source.url} is not what was published: its SHA-256 is not {source.sha256}. Nothing was kept; try again, or "
            "get the data elsewhere."
        ) from error
    return target


def _idx(path: Path) -> np.ndarray:
    """Bytes in LeCun's format: a magic number, the sizes, the values."""
    with gzip.open(path) as file:
        data = file.read()
    dimensions = data[3]
    if int.from_bytes(data[:4], "big") != _MAGIC.get(dimensions):
        raise ValueError(f"{path.name} is no IDX file of bytes.")
    sizes = np.frombuffer(data, ">u4", dimensions, offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
