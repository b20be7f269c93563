"""Steps of denoising training beside the same steps written by hand in PyTorch.

    python examples/benchmarks/diffusion_training.py
    python examples/benchmarks/diffusion_training.py --diffusers

Networks, batches, fused Adam, an average of the weights and the losses are alike; runs alternate in one process, and
the first 50 steps of each, in which ours records its graph, are not counted. By hand, the schedule is a table, as such
loops have it; ours is a curve. With --diffusers the loop is that of its example ``train_unconditional.py``, with its noise
scheduler and its average: it needs ``diffusers`` installed beside the torch that is there.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from clock import Clock
from rows import Rows
from torch import Tensor, nn
from torch.nn import functional as F

from inference import Denoising, MinSNR, SimpleLoss
from pyro_genmodels import DDPM
from pyro_genmodels.diffusion import Betas, Network
from pyro_genmodels.nets import PointNetwork, UNet

SKIPPED, RATE, DECAY, LEVELS = 50, 1e-3, 0.999, 1000
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "points, 2 numbers, batch 256": (lambda: PointNetwork(2), (2,), 256, False),
    "points, 2 numbers, batch 256, min-SNR": (lambda: PointNetwork(2), (2,), 256, True),
    "U-Net, 8 x 8, width 16, batch 32": (lambda: UNet((1, 8, 8), 1, 16, (1, 2), blocks=1), (1, 8, 8), 32, False),
}


def timer(steps: int) -> Clock:
    """Of processor time, which other processes on the machine do not change much."""
    return Clock(SKIPPED, steps, now=time.process_time)


def ours(build: Callable[[], nn.Module], x: Tensor, rows: int, is_weighted: bool, steps: int) -> float:
    torch.manual_seed(0)
    model = DDPM(Network(build(), Betas.linear(LEVELS)), x.shape[1:], LEVELS)
    clock = timer(steps)
    loss = SimpleLoss(MinSNR()) if is_weighted else SimpleLoss()
    settings = {"loss": loss, "steps": steps, "batch_size": rows, "learning_rate": RATE, "average": DECAY}
    Denoising(seed=0, progress=False, callbacks=(clock,), **settings).fit(model, x)
    return clock.rate


def by_hand(build: Callable[[], nn.Module], x: Tensor, rows: int, is_weighted: bool, steps: int) -> float:
    torch.manual_seed(0)
    network, clock = build(), timer(steps)
    signal = (1.0 - torch.linspace(1e-4, 0.02, LEVELS)).cumprod(0)
    alphas, sigmas, levels = signal.sqrt(), (1.0 - signal).sqrt(), 0.25 * torch.logit(signal)
    weights = (5.0 * (1.0 - signal) / signal).clamp(max=1.0)
    optimiser = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))
    shape, order = (-1, *(1,) * (x.dim() - 1)), torch.empty(0)
    for step in range(steps):
        place = step % (len(x) // rows) * rows
        order = order if place else torch.randperm(len(x))
        batch = x[order[place : place + rows]]
        t = torch.randint(LEVELS, (rows,))
        noise = torch.randn_like(batch)
        noisy = alphas[t].reshape(shape) * batch + sigmas[t].reshape(shape) * noise
        output = network(noisy, levels[t])
        if is_weighted:
            loss = (weights[t] * (output - noise).square().reshape(rows, -1).mean(1)).mean()
        else:
            loss = F.mse_loss(output, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update_parameters(network)
        clock()
    return clock.rate


def by_diffusers(build: Callable[[], nn.Module], x: Tensor, rows: int, is_weighted: bool, steps: int) -> float:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    network, clock, scheduler = build(), timer(steps), DDPMScheduler(num_train_timesteps=LEVELS)
    levels = 0.25 * torch.logit(scheduler.alphas_cumprod)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6)
    average = EMAModel(network.parameters(), decay=DECAY, use_ema_warmup=True)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=rows, shuffle=True, drop_last=True)
    batches = iter(loader)
    for _ in range(steps):
        try:
            (batch,) = next(batches)
        except StopIteration:
            batches = iter(loader)
            (batch,) = next(batches)
        noise, t = torch.randn_like(batch), torch.randint(0, LEVELS, (rows,))
        loss = F.mse_loss(network(scheduler.add_noise(batch, noise, t), levels[t]), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(network.parameters())
        clock()
    return clock.rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--diffusers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"ours": ours, "by hand": by_hand, **({"diffusers": by_diffusers} if options.diffusers else {})}
    extra = ""
    if options.diffusers:
        import diffusers

        extra = f", diffusers {diffusers.__version__}"
    beside = " --diffusers" if options.diffusers else ""
    print(f"python examples/benchmarks/diffusion_training.py --steps {options.steps} --rounds {options.rounds}{beside}")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}{extra}"
    print(f"{datetime.date.today()}, {versions}, {os.cpu_count()} cores, shared, one thread; processor time")
    print(f"\nsteps a second, medians of {options.rounds} runs of each in turn; a step of ours in steps of the others")
    others = [way for way in ways if way != "ours"]
    print(f"{'':40}" + "".join(f"{way:>11}" for way in ways) + "".join(f"{'/ ' + way:>14}" for way in others))
    table = Rows()
    for name, (build, shape, rows, is_weighted) in CASES.items():
        x = torch.randn(4096, *shape, generator=torch.Generator().manual_seed(0))
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                rates[way].append(run(build, x, rows, is_weighted, options.steps))
        shown = "".join(f"{statistics.median(rates[way]):11.0f}" for way in ways)
        ratios = [statistics.median(b / a for a, b in zip(rates["ours"], rates[way], strict=True)) for way in others]
        print(f"{name:40}{shown}" + "".join(f"{ratio:14.2f}" for ratio in ratios), flush=True)
        for way, ratio in zip(others, ratios, strict=True):
            target = 1.03 if way == "by hand" else None
            table.add(f"a training step in steps of {way}", name, ratio, target=target)
    table.show()


if __name__ == "__main__":
    main()
