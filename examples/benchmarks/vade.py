"""Clusters of MNIST digits: VaDE beside k-means and Gaussian mixtures, on pixels and on the codes of its autoencoder.

    python examples/benchmarks/vade.py

Accuracy is that of the best matching of clusters to digits, one to one, of the rows that are evaluated; labels are used for
nothing else. Two protocols: fitted to the 60,000 and evaluated on the 10,000 test pictures, and, as in the paper, fitted to
all 70,000 and evaluated on them. Mean, standard deviation, least and best over seeds.

Short schedule: pictures are binarised anew at every visit (the paper takes grey levels for probabilities, which in the mean
over visits is the same likelihood) and encoded as they are in the end; batches of 256; the autoencoder and then VaDE are
fitted by Adam at 1e-3 for the first half of their epochs and then along a cosine to a hundredth of that. Networks are
784-512-256-10, relu, unless ``--hidden`` says otherwise, and clusters have full covariances; the paper's are 500 500 2000
and diagonal, trained for 3,000 epochs at batches of 100, from the weights of a stacked autoencoder that come with its code.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from inference import SVI
from pyro_genmodels import VaDE
from pyro_genmodels.metrics.clustering import accuracy

CLUSTERS, FEATURES = 10, 10
PAPER = {
    "GMM on pixels": 0.537,
    "GMM on codes": 0.822,
    "VaDE": 0.945,
}  # its table of MNIST, on all 70,000
_ROUND = 1e-2  # added to variances of pixels, of which some never change


def peers(x: np.ndarray, new: np.ndarray, seed: int, kind: str, floor: float) -> dict[str, tuple[np.ndarray, float]]:
    """Clusters of new rows by k-means and by a mixture that starts from it, and seconds."""
    found = {}
    models = {
        "k-means": KMeans(CLUSTERS, n_init=1, random_state=seed),
        "GMM": GaussianMixture(CLUSTERS, covariance_type=kind, reg_covar=floor, random_state=seed),
    }
    for name, model in models.items():
        begin = time.perf_counter()
        labels = model.fit(x).predict(new)
        found[name] = labels, time.perf_counter() - begin
    return found


def one_seed(
    options: argparse.Namespace, x: Tensor, new: Tensor, truth: Tensor, seed: int, show: Callable[..., None]
) -> None:
    flat, flat_new = x.flatten(1).numpy(), new.flatten(1).numpy()
    if not options.no_pixels:
        for name, (labels, seconds) in peers(flat, flat_new, seed, "diag", _ROUND).items():
            show(f"{name} on pixels", seed, accuracy(truth, labels), seconds)
    torch.manual_seed(seed)
    model = VaDE((28, 28), CLUSTERS, FEATURES, hidden=options.hidden, covariance=options.covariance)
    a_pass = -(-len(x) // options.batch)
    common: dict[str, Any] = {
        "learning_rate": options.rate,
        "batch_size": options.batch,
        "draws": 1,
        "seed": seed,
        "transform": torch.bernoulli,
    }
    begin = time.perf_counter()
    autoencoder = model.autoencoder()
    SVI(steps=options.steps or options.pretrain * a_pass, progress=False, **common).fit(autoencoder, x)
    codes, codes_new = autoencoder.codes(x), autoencoder.codes(new)
    coded = time.perf_counter() - begin
    for name, (labels, seconds) in peers(codes.numpy(), codes_new.numpy(), seed, "full", 1e-6).items():
        show(f"{name} on codes", seed, accuracy(truth, labels), coded + seconds)
    begin = time.perf_counter()
    model.start_from(codes)
    show("VaDE where it starts", seed, accuracy(truth, model.predict(new)), coded + time.perf_counter() - begin)
    SVI(steps=options.steps or options.epochs * a_pass, progress=False, **common).fit(model, x)
    show("VaDE", seed, accuracy(truth, model.predict(new)), coded + time.perf_counter() - begin)


def protocol(options: argparse.Namespace, title: str, x: Tensor, new: Tensor, truth: Tensor, rows: Rows) -> None:
    print(f"\n{title}: fitted to {len(x):,}, evaluated on {len(new):,}\n{'':22} {'seed':>5} {'accuracy':>9} {'seconds':>8}")
    scores: dict[str, list[float]] = {}

    def show(name: str, seed: int, score: float, seconds: float) -> None:
        scores.setdefault(name, []).append(score)
        print(f"{name:22} {seed:5} {score:9.3f} {seconds:8.0f}", flush=True)

    for seed in options.seeds:
        one_seed(options, x, new, truth, seed, show)
    print(f"\n{title:22} {'mean':>7} {'sd':>7} {'least':>7} {'best':>7} {'paper':>7}")
    for name, found in scores.items():
        spread = np.std(found, ddof=1) if len(found) > 1 else np.nan
        paper = f"{PAPER[name]:7.3f}" if name in PAPER else f"{'-':>7}"
        print(f"{name:22} {np.mean(found):7.3f} {spread:7.3f} {min(found):7.3f} {max(found):7.3f} {paper}", flush=True)
    means = {name: float(np.mean(found)) for name, found in scores.items()}
    setting = f"MNIST, {title}, VaDE, mean of {len(options.seeds)} seeds"
    for name in (name for name in means if "VaDE" not in name):
        rows.add("accuracy of clusters", setting, means["VaDE"], theirs=means[name], peer=name, is_less_better=False,
                 is_difference=True, target=0.0)  # fmt: skip
    rows.add("accuracy of clusters", setting, means["VaDE"], theirs=PAPER["VaDE"], peer="the paper, all rows",
             is_less_better=False, is_difference=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a minute: whether it runs")
    parser.add_argument("--protocols", nargs="+", choices=("split", "all"), default=["split", "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain", type=int, default=6, help="epochs of the autoencoder")
    parser.add_argument("--epochs", type=int, default=8, help="of VaDE")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--covariance", choices=("diagonal", "full"), default="full", help="of a cluster of VaDE")
    parser.add_argument("--no-pixels", action="store_true", help="leave the peers on pixels out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.steps = 20 if options.smoke else None
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)  # of the mixture of pixels, after 100 steps
    print(" ".join(["python examples/benchmarks/vade.py", *sys.argv[1:]]))
    print(f"{datetime.date.today()}, 2 cores, shared; {options.threads} thread{'s'[: options.threads - 1]}, float32")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl", "scikit-learn"))
    print(f"Python {platform.python_version()}, {versions}")
    schedule = f"{options.pretrain} epochs of the autoencoder, {options.epochs} of VaDE"
    print(f"{options.covariance} covariances, {options.hidden} units, {schedule}", flush=True)
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "mnist.npz") as data:
        x, new = (torch.from_numpy(data[name]).float() / 255.0 for name in ("x_train", "x_test"))
        y, truth = (torch.from_numpy(data[name]).long() for name in ("y_train", "y_test"))
    if options.smoke:
        x, y, new, truth, options.seeds = x[:3000], y[:3000], new[:1000], truth[:1000], [0]
    rows = Rows()
    if "split" in options.protocols:
        protocol(options, "train and test", x, new, truth, rows)
    if "all" in options.protocols:
        both, labels = torch.cat([x, new]), torch.cat([y, truth])
        protocol(options, "all rows", both, both, labels, rows)
    rows.show()


if __name__ == "__main__":
    main()
