"""What is read is never executed, and what it names is never written to or deleted outside its own folder."""

from __future__ import annotations

import ast
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import inference
import pyro_genmodels
from inference import Posterior, checkpoint, codec
from pyro_genmodels import datasets, trained
from pyro_genmodels.comparison import Folder

SOURCES = [path for package in (inference, pyro_genmodels) for path in sorted(Path(package.__file__).parent.rglob("*.py"))]
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "ctypes", "yaml"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "pickle.loads"}


def name_of(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{name_of(value)}.{name}"
    return "?"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_in_the_packages_executes_what_it_reads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            never = NEVER_IMPORTED - (
                {"subprocess"} if path.name == "gallery.py" else set()
            )  # which runs the user's examples
            assert not never & {module.split(".")[0] for module in modules}, node.lineno
        if isinstance(node, ast.Call):
            name, keywords = name_of(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            assert name not in NEVER_CALLED, node.lineno
            if name.endswith("np.load"):
                allowed = keywords.get("allow_pickle")
                assert isinstance(allowed, ast.Constant) and allowed.value is False, node.lineno
            assert "allow_pickle" not in keywords or name.endswith("np.load"), node.lineno


# ------------------------------------------------------------------------------------------------------- crafted files
class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def objects(path: Path, bomb: bytes, target: Path) -> None:
    np.save(path, np.array([Bomb(target)], dtype=object), allow_pickle=True)


def objects_in_archive(path: Path, bomb: bytes, target: Path) -> None:
    np.savez(path, x=np.array([Bomb(target)], dtype=object))


def pickled(path: Path, bomb: bytes, target: Path) -> None:
    path.write_bytes(bomb)


def pickled_in_archive(path: Path, bomb: bytes, target: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", bomb)


def of_torch(path: Path, bomb: bytes, target: Path) -> None:
    torch.save(Bomb(target), path)


def header_of_code(path: Path, bomb: bytes, target: Path) -> None:
    """numpy's header is a Python literal, which is parsed."""
    text = f"{{'descr': '<f8', 'fortran_order': __import__('os').mkdir({str(target)!r}), 'shape': (1,)}}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8))


CRAFTED = [
    (objects, ".npy"),
    (objects_in_archive, ".npz"),
    (pickled, ".npy"),
    (pickled, ".npz"),
    (pickled, ".csv"),
    (pickled_in_archive, ".npz"),
    (of_torch, ".npz"),
    (header_of_code, ".npy"),
]


@pytest.mark.parametrize(("craft", "suffix"), CRAFTED, ids=lambda value: value if isinstance(value, str) else value.__name__)
@pytest.mark.parametrize("read", [datasets.read_table, lambda path: datasets.pictures(str(path))], ids=["table", "pictures"])
def test_a_crafted_array_is_refused_and_does_nothing(
    tmp_path: Path, craft: Callable[[Path, bytes, Path], None], suffix: str, read: Callable[[Path], Any]
) -> None:
    path, target = tmp_path / f"rows{suffix}", tmp_path / "target"
    craft(path, pickle.dumps(Bomb(target)), target)
    with pytest.raises(ValueError, match="rows"):
        read(path)
    assert not target.exists()


def saved(folder: Path) -> Path:
    draws = torch.arange(8.0).reshape(2, 4)
    Posterior(draws={"mu": draws}, info={"backend": "HMC", "model": "line"}).save(folder)
    return folder


def reseal(folder: Path, **changes: Any) -> None:
    """Changes the json of a checkpoint, and makes its checksums those of what is there now."""
    path = folder / "checkpoint.json"
    document = json.loads(path.read_text()) | changes
    document.pop("checksum")
    document["checksums"] = {name: checkpoint._checksum(folder / name) for name in document["checksums"]}
    path.write_text(checkpoint._sealed(document))


@pytest.mark.parametrize("form", ["pickle", "torch.save", "empty"])
@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_pickle_called_safetensors_is_refused(tmp_path: Path, form: str, is_sealed: bool) -> None:
    folder, target = saved(tmp_path / "saved"), tmp_path / "target"
    path = folder / "tensors.safetensors"
    path.write_bytes(b"" if form == "empty" else pickle.dumps(Bomb(target)))
    if form == "torch.save":
        torch.save(Bomb(target), path)
    if is_sealed:
        reseal(folder)
    with pytest.raises(ValueError, match=r"tensors.safetensors' is damaged \(.*\). Restore it, or run again."):
        Posterior.load(folder)
    assert not target.exists()


@pytest.mark.parametrize("name", ["../precious", "/etc/hostname", "a/../../precious", "..", "", "C:precious", 7, None])
def test_a_folder_claims_no_file_outside_of_itself(tmp_path: Path, name: Any) -> None:
    """What a checkpoint or a comparison lists as its own is replaced by the next one."""
    precious = tmp_path / "precious"
    precious.write_text("a thesis")
    folder = saved(tmp_path / "saved")
    reseal(folder, files=["checkpoint.json", "tensors.safetensors", "posterior.nc", name])
    with pytest.raises(ValueError, match=r"checkpoint.json' is damaged"):
        Posterior.load(folder)
    with pytest.raises(FileExistsError, match="holds something else"):
        saved(folder)
    compared = tmp_path / "compared"
    compared.mkdir()
    (compared / "comparison.json").write_text(json.dumps({"format": "pyro-genmodels comparison", "files": [name]}))
    with pytest.raises(FileExistsError, match="holds something else"):
        Folder(compared, {}).write("table.csv", lambda path: path.write_text("1"))
    assert precious.read_text() == "a thesis"


@pytest.mark.parametrize(
    "tree",
    [
        ["object", "os:system", {}],
        ["object", "subprocess:Popen", {}],
        ["object", "inference.checkpoint:Path", {}],
        ["record", "builtins:eval", "1"],
        ["partial", ["class", "builtins:exec"], ["tuple"], ["dict"]],
        ["optimiser", "torch.serialization:load", ["list"], ["dict"]],
        ["optimiser", "torch.optim.swa_utils:AveragedModel", ["list"], ["dict"]],
        ["class", "torch.distributions.utils:lazy_property.__get__"],
        ["dtype", "load"],
        ["link", "program"],
        ["same", 3],
        ["tensor", "0", [[2**40], [1], 0], False, "cpu"],
        ["tensor", "missing", None, False, "cpu"],
        ["eval", "1"],
        [],
        ["float"],
        ["size", "a"],
        ["float", "a"],
        ["dict", [1]],
    ],
    ids=str,
)
def test_a_state_names_nothing_but_what_has_a_place_in_it(tree: Any) -> None:
    with pytest.raises(ValueError, match="A checkpoint"):
        codec.decode(codec.Encoded(tree, {"0": torch.zeros(2)}), {})


@pytest.mark.parametrize(
    "tree, which",
    [
        (
            ["record", "inference.gibbs:GibbsInfo", ["tensor", "0", None, False, "cpu"], 1.0],
            "acceptance_rate cannot be a float",
        ),
        (["record", "inference.plan:Update", ["tuple", "mu", 3], "HMC", 1.0, None, "", "exact"], "sites cannot be a tuple"),
        (["record", "inference.plan:Update", ["list", "mu"], "HMC", 1.0, None, "", "exact"], "sites cannot be a list"),
        (["record", "inference.plan:Update", ["tuple"], "HMC", None, None, "", "exact"], "acceptance cannot be None"),
        (["record", "inference.plan:Update", ["tuple"], "HMC", True, None, "", "exact"], "acceptance cannot be a bool"),
        (["record", "inference.plan:Update", ["tuple"], "HMC", 1, "none", "", "exact"], "certificate cannot be a str"),
        (["object", "inference.until:Until", {"rhat": 1.01}], "has other fields: ess"),
    ],
    ids=str,
)
def test_a_state_has_fields_of_the_types_of_its_class(tree: Any, which: str) -> None:
    with pytest.raises(ValueError, match=f"A checkpoint is damaged: .*{which}"):
        codec.decode(codec.Encoded(tree, {"0": torch.zeros(2)}), {})
    whole = ["record", "inference.plan:Update", ["tuple", "mu"], "HMC", 1, None, "", "exact"]
    assert codec.decode(codec.Encoded(whole, {}), {}).sites == ("mu",)


def test_json_that_is_nested_too_deeply_is_damage(tmp_path: Path) -> None:
    folder, deep = saved(tmp_path / "saved"), "[" * 100_000 + "]" * 100_000
    (folder / "checkpoint.json").write_text(deep)
    with pytest.raises(ValueError, match=r"checkpoint.json' is damaged"):
        Posterior.load(folder)
    tree: Any = 0
    for _ in range(5000):
        tree = ["list", tree]
    with pytest.raises(ValueError, match="A checkpoint is damaged"):
        codec.decode(codec.Encoded(tree, {}), {})


def test_an_archive_larger_than_the_memory_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    np.savez_compressed(path, x=np.zeros((1000, 1000)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.infolist()[0].file_size = 2**60  # what the directory of a zip bomb says
        archive.writestr("other.npy", b"")
    for read in (datasets.read_table, lambda path: datasets.pictures(str(path))):
        with pytest.raises(ValueError, match=r"rows.npz cannot be read as numpy arrays: .*larger than the memory"):
            read(path)


def test_a_header_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    for dimensions in ("(1000000000000,)", "(1000000000000000000000000,)", "(-5,)", "(1e3,)"):
        text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {dimensions}}}\n".encode()
        data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(80)
        (tmp_path / "rows.npy").write_bytes(data)
        with zipfile.ZipFile(tmp_path / "rows.npz", "w") as archive:
            archive.writestr("x.npy", data)
        for suffix in (".npy", ".npz"):
            with pytest.raises(ValueError, match=f"rows{suffix} cannot be read as numpy arrays"):
                datasets.read_table(tmp_path / f"rows{suffix}")


def test_a_trained_model_of_any_size_takes_no_memory_before_its_weights_fit(tmp_path: Path) -> None:
    recipe = trained.Recipe(model="vae", shape=(4, 4), features=2)
    trained.save(tmp_path / "model", recipe, recipe.build(), {"data": "digits"})
    for changes in ({"features": 10**9}, {"shape": [10**6, 10**6]}, {"features": -1}, {"beta": "1"}, {"shape": 4}, {"a": 1}):
        meta = json.loads((tmp_path / "model" / "checkpoint.json").read_text())["meta"]
        reseal(tmp_path / "model", meta={**meta, "recipe": {**meta["recipe"], **changes}})
        with pytest.raises(ValueError, match=r"model' holds (no autoencoder|a 'vae' of version)"):
            trained.load(tmp_path / "model")
        reseal(tmp_path / "model", meta=meta)
    assert trained.load(tmp_path / "model")[0] == recipe


def test_a_posterior_and_a_trained_model_say_which_of_them_they_are(tmp_path: Path) -> None:
    recipe = trained.Recipe(model="vae", shape=(4, 4), features=2)
    trained.save(tmp_path / "model", recipe, recipe.build(), {"data": "digits"})
    with pytest.raises(ValueError, match=r"model' holds no posterior"):
        Posterior.load(tmp_path / "model")
    save_file({"x": torch.zeros(2)}, tmp_path / "model" / "tensors.safetensors")
    reseal(tmp_path / "model", tensors=["x"])
    with pytest.raises(ValueError, match=r"model' holds no autoencoder"):
        trained.load(tmp_path / "model")
