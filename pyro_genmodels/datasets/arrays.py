"""Arrays in .npy and .npz files. What is no array of numbers is refused: nothing that is read is ever executed."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

__all__ = ["read_arrays"]

# What numpy and zipfile raise for files that are damaged; it is documented nowhere.
_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_arrays(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Some arrays of a file.

    Args:
        path: A .npy or .npz file.
        wanted: The names of those to read; others are not looked at, but for one that is alone.

    Returns:
        Name to array, "x" that of a .npy; and the names of all arrays in the file.

    Raises:
        ValueError: The file is damaged, holds objects instead of numbers, or more than the memory of this machine.
    """
    try:
        # Opened here, because np.load leaves a broken archive open.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"x": loaded}, ("x",)
            names = tuple(loaded.files)
            read = [name for name in names if name in wanted] or (list(names) if len(names) == 1 else [])
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in loaded.zip.infolist()}
            if sum(sizes[name] for name in read) > _memory():
                raise MemoryError("unpacked, it is larger than the memory of this machine")
            arrays = {name: loaded[name] for name in read}
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    if broken := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise _unreadable(path, f"'{broken[0]}' is no array")
    return arrays, names


def _unreadable(path: Path, reason: Exception | str) -> ValueError:
    first = str(reason).partition(". ")[0].rstrip(".")  # numpy goes on with how to load objects, pickled ones
    return ValueError(f"{path.name} cannot be read as numpy arrays: {first}. Write it anew with np.savez, numbers only.")


def _memory() -> int:
    """Bytes of this machine; without limit where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**63
