"""A hidden Markov model written as a Python loop, beside the same model with its messages written by hand.

    python examples/benchmarks/long_loop.py [--steps 500] [--chains 8]

The program has one statement for each state and one for each observation. Ours finds the chain, sums it out in log-depth
and rolls the loop up; by hand there are a tree of matrix products (gradient of the marginal density, through torch's own
``make_fx``), forward filtering with backward sampling (Gibbs), and the forward-backward recursion (EM), all vectorised over
chains. Gradients and EM's steps are compared first, to rounding. Milliseconds are medians over rounds that alternate in one
process with one thread. A run is the whole of ``fit``, with recording and checking its graphs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from rows import Rows
from torch import Tensor
from torch.distributions import StickBreakingTransform
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from inference import EM, HMC, Gibbs
from inference.density import Unconstrained
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program

STATES = 5


def program(y: Tensor) -> None:
    """moves_i ~ Dirichlet(1 + 5 e_i),  mean_k ~ N(3 k, 3²),  z_t ~ moves[z_{t-1}],  y_t ~ N(mean[z_t], 1),  z_{-1} = 0"""
    moves = pyro.sample("moves", dist.Dirichlet(1.0 + 5.0 * torch.eye(STATES)).to_event(1))
    mean = pyro.sample("mean", dist.Normal(3.0 * torch.arange(STATES).to(y), 3.0).to_event(1))
    z: Any = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z{t}", dist.Categorical(moves[z]))
        pyro.sample(f"y{t}", dist.Normal(mean[z], 1.0), obs=y[t])


def simulated(steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    moves, z, y = 0.02 + 0.9 * torch.eye(STATES), 0, []
    for _ in range(steps):
        z = int(torch.multinomial(moves[z], 1, generator=generator))
        y.append(3.0 * z + torch.randn((), generator=generator, dtype=torch.float64))
    return torch.stack(y)


class ByHand:
    """The same model, its messages vectorised over chains."""

    def __init__(self, y: Tensor) -> None:
        self.y = y
        self.prior = 1.0 + 5.0 * torch.eye(STATES, dtype=y.dtype)
        self.centre = 3.0 * torch.arange(STATES, dtype=y.dtype)

    def log_density(self, position: Tensor) -> Tensor:
        """log p(position, y) of unconstrained moves and means, by a tree of matrix products in log space."""
        transform = StickBreakingTransform()
        free, mean = position[: STATES * (STATES - 1)].reshape(STATES, -1), position[STATES * (STATES - 1) :]
        moves = transform(free)
        prior = dist.Dirichlet(self.prior, validate_args=False).log_prob(moves).sum()
        prior = prior + dist.Normal(self.centre, 3.0, validate_args=False).log_prob(mean).sum()
        seen = dist.Normal(mean, 1.0, validate_args=False).log_prob(self.y[:, None])
        table = moves.log() + seen[1:, None, :]
        while len(table) > 1:
            odd, even = table[len(table) // 2 * 2 :], len(table) // 2 * 2
            table = torch.cat([torch.logsumexp(table[0:even:2, :, :, None] + table[1:even:2, None, :, :], 2), odd])
        first = moves[0].log() + seen[0]
        total = torch.logsumexp((first[:, None] + table[0]).flatten(), 0)
        return prior + total + transform.log_abs_det_jacobian(free, moves).sum()

    def gradient(self, position: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def gradient(position: Tensor) -> Any:
            return vmap(grad_and_value(self.log_density))(position)

        traced: Callable[[Tensor], tuple[Tensor, Tensor]] = make_fx(gradient)(position)
        return traced

    def _filtered(self, moves: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(z_t | y_0..t), p(y_t | z_t) up to a constant, and what each step was divided by; (time, chain, state)."""
        seen = (-0.5 * (self.y[:, None, None] - mean) ** 2).exp()
        alpha, scale = torch.empty_like(seen), torch.empty_like(seen[..., :1])
        row = moves[:, 0] * seen[0]
        for t in range(len(self.y)):
            if t:
                row = (row.unsqueeze(1) @ moves).squeeze(1) * seen[t]
            scale[t] = row.sum(-1, keepdim=True)
            row = row / scale[t]
            alpha[t] = row
        return alpha, seen, scale

    def sweep(self, moves: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """One sweep: states given the parameters, then the parameters given the states."""
        alpha, _, _ = self._filtered(moves, mean)
        steps, chains = alpha.shape[:2]
        uniform = torch.rand(steps, chains, 1, dtype=alpha.dtype)
        z = torch.empty(steps, chains, dtype=torch.long)
        weights, rows = alpha[-1], torch.arange(chains)
        for t in range(steps - 1, -1, -1):
            cumulative = weights.cumsum(-1)
            z[t] = (cumulative < uniform[t] * cumulative[:, -1:]).sum(-1)
            if t:
                weights = alpha[t - 1] * moves[rows, :, z[t]]
        hot = torch.nn.functional.one_hot(z, STATES).to(alpha.dtype)
        before = torch.cat([torch.eye(STATES, dtype=alpha.dtype)[0].expand(1, chains, STATES), hot[:-1]])
        moves = dist.Dirichlet(self.prior + torch.einsum("tci,tcj->cij", before, hot), validate_args=False).sample()
        precision = 1.0 / 9.0 + hot.sum(0)
        centre = (self.centre / 9.0 + torch.einsum("tcj,t->cj", hot, self.y)) / precision
        return moves, centre + precision.rsqrt() * torch.randn_like(centre)

    def em(self, moves: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """One step of EM to the posterior mode: forward-backward, then closed forms."""
        alpha, seen, scale = self._filtered(moves, mean)
        beta = torch.ones_like(alpha)
        row = beta[-1]
        for t in range(len(self.y) - 2, -1, -1):
            row = (moves @ (seen[t + 1] * row / scale[t + 1]).unsqueeze(-1)).squeeze(-1)
            beta[t] = row
        share = alpha * beta
        counts = torch.einsum("tci,cij,tcj->cij", alpha[:-1], moves, seen[1:] * beta[1:] / scale[1:])
        counts[:, 0] += share[0]
        raised = self.prior - 1.0 + counts
        precision = 1.0 / 9.0 + share.sum(0)
        return raised / raised.sum(-1, keepdim=True), (
            self.centre / 9.0 + torch.einsum("tcj,t->cj", share, self.y)
        ) / precision


def alternating(rounds: int, *calls: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each call."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return [1e3 * statistics.median(seconds) for seconds in times]


class Stepping:
    """A back-end on the program, step by step."""

    def __init__(self, backend: Any, known: Program) -> None:
        self.backend, self.known = backend, known
        self.state = backend.init(known)

    def __call__(self) -> None:
        self.state, _ = self.backend.step(self.state, self.known)


def compared(y: Tensor, chains: int) -> list[tuple[str, float, float]]:
    """What is timed to milliseconds of ours and by hand."""
    hand, rows = ByHand(y), []
    with isolated(0), reproducible(torch.float64), quiet():
        known = Program(program, (y,))
        coordinates = Unconstrained(known, ("moves", "mean"))
        position = torch.randn(chains, coordinates.size, dtype=y.dtype)
        ours, theirs = known.density.unconstrained(coordinates, known.finite), hand.gradient(position)
        for _ in range(8):
            slope, value = ours(position, {})
        expected, level = theirs(position)
        torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(value - value[0], level - level[0], rtol=1e-8, atol=1e-8)
        rows.append(("HMC, a gradient", *alternating(40, lambda: ours(position, {}), lambda: theirs(position))))

        gibbs = Stepping(Gibbs(chains=chains, progress=False), known)
        for _ in range(16):
            gibbs()
        moves, mean = (gibbs.state.current.values[name] for name in ("moves", "mean"))
        rows.append(("Gibbs, a sweep", *alternating(40, gibbs, lambda: hand.sweep(moves, mean))))

        em = Stepping(EM(progress=False), known)
        for _ in range(8):
            before = em.state.values
            em()
        for name, found in zip(("moves", "mean"), hand.em(before["moves"], before["mean"]), strict=True):
            torch.testing.assert_close(em.state.values[name], found, rtol=1e-8, atol=1e-10)
        moves, mean = (before[name][:1] for name in ("moves", "mean"))
        rows.append(("EM, a step", *alternating(20, em, lambda: hand.em(moves, mean))))
    return rows


def whole(y: Tensor, chains: int) -> list[tuple[str, float]]:
    """Seconds of whole runs."""
    backends = {
        "HMC, 10 + 10 draws": HMC(chains=chains, warmup=10, draws=10, seed=0, progress=False),
        "Gibbs, 100 + 100 sweeps": Gibbs(chains=chains, warmup=100, draws=100, seed=0, progress=False),
        "EM": EM(seed=0, progress=False),
    }
    seconds = []
    for name, backend in backends.items():
        started = time.perf_counter()
        backend.fit(program, y)
        seconds.append((name, time.perf_counter() - started))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--longest", type=int, default=2000, help="of the runs that are only timed; 0 leaves them out")
    parser.add_argument("--chains", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows()
    lines = [
        f"python examples/benchmarks/long_loop.py --steps {options.steps} --chains {options.chains}",
        f"{datetime.date.today()}, {os.cpu_count()} CPUs, shared, one thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "",
        f"{options.steps} steps, {STATES} states, {options.chains} chains    ours, ms  by hand, ms  ratio  (at most 5)",
    ]
    for name, ours, theirs in compared(simulated(options.steps), options.chains):
        lines.append(f"{name:32s} {ours:11.2f} {theirs:12.2f} {ours / theirs:6.2f}")
        rows.add(f"ms of {name}", f"HMM as a loop of {options.steps} steps, {options.chains} chains", ours, theirs=theirs,
                 peer="by hand", target=1 / 5)  # fmt: skip
    for steps in filter(None, (options.steps, options.longest)):
        lines += ["", f"whole runs of {steps} steps, s"]
        lines += [f"{name:32s} {seconds:11.1f}" for name, seconds in whole(simulated(steps), options.chains)]
    print("\n".join(lines))
    rows.show()


if __name__ == "__main__":
    main()
