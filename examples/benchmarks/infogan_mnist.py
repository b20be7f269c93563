"""How often the category of an InfoGAN is the digit, on MNIST, over seeds; and steps a second by ways of training.

    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/infogan_mnist.py --device cuda
    python examples/benchmarks/infogan_mnist.py --smoke          whether it runs, on a processor

Networks are those of the paper's appendix, but for a recogniser of its own beside the critic: two transposed convolutions
after two full layers, two convolutions before one, with batch normalisation; 62 numbers of noise and a category of ten;
batches of 128, Adam at 1e-3 for the generator and 2e-4 for the critic. In training the recogniser sees pictures that are
moved, turned, stretched and noisy, so that the category cannot be told by where or how a digit is written; without that it
mostly tells other things. No labels are seen. Accuracy is that of the best one-to-one match of categories and digits on all
60,000 training pictures and on the 10,000 of the test set. Distances are between 10,000 draws and the test set in the
features "mnist"; their floor is that of as many training pictures. On a GPU a seed does not give the same run again: the
derivative of grid_sample adds in any order there.

Speed: steps of a generator and a critic, with the recorded steps of ``Adversarial`` in bfloat16, captured and compiled,
beside the same steps written by hand in PyTorch in float32.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from clock import Clock
from rows import Rows
from torch import Tensor, nn
from torch.nn import functional

from inference import Adversarial, NonSaturating
from pyro_genmodels import GAN, InfoGAN
from pyro_genmodels.metrics import images
from pyro_genmodels.metrics.clustering import accuracy

FEATURES, ROWS, SKIPPED = 62, 128, 60
SHIFT, TURN, STRETCH, NOISE = 0.2, 0.3, 0.15, 0.1  # of half a width, in radians, of a logarithm, of white
RATES = {"learning_rate": 1e-3, "critic_learning_rate": 2e-4, "betas": (0.5, 0.999)}


class Drawer(nn.Module):
    """Pictures from noise and codes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, 16 * width), nn.BatchNorm1d(16 * width), nn.ReLU(),
            nn.Linear(16 * width, 98 * width), nn.BatchNorm1d(98 * width), nn.ReLU(), nn.Unflatten(1, (2 * width, 7, 7)),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, *given: Tensor) -> Tensor:
        result: Tensor = self.layers(torch.cat(given, -1)).squeeze(1)
        return result


