"""A hidden Markov model on ten thousand steps, its states one site: seconds of whole fits, and the forward pass.

    python examples/benchmarks/hmm.py

Three states with normal observations, the model ``HMM(3, "diagonal")``, one thread. The log-likelihood at EM's point is held
against the textbook's forward pass, probabilities normalised at every step; back-ends against the states behind the series.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time

import torch
from rows import Rows
from torch import Tensor

from inference import EM, HMC, Gibbs, Posterior
from pyro_genmodels import HMM
from pyro_genmodels.distributions import MarkovChain

MOVES = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.05, 0.15, 0.8]], dtype=torch.float64)
PLACES = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)


def forward_pass(x: Tensor, posterior: Posterior) -> float:
    """log p(x | point)."""
    point = posterior.point()
    forward, total = point["initial"], 0.0
    normal = torch.distributions.Normal(point["means"][:, 0], point["covariances"][:, 0].sqrt())
    for t, seen in enumerate(normal.log_prob(x).exp()):
        forward = (forward if t == 0 else forward @ point["transitions"]) * seen
        total += float(forward.sum().log())
        forward = forward / forward.sum()
    return total


def main(smoke: bool = False) -> None:
    steps, few = (200, 10) if smoke else (10_000, 100)
    torch.manual_seed(0)
    z = MarkovChain(torch.ones(3, dtype=torch.float64) / 3, MOVES, steps).sample()
    x = PLACES[z][:, None] + torch.randn(steps, 1, dtype=torch.float64)
    model, options = HMM(3, "diagonal"), {"seed": 0, "progress": False}
    lines = [
        "python examples/benchmarks/hmm.py",
        f"{datetime.date.today()}, 2 cores, shared, one thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        f"\n{steps:,} steps{'seconds':>26}   means of the states{'path right':>18}",
    ]
    for name, backend in (
        ("EM", EM(**options)),
        ("Gibbs, 4 chains", Gibbs(warmup=few, draws=2 * few, **options)),
        ("HMC, 4 chains", HMC(warmup=few, draws=few // 2, **options)),
    ):
        begun = time.perf_counter()
        posterior = backend.fit(model, x)
        seconds = time.perf_counter() - begun
        means, order = posterior.point()["means"][:, 0].sort()
        right = float((order.argsort()[model.predict(x, posterior)] == z).double().mean())
        lines.append(f"{name:24}{seconds:13.1f}   {'  '.join(f'{float(mean):6.3f}' for mean in means)}{right:13.4f}")
        if name == "EM":
            ours, textbook = model.score(x, posterior), forward_pass(x, posterior)
    lines.append(
        f"\nlog-likelihood at EM's point {ours:.6f}, by the forward pass {textbook:.6f}, "
        f"relative {abs(ours / textbook - 1):.1e}"
    )
    print("\n".join(lines))
    rows = Rows()
    rows.add("log-likelihood at EM's point", f"HMM, 3 states, {steps:,} steps", ours, theirs=textbook, peer="forward pass",
             is_less_better=False, is_difference=True)  # fmt: skip
    rows.add("its relative error", f"HMM, 3 states, {steps:,} steps", abs(ours / textbook - 1), target=1e-10)
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    torch.set_num_threads(1)
    main(parser.parse_args().smoke)
