"""Samplers of diffusion on a mixture whose flow is known, and what their loops cost beside the bare network.

    python examples/benchmarks/diffusion.py

Errors are medians over paths at the same number of calls of the denoiser, which is what a sampler costs; the order is seen
between 128 and 256 steps. The cost of a loop is that of all it does but for the calls: the network is a small convolutional
one on 32 images of 28 by 28, called as often, alternating; seconds are those of the processor, which other processes
of the machine do not take part in.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rows import Rows
from torch import Tensor, nn

from pyro_genmodels.diffusion import EDM, Network, Oracle, samplers

ROWS = Rows()
FLOWS: dict[str, tuple[Callable[..., Tensor], float]] = {  # calls a step
    "euler = ddim": (samplers.euler, 1),
    "heun": (samplers.heun, 2),
    "dpm_solver_2": (samplers.dpm_solver_2, 2),
    "dpm_solver_pp_2m": (samplers.dpm_solver_pp_2m, 1),
    "dpm_solver_pp_3m, published": (lambda *args: samplers.dpm_solver_pp_3m(*args, is_corrected=False), 1),
    "dpm_solver_pp_3m": (samplers.dpm_solver_pp_3m, 1),
    "unipc(2)": (lambda *args: samplers.unipc(*args, order=2), 1),
    "unipc(3)": (samplers.unipc, 1),
    "rk4": (samplers.rk4, 4),
}


class Convolutions(nn.Module):
    """Four layers of 32 channels; the level is one more channel."""

    def __init__(self) -> None:
        super().__init__()
        widths = [2, 32, 32, 32, 1]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.layers(torch.cat([x, level[:, None, None, None].expand_as(x)], 1))


def errors(paths: int) -> None:
    torch.manual_seed(0)
    oracle = Oracle.ring(5, EDM(0.02, 10.0))
    schedule = oracle.schedule
    start = oracle.distribution(torch.tensor(10.0, dtype=torch.float64)).sample((paths,))
    end = samplers.rk4(oracle, start, schedule.grid(1024, "karras"))
    budgets = (8, 16, 32, 64)
    print(f"\n{'median error of paths at calls':32}" + "".join(f"{n:>10}" for n in budgets) + f"{'order':>8}")
    for name, (sampler, calls) in FLOWS.items():
        found = {}
        for steps in {int(n // calls) for n in budgets} | {128, 256}:
            out = sampler(oracle, start, schedule.grid(steps, "karras"))
            found[steps] = (out - end).norm(dim=1).median().item()
        row = "".join(f"{found[int(n // calls)]:10.1e}" for n in budgets)
        order = math.log2(found[128] / found[256])
        print(f"{name:32}{row}{order:8.2f}")
        ROWS.add("observed order of a sampler", f"{name}, exact Gaussian mixture", order, is_less_better=False)


@torch.no_grad()
def cost(repeats: int) -> None:
    torch.manual_seed(0)
    network = Convolutions()
    schedule = EDM()
    denoiser = Network(network, schedule, "preconditioned")
    x, level = 80.0 * torch.randn(32, 1, 28, 28), torch.zeros(32)
    print(f"\n{'loop beside the bare network':32}{'ratio':>10}{'per call':>12}")
    for name, sampler in {**{k: v for k, (v, _) in FLOWS.items()}, "ancestral": samplers.ancestral}.items():
        count = 0

        def counted(*args: Any) -> None:
            nonlocal count
            count += 1

        grid = schedule.grid(10, "karras")
        handle = network.register_forward_hook(counted)
        sampler(denoiser, x, grid)
        handle.remove()
        ours, bare = [], []
        for _ in range(repeats):
            begin = time.process_time()
            sampler(denoiser, x, grid)
            middle = time.process_time()
            for _ in range(count):
                network(x, level)
            bare.append(time.process_time() - middle)
            ours.append(middle - begin)
        ratio = statistics.median(a / b for a, b in zip(ours, bare))
        ROWS.add("seconds of a sampler's run over those of its network alone", f"{name}, 32 pictures of 28 x 28", ratio,
                 target=1.03)  # fmt: skip
        extra = statistics.median(a - b for a, b in zip(ours, bare)) / count
        print(f"{name:32}{ratio:10.3f}{1e6 * extra:9.0f} µs" + ("" if ratio <= 1.03 else "   MISS: above 1.03"))


def main(smoke: bool = False) -> None:
    torch.set_num_threads(1)
    print("python examples/benchmarks/diffusion.py")
    print(f"{datetime.date.today()}, 2 cores, shared; one thread, errors in float64, costs in float32")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    print(f"Python {platform.python_version()}, {versions}")
    errors(32 if smoke else 256)
    cost(1 if smoke else 3)
    ROWS.show()
    print("\nWhere a miss is: what a loop does between calls costs the same beside any network, and this one is small.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    main(parser.parse_args().smoke)