def reader(outputs: int, width: int) -> nn.Sequential:
    """Numbers from pictures."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)), nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.1),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.1), nn.Flatten(),
        nn.Linear(98 * width, 16 * width), nn.BatchNorm1d(16 * width), nn.LeakyReLU(0.1), nn.Linear(16 * width, outputs),
    )  # fmt: skip


class Recogniser(nn.Module):
    """Logits of the categories; in training, of pictures that are changed as a hand might have."""

    def __init__(self, width: int, strength: float) -> None:
        super().__init__()
        self.network, self.strength = reader(10, width), strength

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(self.changed(x) if self.training else x)
        return result

    def changed(self, x: Tensor) -> Tensor:
        turn, *stretch, across, down = (self.strength * (2.0 * torch.rand(5, len(x), device=x.device) - 1.0)).unbind()
        turn, (wide, high) = TURN * turn, ((STRETCH * part).exp() for part in stretch)
        rows = [wide * turn.cos(), -wide * turn.sin(), SHIFT * across, high * turn.sin(), high * turn.cos(), SHIFT * down]
        grid = functional.affine_grid(torch.stack(rows, -1).unflatten(-1, (2, 3)), [len(x), 1, 28, 28], align_corners=False)
        moved = functional.grid_sample(x[:, None], grid, align_corners=False)[:, 0]
        return moved + NOISE * torch.randn_like(moved)


def trained(x: Tensor, seed: int, given: argparse.Namespace) -> tuple[InfoGAN, float]:
    """The model, and the bound on the information in the category at the end."""
    torch.manual_seed(seed)
    parts = {"network": Drawer(FEATURES + 10, given.width), "recogniser": Recogniser(given.width, given.strength)}
    model = InfoGAN((28, 28), FEATURES, **parts).to(x.device)
    critic = reader(1, given.width).to(x.device)
    fit = Adversarial(critic=critic, objective=NonSaturating(), steps=given.steps, seed=seed, progress=False,
                      batch_size=ROWS,
                      information=given.information, average=0.999, **RATES)  # fmt: skip
    information = fit.fit(model, x).history["information"][-50:].mean()
    return model.eval(), float(information)


def ours(x: Tensor, width: int, steps: int, kind: torch.dtype | None, is_compiled: bool) -> float:
    torch.manual_seed(0)
    model = GAN((28, 28), FEATURES, network=Drawer(FEATURES, width)).to(x.device)
    clock = Clock(SKIPPED, SKIPPED + steps, x.device)
    Adversarial(critic=reader(1, width).to(x.device), objective=NonSaturating(), steps=SKIPPED + steps, seed=0,
                progress=False, batch_size=ROWS, autocast=kind, compile=is_compiled, callbacks=(clock,), **RATES,
                ).fit(model, x)  # fmt: skip
    return clock.rate


def by_hand(x: Tensor, width: int, steps: int) -> float:
    torch.manual_seed(0)
    network, critic, game = Drawer(FEATURES, width).to(x.device), reader(1, width).to(x.device), NonSaturating()
    clock = Clock(SKIPPED, SKIPPED + steps, x.device)
    players = [torch.optim.Adam(net.parameters(), lr=rate, betas=RATES["betas"], fused=True)
               for net, rate in ((network, 1e-3), (critic, 2e-4))]  # fmt: skip
    for _ in range(SKIPPED + steps):
        real = x[torch.randint(len(x), (ROWS,), device=x.device)]
        with torch.no_grad():
            drawn = network(torch.randn(ROWS, FEATURES, device=x.device))
        players[1].zero_grad()
        (-game.value(critic(real).squeeze(-1), critic(drawn).squeeze(-1))).backward()
        players[1].step()
        players[0].zero_grad()
        game.loss(critic(network(torch.randn(ROWS, FEATURES, device=x.device))).squeeze(-1)).backward()
        players[0].step()
        clock()
    return clock.rate


def speed(x: Tensor, given: argparse.Namespace, table: Rows) -> None:
    ways = {"float32": (None, False), "bfloat16": (torch.bfloat16, False)}
    if x.is_cuda:
        ways["bfloat16, compiled"] = (torch.bfloat16, True)
    steps = 20 if given.smoke else 300
    theirs = statistics.median(by_hand(x, given.width, steps) for _ in range(3))
    print(f"\n{'steps of generator and critic':32}{'a second':>10}{'/ by hand':>12}")
    print(f"{'by hand, float32':32}{theirs:10.0f}{1.0:12.2f}", flush=True)
    for way, settings in ways.items():
        rate = statistics.median(ours(x, given.width, steps, *settings) for _ in range(1 if settings[1] else 3))
        print(f"{way:32}{rate:10.0f}{rate / theirs:12.2f}", flush=True)
        is_asked = way == "bfloat16, compiled"
        table.add("steps of a generator a second", f"GAN, MNIST, width {given.width}, {way}", rate, theirs=theirs,
                  peer="by hand, float32", is_less_better=False, target=1.5 if is_asked else None)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--information", type=float, default=1.0, help="weight of the bound")
    parser.add_argument("--strength", type=float, default=1.0, help="of the changes that the recogniser sees")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few steps of small networks")
    given = parser.parse_args()
    if given.smoke:
        given.seeds, given.steps, given.width = 1, 60, 8
    device, table = torch.device(given.device), Rows()
    torch.set_num_threads(1)
    print(" ".join(["python examples/benchmarks/infogan_mnist.py", *sys.argv[1:]]))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor, one thread"
    print(f"{datetime.date.today()}, {where}, torch {torch.__version__}, Python {platform.python_version()}")
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "mnist.npz") as arrays:
        x, new = (torch.from_numpy(arrays[key]).float() / 255.0 for key in ("x_train", "x_test"))
        y, truth = (torch.from_numpy(arrays[key].astype(np.int64)) for key in ("y_train", "y_test"))
    x = x.to(device)
    if not given.no_speed:
        speed(x, given, table)
    if not given.seeds:
        return table.show()
    network, draws = images.feature_network("mnist"), 200 if given.smoke else 10_000
    print(f"\nfeatures '{network.name}': {network.about}")
    floor = images.frechet_distance(x[:draws].cpu(), new, network)
    print(
        f"{'InfoGAN':10}{'accuracy':>10}{'held out':>10}{'nats':>8}{'FID':>9}{'seconds':>9}   (training's FID {floor:.3f})"
    )
    found = []
    for seed in range(given.first, given.first + given.seeds):
        begun = time.perf_counter()
        model, information = trained(x, seed, given)
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            told = [
                torch.cat([model.categories_of(part).argmax(-1).cpu() for part in rows.split(1000)]) for rows in (x, new)
            ]
            drawn = torch.cat([model.sample(min(draws, 1000)).cpu() for _ in range(max(draws // 1000, 1))])
        shares = [accuracy(labels, categories) for labels, categories in zip((y, truth), told, strict=True)]
        found.append([*shares, information, images.frechet_distance(drawn, new, network)])
        a, b, nats, fid = found[-1]
        print(f"seed {seed:<5}{a:10.3f}{b:10.3f}{nats:8.2f}{fid:9.3f}{seconds:9.0f}", flush=True)
    a, b, nats, fid = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"{'median':10}{a:10.3f}{b:10.3f}{nats:8.2f}{fid:9.3f}     (accuracy asked for: 0.90)")
    setting = f"InfoGAN, MNIST, median of {given.seeds} seeds, {given.steps} steps"
    table.add("accuracy of the category, training digits", setting, a, is_less_better=False, target=0.90)
    table.add("accuracy of the category, held-out digits", setting, b, is_less_better=False)
    table.add("Fréchet distance to held-out digits", setting, fid, theirs=floor, peer="training digits")
    table.show()


if __name__ == "__main__":
    main()
