"""Training on the command line: a run ends, is killed and goes on, is judged and drawn from, and refuses in one sentence."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import SVI, checkpoint
from pyro_genmodels import cli, cli_train, trained
from pyro_genmodels.datasets import pictures
from pyro_genmodels.metrics import density
from pyro_genmodels.trained import LIKELIHOODS, PRIORS, Recipe

ROWS, SIDE = 60, 4
GREY = np.random.default_rng(0).random((ROWS, SIDE, SIDE)).astype(np.float32)
FILES = {"settings.json", "log.jsonl", "run", "model"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, x_train=GREY, x_test=GREY[:20])
    return path


def argv(file: Path, folder: Path, *more: str, model: str = "vae") -> list[str]:
    small = ["--features", "2", "--epochs", "4", "--batch", "10", "--threads", "1", "--quiet"]
    return ["train", model, "--data", str(file), "--out", str(folder), *small, *more]


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of a small run, and what it printed."""
    folder, out = tmp_path_factory.mktemp("runs") / "deep" / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(argv(file, folder)) == 0
    yield folder, out.getvalue()


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], match: str) -> None:
    """One sentence or two, in one line, and status 2."""
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(match, said) and said.startswith("genmodels: ") and said.count("\n") == 1, said


def weights(folder: Path) -> dict[str, Tensor]:
    return trained.load(folder / "model")[1].state_dict()


# --------------------------------------------------------------------------------------------------- it works
def test_a_run_leaves_its_settings_its_log_its_checkpoint_and_its_model(done: tuple[Path, str]) -> None:
    folder, printed = done
    assert {entry.name for entry in folder.iterdir()} == FILES
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pkl", ".pth")]
    assert json.loads((folder / "settings.json").read_text())["features"] == 2
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [20]
    assert "24 steps of 10 rows" in printed and "pass    4" in printed


