"""Two processes are as good as one: real ones, started by torchrun, with gloo between them.

One start serves many tests. The checks below marked ``in_both`` run in both processes, in turn; a test each asks for what
they found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from inference import EM, HMC, NUTS, SVI, Backend, Denoising, Draw, Gibbs, MetropolisHastings, Posterior, Prior, Until
from inference.distributed import ALONE, alone, processes
from inference.fit import Sample
from inference.program import Program
from inference.start import starting_values
from parameters import quick
from pyro_genmodels import GMM

ROOT = Path(__file__).parent.parent
QUIET: dict[str, Any] = {"seed": 0, "progress": False}
CHAINS: dict[str, Any] = {**QUIET, "chains": 4, "warmup": 12, "draws": 10}
LONG: dict[str, Any] = {**QUIET, "chains": 2, "warmup": 20, "draws": 100, "checkpoint_every": 30, "most_steps": 4}
STEPS: dict[str, Any] = {**QUIET, "steps": 60, "draws": 5, "checkpoint_every": 20}
FEW: dict[str, Any] = {**QUIET, "steps": 8, "standard_errors": False}
SIZE = 2

_random = torch.Generator().manual_seed(3)
X = torch.cat([torch.randn(17, 2, generator=_random) - 1.5, torch.randn(20, 2, generator=_random) + 1.5]).double()
Y = X @ torch.tensor([1.0, -1.0]).double() + 0.3 * torch.randn(len(X), generator=_random)


# ------------------------------------------------------------------------------------------------------- programs
def line(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(x.shape[1]), 5.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, spread), obs=y)


def mixture(x: Tensor) -> None:
    share = pyro.sample("share", dist.Dirichlet(x.new_full((2,), 2.0)))
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", len(x)):
        kind = pyro.sample("kind", dist.Categorical(share))
        pyro.sample("x", dist.Normal(mean[kind], 1.0).to_event(1), obs=x)


def factor(x: Tensor) -> None:
    loading = pyro.sample("loading", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
    noise = pyro.sample("noise", dist.InverseGamma(3.0, 2.0))
    with pyro.plate("rows", len(x)):
        hidden = pyro.sample("hidden", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(hidden.unsqueeze(-1) * loading, noise.sqrt()).to_event(1), obs=x)


def skewed(x: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        hidden = pyro.sample("hidden", dist.Gamma(3.0, rate))
        pyro.sample("x", dist.Normal(hidden, 1.0), obs=x[:, 0])


def centred(x: Tensor) -> None:
    """Computes a mean of all rows: the rows of a part would get another."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(x[:, 0].mean() + shift, 1.0), obs=x[:, 0])


