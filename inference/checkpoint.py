"""A checkpoint: a folder of tensors and json, written whole or not at all. Nothing in it is ever pickled.

folder/checkpoint.json          what it is: format, version, names of its files, whatever the writer added
folder/tensors.safetensors      the tensors, by name
folder/...                      copies for other tools, such as posterior.nc; never read back
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["VERSION", "check", "read", "write"]

VERSION = 1
_FORMAT = "pyro-genmodels checkpoint"
_META, _TENSORS = "checkpoint.json", "tensors.safetensors"


def check(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that ``write`` must not replace: one that holds anything but an earlier checkpoint.

    Args:
        folder: Where a checkpoint is to go; it need not exist.

    Raises:
        FileExistsError: If it is a file, or a folder with anything in it that ``write`` did not put there.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"'{path}' is a file, but a folder is to be written there. Choose another name.")
    if not path.exists():
        return
    held = {entry.name for entry in path.iterdir()}
    foreign = sorted(held - _own_files(path))
    if foreign:
        raise FileExistsError(
            f"Folder '{path}' exists and holds something else ('{foreign[0]}'), which would be lost. "
            "Choose a new folder, or empty this one first."
        )


def write(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    copies: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Writes a checkpoint into a hidden sibling, then renames it: the target is the old checkpoint or the new one.

    Args:
        folder: Where it goes. Parents are made; an earlier checkpoint is replaced.
        tensors: Name to tensor, of any device; names are free text.
        meta: What json can hold.
        copies: File name to a function that writes that file, for what other tools read.

    Raises:
        FileExistsError: If the folder holds anything but an earlier checkpoint.
        OSError: If it cannot be written; the message names the folder.
    """
    target = Path(folder).resolve()
    check(target)
    token = uuid.uuid4().hex[:8]
    fresh = target.with_name(f".{target.name}.{token}.new")
    copies = copies or {}
    files = [_META, _TENSORS, *copies]
    header = {"format": _FORMAT, "version": VERSION, "files": files, "tensors": [*tensors]}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        save_file(_separate(tensors), fresh / _TENSORS)
        for name, copy in copies.items():
            copy(fresh / name)
        text = json.dumps({**header, "meta": meta}, indent=1, ensure_ascii=False)
        (fresh / _META).write_text(text, encoding="utf-8")
        shutil.copymode(fresh / _META, fresh / _TENSORS)  # safetensors lets nobody but the owner read
        for file in files:
            _sync(fresh / file)
        _sync(fresh)
        _exchange(fresh, target, token)
    except (OSError, SafetensorError) as error:
        sentence = f"Cannot write to folder '{folder}' ({error}). Nothing there was changed; choose another folder."
        number = getattr(error, "errno", None)
        raise (OSError(number, sentence) if number else OSError(sentence)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what ``write`` wrote.

    Returns:
        The tensors, on the CPU and in the order in which they were given, and the json.

    Raises:
        FileNotFoundError: If there is no checkpoint in the folder, or a file of it is gone.
        ValueError: If it is damaged, or was written by a later version.
    """
    path = Path(folder)
    for name in (_META, _TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"'{path}' holds no checkpoint: it has no file '{name}'.")
    document = _document(path)
    if document is None:
        raise ValueError(f"'{path / _META}' is damaged, or no file of pyro-genmodels. Restore it, or run again.")
    if document["version"] != VERSION:
        raise ValueError(
            f"'{path}' was written in format {document['version']}, but this version reads format {VERSION}. "
            "Read it with the version of pyro-genmodels that wrote it, or a later one."
        )
    try:
        tensors = load_file(path / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{path / _TENSORS}' is damaged ({error}). Restore it, or run again.") from error
    if tensors.keys() != set(document["tensors"]):
        raise ValueError(f"'{path}' mixes files of two checkpoints: the tensors are not those that '{_META}' lists.")
    return {name: tensors[name] for name in document["tensors"]}, document["meta"]


def _document(path: Path) -> dict[str, Any] | None:
    """The json of a checkpoint; None if it is none of ours."""
    try:
        document = json.loads((path / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(document, dict) and document.get("format") == _FORMAT
    return document if is_ours and {"version", "files", "tensors", "meta"} <= document.keys() else None


def _own_files(path: Path) -> set[str]:
    document = _document(path)
    return set(document["files"]) if document else set()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own: safetensors refuses views of one buffer, and tied weights."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        separate[name] = own
    return separate


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk: a rename may not overtake what it renames."""
    # Windows opens no folders, and some network file systems sync none.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(fresh: Path, target: Path, token: str) -> None:
    """Puts ``fresh`` in the place of ``target``; a folder cannot be renamed onto one that is not empty."""
    old = target.with_name(f".{target.name}.{token}.old")
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:  # Ctrl-C as well
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
