"""A run that stops, for whatever reason, goes on as if it had not: the same digits, from any step, in any process."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor, nn

from inference import (
    ELBO,
    EM,
    HMC,
    NUTS,
    SVI,
    AdaptiveWalk,
    Conjugate,
    EllipticalSlice,
    Enumerate,
    Gaussian,
    Gibbs,
    GuideDraw,
    Hamiltonian,
    Independence,
    Langevin,
    MetropolisHastings,
    PolyaGamma,
    Posterior,
    Prior,
    PriorDraw,
    Slice,
    Unadjusted,
    Until,
    checkpoint,
    codec,
    staging,
)
from inference.diagnosis import worst
from inference.objective import Objective
from parameters import quick

ROOT = Path(__file__).parent.parent
COUNTS = torch.tensor([0.0, 1, 0, 6, 7, 1, 0, 5, 9, 1], dtype=torch.float64)
Y = torch.tensor([1.0, 2.5, -0.5, 2.0, 0.3, 1.4], dtype=torch.float64)
GROUPS = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
CHAINS: dict[str, Any] = {"chains": 2, "warmup": 10, "draws": 10, "seed": 0, "progress": False, "keep_warmup": True}
QUIET: dict[str, Any] = {"seed": 0, "progress": False}


@pytest.fixture(autouse=True)
def without_graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs take seconds to make; the tests that are about them ask for them."""
    if "graphs" not in request.keywords:
        monkeypatch.setenv("PYRO_GENMODELS_RUNG", "vmapped")


