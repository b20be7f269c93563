"""Damaged files, made from whole ones, for every reader of the packages; what became of each of them.

A reader may give a value, or refuse in a sentence of ours: a ValueError, OSError or Unsupported that names the file or its
folder. Anything else is a defect, as is a file that was lost or changed, or code that was run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference import Draw, Gibbs, JSONLines, Posterior, Unsupported, checkpoint
from pyro_genmodels import cli, datasets, trained
from pyro_genmodels.comparison import Folder

__all__ = ["CASES", "Case", "Outcome", "fuzz"]

X = torch.tensor([[3.6, 79.0], [1.8, 54.0], [3.3, 74.0], [2.3, 62.0]], dtype=torch.float64)
PICTURES = np.arange(32, dtype=np.uint8).reshape(8, 2, 2)
BACKEND = Gibbs(chains=2, warmup=4, draws=4, seed=0, progress=False)
PALETTE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**70, -0.5, 1e308, "", "x", "../../x", "/etc/hostname", "\0", "é" * 50),
    *([], {}, [[]], [None], {"": None}, ["float", "nan"], ["object", "os:system", {}], ["tensor", "0", None, False, "cpu"]),
)
WORDS = (
    b"1e999",
    b"-inf",
    b"nan",
    b"",
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 5000,
    b"1_0",
    b"0x1",
)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Case(NamedTuple):
    """A kind of file.

    Attributes:
        name: Of the kind.
        make: Writes whole files into a folder.
        files: Pattern of those that are damaged, one at a time.
        read: Reads them.
        is_sealed: Whether checksums are made to fit the damage, as somebody would who means harm.
        writes: Whether a reader that succeeds goes on to write files of its kind.
    """

    name: str
    make: Callable[[Path], None]
    files: str
    read: Callable[[Path], Any]
    is_sealed: bool = False
    writes: bool = False


class Outcome(NamedTuple):
    """What became of one damaged file: "value" or "refused", and the sentence; or what went wrong."""

    kind: str
    sentence: str
    defect: str = ""


# ------------------------------------------------------------------------------------------------------ files and readers
def model(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.InverseGamma(3.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level, scale.sqrt()), obs=y)


def make_csv(folder: Path) -> None:
    (folder / "table.csv").write_text("eruptions,waiting\n3.6,79\n1.8,54\n3.3,74\n2.3,62\n")


def make_npz(folder: Path) -> None:
    np.savez(folder / "rows.npz", x=X.numpy(), other=np.arange(3))


def make_packed(folder: Path) -> None:
    np.savez_compressed(folder / "rows.npz", x_train=PICTURES, x_test=PICTURES[:2])


def make_npy(folder: Path) -> None:
    np.save(folder / "rows.npy", X.numpy())


def make_log(folder: Path) -> None:
    lines = [{"step": step, "seconds": 0.1 * step, "loss": 1.0 / step, "validation": None} for step in (10, 20, 30, 40)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_posterior(folder: Path) -> None:
    BACKEND.fit(model, X[:, 0]).save(folder / "saved")


def make_run(folder: Path) -> None:
    Gibbs(**{**vars(BACKEND), "checkpoint": folder / "run", "checkpoint_every": 3}).fit(model, X[:, 0])


def make_trained(folder: Path) -> None:
    torch.manual_seed(0)
    recipe = trained.Recipe(model="vae", shape=(2, 2), features=2)
    facts = {"data": "digits", "steps": 3, "is_done": True}
    trained.save(folder / "run" / "model", recipe, recipe.build(), facts)


def make_comparison(folder: Path) -> None:
    made = Folder(folder / "compared", {"model": "gmm", "seed": 0})
    for name in ("table.csv", "gibbs.nc"):
        made.write(name, lambda path: path.write_text("1"))


def read_table(folder: Path) -> None:
    (path,) = (path for path in folder.iterdir() if path.suffix in (".csv", ".npz", ".npy"))
    x = datasets.read_table(path).x
    assert x.dim() == 2 and x.dtype == torch.float64 and bool(x.isfinite().all())


def read_pictures(folder: Path) -> None:
    found = datasets.pictures(str(folder / "rows.npz"))
    assert found.train.dim() >= 2 and bool(found.train.isfinite().all())


def read_log(folder: Path) -> None:
    JSONLines(folder / "log.jsonl", every=50)(25, Draw({}, {"loss": torch.ones(())}))


def read_posterior(folder: Path) -> None:
    posterior = Posterior.load(folder / "saved")
    assert repr(posterior) and str(posterior.plan)
    posterior.point()
    posterior.diagnose()
    posterior.to_arviz(warmup=True)


def read_run(folder: Path) -> None:
    BACKEND.resume(folder / "run", model, X[:, 0])


def read_trained(folder: Path) -> None:
    command(["sample", str(folder / "run"), "--size", "2", "--out", str(folder / "rows.npz")])
    (folder / "rows.npz").unlink()


def read_comparison(folder: Path) -> None:
    Folder(folder / "compared", {}).write("table.csv", lambda path: path.write_text("2"))


def command(argv: list[str]) -> None:
    """The command line: input that cannot be used is one sentence and status 2."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(argv)
    if status:
        assert status == 2 and said.getvalue().count("\n") == 1, said.getvalue()
        raise ValueError(said.getvalue().strip())