def test_the_model_that_is_read_is_the_one_that_was_trained(done: tuple[Path, str]) -> None:
    """By the same steps of SVI, without a command line."""
    recipe, model, facts = trained.load(done[0] / "model")
    torch.manual_seed(0)
    other = recipe.build()
    settings = {"steps": 24, "learning_rate": 1e-3, "batch_size": 10, "transform": torch.bernoulli, "draws": 1, "keep": ()}
    SVI(**settings, seed=0, progress=False).fit(other, torch.from_numpy(GREY))
    assert facts["is_done"] and facts["steps"] == 24
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    done: tuple[Path, str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at step 15, in the third pass; the weights are those of the run that ended, bit for bit."""
    folder = tmp_path / "run"

    class Killed(cli_train.JSONLines):
        def __call__(self, step: int, info: Any) -> None:
            super().__call__(step, info)
            if step == 15:
                raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(cli_train, "JSONLines", Killed)
        with pytest.raises(RuntimeError, match="killed"):
            cli.main(argv(file, folder))
    refused(capsys, ["evaluate", str(folder)], r"has not ended: .*--resume")
    refused(capsys, argv(file, folder), r"is not empty\. --resume goes on with the run in it, or choose a new folder")
    refused(capsys, [*argv(file, folder, "--resume"), "--epochs", "5"], r"has epochs 4, but this command says 5")
    assert cli.main(argv(file, folder, "--resume")) == 0
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(done[0])[name]), name
    capsys.readouterr()
    assert cli.main(argv(file, folder, "--resume")) == 0  # what has ended is not done again
    assert "24 steps" in capsys.readouterr().out


def test_ctrl_c_saves_what_there_is(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(cli_train.JSONLines):
        def __call__(self, step: int, info: Any) -> None:
            if step == 15:
                raise KeyboardInterrupt

    monkeypatch.setattr(cli_train, "JSONLines", Stopped)
    assert cli.main(argv(file, tmp_path / "run")) == 130
    printed, said = capsys.readouterr()
    assert "16 steps" in printed and "--resume goes on" in said
    assert cli.main(["evaluate", str(tmp_path / "run"), "--samples", "5", "--quiet"]) == 0
    assert "was stopped by Ctrl-C" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "more"),
    [
        *(("vae", ["--likelihood", name, "--epochs", "1"]) for name in LIKELIHOODS if name != "discretised-logistic"),
        *(("vae", ["--prior", name, "--epochs", "1"]) for name in PRIORS if name != "vamp"),
        ("vae", ["--bound", "iwae", "--particles", "3", "--beta", "0.5", "--epochs", "1"]),
        ("vae", ["--bound", "renyi", "--epochs", "1"]),
        ("vae", ["--bound", "miwae", "--epochs", "1"]),
        ("iwae", ["--layers", "2", "--bound", "iwae", "--epochs", "1"]),
    ],
)
def test_every_choice_trains_is_drawn_from_and_judged(
    model: str, more: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert cli.main(argv(file, folder, *more, model=model)) == 0
    assert cli.main(["sample", str(folder), "--size", "3", "--drawn", "--out", str(tmp_path / "x.npz")]) == 0
    assert cli.main(["evaluate", str(folder), "--samples", "30", "--rows", "5", "--quiet"]) == 0
    found = re.search(r"NLL, 30 importance samples +(-?[\d.]+) ±", capsys.readouterr().out)
    assert found is not None and np.isfinite(float(found[1]))
    with np.load(tmp_path / "x.npz") as drawn:
        assert drawn["x"].shape == (3, SIDE, SIDE)


def test_what_is_printed_is_what_the_metrics_say(done: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = done
    assert cli.main(["evaluate", str(folder), "--samples", "50", "--quiet"]) == 0
    printed = capsys.readouterr().out
    x = torch.bernoulli(torch.from_numpy(GREY[:20]), generator=torch.Generator().manual_seed(0))
    model = trained.load(folder / "model")[1]
    evidence, parts = density.log_evidence(model, x, samples=50), density.rate_distortion(model, x, samples=50)
    for label, value in (
        (r"NLL, 50 importance samples", -evidence.mean),
        ("rate", float(parts.rate.mean())),
        ("distortion", float(parts.distortion.mean())),
    ):
        found = re.search(rf"^{label} +(-?[\d.]+) ±", printed, re.MULTILINE)
        assert found is not None and float(found[1]) == pytest.approx(value, abs=1e-4)
    assert re.search(r"active units +\d of 2\n", printed) and "k-hat above 0.7" in printed and "20 rows" in printed


def test_a_grid_is_a_picture_and_the_same_for_the_same_seed(done: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("one.png", "two.png", "one.npz", "two.npz"):
        assert cli.main(["sample", str(done[0]), "--size", "5", "--out", str(tmp_path / "deep" / name)]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "deep").iterdir()}
    assert len(files) == 4 and files["one.png"][:4] == b"\x89PNG" and files["one.png"] == files["two.png"]
    with np.load(tmp_path / "deep" / "one.npz") as one, np.load(tmp_path / "deep" / "two.npz") as two:
        assert np.array_equal(one["x"], two["x"]) and one["x"].min() > 0.0 and one["x"].max() < 1.0


# --------------------------------------------------------------------------------------------------- it refuses
@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--bound", "best"], r"no bound 'best'; there are elbo, iwae, miwae, renyi"),
        (["--prior", "flat"], r"no prior 'flat'; there are normal"),
        (["--likelihood", "poison"], r"no likelihood 'poison'; there are bernoulli"),
        (["--batch", "61"], r"--batch is 61, but .* has 60 rows"),
        (["--beta", "-1"], r"beta is -1.0, but must be"),
        (["--beta", "nan"], r"beta is nan, but must be"),
        (["--rate", "0"], r"learning_rate is 0.0, but must be positive"),
        (["--layers", "2"], r"vae has one layer"),
        (["--prior", "sphere", "--features", "1"], r"Sphere needs at least 2 features"),
        (["--prior", "vamp"], r"pseudo-inputs start from as many rows"),
        (["--data", "cats"], r"no pictures 'cats'; there are cifar10, digits, fashion_mnist, mnist, or give"),
        (["--data", "cats.npz"], r"There is no file cats.npz"),
        (["--resume"], r"holds no run to go on with.*Leave --resume out"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(
    more: list[str], match: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*more, "--batch", "40"] if "vamp" in more else more
    path = file if "vamp" not in more else _few(tmp_path)
    refused(capsys, argv(path, tmp_path / "run", *more), match)
    assert not (tmp_path / "run").exists()


def _few(folder: Path) -> Path:
    np.save(folder / "few.npy", GREY[:40])
    return folder / "few.npy"


def test_an_unknown_model_is_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, argv(file, tmp_path / "run", model="gan"), r"no model 'gan' to train; there are vae, iwae")
    refused(capsys, argv(file, tmp_path / "run", "--prior", "cube", model="iwae"), r"iwae has a normal prior")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": GREY * 2.0}, r"has the value .*, but entries of Bernoulli are in \[0, 1\]"),
        ({"x": np.where(GREY > 0.999, np.nan, GREY)}, r"values that are not finite, the first at"),
        ({"x": GREY.astype(str)}, r"must have rows of numbers"),
        ({"x": GREY[0, 0]}, r"must have rows of numbers"),
        ({"x": GREY[:0]}, r"must have rows of numbers"),
        ({"pictures": GREY}, r"has the arrays pictures: call the rows 'x'"),
        ({"x_train": GREY, "x_test": GREY[:, :2]}, r"rows of shape \(4, 4\) to train on, but \(2, 4\) in x_test"),
    ],
)
def test_pictures_that_are_none_are_refused(
    arrays: dict[str, Any], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(capsys, argv(tmp_path / "bad.npz", tmp_path / "run"), match)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(capsys, argv(file, tmp_path), r"exists and is not empty\. Choose a new folder")
    refused(capsys, argv(file, tmp_path / "thesis.txt"), r"exists and is not empty\. Choose a new folder")
    for command in (["sample", str(tmp_path), "--out", str(tmp_path / "a.png")], ["evaluate", str(tmp_path)]):
        refused(capsys, command, r"holds no trained model\. Give a folder that train --out wrote")
        refused(capsys, [command[0], str(tmp_path / "none"), *command[2:]], r"There is no folder .*none'")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_is_not_gone_on_with_on_other_data(
    done: tuple[Path, str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "small.npz", x_train=1.0 - GREY)
    refused(capsys, argv(tmp_path / "small.npz", done[0], "--resume"), r"has data .*, but this command says")


def test_a_model_of_other_data_another_kind_or_another_version_is_refused(
    done: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(done[0])
    refused(capsys, ["evaluate", folder, "--data", "digits"], r"rows of shape \(8, 8\), but the model in .* has \(4, 4\)")
    refused(capsys, ["sample", folder, "--out", str(tmp_path / "grid.gif")], r"must end in .png, .* or .npz")
    tensors, meta = checkpoint.read(done[0] / "model")
    for name, changed, match in (
        ("later", {**meta, "version": 2}, r"of version 2, but this version of pyro-genmodels knows"),
        ("model", {**meta, "recipe": {**meta["recipe"], "model": "gan"}}, r"holds a 'gan' of version 1, but"),
        ("shape", {**meta, "recipe": {**meta["recipe"], "features": 3}}, r"has other weights than its json says"),
        ("posterior", {"info": {}}, r"holds a posterior, and no autoencoder"),
    ):
        checkpoint.write(tmp_path / name / "model", tensors, changed)
        refused(capsys, ["evaluate", str(tmp_path / name)], match)
    weights = tmp_path / "later" / "model" / "tensors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    refused(capsys, ["evaluate", str(tmp_path / "later")], r"is damaged")


def test_rows_that_are_no_pictures_are_drawn_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "table.npy", GREY.reshape(ROWS, -1))
    assert cli.main(argv(tmp_path / "table.npy", tmp_path / "run", "--epochs", "1")) == 0
    refused(capsys, ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "a.png")], r"no pictures: give --out FILE.npz")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--samples", "5", "--rows", "1", "--quiet"]) == 0
    assert "on 1 rows" in capsys.readouterr().out


def test_a_disk_that_is_full_at_the_start_is_said_before_the_first_step_and_later_on_at_the_end(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, save_file = [], checkpoint.save_file

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        written.append(path)
        if len(written) > most:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, *rest)
        return None

    monkeypatch.setattr(checkpoint, "save_file", full)
    most = 0
    refused(capsys, argv(file, tmp_path / "one"), r"Cannot write to folder .*No space left on device")
    assert not (tmp_path / "one" / "log.jsonl").exists()
    most = 3
    refused(capsys, argv(file, tmp_path / "two"), r"Cannot write to folder .*model.*No space left on device")
    most = 100
    assert cli.main(argv(file, tmp_path / "two", "--resume")) == 0  # from the checkpoint that was whole


def test_mnist_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYRO_GENMODELS_DATA", raising=False)
    refused(capsys, argv(Path("mnist"), tmp_path / "run"), r"PYRO_GENMODELS_DATA is not set")
    monkeypatch.setenv("PYRO_GENMODELS_DATA", str(tmp_path))
    refused(capsys, argv(Path("mnist"), tmp_path / "run"), r"there is none in '.*Put it there")
    np.savez(tmp_path / "mnist.npz", x_train=np.full((3, 28, 28), 255, np.uint8), x_test=np.zeros((2, 28, 28), np.uint8))
    found = pictures("mnist")
    assert found.test is not None and found.shape == (28, 28) and found.test.max() == 0.0 and found.train.min() == 1.0


def test_a_recipe_makes_the_same_model_again() -> None:
    recipe = Recipe(model="iwae", shape=(4, 4), features=6, layers=2)
    shapes = [[value.shape for value in recipe.build().state_dict().values()] for _ in range(2)]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="no model 'gan'"):
        Recipe(model="gan", shape=(4, 4))
