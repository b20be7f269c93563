"""Burda et al.'s autoencoders on MNIST, of one and two layers, fitted by the evidence lower bound and by importance weights.

    python examples/benchmarks/mnist_vae.py                            # the short protocol, on a processor
    python examples/benchmarks/mnist_vae.py --full --device cuda       # the authors' protocol, for a GPU

Pictures are binarised anew at every visit, those of the test set once, the same for all models. NLL is −log p(x) a picture,
in nats, by importance sampling from the guide (``metrics.density.log_evidence``); it does not depend on the bound that a
model was fitted by. Models are compared picture by picture, which takes the spread between pictures out.

Short protocol: batches of 100, 8 epochs, Adam at 2e-3 for the first half and then along a cosine to a hundredth of that,
moving average of the weights of decay 0.999, 5,000 samples at 500 test pictures, every twentieth of the test set.

The authors' (github.com/yburda/iwae): batches of 20, eight stages of 3^i epochs at 1e-3 · 10^(−i/7), 3,280 epochs in all,
Adam with eps = 1e-4, no average, 5,000 samples at all 10,000 test pictures. In both, training leaves the last 400 pictures
out, the logits start at the mean picture, and gradients are the authors' (``path=False``) unless ``--path`` is given.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rows import Rows
from torch import Tensor

from inference import ELBO, IWELBO, SVI
from inference.bounds import Bound
from pyro_genmodels import IWAE
from pyro_genmodels.metrics.codes import active_units
from pyro_genmodels.metrics.density import log_evidence

PAPER = {  # Table 1
    "VAE, 1 layer, k=1": 86.76,
    "VAE, 1 layer, k=5": 86.47,
    "IWAE, 1 layer, k=5": 85.54,
    "VAE, 2 layers, k=1": 85.33,
    "IWAE, 2 layers, k=5": 83.89,
    "VAE, 1 layer, k=50": 86.35,
    "IWAE, 1 layer, k=50": 84.78,
    "VAE, 2 layers, k=5": 85.01,
    "VAE, 2 layers, k=50": 84.78,
    "IWAE, 2 layers, k=50": 82.90,
}
SHORT = 5  # of them
STAGES = range(8)
PAIRS = (
    ("VAE, 1 layer, k=1", "IWAE, 1 layer, k=5"),
    ("VAE, 1 layer, k=5", "IWAE, 1 layer, k=5"),
    ("VAE, 1 layer, k=1", "VAE, 2 layers, k=1"),
    ("VAE, 2 layers, k=1", "IWAE, 2 layers, k=5"),
    ("IWAE, 1 layer, k=5", "IWAE, 2 layers, k=5"),
)  # of which the second should be better


class Row(NamedTuple):
    """What is found of a model: log p(x) of each test picture, and share of them whose k-hat is above 0.7."""

    log_p: Tensor
    unreliable: float
    active: str
    bound: float
    fitting: float
    testing: float


def asked(name: str, path: bool) -> tuple[int, Bound]:
    """Layers and bound of a row."""
    layers, particles = int(name.split(", ")[1][0]), int(name.split("k=")[1])
    bound = ELBO(particles=particles, path=path) if name.startswith("VAE") else IWELBO(particles=particles, path=path)
    return layers, bound


def backend(options: argparse.Namespace, rows: int, bound: Bound) -> SVI:
    a_pass = math.ceil(rows / options.batch)
    common = {
        "bound": bound,
        "batch_size": options.batch,
        "transform": torch.bernoulli,
        "draws": 1,
        "seed": options.seed,
        "compile": options.compile,
    }
    if not options.full:
        steps = options.steps or options.epochs * a_pass
        return SVI(steps=steps, learning_rate=options.rate, average=options.average, progress=False, **common)
    ends = np.cumsum([3**i * a_pass for i in STAGES])

    def rate(step: int) -> float:
        return 10.0 ** (-min(int(np.searchsorted(ends, step, side="right")), len(STAGES) - 1) / 7.0)

    return SVI(
        steps=options.steps or int(ends[-1]),
        optimiser=lambda weights: torch.optim.Adam(weights, lr=1e-3, eps=1e-4),
        scheduler=lambda optimiser: torch.optim.lr_scheduler.LambdaLR(optimiser, rate),
        **common,
    )


def measured(name: str, options: argparse.Namespace, x: Tensor, test: Tensor) -> Row:
    layers, bound = asked(name, options.path)
    torch.manual_seed(options.seed)
    model = IWAE(layers=layers, pixel_means=x.mean(0).cpu()).to(x.device)
    begin = time.perf_counter()
    posterior = backend(options, len(x), bound).fit(model, x)
    fitting = time.perf_counter() - begin
    last = posterior.history["loss"][-math.ceil(len(x) / options.batch) :]
    begin = time.perf_counter()
    found = log_evidence(model, test, samples=options.samples)
    testing = time.perf_counter() - begin
    units = active_units(model, test)
    count = {site: int((variance > units.threshold).sum()) for site, variance in units.variance.items()}
    active = "+".join(str(count[site]) for site in ("z", "top") if site in count)
    unreliable = float((found.pareto_k > 0.7).double().mean())
    if options.weights:
        Path(options.weights).mkdir(parents=True, exist_ok=True)
        kept = {"weights": model.state_dict(), "log_p": found.log_p}
        torch.save(kept, Path(options.weights) / f"{re.sub('[^0-9A-Za-z]+', '_', name)}.pt")
    return Row(found.log_p.cpu(), unreliable, active, float(last.mean()) / len(x), fitting, testing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the authors' protocol")
    parser.add_argument("--smoke", action="store_true", help="a minute: whether it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="steps by torch.compile")
    parser.add_argument("--models", nargs="+", default=None, metavar="ROW", help="rows of the table, all by default")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=None, help="stop early")
    parser.add_argument("--batch", type=int, default=None, help="by default 100, or the authors' 20")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--average", type=float, default=0.999)
    parser.add_argument("--path", action="store_true", help="doubly reparameterised gradients")
    parser.add_argument("--images", type=int, default=None, help="of the test set, by default 500, or all")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default=None, help="folder for the weights and log p(x)")
    options = parser.parse_args()
    names = options.models or [*PAPER][: None if options.full else SHORT]
    unknown = [name for name in names if name not in PAPER]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}, but {', '.join(map(repr, PAPER))}")
    options.batch = options.batch or (20 if options.full else 100)
    images = options.images or (10_000 if options.full else 500)
    if options.smoke:
        options.steps, options.samples, images = options.steps or 20, 50, 20
    torch.set_num_threads(options.threads)
    print(" ".join(["python examples/benchmarks/mnist_vae.py", *(f"'{a}'" if " " in a else a for a in sys.argv[1:])]))
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "2 cores, shared"
    print(f"{datetime.date.today()}, {where}; {options.threads} thread{'s'[: options.threads - 1]}, float32")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    print(f"Python {platform.python_version()}, {versions}\n")
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "mnist.npz") as data:
        x, test = (torch.from_numpy(data[name]).float() / 255.0 for name in ("x_train", "x_test"))
    x = x[:-400].to(options.device)
    test = test.bernoulli(generator=torch.Generator().manual_seed(0))[:: 10_000 // images][:images].to(options.device)
    print(f"{len(test)} test pictures, {options.samples} samples; the paper's Table 1 is of all 10,000 and 3,280 epochs")
    titles = ("NLL", "± se", "paper", "active", "k-hat>0.7", "bound", "fit, s", "test, s")
    print(f"{'':20}", *(f"{title:>{width}}" for title, width in zip(titles, (7, 6, 7, 7, 10, 8, 8, 8), strict=True)))
    rows, told = {}, Rows()
    for name in names:
        row = rows[name] = measured(name, options, x, test)
        se = float(row.log_p.std()) / math.sqrt(len(row.log_p))
        print(
            f"{name:20} {-float(row.log_p.mean()):7.2f} {se:6.2f} {PAPER[name]:7.2f} {row.active:>7} {row.unreliable:10.3f} "
            f"{-row.bound:8.2f} {row.fitting:8.0f} {row.testing:8.0f}",
            flush=True,
        )
        told.add("NLL, nats", f"MNIST, {name}, {options.epochs} epochs, {len(test)} pictures", -float(row.log_p.mean()),
                 theirs=PAPER[name], peer="the paper, 3,280 epochs", is_difference=True)  # fmt: skip
    if any({*pair} <= {*rows} for pair in PAIRS):
        print(f"\n{'better by, in nats, picture by picture':48} {'here':>7} {'± se':>6} {'paper':>7}")
    for worse, better in PAIRS:
        if worse in rows and better in rows:
            gain = rows[better].log_p - rows[worse].log_p
            se, paper = float(gain.std()) / math.sqrt(len(gain)), PAPER[worse] - PAPER[better]
            verdict = "" if float(gain.mean()) > 0.0 else "   MISS: not better"
            print(f"{better + ', than ' + worse:48} {float(gain.mean()):7.2f} {se:6.2f} {paper:7.2f}{verdict}")
            told.add("gain in log p(x), nats", f"MNIST, {better}, than {worse}", float(gain.mean()), theirs=paper,
                     peer="the paper", is_less_better=False, is_difference=True, target=-min(0.4, paper))  # fmt: skip
    told.show()


if __name__ == "__main__":
    main()
