"""Samplers of diffusion on a mixture whose flow is known, and what their loops cost beside the bare network.

    python examples/benchmarks/diffusion.py

Errors are medians over paths at the same number of calls of the denoiser, which is what a sampler costs; orders, of paths
and of the law of Gaussian data, are seen between 128 and 256 steps (``conformance.certify``). The cost of a loop is that of
all it does but for the calls, measured with a network that costs nothing, beside a call of a small convolutional one on 32
images of 28 by 28; seconds are those of the processor, the least of 25 runs, as other processes can only add to them.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable

import torch
from rows import Rows
from torch import Tensor, nn

from pyro_genmodels.diffusion import EDM, Network, samplers
from pyro_genmodels.diffusion.conformance import certify, median_error, paths

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
RANDOM: dict[str, Callable[..., Tensor]] = {
    "ancestral, upper": functools.partial(samplers.ancestral, variance="upper"),
    "ancestral, lower": samplers.ancestral,
    "ancestral, optimal": functools.partial(samplers.ancestral, variance="optimal"),
    "ancestral, full": functools.partial(samplers.ancestral, variance="full"),
    "ddim, eta 0.5": functools.partial(samplers.ddim, eta=0.5),
    "euler_maruyama": samplers.euler_maruyama,
    "dpm_solver_pp_2m_sde": samplers.dpm_solver_pp_2m_sde,
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


def errors(count: int) -> None:
    case, budgets = paths(count), (8, 16, 32, 64)
    print(f"\n{'median error of paths at calls':32}" + "".join(f"{n:>10}" for n in budgets) + f"{'order':>8}{'of law':>8}")
    for name, (sampler, calls) in FLOWS.items():
        row = "".join(f"{median_error(sampler, case, int(n // calls)):10.1e}" for n in budgets)
        found = certify(sampler, case=case)
        print(f"{name:32}{row}{found.order:8.2f}{found.weak_order:8.2f}")
        ROWS.add("observed order of a sampler", f"{name}, exact Gaussian mixture", found.order, is_less_better=False)
    print(f"\n{'noise: bias at steps':32}{128:>10}{256:>10}{'of law':>8}{'gap of the bound at 100 steps, nats':>38}")
    for name, sampler in RANDOM.items():
        found = certify(sampler, is_random=True, case=case)
        bias = "".join(f"{value:10.1e}" for value in found.bias)
        print(f"{name:32}{bias}{found.weak_order:8.2f}{found.gap:27.3f} ± {found.gap_error:.3f}")


class Idle(nn.Module):
    """A network that costs nothing."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.found, self.calls = torch.zeros_like(x), 0

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        self.calls += 1
        return self.found


@torch.no_grad()
def cost(repeats: int) -> None:
    torch.manual_seed(0)
    network = Convolutions()
    schedule = EDM()
    x, level = 80.0 * torch.randn(32, 1, 28, 28), torch.zeros(32)
    print(f"\n{'loop beside the bare network':32}{'ratio':>10}{'per call':>12}")
    for name, sampler in {**{k: v for k, (v, _) in FLOWS.items()}, "ancestral": samplers.ancestral}.items():
        grid, idle = schedule.grid(10, "karras"), Idle(x)
        free = Network(idle, schedule, "preconditioned")
        sampler(free, x, grid)
        count, ours, bare = idle.calls, [], []
        for _ in range(repeats):
            begin = time.process_time()
            sampler(free, x, grid)
            middle = time.process_time()
            for _ in range(3):
                network(x, level)
            bare.append((time.process_time() - middle) / 3)
            ours.append((middle - begin) / count)
        ratio = 1.0 + min(ours) / min(bare)
        ROWS.add("seconds of a sampler's run over those of its network alone", f"{name}, 32 pictures of 28 x 28", ratio,
                 target=1.03)  # fmt: skip
        print(f"{name:32}{ratio:10.3f}{1e6 * min(ours):9.0f} µs" + ("" if ratio <= 1.03 else "   MISS: above 1.03"))


def main(smoke: bool = False) -> None:
    torch.set_num_threads(1)
    print("python examples/benchmarks/diffusion.py")
    print(f"{datetime.date.today()}, 2 cores, shared; one thread, errors in float64, costs in float32")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    print(f"Python {platform.python_version()}, {versions}")
    errors(32 if smoke else 256)
    cost(1 if smoke else 25)
    ROWS.show()
    print("\nWhere a miss is: what a loop does between calls costs the same beside any network, and this one is small.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    main(parser.parse_args().smoke)
