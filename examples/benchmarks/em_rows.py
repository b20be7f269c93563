"""A step of EM on a full-covariance Gaussian mixture beside scikit-learn's, and beside one written by hand.

    python examples/benchmarks/em_rows.py

The mixture is the ordinary program ``GMM(K)``, whose rows the engine turns into matrix products; nothing is written for it.
All three start from the same parameters. By hand is a chunked step of products: η and c of every component, one product of
(component, statistic) by (statistic, row) for the log-probabilities, one back for the expected statistics. Seconds are
medians over steps that alternate in one process. The parameters are compared after the same number of steps. A whole fit
starts from its own: ours from pilots, scikit-learn from k-means. Memory is the peak of a process that makes the data and
takes 20 steps.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rows import Rows
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from inference import EM
from inference.handlers import quiet, reproducible
from inference.program import Program
from pyro_genmodels import GMM

COMPONENTS, COLUMNS, CHUNK = 16, 16, 2048
KINDS = ("ours", "scikit-learn", "by hand")
THEIRS = {"full": "full", "tied": "tied", "diagonal": "diag", "spherical": "spherical"}  # names of covariances


def data(rows: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of a mixture of overlapping components, and where to start."""
    generator = torch.Generator().manual_seed(0)
    shape = (COMPONENTS, COLUMNS, COLUMNS)
    means = 2.0 * torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    roots = torch.eye(COLUMNS, dtype=torch.float64) + 0.15 * torch.randn(shape, generator=generator, dtype=torch.float64)
    label = torch.randint(COMPONENTS, (rows,), generator=generator)
    noise = torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float64)
    x = means[label]
    for k in range(COMPONENTS):
        x[label == k] += noise[label == k] @ roots[k].T
    weights = torch.full((COMPONENTS,), 1.0 / COMPONENTS, dtype=torch.float64)
    start = {"weights": weights, "means": means + 0.3, "covariances": torch.eye(COLUMNS, dtype=torch.float64).expand(shape)}
    return x.to(dtype), {name: value.to(dtype) for name, value in start.items()}


Step = Callable[[], dict[str, Tensor]]  # one step of EM; the parameters after it


def ours(x: Tensor, start: dict[str, Tensor], covariance: str = "full") -> Step:
    """Steps of EM, inside the contexts of a run."""
    backend = EM(steps=10**6, tolerance=0.0, objective="mle", start=start, dtype=x.dtype, seed=0, progress=False)
    program = Program(GMM(COMPONENTS, covariance), (x,), dtype=x.dtype)
    with reproducible(program.dtype), quiet(), torch.no_grad():
        state = backend.init(program)

    def step() -> dict[str, Tensor]:
        nonlocal state
        with reproducible(program.dtype), quiet(), torch.no_grad():
            state, _ = backend.step(state, program)
        return {name: state.values[name][0] for name in start}

    return step


def scikit_learn(x: Tensor, start: dict[str, Tensor], covariance: str = "full") -> Step:
    """The two halves of the loop in ``GaussianMixture.fit``."""
    is_matrix, own = covariance in ("full", "tied"), start["covariances"]
    mixture: Any = GaussianMixture(
        COMPONENTS,
        covariance_type=THEIRS[covariance],
        reg_covar=0.0,
        init_params="random",
        weights_init=start["weights"].numpy(),
        means_init=start["means"].numpy(),
        precisions_init=(torch.linalg.inv(own) if is_matrix else own.reciprocal()).numpy(),
        random_state=0,
    )
    rows = x.numpy()
    mixture._initialize_parameters(rows, np.random.RandomState(0))

    def step() -> dict[str, Tensor]:
        _, log_weights = mixture._e_step(rows)
        mixture._m_step(rows, log_weights)
        found = mixture.weights_, mixture.means_, mixture.covariances_
        return {name: torch.as_tensor(value) for name, value in zip(start, found, strict=True)}

    return step


def by_hand(x: Tensor, start: dict[str, Tensor]) -> Step:
    centre, unit = x.mean(0), x.std(0)
    u, parameters = (x - centre) / unit, dict(start)
    i, j = torch.tril_indices(COLUMNS, COLUMNS)
    table = torch.cat([u, u[:, i] * u[:, j]], 1)

    def step() -> dict[str, Tensor]:
        means = (parameters["means"] - centre) / unit
        root = torch.linalg.cholesky(parameters["covariances"] / unit / unit[:, None])
        precision = torch.cholesky_inverse(root)
        linear = (precision @ means[..., None])[..., 0]
        square = precision[:, i, j] * torch.where(i == j, -0.5, -1.0).to(x.dtype)
        constant = parameters["weights"].log() - 0.5 * (linear * means).sum(-1) - root.diagonal(0, -2, -1).log().sum(-1)
        natural = torch.cat([linear, square], 1)
        moments = torch.zeros(natural.shape, dtype=torch.float64)
        counts = torch.zeros(COMPONENTS, dtype=torch.float64)
        for t in table.split(CHUNK):
            weights = torch.addmm(constant[:, None], natural, t.T).softmax(0)
            moments += weights @ t
            counts += weights.sum(1)
        mean, second = moments[:, :COLUMNS] / counts[:, None], torch.zeros(COMPONENTS, COLUMNS, COLUMNS, dtype=torch.float64)
        second[:, i, j] = second[:, j, i] = moments[:, COLUMNS:] / counts[:, None]
        covariance = (second - mean[:, :, None] * mean[:, None]) * unit * unit[:, None]
        found = {"weights": counts / len(x), "means": mean * unit + centre, "covariances": covariance}
        parameters.update({name: value.to(x.dtype) for name, value in found.items()})
        return dict(parameters)

    return step


