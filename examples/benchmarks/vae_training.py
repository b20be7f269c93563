"""Training of a VAE on MNIST, images a second: SVI, pythae, Pyro's own SVI, and a loop written by hand.

    pip install pythae==0.1.2 --no-deps && pip install pydantic imageio cloudpickle
    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/vae_training.py

All train a 784-512-256-20-256-512-784 VAE with ReLU by Adam at batches of 128, on images that are binarised anew at every
visit, from one tensor in memory, with the same learning rate. Pyro's is as in its examples: probabilities from a sigmoid,
``Trace_ELBO``, its Adam. pythae's networks are trained in a plain loop, and by its ``BaseTrainer``, which has data loaders
and writes its model down. Rounds alternate. The first steps of a run, in which SVI records its graph, are told apart.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rows import Rows
from torch import Tensor, nn

from inference import SVI
from pyro_genmodels import VAE

BATCH, CODES, RATE, FIRST = 128, 20, 1e-3, 50
OVER_PYTHAE, OVER_PYRO = 1.3, 1.15


class Round(NamedTuple):
    """Images a second, and a second of processor time, of the steps after the first ones; the loss of the last ones; and
    seconds of the first ones, with all that comes before them."""

    speed: float
    work: float
    loss: float
    first: float


def networks() -> tuple[nn.Module, nn.Module]:
    encoder = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2 * CODES))
    decoder = nn.Sequential(nn.Linear(CODES, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784))
    return encoder, decoder


Clock = tuple[float, float]


def clock() -> Clock:
    return time.perf_counter(), time.process_time()


def measured(times: list[Clock], losses: list[float], begin: Clock) -> Round:
    speed, work = (BATCH * (len(times) - FIRST) / (times[-1][i] - times[FIRST - 1][i]) for i in (0, 1))
    return Round(speed, work, statistics.fmean(losses[-50:]), times[FIRST - 1][0] - begin[0])


def looped(x: Tensor, steps: int, step: Callable[[Tensor], Any]) -> Round:
    """A plain loop over passes of shuffled rows."""
    times, losses, begin = list[Clock](), list[float](), clock()
    while len(times) < steps:
        for index in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            losses.append(float(step(x[index].bernoulli())))
            times.append(clock())
            if len(times) == steps:
                break
    return measured(times, losses, begin)


def ours(x: Tensor, steps: int) -> Round:
    times: list[Clock] = []
    losses: list[Tensor] = []

    def watch(step: int, info: Any) -> None:
        times.append(clock())
        losses.append(info.loss)

    watch.is_passive = True  # type: ignore[attr-defined]
    settings: dict[str, Any] = {
        "steps": steps,
        "learning_rate": RATE,
        "batch_size": BATCH,
        "draws": 1,
        "seed": 0,
        "progress": False,
    }
    encoder, decoder = networks()  # so that all start alike
    model, begin = VAE((28, 28), CODES, encoder=nn.Sequential(nn.Flatten(), encoder), decoder=decoder), clock()
    constant = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)  # as the others have it
    SVI(**settings, transform=torch.bernoulli, scheduler=constant, callbacks=(watch,)).fit(model, x.view(-1, 28, 28))
    return measured(times, [float(loss) / len(x) for loss in losses], begin)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = networks()

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        divergence = (0.5 * (loc * loc + (2.0 * log_scale).exp() - 1.0) - log_scale).sum()
        return (divergence + nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")) / len(x)


def trained(module: Any, loss: Callable[[Tensor], Tensor], fused: bool) -> Callable[[Tensor], Tensor]:
    optimiser = torch.optim.Adam(module.parameters(), RATE, fused=fused)

    def step(x: Tensor) -> Tensor:
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        optimiser.step()
        return value.detach()

    return step


def by_hand(x: Tensor, steps: int, fused: bool = False) -> Round:
    module = ByHand()
    return looped(x, steps, trained(module, module, fused))


class PyroVAE(nn.Module):
    """As in Pyro's examples."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, decoder = networks()
        self.decoder = nn.Sequential(decoder, nn.Sigmoid())

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)  # noqa: TID251
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), CODES), x.new_ones(len(x), CODES)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)  # noqa: TID251
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def pyros(x: Tensor, steps: int) -> Round:
    pyro.clear_param_store()  # noqa: TID251
    vae = PyroVAE()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": RATE}), pyro.infer.Trace_ELBO())  # noqa: TID251
    return looped(x, steps, lambda batch: svi.step(batch) / len(batch))


