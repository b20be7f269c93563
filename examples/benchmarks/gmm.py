"""EM on Gaussian mixtures of all covariance types beside scikit-learn's and pomegranate's, and on five million rows.

    python examples/benchmarks/gmm.py

All start from the same parameters and take the same number of steps, which alternate in one process. Seconds are medians;
log-likelihoods are computed in float64 from the parameters that each has reached. pomegranate (to be installed with
--no-deps, beside apricot-select and numba) has no tied covariance, and its steps take so long that it takes the last two
only. Memory is the peak of 20 steps, the start of a run included, over what a process held that had just done the same on
a thousand rows and made the data. Five million rows go by in mini-batches, in a process of their own whose peak memory is
printed beside that of its data.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from em_rows import COLUMNS, COMPONENTS, THEIRS, Step, data, ours, scikit_learn
from rows import Rows
from threadpoolctl import threadpool_limits
from torch import Tensor

from inference import EM
from pyro_genmodels import GMM

ROWS = Rows()
_TARGETS = {"float32": 4.0, "float64": 1.5}  # times faster than scikit-learn
_STEPS = 20
_PEER_STEPS = 2  # of pomegranate, whose steps take long


def shaped(covariance: str, start: dict[str, Tensor]) -> dict[str, Tensor]:
    full = start["covariances"]
    shapes = {"full": full, "tied": full[0], "diagonal": full.diagonal(0, -2, -1), "spherical": full[:, 0, 0]}
    return start | {"covariances": shapes[covariance].contiguous()}


def pomegranate(x: Tensor, start: dict[str, Tensor], covariance: str) -> Step | None:
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    kind = {"full": "full", "diagonal": "diag", "spherical": "sphere"}.get(covariance)
    if kind is None:
        return None
    parts = zip(start["means"], start["covariances"], strict=True)
    components = [Normal(mean.clone(), cov.clone(), covariance_type=kind) for mean, cov in parts]
    mixture = GeneralMixtureModel(components, priors=start["weights"].clone())

    def step() -> dict[str, Tensor]:
        mixture.summarize(x)
        mixture.from_summaries()
        covariances = torch.stack([component.covs.reshape(start["covariances"].shape[1:]) for component in components])
        return {"weights": mixture.priors.data, "means": torch.stack([c.means.data for c in components]),
                "covariances": covariances.data}  # fmt: skip

    return step


KINDS: dict[str, Callable[..., Step | None]] = {"ours": ours, "scikit-learn": scikit_learn, "pomegranate": pomegranate}


def compare(covariance: str, x: Tensor, start: dict[str, Tensor], count: int, warmup: int, kinds: tuple[str, ...]) -> None:
    runs, failed = {}, {}
    for kind in kinds:
        try:
            run = KINDS[kind](x, start, covariance)
            if run is not None:
                runs[kind] = run
        except Exception as error:
            failed[kind] = repr(error)[:60]
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    found = {}
    for number in range(warmup + count):
        for kind, run in list(runs.items()):
            if kind == "pomegranate" and number < warmup + count - _PEER_STEPS:
                continue
            begun = time.perf_counter()
            try:
                found[kind] = run()
            except Exception as error:
                failed[kind] = repr(error)[:60]
                del runs[kind]
                continue
            if number >= warmup:
                times[kind].append(time.perf_counter() - begun)
    peer, model = statistics.median(times["scikit-learn"]), GMM(COMPONENTS, covariance)
    wide = x.double()
    for kind in runs:
        values = {name: value.double() for name, value in found[kind].items()}
        level = float(torch.cat([model.score_samples(part, values) for part in wide.split(20_000)]).mean())
        median = statistics.median(times[kind])
        level = level if kind != "pomegranate" else float("nan")  # after other steps
        name = str(x.dtype).removeprefix("torch.")
        print(f"{name:9}{covariance:11}{kind:14}{median:9.3f}{peer / median:8.2f}{level:16.6f}", flush=True)
    if "ours" in runs:
        name, width = str(x.dtype).removeprefix("torch."), x.shape[1]
        ROWS.add("seconds a step of EM", f"GMM, K = {COMPONENTS}, {len(x):,} x {width}, {covariance}, {name}",
                 statistics.median(times["ours"]), theirs=peer, peer="scikit-learn", target=_TARGETS[name])  # fmt: skip
    for kind, why in failed.items():
        print(f"{'':9}{covariance:11}{kind:14}{why}", flush=True)


def peak() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))


def memory(kind: str, covariance: str, rows: int) -> None:
    """Prints the MiB that steps take beside the data."""
    torch.set_num_threads(1)
    x, start = data(rows, torch.float32)
    start = shaped(covariance, start)
    for part in (x[:1000].clone(), x):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the peak is what is held now
        before, run = peak(), KINDS[kind](part, start, covariance)
        assert run is not None
        for _ in range(_STEPS):
            run()
    print(peak() - before)


def many(rows: int) -> None:
    """EM in mini-batches; prints peaks with the data alone and with the run, seconds and the level."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    means = 3.0 * torch.randn(8, 8, generator=generator)
    x = torch.randn(rows, 8, generator=generator)
    for part in x.split(100_000):
        part += means[torch.randint(8, (len(part),), generator=generator)]
    before, begun = peak(), time.perf_counter()
    backend = EM(steps=100, batch_size=min(50_000, rows // 4), dtype=torch.float32, seed=0, progress=False,
                 standard_errors=False, keep=("weights", "means", "covariances"))  # fmt: skip
    posterior = backend.fit(GMM(8, "diagonal"), x)
    seconds, after = time.perf_counter() - begun, peak()
    model, point = GMM(8, "diagonal"), posterior.point()
    level = float(torch.cat([model.score_samples(part, point) for part in x[:200_000].split(20_000)]).mean())
    truth = {"weights": torch.full((8,), 0.125), "means": means, "covariances": torch.ones(8, 8)}
    best = float(torch.cat([model.score_samples(part, truth) for part in x[:200_000].split(20_000)]).mean())
    print(
        f"N = {rows:,}, D = 8, K = 8, float32, diagonal, 100 mini-batches of {backend.batch_size:,}: {seconds:.1f} s; ",
        end="",
    )
    print(f"peak {after} MiB, {before} before the run; log-likelihood of a row {level:.4f}, of the truth {best:.4f}")


def beside(rows: int) -> None:
    """pomegranate beside scikit-learn, in a process of its own: to import it slows torch down, ours several times."""
    print("\npomegranate, in a process of its own:")
    x, start = data(rows, torch.float32)
    for covariance in ("full", "diagonal"):
        compare(covariance, x, shaped(covariance, start), _PEER_STEPS, 0, ("scikit-learn", "pomegranate"))
    print()


def main(smoke: bool = False, threads: int = 1, rows: int = 200_000) -> None:
    torch.set_num_threads(threads)
    rows, count, warmup = (2_000, 2, 2) if smoke else (rows, 5, 15)
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl", "scikit-learn", "pomegranate")
    )
    print(
        f"python examples/benchmarks/{os.path.basename(__file__)}{' --smoke' * smoke}{f' --rows {rows}' * (rows != 200_000)}"
    )
    machine = f"{os.cpu_count()} cores, shared, {threads} thread, Python {platform.python_version()}"
    print(f"{datetime.date.today()}, {machine}, {versions}")
    print(f"K = {COMPONENTS}, D = {COLUMNS}, N = {rows:,}, after {warmup + count} steps from one start\n")
    print(f"{'':9}{'':11}{'':14}{'s / step':>9}{'speed':>8}{'log-likelihood':>16}")
    with threadpool_limits(threads):
        for dtype in (torch.float32, torch.float64):
            x, start = data(rows, dtype)
            for covariance in THEIRS:
                compare(covariance, x, shaped(covariance, start), count, warmup, ("ours", "scikit-learn"))
    limit = 3 * (rows * COLUMNS + rows * COMPONENTS) * 4 / 2**20
    print(f"\nMiB beside the data, float32; three times the data and the responsibilities are {limit:.0f}")
    for covariance in THEIRS:
        used = []
        for kind in ("ours", "scikit-learn"):
            child = [sys.executable, __file__, "--memory", kind, covariance, "--rows", str(rows)]
            used.append(int(subprocess.run(child, capture_output=True, check=True, text=True).stdout))
        print(f"{covariance:11}ours{used[0]:6}   scikit-learn{used[1]:6}", flush=True)
        setting = f"GMM, K = {COMPONENTS}, {rows:,} x {COLUMNS}, {covariance}, float32"
        ROWS.add("MiB beside the data, of a run", setting, used[0], target=limit)
    peer = [sys.executable, __file__, "--pomegranate", "--rows", str(rows)]
    print(subprocess.run(peer, capture_output=True, check=True, text=True).stdout, end="")
    command = [sys.executable, __file__, "--many", str(20_000 if smoke else 5_000_000)]
    print(subprocess.run(command, capture_output=True, check=True, text=True).stdout, end="")
    ROWS.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pomegranate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--many", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.many is not None:
        many(options.many)
    elif options.memory is not None:
        memory(*options.memory, options.rows)
    elif options.pomegranate:
        torch.set_num_threads(1)
        with threadpool_limits(1):
            beside(options.rows)
    else:
        main(options.smoke, options.threads, options.rows)