MAKERS = dict(zip(KINDS, (ours, scikit_learn, by_hand), strict=True))


def steps(x: Tensor, start: dict[str, Tensor], count: int, warmup: int) -> tuple[list[float], list[float]]:
    """Median seconds of a step of each kind, and the largest difference of each from scikit-learn's parameters."""
    runs = [make(x, start) for make in MAKERS.values()]
    times: list[list[float]] = [[] for _ in runs]
    for number in range(warmup + count):
        found = []
        for own, run in zip(times, runs, strict=True):
            begun = time.perf_counter()
            found.append(run())
            if number >= warmup:
                own.append(time.perf_counter() - begun)
    peer = found[KINDS.index("scikit-learn")]
    largest = [max(float((f[n] - peer[n]).abs().max() / peer[n].abs().max()) for n in start) for f in found]
    return [statistics.median(own) for own in times], largest


def fits(x: Tensor, count: int) -> list[tuple[float, float]]:
    """Seconds of a whole fit of each back-end from its own start, and the mean log-likelihood of a row."""
    begun = time.perf_counter()
    backend = EM(steps=count, tolerance=0.0, objective="mle", dtype=x.dtype, seed=0, progress=False)
    posterior = backend.fit(GMM(COMPONENTS), x)
    mine = time.perf_counter() - begun, float(posterior.stats["lp"][0, 0]) / len(x)
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture = GaussianMixture(COMPONENTS, reg_covar=0.0, tol=0.0, max_iter=count, random_state=0).fit(x.numpy())
    return [mine, (time.perf_counter() - begun, mixture.score(x.numpy()))]


def peak(kind: str, dtype: str, rows: int) -> None:
    """Prints the peak memory of this process in MiB: that of the data alone, or with steps."""
    x, start = data(rows, getattr(torch, dtype))
    if kind in MAKERS:
        run = MAKERS[kind](x, start)
        for _ in range(20):
            run()
    with open("/proc/self/status") as status:  # what getrusage tells of a child begins with its parent's
        print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))


def memory(kind: str, dtype: str, rows: int) -> int:
    command = [sys.executable, __file__, "--memory", kind, "--dtype", dtype, "--rows", str(rows)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main(smoke: bool = False, threads: int = 1, dtypes: tuple[str, ...] = ("float32", "float64")) -> None:
    torch.set_num_threads(threads)
    rows, count, warmup, long = (2_000, 2, 16, 2) if smoke else (200_000, 9, 16, 30)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl", "scikit-learn"))
    options = f" --threads {threads}" + " --smoke" * smoke + (f" --dtype {dtypes[0]}" if len(dtypes) == 1 else "")
    print(f"python examples/benchmarks/{os.path.basename(__file__)}{options}")
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, shared, Python {platform.python_version()}, {versions}")
    print(f"K = {COMPONENTS}, D = {COLUMNS}, N = {rows:,}, full covariances\n")
    told = Rows()
    with threadpool_limits(threads):
        for name in dtypes:
            x, start = data(rows, getattr(torch, name))
            seconds, differences = steps(x, start, count, warmup)
            peer = seconds[KINDS.index("scikit-learn")]
            print(f"{name:13}{'s / step':>10}{'speed':>8}{'parameters':>13}{'peak MiB':>10}")
            for kind, own, difference in zip(KINDS, seconds, differences, strict=True):
                used = memory(kind, name, rows)
                print(f"{kind:13}{own:10.3f}{peer / own:8.2f}{difference:13.1e}{used:10}", flush=True)
            print(f"{'(data alone)':13}{'':31}{memory('', name, rows):10}")
            told.add("seconds a step of EM", f"GMM, K = D = {COMPONENTS}, {rows:,} rows, full, {name}",
                     seconds[KINDS.index("ours")], theirs=peer, peer="scikit-learn")  # fmt: skip
            print()
        print(f"{'whole fit':13}{f'{long} steps, s':>14}{'log-likelihood of a row':>26}")
        for kind, (own, level) in zip(KINDS, fits(x, long), strict=False):
            print(f"{kind:13}{own:14.1f}{level:26.4f}", flush=True)
    told.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("float32", "float64"), help="one of the two alone")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory is not None:
        peak(options.memory, options.dtype, options.rows)
    else:
        main(options.smoke, options.threads, *([(options.dtype,)] if options.dtype else []))