# ------------------------------------------------------------------------------------------------------- programs
def rates(counts: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("day", len(counts)):
        busy = pyro.sample("busy", dist.Bernoulli(0.3))
        pyro.sample("count", dist.Poisson(rate * (1.0 + 3.0 * busy)), obs=counts)


def outages(counts: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("regime", 2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    level = pyro.sample("level", dist.Uniform(0.5, 5.0))
    pyro.deterministic("top", level + rate.sum(-1))
    with pyro.plate("day", len(counts)):
        busy = pyro.sample("busy", dist.Bernoulli(share))
        pyro.sample("count", dist.Poisson(level + rate[busy.long()]), obs=counts)


def everything(y: Tensor) -> None:
    """A site for every kind of block."""
    rows = pyro.plate("rows", len(y))
    scale = pyro.sample("scale", dist.InverseGamma(3.0, 2.0))
    first = pyro.sample("first", dist.Normal(0.0, 2.0))
    second = pyro.sample("second", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    walked = pyro.sample("walked", dist.Laplace(0.0, 1.0))
    drawn = pyro.sample("drawn", dist.Gumbel(0.0, 1.0))
    total = pyro.sample("total", dist.Poisson(3.0))
    only = pyro.sample("only", dist.Dirichlet(torch.ones(1, dtype=y.dtype)))
    covariance = torch.eye(len(y), dtype=y.dtype) + 0.5
    curve = pyro.sample("curve", dist.MultivariateNormal(y.new_zeros(len(y)), covariance))
    on = pyro.sample("on", dist.Bernoulli(0.4))
    with rows:
        kind = pyro.sample("kind", dist.Categorical(y.new_tensor([0.3, 0.7])))
        mean = first + second + 0.1 * curve + 0.2 * walked + 0.1 * drawn + on + 0.3 * kind + only.sum(-1)
        pyro.sample("y", dist.Normal(mean, scale.sqrt()), obs=y)
        pyro.sample("is_high", dist.Bernoulli(logits=slope * y), obs=(y > 1.0).to(y.dtype))
        pyro.sample("size", dist.Gamma(shape, 1.0), obs=y.abs() + 0.1)
    pyro.sample("seen", dist.Normal(total, 1.0), obs=y.new_tensor(2.0))


BLOCKS: dict[Any, Any] = {
    "scale": Conjugate(), ("first", "second"): Gaussian(), "slope": PolyaGamma(), "shape": Hamiltonian(),
    "walked": AdaptiveWalk(), "drawn": PriorDraw(), "total": Slice(), "curve": EllipticalSlice(), "on": Enumerate(),
    "kind": Enumerate(by_element=True),
}  # fmt: skip


def bent(data: Tensor) -> None:
    """Conjugate as far as the prior of ``level`` reaches, and not where its data take it (tests/test_blocks.py)."""
    level = pyro.sample("level", dist.Normal(data.new_tensor(0.0), 1.0))
    m = pyro.sample("m", dist.Normal(data.new_tensor(0.5), 1.0))
    pyro.sample("x", dist.Normal(level, 0.05), obs=data[0])
    pyro.sample("y", dist.Normal(torch.where(level > 6.0, m**3, m), 1.0), obs=data[1])


FAR = torch.tensor([9.0, 2.0], dtype=torch.float64)


def bursts(y: Tensor) -> None:
    k = pyro.sample("k", dist.Poisson(2.0))
    with pyro.plate("bursts", int(k) + 1):
        size = pyro.sample("size", dist.Exponential(1.0))
    if k > 2:
        pyro.deterministic("late", pyro.sample("extra", dist.Normal(0.0, 1.0)).exp())
    pyro.sample("y", dist.Normal(size.sum(), 0.5), obs=y)


def line(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    spread = pyro.sample("spread", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level, spread), obs=y)


def own_guide(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))  # noqa: TID251
    size = pyro.param("size", torch.tensor(0.5), constraint=constraints.positive)  # noqa: TID251
    pyro.sample("level", dist.Normal(loc, size))
    pyro.sample("spread", dist.LogNormal(loc, size))


def intercepts(y: Tensor) -> None:
    centre = pyro.sample("centre", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.InverseGamma(2.0, 2.0))
    with pyro.plate("group", len(y)):
        level = pyro.sample("level", dist.Normal(centre, 1.0))
        pyro.sample("y", dist.Normal(level.unsqueeze(-1), spread.sqrt()).expand([len(y), 3]).to_event(1), obs=y)


def skewed(y: Tensor) -> None:
    """Sites of single rows that are not Gaussian: the E-step is by draws."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        hidden = pyro.sample("hidden", dist.Gamma(3.0, rate))
        pyro.sample("y", dist.Poisson(hidden), obs=y)


class Network(nn.Module):
    """A program with weights and a buffer; a new one begins elsewhere."""

    def __init__(self, start: float = 0.0, width: int = 3) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.full((width,), start, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(start, dtype=torch.float64))

    def model(self, y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(level + self.beta.sum() * kind + self.shift, 1.0), obs=y)


@functools.cache
def fitted(sampler: str) -> Posterior:
    """What an independence sampler proposes from."""
    if sampler == "SVI":
        return SVI(steps=20, draws=10, **QUIET).fit(line, Y)
    return MetropolisHastings(chains=4, warmup=20, draws=20, **QUIET).fit(line, Y)


AHEAD: dict[str, Any] = {**CHAINS, "draws": 60}  # more than the 64 proposals that are drawn at once
FITTED: dict[str, Any] = {"steps": 10, "draws": 8, **QUIET}


def independent(guide: Callable[[], Any], **options: Any) -> Callable[[], Any]:
    return lambda: MetropolisHastings(proposal=Independence(guide()), **{**CHAINS, **options})


def metropolis(proposal: Any, **options: Any) -> Callable[[], Any]:
    return lambda: MetropolisHastings(proposal=proposal, **{**CHAINS, **options})


def em(**options: Any) -> Callable[[], Any]:
    return lambda: EM(**{"steps": 8, "tolerance": 0.0, **QUIET, **options})


# name: back-end, program (made anew for each run), data, steps of the two phases from which the run is gone on with
RUNS: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[Tensor, ...], tuple[int, int]]] = {
    "Gibbs": (lambda: Gibbs(**CHAINS), lambda: outages, (COUNTS,), (6, 15)),
    "Gibbs, every block": (
        lambda: Gibbs(**{**CHAINS, "warmup": 5, "draws": 4}, blocks=BLOCKS), lambda: everything, (Y,), (3, 6),
    ),
    "Gibbs, guide": (
        lambda: Gibbs(**CHAINS, blocks={("level", "spread"): GuideDraw(own_guide)}), lambda: line, (Y,), (6, 15),
    ),
    "Gibbs, demoted": (lambda: Gibbs(**CHAINS), lambda: bent, (FAR,), (6, 15)),
    "RandomWalk": (lambda: MetropolisHastings(**CHAINS, thin=2), lambda: rates, (COUNTS,), (6, 15)),
    "Langevin": (metropolis(Langevin()), lambda: rates, (COUNTS,), (6, 15)),
    "Unadjusted": (metropolis(Unadjusted(1e-4)), lambda: rates, (COUNTS,), (6, 15)),
    "Prior": (metropolis(Prior(), draws=60), lambda: rates, (COUNTS,), (6, 66)),
    "Independence, guide": (independent(lambda: own_guide, draws=60), lambda: line, (Y,), (6, 66)),
    "Independence, SVI": (independent(lambda: fitted("SVI")), lambda: line, (Y,), (6, 15)),
    "Independence, draws": (independent(lambda: fitted("walk")), lambda: line, (Y,), (6, 15)),
    "changing": (metropolis(Prior()), lambda: bursts, (torch.tensor(4.0),), (6, 15)),
    "HMC": (lambda: HMC(**CHAINS, mass="dense"), lambda: rates, (COUNTS,), (6, 15)),
    "HMC, weights": (lambda: HMC(**CHAINS, most_steps=8), lambda: Network(0.5), (Y,), (6, 15)),
    "NUTS": (lambda: NUTS(**CHAINS, max_depth=3), lambda: rates, (COUNTS,), (6, 15)),
    "SVI": (lambda: SVI(**FITTED, batch_size=4), lambda: rates, (COUNTS,), (6, 15)),
    "SVI, own guide": (lambda: SVI(**FITTED, guide=own_guide), lambda: line, (Y,), (6, 15)),
    "SVI, Laplace": (lambda: SVI(**FITTED, guide=AutoLaplaceApproximation), lambda: line, (Y,), (6, 15)),
    "SVI, weights": (lambda: SVI(**FITTED), lambda: Network(0.2), (Y,), (6, 15)),
    "EM": (em(restarts=2), lambda: outages, (COUNTS,), (3, 6)),
    "EM, squarem": (em(restarts=2, acceleration="squarem"), lambda: outages, (COUNTS,), (3, 6)),
    "EM, Gaussian": (em(), lambda: intercepts, (GROUPS,), (3, 6)),
    "EM, batches": (em(batch_size=4), lambda: rates, (COUNTS,), (3, 6)),
    "EM, draws": (em(e_step=Gibbs(chains=8, thin=2)), lambda: skewed, (COUNTS,), (3, 6)),
    "EM, HMC": (em(e_step=HMC(chains=8, most_steps=4)), lambda: skewed, (COUNTS,), (3, 6)),
    "EM, weights": (em(batch_size=4), lambda: Network(0.2), (Y,), (3, 6)),
    "EM, many weights": (em(learning_rate=1e-4), lambda: Network(0.0, 1100), (Y,), (3, 6)),
}  # fmt: skip
FAST_RUNS = (
    "Gibbs", "Gibbs, demoted", "RandomWalk", "Independence, draws", "changing", "HMC", "NUTS", "SVI", "SVI, weights", "EM",
    "EM, squarem", "EM, batches", "EM, draws",
)  # fmt: skip
every_run = pytest.mark.parametrize("name", quick(RUNS, FAST_RUNS))


def assert_same(left: Posterior, right: Posterior) -> None:
    """Bit for bit, with the same plan and findings."""
    for group in ("draws", "stats", "history", "weights", "warmup_draws"):
        ours, theirs = getattr(left, group), getattr(right, group)
        assert [*ours] == [*theirs], group
        for name, value in ours.items():
            other = theirs[name]
            assert value.dtype == other.dtype and value.shape == other.shape, (group, name)
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), (group, name)
            assert torch.equal(value.isnan(), other.isnan()), (group, name)
    assert str(left.plan) == str(right.plan)
    assert left.info["findings"] == right.info["findings"]


def copies(backend: Any, program: Any, data: tuple[Tensor, ...], folder: Path, steps: tuple[int, ...]) -> Posterior:
    """A run whose checkpoint after each of some steps is copied to ``folder / step``: what a kill at that moment leaves."""
    write = checkpoint.Journal.write

    def copied(self: checkpoint.Journal, step: int, *args: Any) -> None:
        write(self, step, *args)
        if step in steps:
            shutil.copytree(folder / "run", folder / str(step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Journal, "write", copied)
        return dataclasses.replace(backend, checkpoint=folder / "run", checkpoint_every=3).fit(program, *data)


# ------------------------------------------------------------------------------------------------------- the law
@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Posterior, Path]]:
    """One of ``RUNS`` and the folder of its copies, made once."""

    @functools.cache
    def made(name: str) -> tuple[Posterior, Path]:
        make, program, data, steps = RUNS[name]
        folder = tmp_path_factory.mktemp("stopped")
        return copies(make(), program(), data, folder, steps), folder

    return made


@every_run
def test_a_run_that_is_stopped_in_either_phase_goes_on_bit_for_bit(name: str, stopped: Any) -> None:
    make, program, data, steps = RUNS[name]
    whole, folder = stopped(name)
    for step in steps:
        other = Network(9.0, len(whole.weights["beta"])) if "beta" in whole.weights else program()
        assert_same(make().resume(folder / str(step), other, *data), whole)


EXTENDED = ("Gibbs, demoted", "RandomWalk", "Prior", "Independence, draws", "changing", "HMC", "NUTS", "SVI", "SVI, Laplace")


@pytest.mark.parametrize("name", quick(EXTENDED, ("Gibbs, demoted", "RandomWalk", "changing", "SVI")))
def test_more_draws_extend_a_run_as_if_they_had_been_asked_for_at_once(name: str, stopped: Any, tmp_path: Path) -> None:
    make, program, data, _ = RUNS[name]
    short, _ = stopped(name)
    backend = dataclasses.replace(make(), draws=make().draws + 5)
    long = backend.resume(short, program(), *data)
    for site, values in short.draws.items():
        first = long.draws[site][:, : short.shape[1]]
        first = first[(slice(None), slice(None), *(slice(size) for size in values.shape[2:]))]
        assert torch.equal(first.nan_to_num().double(), values.nan_to_num().double()), site
    assert_same(long, backend.fit(program(), *data))
    short.save(tmp_path / "saved")
    assert_same(backend.resume(tmp_path / "saved", program(), *data), long)


def test_a_block_that_was_demoted_stays_where_it_is(stopped: Any) -> None:
    plan = stopped("Gibbs, demoted")[0].plan
    assert "demoted from Normal" in plan["m"].note


def test_the_plan_has_a_block_of_every_kind(stopped: Any) -> None:
    assert {update.update for update in stopped("Gibbs, every block")[0].plan.updates} == {
        "InverseGamma", "Gaussian", "PolyaGamma", "HMC", "RandomWalk", "Prior", "Slice", "EllipticalSlice", "Enumerate",
        "Constant",
    }  # fmt: skip


def test_writing_a_run_down_does_not_change_it(tmp_path: Path) -> None:
    plain = Gibbs(**CHAINS).fit(rates, COUNTS)
    written = Gibbs(**CHAINS, checkpoint=tmp_path / "run", checkpoint_every=3).fit(rates, COUNTS)
    assert_same(plain, written)
    assert_same(Gibbs(**CHAINS).resume(tmp_path / "run", rates, COUNTS), plain)
    assert not [file for file in (tmp_path / "run").iterdir() if file.suffix not in (".json", ".safetensors")]


def test_a_run_may_stop_many_times_and_stay_in_one_folder(tmp_path: Path) -> None:
    whole = HMC(**CHAINS).fit(rates, COUNTS)
    backend = HMC(**CHAINS, checkpoint=tmp_path / "run", checkpoint_every=3)

    def stopping(at: int) -> Any:
        def stop(step: int, info: Any) -> None:
            if step == at:
                raise ArithmeticError

        return dataclasses.replace(backend, callbacks=(stop,))

    with pytest.raises(ArithmeticError):
        stopping(4).fit(rates, COUNTS)
    for at in (8, 12, 13, 17):
        with pytest.raises(ArithmeticError):
            stopping(at).resume(tmp_path / "run", rates, COUNTS)
    assert_same(backend.resume(tmp_path / "run", rates, COUNTS), whole)
    more = dataclasses.replace(backend, draws=14)
    assert_same(more.resume(tmp_path / "run", rates, COUNTS), HMC(**{**CHAINS, "draws": 14}).fit(rates, COUNTS))


@pytest.mark.graphs
@pytest.mark.parametrize("rung", quick(["staged", "compiled"], ["staged"]))
def test_a_run_goes_on_on_the_rung_where_it_was(rung: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before graphs are made, while they are held against the program, and after."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", rung)
    monkeypatch.setattr(staging, "_SECONDS_TO_COMPILE", (0.0, 0.0))
    if rung == "compiled" and not shutil.which("g++"):
        pytest.skip("needs a compiler")
    options = {**CHAINS, "warmup": 20, "draws": 14}
    backends: list[Any] = [HMC(**options)]
    if rung == "staged":
        backends += [Gibbs(**options), SVI(steps=30, draws=4, **QUIET)]
    for backend in backends:
        folder = tmp_path / type(backend).__name__
        whole = copies(backend, rates, (COUNTS,), folder, (3, 12, 15, 27))
        for step in (3, 12, 15, 27):
            assert_same(backend.resume(folder / str(step), rates, COUNTS), whole)
    calls = whole._ends[0].facts["calls"]
    functions = [function for function in calls.values() if isinstance(function, dict)]
    assert rung in {variant[3] for function in functions for variant in function.values()}


def rows(x: Tensor) -> None:
    """Normal rows as a matrix product, where a narrow component does not show its rounding."""
    spread = pyro.sample("spread", dist.LogNormal(-8.0, 3.0))
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(centre, spread), obs=x)


@pytest.mark.graphs
def test_what_was_evaluated_row_by_row_is_so_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "staged")
    x = 1e-7 * torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] = 1.0
    steps = (3, 12, 15, 27)
    backend = MetropolisHastings(**{**CHAINS, "warmup": 20, "draws": 14}, start={"spread": 1e-6, "centre": 0.0})
    whole = copies(backend, rows, (x,), tmp_path, steps)
    calls = whole._ends[0].facts["calls"]
    assert calls["has rows"]
    assert any("row by row" in function for function in calls.values() if isinstance(function, dict))
    for step in steps:
        assert_same(backend.resume(tmp_path / str(step), rows, x), whole)


STEPS: dict[str, Any] = {"steps": 40, "draws": 80, **QUIET}
STAGED_STEPS: dict[str, tuple[SVI, Callable[[], Any], Tensor]] = {
    "batches": (SVI(**STEPS, batch_size=4), lambda: rates, COUNTS),
    "particles": (SVI(**STEPS, bound=ELBO(particles=3)), lambda: rates, COUNTS),
    "weights": (SVI(**STEPS), lambda: Network(0.2), Y),
    "own guide": (SVI(**STEPS, guide=own_guide), lambda: line, Y),
    "watched": (SVI(**STEPS, callbacks=(lambda step, info: None,)), lambda: rates, COUNTS),
    "Laplace": (SVI(**STEPS, guide=AutoLaplaceApproximation), lambda: line, Y),
}


@pytest.mark.graphs
@pytest.mark.parametrize("name", quick(STAGED_STEPS, ("batches",)))
def test_a_staged_step_is_staged_again(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before the graph is made, at its checks and after them; and inside the blocks of draws."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "staged")
    backend, program, data = STAGED_STEPS[name]
    steps = (3, 12, 15, 18, 27, 45, 72, 90)  # 40 steps, then draws in blocks of 32, 32 and 64
    whole = copies(backend, program(), (data,), tmp_path, steps)
    assert_same(backend.fit(program(), data), whole)
    calls, asked = Objective.__call__, []

    def watched(self: Objective, *args: Any) -> Tensor:
        found = calls(self, *args)
        asked.append(self.rung)
        return found

    monkeypatch.setattr(Objective, "__call__", watched)
    for step in steps:
        asked.clear()
        assert_same(backend.resume(tmp_path / str(step), program(), data), whole)
        assert ("staged" in asked) == (step < 40)
    longer = dataclasses.replace(backend, draws=140)
    assert_same(longer.resume(whole, program(), data), longer.fit(program(), data))


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from inference import SVI, checkpoint
from test_resume import COUNTS, LONG, dataclasses, rates
for name, backend in LONG.items():
    for at in (11, 31):
        if pid := os.fork():
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, (name, at)
            continue
        def kill(step, info):
            if step == at:
                os.kill(os.getpid(), signal.SIGKILL)
        replace = checkpoint.Journal._replace
        def killed(self, file, write):  # draws of a guide call nobody
            if at == 31 and file == "checkpoint.json" and (self.path / "state-00000035.safetensors").exists():
                kill(31, None)
            return replace(self, file, write)
        if isinstance(backend, SVI):
            checkpoint.Journal._replace = killed
        folder = os.path.join(sys.argv[2], f"{name}-{at}")
        dataclasses.replace(backend, checkpoint=folder, checkpoint_every=5, callbacks=(kill,)).fit(rates, COUNTS)
"""
LONG: dict[str, Any] = {"Gibbs": Gibbs(chains=2, warmup=20, draws=20, **QUIET), "SVI": SVI(steps=20, draws=20, **QUIET)}


@pytest.mark.slow
def test_a_killed_process_goes_on_in_another_bit_for_bit(tmp_path: Path) -> None:
    """In either phase, and while a checkpoint is written; the process has another order of sets than this one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, backend in LONG.items():
        whole = backend.fit(rates, COUNTS)
        for at in (11, 31):
            folder = tmp_path / f"{name}-{at}"
            facts = json.loads((folder / "checkpoint.json").read_text())["meta"]["facts"]
            assert (facts["improved"], facts["read"]) == ((10, 0) if at == 11 else (20, 10))
            assert_same(backend.resume(folder, rates, COUNTS), whole)


def test_after_ctrl_c_a_posterior_goes_on_from_where_it_is() -> None:
    def stop(step: int, info: Any) -> None:
        if step == 14:
            raise KeyboardInterrupt

    first = Gibbs(**CHAINS, callbacks=(stop,)).fit(rates, COUNTS)
    assert first.shape == (2, 5) and first.info["interrupted"]
    last = Gibbs(**CHAINS).resume(first, rates, COUNTS)
    assert last.shape == (2, 10) and not last.info["interrupted"]
    assert torch.equal(last.draws["rate"][:, :5], first.draws["rate"])


def test_steps_that_ctrl_c_cut_short_are_taken_before_there_are_new_draws() -> None:
    def stop(step: int, info: Any) -> None:
        if step == 9:
            raise KeyboardInterrupt

    half = SVI(steps=20, draws=10, callbacks=(stop,), **QUIET).fit(line, Y)
    assert len(half.history["loss"]) == 10 and half.shape == (1, 10)
    whole = SVI(steps=20, draws=10, **QUIET).resume(half, line, Y)
    assert len(whole.history["loss"]) == 20 and whole.shape == (1, 10)
    assert torch.equal(whole.history["loss"], SVI(steps=20, draws=10, **QUIET).fit(line, Y).history["loss"])


@pytest.mark.parametrize("is_saved", quick([False, True], [True]))
def test_em_goes_on_with_chains_of_states_after_ctrl_c(is_saved: bool, tmp_path: Path) -> None:
    def walk(y: Tensor) -> None:
        step = pyro.sample("step", dist.HalfNormal(1.0))
        x: Any = 0.0
        for t in range(len(y)):
            x = pyro.sample(f"x{t}", dist.Normal(x, step))
            pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[t])

    def stop(step: int, info: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    y = torch.linspace(-1.0, 2.0, 20, dtype=torch.float64).sin()
    half = EM(steps=12, callbacks=(stop,), **QUIET).fit(walk, y)
    if is_saved:
        half.save(tmp_path / "half")
    last = EM(steps=12, **QUIET).resume(tmp_path / "half" if is_saved else half, walk, y)
    whole = EM(steps=12, **QUIET).fit(walk, y)
    assert whole.plan is not None and len(whole.plan["x0"].sites) == 20
    assert_same(last, whole)


def test_a_back_end_of_the_user_goes_on_too(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Restless(HMC):
        """HMC under another name."""

    whole = copies(Restless(**CHAINS), rates, (COUNTS,), tmp_path, (6,))
    assert_same(Restless(**CHAINS).resume(tmp_path / "6", rates, COUNTS), whole)


# ------------------------------------------------------------------------------------------------------- codec
class Held:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


def test_tensors_come_back_in_the_order_of_their_memory() -> None:
    base = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4)
    shapes = [
        base, base.mT, base[:, 1:], base[..., 0], base[:1].expand(5, 3, 4), base[0, 0, 0], base[:0],
        base.as_strided((3, 2), (1, 1)),
    ]  # fmt: skip
    encoded = codec.encode([*shapes, shapes[0]], {})
    found = codec.decode(codec.Encoded(json.loads(json.dumps(encoded.tree)), encoded.tensors), {})
    for before, after in zip(shapes, found, strict=False):
        assert torch.equal(before, after) and before.untyped_storage()._cdata != after.untyped_storage()._cdata
    for before, after in zip(shapes[:-2], found, strict=False):  # not of what overlaps
        assert before.stride() == after.stride()
        assert (before.data_ptr() - base.data_ptr()) % 64 == after.data_ptr() % 64
    assert found[-1] is found[0]


def test_everything_else_comes_back_as_it_was() -> None:
    held: dict[Any, Any] = {
        "numbers": (1, True, None, 2.5, "text", [1, 2]), 3: math.inf, "size": torch.Size([2, 3]), "type": torch.float32,
        "device": torch.device("cpu"), "part": functools.partial(dist.Normal, loc=0.0), "class": dist.Poisson,
    }  # fmt: skip
    encoded = codec.encode(held, {})
    found = codec.decode(codec.Encoded(json.loads(json.dumps(encoded.tree, allow_nan=False)), encoded.tensors), {})
    part, other = found.pop("part"), held.pop("part")
    assert found == held and (part.func, part.args, part.keywords) == (other.func, other.args, other.keywords)


@pytest.mark.parametrize(
    ("value", "words"), [(lambda: None, "function"), ({"a": (Held(),)}, r"state\['a'\]\[0\]"), (object(), "object")]
)
def test_what_is_code_is_not_written(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"A checkpoint cannot hold .*{words}"):
        codec.encode(value, {})


@pytest.mark.parametrize(
    "tree",
    [
        ["object", "subprocess:Popen", {}],
        ["partial", ["class", "os:system"], ["tuple", "true"], ["dict"]],
        ["class", "builtins:eval"],
        ["class", "inference.codec:sys.modules"],
        ["object", "pyro.distributions.torch:Normal", {}],
        ["record", "inference.codec:Nothing"],
        ["optimiser", "torch.nn.modules.linear:Linear", ["list"], ["dict"]],
        ["link", "program"],
        ["execute", "true"],
    ],
)
def test_nothing_in_a_checkpoint_is_executed(tree: Any) -> None:
    with pytest.raises(ValueError, match="A checkpoint"):
        codec.decode(codec.Encoded(tree, {}), {})


# ------------------------------------------------------------------------------------------------------- bad input
SMALL: dict[str, Any] = {"chains": 2, "warmup": 3, "draws": 4, "seed": 0, "progress": False}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYRO_GENMODELS_RUNG", "vmapped")
        Gibbs(**SMALL, checkpoint=folder, checkpoint_every=2).fit(line, Y)
    return folder


def other_line(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def renamed(name: str, program: Any) -> Any:
    program.__name__ = name
    return program


def narrow_line(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level, spread), obs=y)


def wide_line(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    spread = pyro.sample("spread", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level.sum(-1), spread), obs=y)


@pytest.mark.parametrize(
    ("backend", "program", "data", "sentence"),
    [
        (
            Gibbs(**SMALL),
            line,
            Y + 1.0,
            r"The data of the argument 'y' are not those of the run.",
        ),
        (Gibbs(**SMALL), line, Y[:4], r"Site 'y' was Normal of shape \(6,\), and is now Normal of shape \(4,\)"),
        (Gibbs(**SMALL), outages, COUNTS, "The run is of line, but this is outages. Give resume the same model."),
        (Gibbs(**SMALL), renamed("line", other_line), Y, "line has no site 'spread', which the program of the run has."),
        (Gibbs(**SMALL), renamed("line", narrow_line), Y, "line has another log-density than the program of the run"),
        (Gibbs(**SMALL), renamed("line", wide_line), Y, r"Site 'level' was Normal of shape \(\), and is now Normal of"),
        (Gibbs(**{**SMALL, "warmup": 4}), line, Y, "warmup= was 3 and is now 4. .*only draws= may be larger"),
        (Gibbs(**{**SMALL, "draws": 3}), line, Y, "draws= was 4 and is now 3. .*only draws= may be larger"),
        (Gibbs(**{**SMALL, "seed": 1}), line, Y, "seed= was 0 and is now 1"),
        (Gibbs(**SMALL, blocks={"level": Slice()}), line, Y, "blocks= was None and is now .*Slice"),
        (Gibbs(**SMALL, start={"level": 0.1}), line, Y, "start= was None and is now"),
        (HMC(**SMALL), line, Y, "This is a run of Gibbs, so that HMC cannot go on with it"),
    ],
)
def test_another_run_is_refused_before_the_first_step(
    backend: Any, program: Any, data: Tensor, sentence: str, ended: Path
) -> None:
    steps: list[int] = []
    watched = dataclasses.replace(backend, callbacks=(lambda step, info: steps.append(step),))
    with pytest.raises(ValueError, match=sentence):
        watched.resume(ended, program, data)
    assert not steps


def test_what_changes_no_step_may_change(ended: Path) -> None:
    whole = Gibbs(**SMALL).fit(line, Y)
    free = {**SMALL, "seed": None, "callbacks": (lambda step, info: None,), "until": Until(seconds=60.0), "device": "cpu"}
    assert_same(Gibbs(**free).resume(ended, line, Y), whole)
    assert Gibbs(**free).resume(ended, line, Y).info["seed"] == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda facts: facts["versions"].update(torch="1.0"), "begun with torch 1.0, but this is .* Install torch 1.0"),
        (lambda facts: facts["versions"].update({"pyro-genmodels": "9"}), "begun with pyro-genmodels 9, but this is"),
        (lambda facts: facts.update(threads=7), r"begun with thread\(s\) of torch 7, but this is 1.*set_num_threads\(7\)"),
        (lambda facts: facts.update(rung="looped"), "begun with PYRO_GENMODELS_RUNG 'looped', but this is 'vmapped'"),
        (lambda facts: facts.update(dtype="torch.float32"), "begun with dtype 'torch.float32'"),
    ],
)
def test_another_world_is_refused(change: Any, sentence: str) -> None:
    posterior = Gibbs(**SMALL).fit(line, Y)
    change(posterior._ends[0].facts["fingerprint"])
    with pytest.raises(ValueError, match=sentence):
        Gibbs(**SMALL).resume(posterior, line, Y)


@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.parametrize("what", ["checkpoint.json", "state", "rows"])
def test_a_damaged_checkpoint_is_not_read(what: str, how: str, ended: Path, tmp_path: Path) -> None:
    shutil.copytree(ended, tmp_path / "run")
    file = sorted(tmp_path.glob(f"run/{what}*"))[-1]
    content = bytearray(file.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[-30] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        Gibbs(**SMALL).resume(tmp_path / "run", line, Y)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: it has no file"):
        Gibbs(**SMALL).resume(tmp_path / "run", line, Y)


def test_a_saved_posterior_that_is_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    Gibbs(**SMALL).fit(line, Y).save(tmp_path / "run")
    file = tmp_path / "run" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tensors.safetensors' is damaged"):
        Gibbs(**SMALL).resume(tmp_path / "run", line, Y)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
            Gibbs(**SMALL).resume(folder, line, Y)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds something else \('notes.txt'\)"):
        Gibbs(**SMALL, checkpoint=tmp_path).fit(line, Y)
    with pytest.raises(TypeError, match="resume takes a checkpoint folder or a Posterior, but was given 3"):
        Gibbs(**SMALL).resume(3, line, Y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not hold the end of its run"):
        Gibbs(**SMALL).resume(Posterior(draws={"level": torch.zeros(2, 4)}), line, Y)


def test_a_run_is_never_written_over_another(ended: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="holds the checkpoint of a run, which would be lost. Go on with it by resume"):
        Gibbs(**SMALL, checkpoint=ended).fit(line, Y)
    posterior = Gibbs(**SMALL).resume(ended, line, Y)
    posterior.save(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="holds a saved posterior, which would be lost"):
        Gibbs(**SMALL, checkpoint=tmp_path / "saved").fit(line, Y)
    with pytest.raises(ValueError, match=r"is the checkpoint of a run that may not have ended. resume\("):
        Posterior.load(ended)


@pytest.mark.parametrize("every", [0, 2.5, -1])
def test_a_checkpoint_comes_every_so_many_steps(every: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Gibbs\(checkpoint_every=.*\): must be an integer of at least 1"):
        Gibbs(**SMALL, checkpoint=tmp_path / "run", checkpoint_every=every).fit(line, Y)


@pytest.mark.parametrize("broken", ["save_file", "_sync"])
def test_a_full_disk_does_not_lose_the_run(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = Gibbs(**CHAINS, checkpoint=tmp_path / "run", checkpoint_every=5)
    is_full = [False]
    original = getattr(checkpoint, broken)

    def full(*args: Any, **options: Any) -> None:
        if is_full[0]:
            raise OSError(28, "No space left on device")
        original(*args, **options)

    def fill(step: int, info: Any) -> None:
        is_full[0] = step >= 8

    monkeypatch.setattr(checkpoint, broken, full)
    posterior = dataclasses.replace(backend, callbacks=(fill,)).fit(rates, COUNTS)
    (finding,) = (text for text in posterior.info["findings"] if "checkpoint" in text)
    assert "after step 20 could not be written, and the run went on without" in finding and "No space left" in finding
    assert "The last one, after step 5, is whole." in finding
    is_full[0] = False
    whole = Gibbs(**CHAINS).fit(rates, COUNTS)
    assert torch.equal(posterior.draws["rate"], whole.draws["rate"])
    assert_same(backend.resume(tmp_path / "run", rates, COUNTS), whole)


def test_a_disk_that_is_full_for_a_while_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = checkpoint.save_file
    calls: list[int] = []

    def sometimes(*args: Any, **options: Any) -> None:
        calls.append(1)
        if 4 < len(calls) < 7:
            raise OSError(28, "No space left on device")
        original(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", sometimes)
    posterior = Gibbs(**CHAINS, checkpoint=tmp_path / "run", checkpoint_every=5).fit(rates, COUNTS)
    assert not [text for text in posterior.info["findings"] if "checkpoint" in text]
    assert_same(Gibbs(**CHAINS).resume(tmp_path / "run", rates, COUNTS), Gibbs(**CHAINS).fit(rates, COUNTS))


def test_a_disk_that_is_full_from_the_start_is_said_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    steps: list[int] = []
    monkeypatch.setattr(checkpoint, "save_file", full)
    backend = Gibbs(**SMALL, checkpoint=tmp_path / "run", callbacks=(lambda step, info: steps.append(step),))
    with pytest.raises(OSError, match=r"Cannot write to folder '.*run' \(.*No space left on device\)"):
        backend.fit(line, Y)
    assert not steps


def test_a_run_that_was_killed_before_its_first_checkpoint_may_begin_again(tmp_path: Path) -> None:
    (tmp_path / "state-00000000.safetensors").write_bytes(b"half")
    (tmp_path / ".rows-00000100.0123abcd.new").write_bytes(b"half")
    Gibbs(**SMALL, checkpoint=tmp_path).fit(line, Y)
    assert {file.name.split("-")[0] for file in tmp_path.iterdir()} == {"checkpoint.json", "state", "rows"}


# ------------------------------------------------------------------------------------------------------- until
def test_a_sampler_stops_when_its_targets_are_met() -> None:
    options: dict[str, Any] = {**QUIET, "chains": 4, "warmup": 10, "draws": 400}
    until = Until(rhat=1.2, ess=60.0, every=10)
    posterior = Gibbs(**options, until=until).fit(rates, COUNTS)
    taken = posterior.shape[1]
    assert taken % 10 == 0 and 20 <= taken < 400
    whole = Gibbs(**{**options, "draws": taken}).fit(rates, COUNTS)
    assert torch.equal(posterior.draws["rate"], whole.draws["rate"])
    assert until.are_met(*worst(posterior))
    before = dataclasses.replace(posterior, draws={n: d[:, :-10] for n, d in posterior.draws.items()}, stats={})
    assert not until.are_met(*worst(before))


def test_a_run_that_has_met_its_targets_is_done_until_there_are_others(tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUIET, "chains": 4, "warmup": 10, "draws": 60}
    backend = HMC(**options, until=Until(ess=20, every=5), checkpoint=tmp_path / "run", checkpoint_every=7)
    posterior = backend.fit(rates, COUNTS)
    assert posterior.shape[1] < 60
    assert_same(backend.resume(tmp_path / "run", rates, COUNTS), posterior)
    assert_same(HMC(**options).resume(posterior, rates, COUNTS), HMC(**options).fit(rates, COUNTS))


def test_targets_that_were_not_met_are_found() -> None:
    posterior = Gibbs(**{**SMALL, "draws": 20}, until=Until(ess=40.0, every=10)).fit(line, Y)
    assert posterior.shape[1] == 20
    assert any("until= was not met in 20 draws a chain" in finding for finding in posterior.info["findings"])


def test_a_time_budget_is_kept_and_said() -> None:
    posterior = Gibbs(**{**SMALL, "draws": 100_000}, until=Until(seconds=0.2)).fit(line, Y)
    assert 1 <= posterior.shape[1] < 100_000
    assert any("another run may stop elsewhere" in finding for finding in posterior.info["findings"])


@pytest.mark.parametrize("make", [Gibbs, HMC, NUTS, MetropolisHastings])
@pytest.mark.parametrize(
    ("until", "sentence"),
    [
        (Until(rhat=0.99), "can never be met: R-hat is 1 at best"),
        (Until(rhat=math.nan), "can never be met"),
        (Until(ess=1001), "can never be met: 2 chains of 500 draws are 1000"),
        (Until(ess=0), "must be positive"),
        (Until(seconds=0.0), "must be positive and finite"),
        (Until(seconds=-1.0), "must be positive and finite"),
        (Until(rhat=1.1, every=3), "must be an integer of at least 4"),
        (Until(rhat=1.1, every=501), "would never look at the 500 draws"),
        (Until(), "has no target"),
    ],
)
def test_targets_out_of_reach_are_refused_before_the_first_step(make: Any, until: Until, sentence: str) -> None:
    steps: list[int] = []
    backend = make(**{**SMALL, "draws": 500}, until=until, callbacks=(lambda step, info: steps.append(step),))
    with pytest.raises(ValueError, match=sentence):
        backend.fit(line, Y)
    assert not steps


def test_until_must_be_one() -> None:
    with pytest.raises(TypeError, match="until= must be an Until, such as"):
        Gibbs(**SMALL, until=60).fit(line, Y)  # type: ignore[arg-type]
