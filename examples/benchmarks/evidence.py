"""log p(x) of MNIST images under a VAE: importance sampling beside pythae's, and between the two bounds of annealing.

    pip install pythae==0.1.2 --no-deps && pip install pydantic imageio cloudpickle
    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/evidence.py

Both evaluate one and the same fitted networks, pythae's own (784-512-20-512-784), on binarised images. The peer runs the
encoder again for every draw. Neither can do without the matrix products of the decoder: they are timed on their own, and
bound what a faster program can gain.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rows import Rows
from torch import Tensor, nn

from inference.rowwise import Rowwise
from pyro_genmodels.metrics import codes, density

ROWS = Rows()
CODES = 20
WANTED = 20.0  # times faster than the peer


class Program(nn.Module):
    """The networks of a VAE of pythae, as a program and its guide."""

    def __init__(self, peer: Any) -> None:
        super().__init__()
        hidden, output = peer.decoder.layers
        self.encoder, self.decoder = peer.encoder, nn.Sequential(hidden, output[0])  # without the sigmoid

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        rows = size if x is None else len(x)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(CODES), 1.0).to_event(1))
            return pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        code = self.encoder(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(code.embedding, (0.5 * code.log_covariance).exp()).to_event(1))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def fitted(x: Tensor, passes: int) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        from pythae.models import VAE, VAEConfig
    torch.manual_seed(0)
    peer = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=CODES, reconstruction_loss="bce"))
    optimiser = torch.optim.Adam(peer.parameters(), 1e-3)
    for _ in range(passes):
        for batch in x[torch.randperm(len(x))].split(128):
            loss = peer({"data": batch.bernoulli().view(-1, 1, 28, 28)}).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return peer.eval().requires_grad_(False)


@torch.no_grad()
def same_draws(peer: Any, x: Tensor, count: int = 100) -> None:
    """Both answers from one and the same draws, which the peer is given in place of its own."""
    view = Rowwise(Program(peer), (x,), purpose="This comparison")
    with view.running(0):
        index = torch.arange(len(x))
        values, log_q = view.draw(index, count)
        log_weights = view.terms(values, index, count).joint - log_q
    ours = float((log_weights.logsumexp(0) - math.log(count)).mean())
    draws = iter(values["z"].unflatten(0, (count, len(x))).unbind(1))
    peer._sample_gauss = lambda mean, scale: (next(draws), None)
    theirs = float(peer.get_nll(x.view(-1, 1, 28, 28), n_samples=count, batch_size=count))
    del peer._sample_gauss
    print(f"\nlog p(x) of {len(x)} images from the same {count} draws: {ours:.5f}, pythae {theirs:.5f}")


@torch.no_grad()
def beside(peer: Any, x: Tensor, samples: int, rounds: int) -> None:
    program = Program(peer)
    print(f"\n{f'{len(x)} images, {samples} samples':34}{'log p(x)':>10}{'±':>7}{'seconds':>9}")
    seconds: list[tuple[float, float]] = []
    for seed in range(rounds):  # by turns
        ours, quick = timed(lambda seed=seed: density.log_evidence(program, x, samples=samples, seed=seed))
        se = float(ours.se.square().sum().sqrt()) / len(x)
        print(f"{'log_evidence':34}{ours.mean:10.3f}{se:7.3f}{quick:9.2f}")
        theirs, slow = timed(lambda: peer.get_nll(x.view(-1, 1, 28, 28), n_samples=samples))
        off = (ours.mean - theirs) / (math.sqrt(2.0) * se)
        print(f"{'pythae get_nll':34}{theirs:10.3f}{'':7}{slow:9.2f}   differs by {off:+.1f} standard errors")
        seconds.append((quick, slow))
    z = torch.randn(2500, CODES)
    _, product = timed(lambda: [program.decoder(z) for _ in range(20)])
    floor = product / 20 / 2500 * len(x) * samples
    ratios = [slow / quick for quick, slow in seconds]
    quick, slow = min(seconds, key=lambda pair: pair[1] / pair[0])
    ROWS.add("seconds of log p(x)", f"VAE, {len(x)} images, {samples} samples, the worse of {rounds} rounds", quick,
             theirs=slow, peer="pythae get_nll", target=WANTED)  # fmt: skip
    miss = "" if min(ratios) >= WANTED else f"   MISS: below {WANTED:.0f}"
    print(f"times faster: {', '.join(f'{ratio:.1f}' for ratio in ratios)}{miss}")
    print(
        f"The decoder's networks alone take {floor:.2f} s, which bounds the gain to {seconds[-1][1] / floor:.1f}. "
        f"k-hat is above 0.7 at {int((ours.pareto_k > 0.7).sum())} images."
    )


def between(program: Program, images: int, steps: list[int]) -> None:
    sim = density.simulated(program, images, seed=1)
    print(f"\n{f'{images} images drawn from the model':34}{'log p(x)':>10}{'±':>7}{'seconds':>9}")
    for samples in (50, 500, 5000):
        found, spent = timed(lambda n=samples: density.log_evidence(program, sim.x, samples=n))
        se = float(found.se.square().sum().sqrt()) / images
        high = int((found.pareto_k > 0.7).sum())
        print(f"{f'importance, {samples} samples':34}{found.mean:10.3f}{se:7.3f}{spent:9.2f}   k-hat > 0.7 at {high}")
    for from_guide in (False, True):
        for count in steps:
            found, spent = timed(
                lambda n=count, g=from_guide: density.annealed_evidence(
                    program, sim.x, latents=sim.latents, steps=n, particles=8, from_guide=g
                )
            )
            name = f"annealed from the {'guide' if from_guide else 'prior'}, {count} steps"
            for label, value, se in (("", found.lower, found.lower_se), (", back", found.upper, found.upper_se)):
                error = float(se.square().sum().sqrt()) / images
                print(f"{name + label:34}{float(value.mean()):10.3f}{error:7.3f}{spent / 2:9.2f}")


def said(program: Program, x: Tensor) -> None:
    rate = density.rate_distortion(program, x, samples=100)
    information = density.mutual_information(program, x, samples=2)
    units = codes.active_units(program, x)
    print(
        f"\n{len(x)} images: rate {float(rate.rate.mean()):.2f}, distortion {float(rate.distortion.mean()):.2f} nats, ",
        end="",
    )
    print(f"{units.active} of {units.units} units active, ", end="")
    print(
        f"mutual information {information.lower:.2f} … {information.upper:.2f} nats (log {len(x)} = {math.log(len(x)):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a minute: whether it runs")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=10, help="over 20,000 images, to fit the networks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--simulated", type=int, default=20, help="images for the bounds")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 500], help="of annealing")
    options = parser.parse_args()
    if options.smoke:
        options.images, options.samples, options.rounds, options.passes, options.simulated = 20, 50, 1, 1, 4
        options.steps = [5]
    torch.set_num_threads(options.threads)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl", "pythae"))
    print(" ".join(["python examples/benchmarks/evidence.py", *sys.argv[1:]]))
    print(f"{datetime.date.today()}, 2 cores, shared; {options.threads} thread{'s'[: options.threads - 1]}, float32")
    print(f"Python {platform.python_version()}, {versions}")
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "mnist.npz") as found:
        train, test = (torch.from_numpy(found[name]).float().flatten(1) / 255.0 for name in ("x_train", "x_test"))
    peer = fitted(train[:20_000], options.passes)
    torch.manual_seed(1)
    x = test[: options.images].bernoulli()
    same_draws(peer, x[:20])
    beside(peer, x, options.samples, options.rounds)
    program = Program(peer)
    between(program, options.simulated, options.steps)
    said(program, x)
    ROWS.show()


if __name__ == "__main__":
    main()
