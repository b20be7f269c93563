"""A checkpoint: a folder of tensors and json, written whole or not at all. Nothing in it is ever pickled.

folder/checkpoint.json          what it is: format, version, names and checksums of its files, whatever the writer added
folder/tensors.safetensors      the tensors, by name
folder/...                      copies for other tools, such as posterior.nc; never read back

That of a run grows while the run goes on (``Journal``); it has, in place of the tensors,

folder/state-<step>.safetensors    what the run needs to go on from its last step
folder/rows-<step>.safetensors     what it had gathered since the write before; written once, and never again
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["VERSION", "Journal", "are_plain", "check", "is_of_run", "read", "understood", "write"]

VERSION = 1
_FORMAT = "pyro-genmodels checkpoint"
_META, _TENSORS = "checkpoint.json", "tensors.safetensors"
_OF_RUN = re.compile(r"(state|rows)-\d{8,}\.safetensors|\.(state-\d+|rows-\d+|checkpoint)\.\w+\.new")


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
    foreign = sorted(name for name in held - _own_files(path) if not _OF_RUN.fullmatch(name))  # killed at its first write
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
        checksums = {_TENSORS: _checksum(fresh / _TENSORS)}
        (fresh / _META).write_text(_sealed({**header, "checksums": checksums, "meta": meta}), encoding="utf-8")
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
    if is_of_run(path):
        raise ValueError(
            f"'{path}' is the checkpoint of a run that may not have ended. resume(folder, model, *data) of its back-end "
            "goes on with it, and gives its posterior."
        )
    document = _checked(path, [_TENSORS])
    tensors = _loaded(path / _TENSORS, document.get("checksums", {}).get(_TENSORS))
    if tensors.keys() != set(document["tensors"]):
        raise ValueError(f"'{path}' mixes files of two checkpoints: the tensors are not those that '{_META}' lists.")
    return {name: tensors[name] for name in document["tensors"]}, document["meta"]


@contextlib.contextmanager
def understood(folder: object, what: str, in_words: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Reading what ``read`` gave: parts that are missing, or of another kind, are a sentence that names the folder.

    Args:
        folder: Where it was read from.
        what: What it should hold, such as "posterior".
        in_words: Errors that say what to do already, and pass.

    Raises:
        ValueError: In place of what reading raises.
    """
    try:
        yield
    except in_words:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        if isinstance(error, ValueError) and f"'{folder}" in str(error):  # said already, of one of its files
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"'{folder}' holds no {what} that this version of pyro-genmodels can read: {reason.rstrip('.')}. Give another "
            "folder, or read it with the version that wrote it."
        ) from error


def is_of_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is the checkpoint of a run, which ``Journal`` writes and reads."""
    document = _document(Path(folder))
    return document is not None and document.get("kind") == "run"


class Journal:
    """The checkpoint of a run: the state is replaced at every write, what the run gathers is only added to.

    New files go beside the old ones, each under another name until it is on the disk. What counts is the json, which is
    replaced last, at once: whenever the machine stops, it lists files that are whole, with their checksums.

    Args:
        folder: Where it goes; made at the first write.
        is_continued: Whether the folder may hold such a checkpoint, whose gathered files are kept.

    Raises:
        FileExistsError: If the folder holds anything else, or a checkpoint that is not to be continued.
    """

    def __init__(self, folder: str | os.PathLike[str], is_continued: bool = False) -> None:
        self.path = Path(folder).resolve()
        self.files: dict[str, str] = {}  # of what was gathered: name to checksum
        if is_continued:
            self.files = {name: sum_ for name, sum_ in _checked(self.path, [])["checksums"].items() if "rows" in name}
            return
        if is_of_run(self.path):
            raise FileExistsError(
                f"'{folder}' holds the checkpoint of a run, which would be lost. Go on with it by resume('{folder}', model, "
                "*data), or choose a new folder."
            )
        check(self.path)
        if _document(self.path) is not None:
            raise FileExistsError(f"'{folder}' holds a saved posterior, which would be lost. Choose a new folder.")

    def write(
        self,
        step: int,
        state: Mapping[str, Tensor],
        rows: Mapping[str, Tensor] | None,
        meta: Mapping[str, Any],
        layout: Any,
    ) -> None:
        """Adds to the checkpoint.

        Args:
            step: Of the run; larger at every write.
            state: Replaces the state.
            rows: Is added to what was gathered; None adds nothing.
            meta: Replaces the json of the state.
            layout: Json that goes with the rows.

        Raises:
            OSError: If it cannot be written; what was there before is as it was.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            kept = dict(self.files)
            if rows is not None:
                kept |= self._put(f"rows-{step:08d}", rows, {"layout": json.dumps(layout)})
            sums = self._put(f"state-{step:08d}", state) | kept
            header = {"format": _FORMAT, "version": VERSION, "kind": "run", "files": [_META, *sums], "tensors": []}
            text = _sealed({**header, "checksums": sums, "meta": meta}, indent=None)
            self._replace(_META, lambda path: path.write_text(text, encoding="utf-8"))
            _sync(self.path)
        except (OSError, SafetensorError) as error:
            sentence = f"Cannot write to folder '{self.path}' ({error})."
            number = getattr(error, "errno", None)
            raise (OSError(number, sentence) if number else OSError(sentence)) from error
        finally:
            self._clear()
        self.files = kept

    def _put(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, str]:
        """Writes tensors; returns the name of the file and its checksum."""
        file = f"{name}.safetensors"
        return {file: self._replace(file, lambda path: save_file(_separate(tensors), path, metadata))}

    def _replace(self, name: str, write: Callable[[Path], Any]) -> str:
        """Writes a file under another name, waits until it is on the disk, and gives it its name; its checksum."""
        fresh = self.path / f".{name.split('.')[0]}.{uuid.uuid4().hex[:8]}.new"
        fresh.touch()
        mode = fresh.stat().st_mode
        write(fresh)
        fresh.chmod(mode)  # safetensors lets nobody but the owner read
        _sync(fresh)
        checksum = _checksum(fresh)
        fresh.replace(self.path / name)
        return checksum

    def _clear(self) -> None:
        """Removes files of this kind that the json does not list: older states, and what was never finished."""
        with contextlib.suppress(OSError):
            own = _own_files(self.path)
            for entry in self.path.iterdir():
                if entry.name not in own and _OF_RUN.fullmatch(entry.name):
                    entry.unlink()

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any], Iterator[tuple[dict[str, Tensor], Any]]]:
        """The last state, its json, and what was gathered, write by write: tensors and their layout.

        Raises:
            FileNotFoundError: If there is no checkpoint in the folder, or a file of it is gone.
            ValueError: If it is damaged, or was written by a later version.
        """
        document = _checked(self.path, [])
        sums = document["checksums"]
        _checked(self.path, [*sums])
        state, *others = [name for name in sums if name.startswith("state")] or [""]
        if others or not state:
            raise _damage(self.path / _META)
        gathered = ((_loaded(self.path / name, sums[name]), _layout(self.path / name)) for name in self.files)
        return _loaded(self.path / state, sums[state]), document["meta"], gathered


