"""Are the samplers right? Simulation-based calibration and Geweke's test of Gibbs, Metropolis-Hastings and HMC.

    python examples/benchmarks/calibration.py

Each cell is a program and a sampler. SBC draws 1,000 data sets from the program, fits all of them at once, each with
adaptation of its own, and asks whether the truths rank uniformly among the draws: p is the smallest of all quantities, times
their number, by the exact test of the rank distribution functions. Geweke's test lets 500 chains draw latents and data in
turns, and compares them with what the program draws: |z| is the largest, p as before. A cell passes at p > 0.001.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any

from rows import Rows

os.environ.setdefault("PYRO_GENMODELS_RUNG", "staged")  # a cell is too short for the compiler to pay

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference import HMC, Gibbs, MetropolisHastings
from inference.calibration import SBC, Geweke, geweke, sbc

X = torch.linspace(-1.5, 1.5, 10, dtype=torch.float64)
DESIGN = torch.stack([torch.ones_like(X), X], 1)
ZEROS = torch.zeros(10, dtype=torch.float64)


def normal(y: Tensor) -> None:
    """Mean and variance of normal data."""
    variance = pyro.sample("variance", dist.InverseGamma(y.new_tensor(3.0), 4.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)


def beta_binomial(successes: Tensor) -> None:
    """Success rates of groups around a common one."""
    middle = pyro.sample("middle", dist.Beta(successes.new_tensor(2.0), 2.0))
    size = pyro.sample("size", dist.Gamma(successes.new_tensor(3.0), 0.3))
    with pyro.plate("groups", len(successes)):
        rate = pyro.sample("rate", dist.Beta(middle * size, (1.0 - middle) * size))
        pyro.sample("successes", dist.Binomial(12, rate), obs=successes)


def gamma_poisson(counts: Tensor) -> None:
    """Rates of groups with a common scale."""
    scale = pyro.sample("scale", dist.Gamma(counts.new_tensor(3.0), 3.0))
    with pyro.plate("groups", len(counts)):
        rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), scale))
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


def regression(design: Tensor, y: Tensor) -> None:
    """Coefficients and noise of a linear regression."""
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    variance = pyro.sample("variance", dist.InverseGamma(design.new_tensor(3.0), 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, variance.sqrt()), obs=y)


def logistic(design: Tensor, labels: Tensor) -> None:
    """Coefficients of a logistic regression."""
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 1.5).to_event(1))
    with pyro.plate("rows", len(labels)):
        pyro.sample("labels", dist.Bernoulli(logits=design @ beta), obs=labels)


def centred(y: Tensor) -> None:
    """Effects of groups around their mean."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 2.0))
    between = pyro.sample("between", dist.InverseGamma(y.new_tensor(4.0), 4.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, between.sqrt()))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def not_centred(y: Tensor) -> None:
    """The same, with a half-normal deviation, and effects on a scale of their own."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 2.0))
    deviation = pyro.sample("deviation", dist.HalfNormal(y.new_tensor(1.5)))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mean + deviation * effect, 1.0), obs=y)


def mixture(y: Tensor) -> None:
    """Two normals whose labels are exchangeable."""
    weights = pyro.sample("weights", dist.Dirichlet(y.new_ones(2) * 2.0))
    with pyro.plate("components", 2):
        location = pyro.sample("location", dist.Normal(y.new_tensor(0.0), 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(location[z], 1.0), obs=y)


def change_point(counts: Tensor) -> None:
    """Two rates, and when the first gives way to the second."""
    early = pyro.sample("early", dist.Gamma(counts.new_tensor(2.0), 1.0))
    late = pyro.sample("late", dist.Gamma(counts.new_tensor(2.0), 1.0))
    switch = pyro.sample("switch", dist.Categorical(counts.new_ones(len(counts))))
    with pyro.plate("year", len(counts)):
        is_early = torch.arange(len(counts), device=counts.device) < switch
        pyro.sample("n", dist.Poisson(torch.where(is_early, early, late)), obs=counts)


def hidden_markov(y: Tensor) -> None:
    """Two states that the prior tells apart, seen through noise."""
    stay = pyro.sample("stay", dist.Beta(y.new_ones(2) * 4.0, 2.0).to_event(1))
    low = pyro.sample("low", dist.Normal(y.new_tensor(-1.0), 1.0))
    high = pyro.sample("high", dist.Normal(y.new_tensor(2.0), 1.0))
    state = y.new_zeros((), dtype=torch.long)
    for i in range(len(y)):
        to_high = torch.stack([1.0 - stay[..., 0], stay[..., 1]], -1)[..., state] if i else y.new_tensor(0.5)
        state = pyro.sample(f"z_{i}", dist.Categorical(torch.stack([1.0 - to_high, to_high], -1)))
        pyro.sample(f"y_{i}", dist.Normal(torch.where(state > 0, high, low), 1.0), obs=y[i])


def _of_lower(values: dict[str, Tensor], name: str) -> Tensor:
    lower = values["location"].argmin(1, keepdim=True)
    return values[name].gather(1, lower).squeeze(1)


ORDERED = {
    "lower location": lambda values: values["location"].amin(1),
    "higher location": lambda values: values["location"].amax(1),
    "weight of the lower": lambda values: _of_lower(values, "weights"),
    "rows of the lower": lambda values: (values["z"] == values["location"].argmin(1, keepdim=True)).sum(1),
}

PROGRAMS: dict[Callable[..., None], tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    normal: ((ZEROS,), {}),
    beta_binomial: ((ZEROS[:5],), {}),
    gamma_poisson: ((ZEROS[:5],), {}),
    regression: ((DESIGN, ZEROS), {}),
    logistic: ((DESIGN, ZEROS), {}),
    centred: ((ZEROS[:5],), {}),
    not_centred: ((ZEROS[:5],), {}),
    mixture: ((ZEROS[:8],), {"sites": (), "quantities": ORDERED}),
    change_point: ((ZEROS,), {}),
    hidden_markov: ((ZEROS[:5],), {}),
}

# Steps per draw, where a draw would be much like the last one.
GIBBS_THIN = {"beta_binomial": 5, "centred": 2, "not_centred": 3, "mixture": 4, "logistic": 2, "gamma_poisson": 2}
METROPOLIS_THIN = {"normal": 8, "regression": 10, "logistic": 8, "beta_binomial": 25, "not_centred": 25, "hidden_markov": 20}


def samplers(name: str, smoke: bool) -> list[Any]:
    """The three samplers, as they are calibrated on a program."""
    few = {"warmup": 5, "draws": 5, "thin": 1} if smoke else {}
    common: dict[str, Any] = {"seed": 0, "progress": False}
    return [
        Gibbs(**{"chains": 1, "warmup": 100, "draws": 60, "thin": GIBBS_THIN.get(name, 1), **few}, **common),
        MetropolisHastings(
            **{"chains": 2, "warmup": 600, "draws": 40, "thin": METROPOLIS_THIN.get(name, 15), **few}, **common
        ),
        HMC(**{"chains": 2, "warmup": 200, "draws": 60, "most_steps": 12, **few}, **common),
    ]


def main(smoke: bool = False) -> dict[tuple[str, str], tuple[SBC, Geweke]]:
    """Prints the table; returns the results of each program and sampler."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl", "arviz"))
    print(
        f"{datetime.date.today()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {versions}\n"
    )
    print(
        f"{'program':14} {'sampler':18} | {'SBC':7} {'p':>7} {'draws':>6} {'thin':>5} {'s':>5} "
        f"| {'Geweke':7} {'p':>7} {'|z|':>5} {'s':>5}"
    )
    start, work, results = time.perf_counter(), time.process_time(), {}
    for program, (data, options) in list(PROGRAMS.items())[: 1 if smoke else None]:
        for sampler in samplers(program.__name__, smoke):
            ranked = sbc(program, sampler, *data, replicates=30 if smoke else 1000, **options)
            joint = geweke(program, sampler, *data, chains=30 if smoke else 500, iterations=3 if smoke else 50, **options)
            results[program.__name__, type(sampler).__name__] = ranked, joint
            p, q = (min(1.0, x.p_value.size * x.p_value.min()) for x in (ranked, joint))
            print(
                f"{program.__name__:14} {type(sampler).__name__:18} | {'passed' if ranked.passed else 'FAILED':7} {p:7.2g} "
                f"{ranked.draws:6d} {ranked.thin * sampler.thin:5d} {ranked.info['sampling_time']:5.0f} "
                f"| {'passed' if joint.passed else 'FAILED':7} {q:7.2g} {abs(joint.z).max():5.2f} "
                f"{joint.info['sampling_time']:5.0f}",
                flush=True,
            )
    failed = [result for cell in results.values() for result in cell if not result.passed]
    tests = 2 * len(results)
    print(
        f"\n{tests - len(failed)} of {tests} tests passed, {time.perf_counter() - start:.0f} s in all, "
        f"{time.process_time() - work:.0f} s of one processor."
    )
    for result in failed:
        print(f"\n{result}")
    rows = Rows()
    rows.add("calibration tests that fail", f"{tests} tests of samplers, SBC and Geweke", float(len(failed)), target=0.0)
    rows.show()
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    main(parser.parse_args().smoke)
