"""The log of a run, as JSON lines."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import EM, HMC, NUTS, SVI, Gibbs, JSONLines, MetropolisHastings

Y = torch.tensor([0.3, -1.2, 0.7, 2.1, -0.4], dtype=torch.float64)
BACKENDS = {
    "SVI": SVI(steps=40, draws=1),
    "EM": EM(steps=40, tolerance=0.0, restarts=2),
    "Gibbs": Gibbs(draws=20, warmup=20, chains=2),
    "MetropolisHastings": MetropolisHastings(draws=20, warmup=20, chains=2),
    "HMC": HMC(draws=20, warmup=20, chains=2),
    "NUTS": NUTS(draws=20, warmup=20, chains=2),
}


def normal(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


class Rows(nn.Module):
    """z_n ~ N(0, 1), y_n ~ N(w z_n, 1)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.read = nn.Parameter(torch.ones(())), nn.Linear(1, 2)

    def model(self, y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(self.weight * z, 1.0), obs=y)

    def guide(self, y: Tensor) -> None:
        loc, log_scale = self.read(y.unsqueeze(-1)).unbind(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


DATA = torch.randn(40, generator=torch.Generator().manual_seed(1))


class Info(NamedTuple):
    """Of a step of a back-end that is not ours."""

    loss: Tensor
    matrix: Tensor


def svi(**settings: Any) -> SVI:
    return SVI(**{"steps": 60, "batch_size": 10, "draws": 1, "seed": 0, "progress": False} | settings)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_back_end_writes_a_line_every_few_steps(name: str, tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.jsonl"
    every = 1 if name == "EM" else 8  # which needs but one step here
    backend = dataclasses.replace(BACKENDS[name], seed=0, progress=False, callbacks=(JSONLines(log, every),))
    history = backend.fit(normal, Y).history
    found = lines(log)
    steps = len(history["log_joint"]) if name == "EM" else 40
    assert [line["step"] for line in found] == [*range(every, steps + 1, every)]
    assert all(one["seconds"] <= two["seconds"] for one, two in itertools.pairwise(found))
    key = {"SVI": "loss", "EM": "log_joint"}.get(name, "lp")
    assert found[-1][key] == pytest.approx(float(history[key][-1].double().mean()), rel=1e-12)


def test_a_log_changes_no_step(tmp_path: Path) -> None:
    logged = svi(callbacks=(JSONLines(tmp_path / "log.jsonl"),)).fit(Rows(), DATA)
    assert torch.equal(logged.history["loss"], svi().fit(Rows(), DATA).history["loss"])


def test_rows_rate_distortion_and_validation_are_told(tmp_path: Path) -> None:
    """Validation is looked at every 7 steps, and a line every 10 has the last look since the line before."""
    log = tmp_path / "log.jsonl"
    backend = svi(callbacks=(JSONLines(log, every=10),), validation=DATA[:9], validate_every=7)
    history = backend.fit(Rows(), DATA).history
    found = lines(log)
    looks = {step: float(history["validation"][step // 7 - 1]) for step in range(7, 61, 7)}
    for line in found:
        seen = [value for step, value in looks.items() if line["step"] - 10 < step <= line["step"]]
        assert line["validation"] == seen[-1]
        assert line["rate"] + line["distortion"] == pytest.approx(line["loss"], rel=1e-5)
        assert line["rows_per_second"] > 0.0
    seconds = found[-1]["seconds"] - found[0]["seconds"]
    steps = [line["rows_per_second"] for line in found[1:]]
    assert sum(10 * 10 / speed for speed in steps) == pytest.approx(seconds, abs=0.01)


def test_a_resumed_run_goes_on_with_its_log(tmp_path: Path) -> None:
    """Killed at step 47, resumed from the checkpoint of step 40: the log is that of one run, with no step twice."""
    whole, log = tmp_path / "whole.jsonl", tmp_path / "log.jsonl"
    svi(callbacks=(JSONLines(whole, every=5),)).fit(Rows(), DATA)

    def killed(step: int, info: Any) -> None:
        if step == 46:
            raise RuntimeError("killed")

    killed.is_passive = True  # type: ignore[attr-defined]
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        settings = {"checkpoint": folder, "checkpoint_every": 20}
        svi(callbacks=(JSONLines(log, every=5), killed), **settings).fit(Rows(), DATA)
    assert lines(log)[-1]["step"] == 45
    with log.open("a") as file:
        file.write('{"step": 46, "sec')  # cut in the middle of a line
    svi(callbacks=(JSONLines(log, every=5),), **settings).resume(folder, Rows(), DATA)
    assert [(line["step"], line["loss"]) for line in lines(log)] == [(line["step"], line["loss"]) for line in lines(whole)]
    seconds = [line["seconds"] for line in lines(log)]
    assert seconds == sorted(seconds)


def test_a_run_that_begins_at_its_first_step_begins_the_log_anew(tmp_path: Path) -> None:
    log = JSONLines(tmp_path / "log.jsonl", every=30)
    for _ in range(2):
        svi(callbacks=(log,)).fit(Rows(), DATA)
    assert [line["step"] for line in lines(log.path)] == [30, 60]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = JSONLines(tmp_path / "log.jsonl", every=1)
    log(0, Info(torch.tensor(float("nan")), torch.ones(2, 3)))
    assert lines(log.path)[0]["loss"] is None and "matrix" not in lines(log.path)[0]


@pytest.mark.parametrize("every", [0, -3, 2.5, True, None])
def test_a_distance_between_lines_that_is_no_count_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        JSONLines("log.jsonl", every=every)


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"is a folder, .* add a name"):
        JSONLines(tmp_path)


@pytest.mark.parametrize("text", ["dear diary\nmore\n", "dear diary", '{"steps": 3}', '{"step": "3", "seconds": 1}\n{"s'])
def test_another_file_is_not_gone_on_with(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no log of JSONLines: see its line 1"):
        JSONLines(path)(5, Info(torch.ones(()), torch.ones(2, 3)))
    assert path.read_text() == text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_lines_but_not_the_run(tmp_path: Path) -> None:
    log = JSONLines(tmp_path / "log.jsonl", every=30)

    def fills(step: int, info: Any) -> None:
        if step == 40:
            log.path = Path("/dev/full")

    with pytest.warns(UserWarning, match=r"misses step 60 .*The run goes on"):
        posterior = svi(callbacks=(log, fills)).fit(Rows(), DATA)
    assert len(posterior.history["loss"]) == 60 and len(lines(tmp_path / "log.jsonl")) == 1