def walk(x: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    for i in range(len(x)):
        pyro.sample(f"x_{i}", dist.Normal(level, 1.0), obs=x[i, 0])


def bursts(y: Tensor) -> None:
    k = pyro.sample("k", dist.Poisson(2.0))
    with pyro.plate("bursts", int(k) + 1):
        size = pyro.sample("size", dist.Exponential(1.0))
    pyro.sample("y", dist.Normal(size.sum(), 0.5), obs=y)


class Coder(nn.Module):
    """A latent number for each row, guessed from the row; its weights begin elsewhere for another ``start``."""

    def __init__(self, start: int, is_normalised: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(100 + start)
            self.decoder = nn.Linear(1, 2).double()
            first = nn.BatchNorm1d(2) if is_normalised else nn.Identity()
            self.encoder = nn.Sequential(first, nn.Linear(2, 2)).double()

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            code = pyro.sample("code", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(3.0 * self.decoder(code).tanh(), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        location, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Normal(location, log_scale.exp()).to_event(1))


class Slope(nn.Module):
    """A program whose weights EM trains."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.full((2,), start, dtype=torch.float64))

    def model(self, x: Tensor, y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(level + x @ self.beta + kind, 1.0), obs=y)


# -------------------------------------------------------------------------------------------------- a back-end of a user
class Place(NamedTuple):
    values: dict[str, Tensor]
    lp: Tensor


@dataclass(frozen=True, kw_only=True)
class Still(Backend[Place, Place]):
    """Chains that stay where they start, which tells them apart."""

    chains: int = 4
    keep_warmup: bool = True

    @property
    def schedule(self) -> Sample:
        return Sample(self.chains, 2, 3)

    def init(self, program: Program) -> Place:
        values = starting_values(program, self.chains, self.start)
        return Place(values, program.density.joint(values))

    def step(self, state: Place, program: Program) -> tuple[Place, Place]:
        return state, state

    def sample(self, state: Place, program: Program) -> tuple[Place, Draw]:
        return state, Draw(state.values, {"lp": state.lp})

    def values(self, state: Place, program: Program) -> dict[str, Tensor]:
        return state.values


# --------------------------------------------------------------------------------------------- checks in both processes
CHECKS: dict[str, Callable[[Path], None]] = {}


def in_both(check: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[check.__name__] = check
    return check


def same_everywhere(posterior: Posterior) -> None:
    group = processes()
    tensors = {f"{kind}/{n}": t for kind in ("draws", "stats", "history", "weights", "warmup_draws")
               for n, t in getattr(posterior, kind).items()}  # fmt: skip
    first, second = group.gather(tensors, [str(posterior.plan), posterior.info["findings"], posterior.info["seed"]])
    assert first.facts == second.facts and first.tensors.keys() == second.tensors.keys() == tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.nan_to_num(), second.tensors[name].nan_to_num()), name


def distance(one: Posterior, other: Posterior, kind: str = "draws") -> float:
    pairs = [(values.double(), getattr(other, kind)[name].double()) for name, values in getattr(one, kind).items()]
    assert pairs and all(a.shape == b.shape and torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs)
    return max(float((a - b)[a.isfinite()].abs().max()) for a, b in pairs if a.isfinite().any())


def refused(sentence: str, backend: Any, model: Any, *data: Any) -> None:
    """Both processes must be refused before the first step, and go on to live."""
    steps: list[int] = []
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(backend, callbacks=(lambda step, info: steps.append(step),)).fit(model, *data)
    assert not steps


def rank() -> int:
    return processes().rank


@in_both
def em_is_that_of_one_process(folder: Path) -> None:
    for backend, model, data in [
        (EM(**QUIET, tolerance=1e-8, restarts=2), mixture, (X,)),
        (EM(**QUIET, tolerance=1e-8, acceleration="squarem"), mixture, (X,)),
        (EM(**FEW, objective="mle", hard=True), GMM(2), (X,)),
        (EM(**FEW), line, (X, Y)),  # by L-BFGS
        (EM(**FEW), factor, (X,)),
        (EM(**FEW, batch_size=10), factor, (X,)),
    ]:
        together = backend.fit(model, *data)
        with alone():
            one = backend.fit(model, *data)
        assert together.info["processes"] == SIZE and one.info["processes"] == 1
        # the same sums in another order; convergence divides what rounding leaves by 1 − rate, here at most 10²
        assert distance(together, one) < 1e-8, (model, distance(together, one))
        assert distance(together, one, "stats") < 1e-8
        if backend.hard:  # ends on a change of 0, or one step later where rounding has left more than 0
            paths = [posterior.history["log_joint"] for posterior in (together, one)]
            steps = min(map(len, paths))
            assert max(map(len, paths)) <= steps + 1
            assert float((paths[0][:steps] - paths[1][:steps]).abs().max()) < 1e-8
        else:
            assert distance(together, one, "history") < 1e-8
        same_everywhere(together)


@in_both
def em_trains_weights_as_one_process_does(folder: Path) -> None:
    backend = EM(**QUIET, steps=10)
    together = backend.fit(Slope(float(rank())), X, Y)
    same_everywhere(together)
    with alone():
        one = backend.fit(Slope(0.0), X, Y)  # where that of process 0 began
    assert distance(together, one, "weights") < 1e-8 and distance(together, one) < 1e-8


@in_both
def the_gradient_of_svi_is_that_of_one_process(folder: Path) -> None:
    for model, data in [(line, (X, Y)), (mixture, (X,))]:
        found = []
        for group in (processes(), ALONE):
            torch.manual_seed(1)
            program = Program(model, data)
            program.processes = group
            state = SVI(**QUIET).init(program)
            torch.manual_seed(2)  # the noise
            objective = state.objective
            loss = group.average(objective(program.shard), objective.weights, objective.buffers)
            found.append([loss, *(weight.grad for weight in objective.weights)])
        for together, one in zip(*found, strict=True):
            assert torch.allclose(together, one, rtol=1e-12, atol=1e-12 * float(one.abs().max()))


@in_both
def svi_takes_the_steps_of_one_process(folder: Path) -> None:
    for backend, model, data in [
        (SVI(**QUIET, steps=40, draws=20), line, (X, Y)),
        (SVI(**QUIET, steps=20, draws=20), mixture, (X,)),
        (SVI(**QUIET, steps=20, draws=20, batch_size=9), line, (X, Y)),
    ]:
        with graphs():
            together = backend.fit(model, *data)
        with alone():
            one = backend.fit(model, *data)
        assert distance(together, one) < 1e-8 and distance(together, one, "history") < 1e-8
        same_everywhere(together)


@contextlib.contextmanager
def graphs() -> Iterator[None]:
    """Lets steps be recorded; the rows of a process are inputs of the graph."""
    os.environ["PYRO_GENMODELS_RUNG"] = "staged"
    yield
    os.environ["PYRO_GENMODELS_RUNG"] = "vmapped"


@in_both
def noise_of_single_rows_is_drawn_where_the_rows_are(folder: Path) -> None:
    model = Coder(rank(), is_normalised=True)
    same_everywhere(SVI(**QUIET, steps=10, draws=4).fit(model, X))
    first, second = processes().gather(dict(model.named_buffers()))
    assert first.tensors and all(torch.equal(buffer, second.tensors[name]) for name, buffer in first.tensors.items())
    same_everywhere(SVI(**QUIET, steps=4, draws=2, batch_size=len(X) // 2).fit(Coder(rank()), X))  # as many as a shard has
    backend = SVI(**QUIET, steps=800, draws=400)
    with graphs():
        together = backend.fit(Coder(rank()), X)
        same_everywhere(together)
        with alone():
            one = backend.fit(Coder(0), X)
    assert distance(together, one, "history") > 0.01  # other noise
    # the bound and its standard error, at the last weights; 3 of the difference: a false alarm in 370
    bounds = [posterior.stats["lp"] - posterior.stats["log_q"] for posterior in (together, one)]
    error = sum(bound.var() / bound.numel() for bound in bounds).sqrt()
    assert abs(bounds[0].mean() - bounds[1].mean()) < 3 * error, (bounds[0].mean(), bounds[1].mean(), error)


@in_both
def chains_are_complete_and_in_order(folder: Path) -> None:
    at = {"slope": torch.arange(8.0).reshape(4, 2), "spread": torch.tensor(1.0)}
    for backend, model, data in [
        (HMC(**CHAINS, most_steps=4, keep_warmup=True, start=at), line, (X, Y)),
        (NUTS(**CHAINS, max_depth=2), line, (X, Y)),
        (MetropolisHastings(**CHAINS), mixture, (X,)),
        (Gibbs(**CHAINS), mixture, (X,)),
        (MetropolisHastings(**CHAINS, proposal=Prior()), bursts, (torch.tensor(4.0),)),
    ]:
        posterior = backend.fit(model, *data)
        assert posterior.shape == (4, 10) and all(stat.shape[:2] == (4, 10) for stat in posterior.stats.values())
        assert all(values.shape[1] == 4 for values in posterior.history.values()) and posterior.plan is not None
        assert len(posterior.stats["lp"][:, -1].unique()) == 4  # no two chains alike: each process has its own numbers
        same_everywhere(posterior)
        again = backend.fit(model, *data)
        assert all(torch.equal(v.nan_to_num(), again.draws[n].nan_to_num()) for n, v in posterior.draws.items())
    still = Still(**QUIET, start=at).fit(line, X, Y)
    assert torch.equal(still.draws["slope"], at["slope"].double()[:, None].expand(4, 3, 2))
    assert torch.equal(still.warmup_draws["slope"], at["slope"].double()[:, None].expand(4, 2, 2))
    assert torch.equal(Still(**QUIET, start=still).fit(line, X, Y).draws["slope"], still.draws["slope"])


class Line(nn.Module):
    """A module that is trained by a loss of its rows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


@dataclass(frozen=True)
class Squares:
    """(y − slope · x)², and noise of its own."""

    noise: float = 0.0

    def rows(self, module: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return (context - x @ module.slope + self.noise * torch.randn(len(x), dtype=x.dtype)).square()


@in_both
def losses_of_rows_are_shared_out(folder: Path) -> None:
    backend = Denoising(**QUIET, loss=Squares(), steps=20, average=0.9, clip_norm=1.0)
    together = backend.fit(Line(rank()), X, Y)
    same_everywhere(together)
    with alone():
        one = backend.fit(Line(0), X, Y)
    assert distance(together, one, "weights") < 1e-10 and distance(together, one, "history") < 1e-10
    # batches that two processes cannot share evenly: at weights that stay, a pass adds up to the loss of all rows
    still = Denoising(**QUIET, loss=Squares(), steps=4, batch_size=9, learning_rate=1e-15)
    losses, whole = still.fit(Line(0), X[:36], Y[:36]).history["loss"], Squares().rows(Line(0), X[:36], Y[:36])
    assert abs(float((losses.mean() - whole.mean()).detach())) < 1e-10

    def copy(step: int, info: Any) -> None:
        if step == 15 and not rank():
            shutil.copytree(folder / "losses", folder / "copied losses")

    noisy = Denoising(**QUIET, loss=Squares(1.0), steps=30, batch_size=8, checkpoint_every=10, callbacks=(copy,))
    whole = dataclasses.replace(noisy, checkpoint=folder / "losses").fit(Line(rank()), X, Y)
    same_everywhere(whole)
    resumed = dataclasses.replace(noisy, callbacks=()).resume(folder / "copied losses", Line(7), X, Y)
    assert distance(resumed, whole, "weights") == 0.0 and distance(resumed, whole, "history") == 0.0
    refused("A step of 1 rows cannot be shared out among 2", dataclasses.replace(noisy, batch_size=1), Line(0), X, Y)


@in_both
def they_stop_together(folder: Path) -> None:
    options = {**CHAINS, "draws": 200}
    posterior = Gibbs(**options, until=Until(rhat=1.5, ess=40, every=20)).fit(mixture, X)
    assert posterior.shape[0] == 4 and posterior.shape[1] % 20 == 0 and posterior.shape[1] < 200
    same_everywhere(posterior)
    called = Gibbs(**options, callbacks=(lambda step, info: rank() == 1 and step == 30,)).fit(mixture, X)
    assert called.shape == (4, 19)
    seconds = Gibbs(**{**options, "draws": 100_000}, until=Until(seconds=0.3)).fit(line_of_rates, X)
    same_everywhere(seconds)

    def stop(step: int, info: Any) -> None:
        if step == 20:
            raise KeyboardInterrupt

    for backend in (Gibbs(**options, callbacks=(stop,)), SVI(**STEPS, callbacks=(stop,))):
        with pytest.raises(KeyboardInterrupt, match="stopped in one of several processes"):
            backend.fit(line_of_rates, X)


def line_of_rates(x: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Exponential(rate), obs=x[:, 0].abs())


@in_both
def seeds_agree(folder: Path) -> None:
    posterior = SVI(**{**STEPS, "seed": None}).fit(line, X, Y)
    same_everywhere(posterior)
    same_everywhere(Gibbs(**{**CHAINS, "seed": None}).fit(line_of_rates, X))
    refused("but seed= is 0 in process 0 and 1 in process 1", Gibbs(**{**CHAINS, "seed": rank()}), line_of_rates, X)


@in_both
def what_is_not_given_alike_is_refused(folder: Path) -> None:
    other = rank() == 1
    gibbs, em = Gibbs(**CHAINS), EM(**QUIET)
    refused(r"the argument 'x' is torch.float64 of shape \(19, 2\) in process 0 and .*\(18, 2\) in process 1. Rows and "
            "chains are shared out by fit", em, mixture, X[rank() :: 2])  # fmt: skip
    refused(r"shape \(37, 2\) in process 0 and .*\(37, 3\) in process 1", em, line, X if not other else X[:, [0, 1, 1]], Y)
    refused("is torch.float64 .* in process 0 and torch.float32", em, mixture, X if not other else X.float())
    refused("the program is mixture in process 0 and factor in process 1", em, factor if other else mixture, X)
    refused("the checksum of the argument 'x' is ", em, mixture, X + rank())
    refused("draws= is 10 in process 0 and 11 in process 1", Gibbs(**{**CHAINS, "draws": 10 + rank()}), mixture, X)
    refused("the back-end is EM in process 0 and Gibbs in process 1", gibbs if other else em, mixture, X)
    broken = X.clone()
    broken[3, 1] = torch.nan if other else 0.0
    with pytest.raises(ValueError, match="NaN" if other else "Process 1 of 2 was stopped, and so all are: .*NaN"):
        em.fit(mixture, broken)


@in_both
def what_cannot_be_split_is_refused(folder: Path) -> None:
    odd = {**CHAINS, "chains": 3}
    for make in (Gibbs, HMC, NUTS, MetropolisHastings):
        refused(rf"{make.__name__}\(chains=3\): the chains cannot be shared out evenly among 2 processes. Take 2 or 4",
                make(**odd), mixture, X)  # fmt: skip
    for make in (EM, SVI):
        refused("the parts add up to a log-density of .*Give that as an argument", make(**QUIET), centred, X)
        refused("Several processes split rows, but no plate of walk", make(**QUIET), walk, X)
        refused("There are 1 rows, which 2 processes cannot share", make(**QUIET), line, X[:1], Y[:1])
        refused("There are 1 rows of a batch", make(**QUIET, batch_size=1), line, X, Y)
    refused("Several processes need an exact E-step", EM(**QUIET), skewed, X)
    refused("'spread' is averaged and not in the plate 'rows'", EM(**QUIET, maximise=["slope"]), line, X, Y)
    refused("'hidden' is maximised and of single rows", EM(**QUIET, maximise=["rate", "hidden"]), skewed, X)
    refused("The guide has 'hidden' for all 37 rows", SVI(**QUIET), skewed, X)
    assert Gibbs(**CHAINS).fit(skewed, X).shape == (4, 10)  # chains can be


@in_both
def a_run_that_lost_a_process_goes_on(folder: Path) -> None:
    """The checkpoints are those of the tests of a process that died."""
    for name, backend, data in lost_runs(folder):
        whole = dataclasses.replace(backend, checkpoint=None).fit(line, *data)
        resumed = backend.resume(folder / name, line, *data)
        assert distance(resumed, whole) == 0.0 and distance(resumed, whole, "stats") == 0.0
        assert distance(resumed, whole, "history") == 0.0
        same_everywhere(resumed)
        more = {"draws": backend.draws + 3, "checkpoint": None}
        longer, straight = dataclasses.replace(backend, **more).resume(whole, line, *data), None
        if isinstance(backend, HMC):
            straight = dataclasses.replace(backend, **more).fit(line, *data)
            assert distance(longer, straight) == 0.0 and distance(longer, straight, "history") == 0.0
        if not rank():
            whole.save(folder / f"saved {name}")
        processes().meet()
        saved = dataclasses.replace(backend, **more).resume(folder / f"saved {name}", line, *data)
        assert distance(saved, longer) == 0.0
        with alone(), pytest.raises(ValueError, match=r"was begun by 2 process\(es\), but there are 1 now. Start as many"):
            backend.resume(folder / name, line, *data)
    refuse = pytest.raises((FileExistsError, ValueError), match="holds the checkpoint of a run, which would be lost")
    with refuse:
        backend.fit(line, X, Y)

    def copy(step: int, info: Any) -> None:
        if step == 50 and not rank():
            shutil.copytree(folder / "rows", folder / "copied rows")

    local = SVI(**STEPS, checkpoint=folder / "rows", callbacks=(copy,))
    whole = local.fit(Coder(rank()), X)  # whose noise differs between the processes
    resumed = dataclasses.replace(local, callbacks=(), checkpoint=None).resume(folder / "copied rows", Coder(7), X)
    assert distance(resumed, whole) == 0.0 and distance(resumed, whole, "history") == 0.0
    same_everywhere(resumed)


def lost_runs(folder: Path) -> list[tuple[str, Any, tuple[Tensor, ...]]]:
    return [
        ("HMC", HMC(**LONG, checkpoint=folder / "HMC"), (X, Y)),
        ("SVI", SVI(**STEPS, checkpoint=folder / "SVI"), (X, Y)),
    ]


# --------------------------------------------------------------------------------------------------- starting processes
def environment(**more: str) -> dict[str, str]:
    quick = {"PYRO_GENMODELS_RUNG": "vmapped", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **quick, "PYTHONPATH": path, **more}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_pair(what: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Two processes without torchrun, which would end the second as soon as the first has ended."""
    port = str(free_port())
    ranks = [{"RANK": str(i), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for i in range(2)]
    command = [sys.executable, __file__, what, str(folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env=environment(**variables), **pipes) for variables in ranks]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={free_port()}", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


LONG_CHECKS = {"em_is_that_of_one_process", "they_stop_together", "svi_takes_the_steps_of_one_process"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def died(folder: Path) -> dict[str, tuple[list[int], str, float]]:
    """What became of two processes, of which the second died in the middle: exit codes, what the first said, seconds."""
    pairs = {name: start_pair(name, folder) for name, *_ in lost_runs(folder)}
    found = {}
    for name, (first, second) in pairs.items():
        second.communicate(timeout=120)
        begun = time.monotonic()
        said, _ = first.communicate(timeout=60)
        found[name] = [first.returncode, second.returncode], said, time.monotonic() - begun
    return found


@pytest.fixture(scope="module")
def outcomes(folder: Path, died: Any, request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """Check to traceback, "" where it passed; of each process. Of the checks that were asked for."""
    asked = {item.callspec.params["name"] for item in request.session.items if item.originalname == "test_in_two_processes"}
    done = torchrun(__file__, "checks", str(folder), *(name for name in CHECKS if name in asked))
    files = [folder / f"outcomes-{i}.json" for i in range(SIZE)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", quick(CHECKS, {*CHECKS} - LONG_CHECKS))
def test_in_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    for found in outcomes:
        assert found.get(name, "did not run") == "", found.get(name, "did not run")


@pytest.mark.parametrize("name", ["HMC", "SVI"])
def test_a_process_that_dies_ends_the_others_with_a_sentence(name: str, died: Any) -> None:
    codes, said, seconds = died[name]
    assert codes == [1, 9] and seconds < 30, said
    assert "ConnectionError: Another of the 2 processes has ended or does not answer" in said
    assert "and process 0 cannot go on without it" in said and "is gone on with by resume" in said


@pytest.mark.slow
def test_the_example_runs_in_two_processes(tmp_path: Path) -> None:
    done = torchrun(str(ROOT / "examples" / "distributed.py"), "--smoke", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("HMC") == 1 and "2 processes" in done.stdout and [*tmp_path.glob("*.png")]


def test_one_process_has_nobody_to_ask() -> None:
    assert processes() is ALONE
    assert ALONE.first(3) == 3 and not ALONE.any(False) and ALONE.gather({}, 1)[0].facts == 1
    assert Gibbs(**CHAINS).fit(line_of_rates, X).info["processes"] == 1


# ---------------------------------------------------------------------------------------------- what the processes do
def main(what: str, folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    if what == "checks":
        found = {}
        for name in names:
            try:
                begun = time.monotonic()
                CHECKS[name](folder)
                processes().meet()
                found[name] = ""
            except BaseException:
                found[name] = traceback.format_exc()
            print(f"{name}: {time.monotonic() - begun:.1f} s {found[name]}", flush=True)
            (folder / f"outcomes-{rank()}.json").write_text(json.dumps(found))
            if found[name]:
                break  # the other process may be elsewhere
    else:
        ((backend, data),) = [run[1:] for run in lost_runs(folder) if run[0] == what]
        if rank() == 1:
            die_in(type(backend), *{"SVI": ("step", 50), "HMC": ("sample", 75)}[what])
        backend.fit(line, *data)


def die_in(backend: Any, method: str, count: int) -> None:
    """Ends this process in a step of a back-end, as the kernel ends one that takes too much memory."""
    original, calls = getattr(backend, method), [0]

    def dying(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os._exit(9)
        return original(*args)

    setattr(backend, method, dying)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
