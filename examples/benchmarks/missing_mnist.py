"""Half of the pixels of MNIST's test images, filled in from the other half.

    PYRO_GENMODELS_DATA=... python examples/benchmarks/missing_mnist.py

As ``examples/missing_pixels.py``, whose table this is: grey levels rounded to 16, a VAE of a few epochs on images of which
up to 60 % is hidden, 500 images of the test set. "completes" has Gibbs draw missing pixels before the encoder reads a row
(Mattei and Frellsen), "reads gaps" has it read what is known. R-hat is that of the worst code of each image.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import SVI, Gibbs, GuideDraw, arviz
from pyro_genmodels import VAE
from pyro_genmodels.autoencoders.likelihoods import DiscretisedLogistic

_LEVELS, _BATCH = 16, 250


def _example() -> Any:
    path = Path(__file__).parents[1] / "missing_pixels.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _levelled(pixels: Any) -> Tensor:
    return (torch.as_tensor(pixels).float() / 255.0 * (_LEVELS - 1)).round() / (_LEVELS - 1)


def _sampled(model: VAE, gaps: Tensor, completes: bool, sweeps: int) -> tuple[Tensor, np.ndarray, float]:
    """Draws of z of a batch of images, R-hat of each image, and the share of the guide's proposals that are taken."""
    gibbs = Gibbs(
        blocks={"z": GuideDraw(completes=completes)},
        chains=4,
        warmup=sweeps,
        draws=sweeps // 2,
        thin=2,
        seed=0,
        progress=False,
    )
    posterior = gibbs.fit(model, gaps)
    rhat = np.asarray(arviz.rhat(posterior.draws["z"].numpy())).max(1)
    return posterior.draws["z"].flatten(0, 1), rhat, posterior.plan["z"].acceptance


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=500, help="of the test set")
    parser.add_argument("--sweeps", type=int, default=120, help="of warm-up, and again of sampling")
    parser.add_argument("--features", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {versions}; 1 thread of 2 cores, shared")
    with np.load(Path(os.environ["PYRO_GENMODELS_DATA"]) / "mnist.npz") as data:
        x, truth = _levelled(data["x_train"]), _levelled(data["x_test"][: asked.images])
    gaps = torch.where(torch.rand(truth.shape) < 0.5, torch.nan, truth)
    tools = _example()
    model = VAE((28, 28), asked.features, likelihood=DiscretisedLogistic(_LEVELS), hidden=(256, 128), observed=True)
    begin, steps = time.perf_counter(), asked.epochs * len(x) // 200
    SVI(steps=steps, learning_rate=2e-3, batch_size=200, draws=1, transform=tools.hide, seed=0, progress=False).fit(model, x)
    print(f"{len(x)} images, {steps} steps of 200, {asked.features} features, {time.perf_counter() - begin:.0f} s")
    parts: dict[str, list[Any]] = {"pseudo-Gibbs": [], "reads gaps": [], "completes": []}
    found: dict[str, list[Any]] = {"reads gaps": [], "completes": []}
    seconds = dict.fromkeys(found, 0.0)
    for rows in torch.arange(len(truth)).split(_BATCH):
        own, seen = truth[rows], gaps[rows]
        parts["pseudo-Gibbs"].append(tools.by_code(model, model.encode(seen).sample((2 * asked.sweeps,)), own, seen))
        for name in found:
            begin = time.perf_counter()
            z, *told = _sampled(model, seen, name == "completes", asked.sweeps)
            seconds[name] += time.perf_counter() - begin
            found[name].append(told)
            parts[name].append(tools.by_code(model, z, own, seen))
    print(f"\n{len(truth)} images of the test set, half of the pixels missing\n{tools.HEADER}")
    print(tools.line("mean", truth, gaps, _LEVELS, *tools.by_pixel(x, truth, gaps, _LEVELS)))
    scores = {}
    for name, batches in parts.items():
        draws, guess, log_p = (torch.cat(part, dim) for part, dim in zip(zip(*batches, strict=True), (1, 0, 0), strict=True))
        scores[name] = (float((guess - truth)[gaps.isnan()].square().mean()), float(log_p.sum()))
        print(tools.line(name, truth, gaps, _LEVELS, draws, guess, log_p))
    print()
    for name, told in found.items():
        rhat = np.concatenate([part for part, _ in told])
        is_better = scores[name][0] < scores["pseudo-Gibbs"][0] and scores[name][1] > scores["pseudo-Gibbs"][1]
        print(
            f"{name:14}R-hat below 1.1 for {(rhat < 1.1).mean():.0%} of images, below 1.5 for {(rhat < 1.5).mean():.0%}; "
            f"acceptance {np.mean([rate for _, rate in told]):.3f}; {seconds[name]:.0f} s"
            f"{'' if is_better else '   MISS: not better than pseudo-Gibbs in both'}"
            f"{'' if (rhat < 1.1).mean() > 0.9 else '   MISS: chains have not converged, take more sweeps'}"
        )


if __name__ == "__main__":
    main()