CASES = (
    Case("csv", make_csv, "table.csv", read_table),
    Case("npz", make_npz, "rows.npz", read_table),
    Case("npy", make_npy, "rows.npy", read_table),
    Case("pictures, compressed npz", make_packed, "rows.npz", read_pictures),
    Case("log of JSON lines", make_log, "log.jsonl", read_log, writes=True),
    Case("comparison", make_comparison, "compared/comparison.json", read_comparison, writes=True),
    Case("posterior", make_posterior, "saved/c*.json|saved/t*", read_posterior),
    Case("posterior, checksums forged", make_posterior, "saved/c*.json|saved/t*", read_posterior, is_sealed=True),
    Case("trained model", make_trained, "run/model/*", read_trained),
    Case("trained model, checksums forged", make_trained, "run/model/*", read_trained, is_sealed=True),
    Case("checkpoint of a run", make_run, "run/*", read_run),
    Case("checkpoint of a run, checksums forged", make_run, "run/*", read_run, is_sealed=True),
)


# ---------------------------------------------------------------------------------------------------------------- damage
def damaged(data: bytes, name: str, random_: random.Random, target: Path) -> bytes:
    """Other bytes than those of a whole file."""
    ways = [flipped, cut, doubled, erased, spliced, worded]
    if name.endswith(".json"):
        ways = [*ways, *4 * [restructured]]
    if name.endswith(".safetensors"):
        ways = [*ways, *4 * [reheaded]]
    if random_.random() < 0.03:
        return pickle.dumps(Bomb(target))
    for _ in range(random_.choice([1, 1, 1, 2, 4])):
        data = random_.choice(ways)(data, random_)
    return data


def place(data: bytes, random_: random.Random) -> tuple[int, int]:
    start = random_.randrange(len(data) + 1)
    return start, min(len(data), start + random_.choice([0, 1, 1, 4, 16, 200]))