def peer() -> Any:
    """pythae's VAE with these networks."""
    with contextlib.redirect_stderr(io.StringIO()):
        from pythae.models import VAE as PeerVAE
        from pythae.models import VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = networks()[0]

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.network(x.flatten(1)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(networks()[1], nn.Sigmoid())

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z).view(-1, 1, 28, 28))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=CODES, reconstruction_loss="bce")
    return PeerVAE(config, encoder=Encoder(), decoder=Decoder())


def pythaes(x: Tensor, steps: int) -> Round:
    module = peer()
    return looped(x, steps, trained(module, lambda batch: module({"data": batch.view(-1, 1, 28, 28)}).loss, False))


def trainer(x: Tensor, steps: int) -> Round:
    """A pass of pythae's own trainer, on images that are binarised once: it has no other way."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    module, data = peer(), x[: steps * BATCH].bernoulli().view(-1, 1, 28, 28)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, num_epochs=1, learning_rate=RATE, optimizer_cls="Adam"
        )
        run = BaseTrainer(module, BaseDataset(data, torch.zeros(len(data))), training_config=config)
        run.prepare_training()
        begin = clock()
        loss = run.train_step(1)
        wall, work = (len(data) / (now - then) for now, then in zip(clock(), begin, strict=True))
        return Round(wall, work, float(loss), float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl", "pythae"))
    print(" ".join(["python examples/benchmarks/vae_training.py", *sys.argv[1:]]))
    print(f"{datetime.date.today()}, 2 cores, shared; {options.threads} thread{'s'[: options.threads - 1]}, float32")
    print(f"Python {platform.python_version()}, {versions}\n")
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "mnist.npz") as found:
        x = torch.from_numpy(found["x_train"][: options.images]).float().flatten(1) / 255.0
    runs: dict[str, Callable[[Tensor, int], Round]] = {
        "SVI": ours,
        "pythae, plain loop": pythaes,
        "pythae, BaseTrainer": trainer,
        "Pyro, as its examples": pyros,
        "by hand": by_hand,
        "by hand, fused Adam": lambda x, steps: by_hand(x, steps, fused=True),
    }
    rounds: dict[str, list[Round]] = {name: [] for name in runs}
    for seed in range(options.rounds):
        for name, run in runs.items():
            torch.manual_seed(seed)
            rounds[name].append(run(x, options.steps))
    print(f"{options.steps} steps a round, {options.rounds} rounds; {len(x)} images")
    print(f"{'':24}{'images/s':>10}{'rounds':>38}{'a CPU second':>14}{f'first {FIRST}, s':>13}{'loss':>9}")
    for name, found in rounds.items():
        speeds = " ".join(f"{one.speed:6.0f}" for one in found)
        speed, work, loss, first = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:24}{speed:10.0f}{speeds:>38}{work:14.0f}{first:13.2f}{loss:9.2f}")
    rows = Rows()
    wanted = {"pythae, plain loop": OVER_PYTHAE, "pythae, BaseTrainer": OVER_PYTHAE, "Pyro, as its examples": OVER_PYRO}
    for name in [*runs][1:]:
        pairs = [*zip(rounds["SVI"], rounds[name], strict=True)]
        ratio = statistics.median(one.speed / other.speed for one, other in pairs)
        work = statistics.median(one.work / other.work for one, other in pairs)
        speeds_of = [statistics.median(one.speed for one in rounds[which]) for which in ("SVI", name)]
        rows.add("images a second", f"VAE, batches of MNIST, {options.threads} threads", speeds_of[0], theirs=speeds_of[1],
                 peer=name, is_less_better=False, target=wanted.get(name))  # fmt: skip
        miss = f"   MISS: below {wanted[name]}" if ratio < wanted.get(name, 0.0) else ""
        print(f"SVI to {name}: {ratio:.2f} times, {work:.2f} in processor time{miss}")
    rows.show()
    print("The loss, of the last 50 steps, is in nats an image; that of BaseTrainer is a mean over all its steps.")


if __name__ == "__main__":
    main()