def _layout(path: Path) -> Any:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["layout"])
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damage(path, error) from error


def _damage(path: Path, why: object = "it is no file of pyro-genmodels") -> ValueError:
    return ValueError(f"'{path}' is damaged ({why}). Restore it, or run again.")


def _checked(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    """The json of a checkpoint all of whose files are there.

    Raises:
        FileNotFoundError: If one of them is not.
        ValueError: If the json is damaged, or was written by a later version.
    """
    missing = [name for name in (_META, *needed) if not (path / name).is_file()]
    document = _document(path)
    if missing and (document is not None or missing[0] == _META):
        raise FileNotFoundError(f"'{path}' holds no checkpoint: it has no file '{missing[0]}'.")
    if document is None:
        raise _damage(path / _META)
    if document["version"] != VERSION:
        raise ValueError(
            f"'{path}' was written in format {document['version']}, but this version reads format {VERSION}. "
            "Read it with the version of pyro-genmodels that wrote it, or a later one."
        )
    checksum = document.pop("checksum", None)
    if checksum is not None and checksum != _digest(document):
        raise _damage(path / _META, "its checksum is another")
    return document


def _loaded(path: Path, checksum: str | None) -> dict[str, Tensor]:
    try:
        found = None if checksum is None else _checksum(path)
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damage(path, error) from error
    if found != checksum:
        raise _damage(path, "its checksum is another")
    return tensors


def _sealed(document: Mapping[str, Any], indent: int | None = 1) -> str:
    """Json with its own checksum."""
    return json.dumps({**document, "checksum": _digest(document)}, indent=indent, ensure_ascii=False)


def _digest(document: Mapping[str, Any]) -> str:
    # read back first: json turns tuples into lists, and keys into text
    text = json.dumps(json.loads(json.dumps(document)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document(path: Path) -> dict[str, Any] | None:
    """The json of a checkpoint; None if it is none of ours."""
    try:
        document = json.loads((path / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if _is_ours(document) else None


def _is_ours(document: Any) -> bool:
    """Whether json has the parts of a checkpoint; the files that it names are in its own folder."""
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return False
    files, tensors, sums = (document.get(name, {}) for name in ("files", "tensors", "checksums"))
    return (
        isinstance(document.get("meta"), dict)
        and "version" in document
        and are_plain(files)
        and isinstance(sums, dict)
        and are_plain([*sums])
        and isinstance(tensors, list)
        and all(isinstance(name, str) for name in [*tensors, *sums.values()])
    )


def are_plain(names: Any) -> bool:
    """Whether json is a list of names of files in one folder, and of none elsewhere: what it names may be deleted."""
    return isinstance(names, list) and all(
        isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0") for name in names
    )


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
