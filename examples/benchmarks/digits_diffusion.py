"""A score model of digits of 8x8 pixels: distances of its draws in named features, bits per dimension, samplers by calls.

    python examples/benchmarks/digits_diffusion.py       about 4 minutes of a core of its own

The model and its training are those of ``examples/train_unet.py``, fitted to the 1,500 training digits for longer. Draws are
rounded to the grey levels that data have. Distances are between 1,500 draws and the 297 digits held out, of other writers,
in the features "digits" that come with the package; their floor is that of the training digits, and a mixture of Gaussians
on the pixels (scikit-learn's, of the components that a fifth of the training digits prefers) is the peer. Bits per dimension
are those of the held-out digits with uniform noise of one grey level, by the probability flow and by the variational bound;
those of the mixture likewise. Then, draws by some samplers at 5, 10 and 20 calls of the network.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sklearn
import torch
from rows import Rows
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_genmodels import ScoreModel, datasets
from pyro_genmodels.diffusion import likelihood, samplers
from pyro_genmodels.metrics import images

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_unet import continuous, trained

LEVELS = 17
SAMPLERS: dict[str, tuple[Callable[..., Tensor], int, int]] = {  # calls a step, and beside all steps
    "euler": (samplers.euler, 1, 0),
    "heun": (samplers.heun, 2, 0),
    "dpm_solver_pp_2m": (samplers.dpm_solver_pp_2m, 1, 0),
    "dpm_solver_pp_3m": (samplers.dpm_solver_pp_3m, 1, 1),
    "unipc(3)": (samplers.unipc, 1, 2),
}

CALLS = 5, 10, 20


def by_calls(found: Callable[[Callable[..., Tensor], int], float]) -> Iterator[tuple[str, list[float]]]:
    """The name of each sampler, and what is found of it and its steps at so many calls of the network."""
    for name, (sampler, each, beside) in SAMPLERS.items():
        numbers = []
        for calls in CALLS:
            torch.manual_seed(2)
            numbers.append(found(sampler, (calls - beside) // each))
        yield name, numbers


def rounded(x: Tensor) -> Tensor:
    """From [−1, 1] to the grey levels of data, in [0, 1]."""
    return ((x + 1.0) * (0.5 * LEVELS)).floor().clamp(0, LEVELS - 1) / (LEVELS - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    given = parser.parse_args()
    steps = 20 if given.smoke else given.steps
    torch.set_num_threads(1)
    data, network = datasets.pictures("digits"), images.feature_network("digits")
    assert data.test is not None
    x, new = (((LEVELS - 1) * part).round().to(torch.uint8)[:, None] for part in (data.train, data.test))
    if given.smoke:
        x, new = x[:100], new[:50]
    print(f"python examples/benchmarks/digits_diffusion.py --steps {steps}")
    versions = f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}"
    print(f"{datetime.date.today()}, {versions}, {os.cpu_count()} cores, shared, one thread; processor time")
    print(f"features '{network.name}': {network.about}\n")
    rows, seen = Rows(), new.squeeze(1).float() / (LEVELS - 1)

    def apart(drawn: Tensor) -> list[float]:
        drawn = drawn.squeeze(1)
        held = images.manifolds(seen, drawn, network)
        far = [images.frechet_distance(drawn, seen, network), images.kernel_distance(drawn, seen, network)]
        return [*far, held.precision, held.recall, held.coverage]

    def row(name: str, numbers: list[float], bits: str = "") -> None:
        print(f"{name:26}" + "".join(f"{number:10.3f}" for number in numbers) + f"{bits:>18}", flush=True)

    print(f"{'':26}" + "".join(f"{n:>10}" for n in ("FID", "KID", "precision", "recall", "coverage")) + f"{'bits':>18}")
    floor = apart(x.float() / (LEVELS - 1))
    row("training digits", floor)
    torch.manual_seed(0)
    noisy, held = (continuous(part, LEVELS).flatten(1).double() for part in (x, new))
    cut = len(noisy) * 4 // 5
    fits = [GaussianMixture(k, reg_covar=1e-3, random_state=0).fit(noisy[:cut].numpy()) for k in (1, 3, 10, 30)]
    best = max(fits, key=lambda fit: fit.score(noisy[cut:].numpy())).n_components
    mixture = GaussianMixture(best, reg_covar=1e-3, random_state=0).fit(noisy.numpy())
    scores = torch.as_tensor(mixture.score_samples(held.numpy()))
    theirs = likelihood.bits_per_dimension(scores, 64, LEVELS)
    drawn = torch.as_tensor(mixture.sample(len(x))[0]).float().reshape(x.shape)
    peer = apart(rounded(drawn))
    row(f"mixture of {best}", peer, f"{theirs.mean():.3f} ({theirs.std() / len(theirs) ** 0.5:.3f})")

    begun = time.process_time()
    model, _ = trained(x, LEVELS, steps, 64)
    seconds = time.process_time() - begun
    torch.manual_seed(1)
    ours = apart(rounded(model.sample(len(x))))
    found = bits_of(model, held.float().reshape(new.shape), 2 if given.smoke else 16)
    flow, bound = (f"{value.mean():.3f} ({value.std() / len(value) ** 0.5:.3f})" for value in found)
    row("score model", ours, flow)
    print(f"by the bound, {bound}; of uniform noise, {math.log2(LEVELS):.3f}; {seconds:.0f} seconds of training\n")
    setting = "score model, 8x8 digits"
    rows.add("Fréchet distance to held-out digits", setting, ours[0], theirs=floor[0], peer="training digits")
    rows.add("Fréchet distance to held-out digits", setting, ours[0], theirs=peer[0], peer="mixture of Gaussians")
    by_flow, by_bound, by_mixture = (float(value.mean()) for value in (*found, theirs))
    rows.add("bits per dimension, held-out digits, by the flow", setting, by_flow, theirs=by_mixture,
             peer="mixture of Gaussians", is_difference=True, target=0.0)  # fmt: skip
    rows.add("bits per dimension, held-out digits, by the bound", setting, by_bound)

    def distance(sampler: Callable[..., Tensor], steps: int) -> float:
        return images.frechet_distance(rounded(by(model, sampler, steps, len(x))).squeeze(1), seen, network)

    print(f"{'FID at calls':26}" + "".join(f"{calls:>10}" for calls in CALLS))
    for name, distances in by_calls(distance):
        row(name, distances)
        rows.add("Fréchet distance to held-out digits at 10 calls", f"{setting}, {name}", distances[1])
    rows.show()


@torch.no_grad()
def bits_of(model: ScoreModel, x: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """Bits per dimension by the flow and by the bound, (rows,) each."""
    size, network = x[0].numel(), model.denoiser
    model.probes = likelihood.rademacher(probes, x[:1], torch.Generator().manual_seed(0))
    z, volume = model.standardised(x), size * model.deviation.log().sum()
    chain = torch.cat([network.schedule.grid(200, "log_snr").to(model.grid), model.grid.new_zeros(1)])
    bound = likelihood.variational_bound(network, z, chain).total - volume
    flow, bound = (likelihood.bits_per_dimension(value, size, LEVELS) for value in (model().log_prob(x), bound))
    return flow, bound


@torch.no_grad()
def by(model: ScoreModel, sampler: Callable[..., Tensor], steps: int, count: int) -> Tensor:
    """Draws by a sampler of this many steps, the last of them to no noise."""
    schedule = model.denoiser.schedule
    grid = torch.cat([schedule.grid(steps - 1, "karras").to(model.grid), model.grid.new_zeros(1)])
    start = samplers.terminal(model.denoiser, grid, model.grid.float()).sample((count, *model.shape))
    return sampler(model.denoiser, start, grid) * model.deviation + model.location


if __name__ == "__main__":
    main()