def flipped(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.choice([1, 1, 3, 20]) if data else 0):
        changed[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def cut(data: bytes, random_: random.Random) -> bytes:
    return data[: random_.randrange(len(data) + 1)] if random_.random() < 0.5 else data[random_.randrange(len(data) + 1) :]


def doubled(data: bytes, random_: random.Random) -> bytes:
    start, end = place(data, random_)
    return data[:end] + data[start:end] * random_.choice([1, 50]) + data[end:]


def erased(data: bytes, random_: random.Random) -> bytes:
    start, end = place(data, random_)
    return data[:start] + bytes(end - start) * random_.randrange(2) + data[end:]


def spliced(data: bytes, random_: random.Random) -> bytes:
    start, end = place(data, random_)
    return data[:start] + random_.randbytes(random_.choice([1, 8, 64])) + data[end:]


def worded(data: bytes, random_: random.Random) -> bytes:
    """A number becomes another word."""
    numbers = [*re.finditer(rb"-?\d+(?:\.\d+)?", data)]
    start, end = random_.choice(numbers).span() if numbers else place(data, random_)
    return data[:start] + random_.choice(WORDS) + data[end:]


def restructured(data: bytes, random_: random.Random) -> bytes:
    """Json with a part that is missing, another, or there twice."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = [*parts(document)]
    if not places:
        return data
    holder, key = random_.choice(places)
    match random_.randrange(4):
        case 0:
            del holder[key]
        case 1:
            other, there = random_.choice(places)
            holder[key] = json.loads(json.dumps(other[there]))
        case _:
            holder[key] = random_.choice(PALETTE)
    return json.dumps(document).encode()


def parts(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from parts(tree[key])


def reheaded(data: bytes, random_: random.Random) -> bytes:
    """safetensors: 8 bytes with the length of a header, the header in json, the numbers."""
    length = int.from_bytes(data[:8], "little")
    header = restructured(data[8 : 8 + length], random_)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def seal(path: Path) -> None:
    """Makes the checksums of a checkpoint those of what is there."""
    file = path / "checkpoint.json"
    try:
        document = json.loads(file.read_bytes())
        document.pop("checksum", None)
        for name in document["checksums"]:
            document["checksums"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        file.write_text(checkpoint._sealed(document))
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
        pass


# ------------------------------------------------------------------------------------------------------------- the watch
class Watch:
    """Notes what Python does that no reader should, while it is on: an audit hook, which cannot be taken off."""

    STARTS = (
        "os.system",
        "os.exec",
        "os.fork",
        "os.posix_spawn",
        "os.spawn",
        "subprocess.Popen",
        "pickle.find_class",
        "socket",
    )
    CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")

    def __init__(self) -> None:
        self.home: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        if event.startswith(self.STARTS) or (event in ("exec", "compile") and "<string>" in str(args)):
            self.seen.append(f"{event} {args!r:.100}")
        is_writing = event == "open" and isinstance(args[0], str) and bool(set(str(args[1] or "")) & set("wax+"))
        paths = args[:2] if event == "os.rename" else args[:1]
        if event in self.CHANGES or is_writing:
            for path in paths:
                if isinstance(path, str | os.PathLike) and not Path(os.path.abspath(path)).is_relative_to(self.home):
                    self.seen.append(f"{event} {args!r:.100}")


WATCHES: list[Watch] = []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fuzz(case: Case, count: int, folder: Path, seed: int = 0) -> Iterator[Outcome]:
    """What becomes of damaged files, one after the other.

    Args:
        case: The kind of file.
        count: How many.
        folder: An empty one, to work in.
        seed: Of the damage; the same for the same seed.
    """
    watch = WATCHES[0] if WATCHES else Watch()
    WATCHES[:] = [watch]
    whole, work, target = folder / "whole", folder / "work", folder / "target"
    whole.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.make(whole)
        files = sorted(path.relative_to(whole) for pattern in case.files.split("|") for path in whole.glob(pattern))
        shutil.copytree(whole, work)
        case.read(work)  # what is whole is read, and what is imported late is there
        for i in range(count):
            random_ = random.Random(f"{case.name} {seed} {i}")
            shutil.rmtree(work)
            shutil.copytree(whole, work)
            file = work / random_.choice(files)
            file.write_bytes(damaged(file.read_bytes(), file.name, random_, target))
            if case.is_sealed:
                seal(file.parent)
            before = contents(work)
            watch.home, watch.seen = work, []
            try:
                outcome = tried(case, work)
            finally:
                watch.home = None
            after = contents(work)
            lost = sorted(name for name in before if before[name] != after.get(name))
            if lost and not (case.writes and outcome.kind == "value"):
                outcome = outcome._replace(defect=f"lost or changed {lost[0]}")
            if target.exists() or watch.seen:
                outcome = outcome._replace(defect=f"code was run: {watch.seen}")
            yield outcome if not outcome.defect else outcome._replace(defect=f"{case.name}, number {i}: {outcome.defect}")


def tried(case: Case, work: Path) -> Outcome:
    try:
        case.read(work)
    except (ValueError, OSError, Unsupported) as error:
        names = {path.name for path in work.rglob("*")} | {"The run", "Give resume the same model"}
        is_ours = any(name in str(error) for name in names)
        sentence = str(error).replace(str(work), "…")
        return Outcome("refused", sentence, "" if is_ours else f"no file is named by {type(error).__name__}: {sentence}")
    except Exception as error:
        return Outcome("foreign", str(error), f"{type(error).__name__}: {error}")
    return Outcome("value", "")
