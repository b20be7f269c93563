"""The rest of an MNIST digit given one, two or three of its quadrants: CVAE beside nearest neighbours and a plain network.

    python examples/benchmarks/cvae_quadrants.py

As in Sohn et al.: the lower left quadrant is seen, the left half, or all but the upper right one, and the score is
−log p(rest | seen) a picture, in nats. That of the CVAE is by importance sampling: from its guess q(z | picture), or from
its prior p(z | seen), which never looks at the rest (the paper's "Monte Carlo"). In expectation both say less of log p than
it is, and meet as samples grow. Pictures are binarised anew at every visit, those of the test set once.

    nearest neighbour       the rest of the training picture that is nearest in what is seen, its levels kept off 0 and 1
    k nearest neighbours    a mixture of k of them; how many, and how far levels are kept off, is chosen on held-out rows
    network                 independent pixels, from a network of what is seen: the paper's baseline
    CVAE                    with a conditional prior, as in the paper

Short schedule: 3 epochs, batches of 128, Adam at 1e-3 for the first half, then along a cosine to a hundredth of that,
a moving average of the weights of decay 0.999; networks of 512 and 256 units, z of 30 numbers; every twentieth test picture.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rows import Rows
from torch import Tensor, nn

from inference import SVI
from pyro_genmodels import CVAE
from pyro_genmodels.metrics.density import log_evidence
from pyro_genmodels.nets import MLP

HIDDEN, FEATURES = (512, 256), 30
PAPER = {  # Table 1, from memory of the paper; quadrants seen to nats
    "network": {1: 100.03, 2: 62.14, 3: 26.01},
    "CVAE, prior": {1: 68.62, 2: 45.57, 3: 20.97},
    "CVAE, guess": {1: 64.05, 2: 44.96, 3: 20.97},
}
NEIGHBOURS, FLOORS = (1, 3, 10, 30, 100, 300, 1000), (0.01, 0.02, 0.05, 0.1, 0.2)
HELD = 400  # training rows, on which neighbours are chosen; no model is fitted to them


def quadrants(count: int) -> Tensor:
    """Which pixels are seen, (784,)."""
    seen = torch.zeros(28, 28, dtype=torch.bool)
    seen[14:, :14] = True
    if count > 1:
        seen[:, :14] = True
    if count > 2:
        seen[14:, :] = True
    return seen.flatten()


class Rest(nn.Module):
    """A CVAE of what is not seen, as a program of whole pictures (rows, 784): what is binarised anew stays one picture."""

    def __init__(self, seen: Tensor, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.seen, self.rest = seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]
        self.part = CVAE((len(self.rest),), len(self.seen), FEATURES, conditional_prior=True, hidden=hidden)

    def model(self, x: Tensor) -> Tensor:
        return self.part.model(x[:, self.rest], x[:, self.seen])

    def guide(self, x: Tensor) -> None:
        self.part.guide(x[:, self.rest], x[:, self.seen])

    def prior(self, x: Tensor) -> None:
        """A guide that does not look at the rest."""
        self.part.guide(None, x[:, self.seen])


class Network(nn.Module):
    """The rest from a network of what is seen, pixel by pixel; nothing is hidden."""

    def __init__(self, seen: Tensor, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.seen, self.rest = seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]
        self.logits = MLP(len(self.seen), len(self.rest), hidden)

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("rest", self(x), obs=x[:, self.rest])

    def guide(self, x: Tensor) -> None:
        """Nothing to guess."""

    def forward(self, x: Tensor) -> pyro.distributions.TorchDistribution:
        return dist.Bernoulli(logits=self.logits(x[:, self.seen])).to_event(1)

    @torch.no_grad()
    def log_p(self, x: Tensor) -> Tensor:
        return self(x).log_prob(x[:, self.rest]).double()


def neighbours(x: Tensor, new: Tensor, seen: Tensor, count: int) -> Tensor:
    """The training rows that are nearest in what is seen, nearest first, (row, count)."""
    parts = new[:, seen].split(200)
    return torch.cat([torch.cdist(part, x[:, seen]).topk(count, largest=False).indices for part in parts])


def mixtures(x: Tensor, new: Tensor, seen: Tensor, nearest: Tensor, floor: float) -> Tensor:
    """log p(rest | seen) of a mixture of the k nearest, for each k in NEIGHBOURS, (k, row)."""
    rows = []
    for row, index in zip(new[:, ~seen], nearest, strict=True):
        level = x[index][:, ~seen].clamp(floor, 1.0 - floor)
        log_p = (row * level.log() + (1.0 - row) * torch.log1p(-level)).sum(1).double()
        rows.append(log_p.logcumsumexp(0))
    table = torch.stack(rows, 1)
    chosen = [k for k in NEIGHBOURS if k <= len(table)]
    return torch.stack([table[k - 1] - math.log(k) for k in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a minute: whether it runs")
    parser.add_argument("--seen", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="quadrants")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=500, help="of the test set")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.smoke:
        options.images, options.samples = 50, [10]
    torch.set_num_threads(options.threads)
    print(" ".join(["python examples/benchmarks/cvae_quadrants.py", *sys.argv[1:]]))
    print(f"{datetime.date.today()}, 2 cores, shared; {options.threads} thread{'s'[: options.threads - 1]}, float32")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    print(f"Python {platform.python_version()}, {versions}")
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "mnist.npz") as data:
        x, test = (torch.from_numpy(data[name]).float().flatten(1) / 255.0 for name in ("x_train", "x_test"))
    generator = torch.Generator().manual_seed(0)
    test = test.bernoulli(generator=generator)[:: 10_000 // options.images][: options.images]
    held, x = x[-HELD:].bernoulli(generator=generator), x[: 3000 if options.smoke else -HELD]
    print(f"{len(test)} test pictures, {options.epochs} epochs")
    rows = Rows()
    svi = SVI(
        steps=20 if options.smoke else options.epochs * -(-len(x) // 128),
        learning_rate=1e-3,
        batch_size=128,
        average=0.999,
        transform=torch.bernoulli,
        draws=1,
        seed=options.seed,
        progress=False,
    )
    for count in options.seen:
        seen = quadrants(count)
        print(
            f"\n{count} seen, {int((~seen).sum())} pixels to tell {'':3} {'nats':>7} {'± se':>6} {'paper':>7} {'seconds':>8}"
        )

        def show(name: str, log_p: Tensor, seconds: float, note: str = "", count: int = count) -> None:
            paper = PAPER.get(name.rsplit(", ", 1)[0], {}).get(count)
            told = f"{'-':>7}" if paper is None else f"{paper:7.2f}"
            se = float(log_p.std()) / math.sqrt(len(log_p))
            print(f"{name:28} {-float(log_p.mean()):7.2f} {se:6.2f} {told} {seconds:8.0f}   {note}", flush=True)
            if paper is not None:
                rows.add("nats of what is hidden", f"MNIST, {count} quadrants seen, {name}", -float(log_p.mean()),
                         theirs=paper, peer="the paper", is_difference=True)  # fmt: skip

        begin = time.perf_counter()
        near = neighbours(x, held, seen, max(NEIGHBOURS))
        tried = {floor: mixtures(x, held, seen, near, floor).mean(1) for floor in FLOORS}
        near = neighbours(x, test, seen, max(NEIGHBOURS))
        seconds = time.perf_counter() - begin
        floor = max(FLOORS, key=lambda f: float(tried[f][0]))
        show("nearest neighbour", mixtures(x, test, seen, near, floor)[0], seconds, f"levels from {floor} to {1 - floor}")
        floor = max(FLOORS, key=lambda f: float(tried[f].max()))
        best = int(tried[floor].argmax())
        note = f"k = {NEIGHBOURS[best]}, levels from {floor} to {1 - floor}"
        show("k nearest neighbours", mixtures(x, test, seen, near, floor)[best], seconds, note)

        torch.manual_seed(options.seed)
        begin = time.perf_counter()
        network = Network(seen, HIDDEN)
        svi.fit(network, x)
        show("network, exact", network.log_p(test), time.perf_counter() - begin)

        begin = time.perf_counter()
        model = Rest(seen, HIDDEN)
        svi.fit(model, x)
        fitting = time.perf_counter() - begin
        for name, guide in {"prior": model.prior, "guess": model.guide}.items():
            for samples in options.samples:
                begin = time.perf_counter()
                found = log_evidence(model, test, guide=guide, samples=samples)
                note = f"k-hat above 0.7 at {float((found.pareto_k > 0.7).double().mean()):.1%}"
                show(f"CVAE, {name}, {samples}", found.log_p, fitting + time.perf_counter() - begin, note)
    rows.show()


if __name__ == "__main__":
    main()
