"""Half of the pixels of MNIST's test images, filled in from the other half.

    PYRO_GENMODELS_DATA=... python examples/benchmarks/missing_mnist.py         about 5 minutes of a core of its own
    PYRO_GENMODELS_DATA=... python examples/benchmarks/missing_mnist.py --smoke

As ``examples/missing_pixels.py``, whose table this is: grey levels rounded to 16, a VAE of a few epochs on images of which
up to 60 % is hidden, images of the test set of which half is.

An encoder that has seen 60,000 images misses the posterior of one by a few of its standard deviations, and hardly any of its
proposals are taken. So it is fitted again to the images at hand, incomplete as they are, while the decoder stays (Mattei and
Frellsen 2018); by an importance-weighted bound, which makes it as wide as the posterior. Rows of the table:

    mean            each pixel from what it is in the training images
    guess           z from the encoder, which reads what is known
    pseudo-Gibbs    z from the encoder and missing pixels from the decoder in turn, nothing refused (Rezende et al.)
    refitted        the guess of the encoder fitted again
    exact           Gibbs: Metropolis-Hastings steps with the refitted encoder as proposal, and walks of its size

with as many draws each. R-hat is that of the worst number in the code of each image; differences are paired by image. The
share of proposals that are taken "as it was trained" is that of a few sweeps after its own proposals, which flatters it.

References:
    D. Rezende, S. Mohamed and D. Wierstra, Stochastic backpropagation and approximate inference in deep generative models
    (2014), appendix F.
    P.-A. Mattei and J. Frellsen, Leveraging the exact likelihood of deep latent variable models (2018).
    P.-A. Mattei and J. Frellsen, Refit your encoder when new data comes by (2018).
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
from rows import Rows
from torch import Tensor

from inference import IWELBO, SVI, Gibbs, GuideDraw, Posterior, arviz
from pyro_genmodels import VAE
from pyro_genmodels.autoencoders.likelihoods import DiscretisedLogistic
from pyro_genmodels.metrics.calibration import interval_calibration

_LEVELS, _CHAINS = 16, 4


def _example() -> Any:
    path = Path(__file__).parents[1] / "missing_pixels.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _levelled(pixels: Any) -> Tensor:
    return (torch.as_tensor(pixels).float() / 255.0 * (_LEVELS - 1)).round() / (_LEVELS - 1)


def _pseudo_gibbs(model: VAE, gaps: Tensor, draws: int) -> Tensor:
    """Draws of z, (draws, row, features): chains side by side, the first half of their sweeps left out."""
    sweeps, rows = draws // _CHAINS, gaps.repeat(_CHAINS, 1, 1)
    x, found = rows, []
    for _ in range(2 * sweeps):
        z = model.encode(x).sample()
        found.append(z.reshape(_CHAINS, len(gaps), -1))
        x = model.complete(rows, z=z[None])[0]
    return torch.cat(found[sweeps:])


def _exact(model: VAE, gaps: Tensor, draws: int, thin: int) -> Posterior:
    blocks = {"z": GuideDraw(completes=False)}
    kept = draws // _CHAINS
    return Gibbs(blocks=blocks, chains=_CHAINS, warmup=thin * kept // 2, draws=kept, thin=thin, seed=0, progress=False).fit(
        model, gaps
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--features", type=int, default=4)
    parser.add_argument("--images", type=int, default=100, help="of the test set")
    parser.add_argument("--refits", type=int, default=600, help="steps of the encoder at the images at hand")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--thin", type=int, default=5, help="sweeps a draw that is kept")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    asked = parser.parse_args()
    if asked.smoke:
        asked.epochs, asked.images, asked.refits, asked.draws, asked.thin = 0.05, 5, 10, 16, 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {versions}; 1 thread of 2 cores, shared")
    with np.load(Path(os.environ["PYRO_GENMODELS_DATA"]) / "mnist.npz") as data:
        x, truth = _levelled(data["x_train"]), _levelled(data["x_test"][: asked.images])
    gaps = torch.where(torch.rand(truth.shape) < 0.5, torch.nan, truth)
    tools = _example()
    model = VAE((28, 28), asked.features, likelihood=DiscretisedLogistic(_LEVELS), hidden=(256, 128), observed=True)
    begin, steps = time.process_time(), round(asked.epochs * len(x) / 200)
    options: dict[str, Any] = {"draws": 1, "seed": 0, "progress": False}
    SVI(steps=steps, learning_rate=2e-3, batch_size=200, transform=tools.hide, **options).fit(model, x)
    print(f"{len(x)} images, {steps} steps of 200, {asked.features} features, {time.process_time() - begin:.0f} s of a core")

    def drawn(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tools.by_code(model, z, truth, gaps)

    found = {"mean": tools.by_pixel(x, truth, gaps, _LEVELS)}
    found["guess"] = drawn(model.encode(gaps).sample(torch.Size((asked.draws,))))
    found["pseudo-Gibbs"] = drawn(_pseudo_gibbs(model, gaps, asked.draws))
    before = _exact(model, gaps, 2 * _CHAINS, asked.thin).plan
    begin = time.process_time()
    model.decoder.requires_grad_(False)
    batch = min(50, len(gaps))
    SVI(steps=asked.refits, bound=IWELBO(8), learning_rate=1e-3, batch_size=batch, **options).fit(model, gaps)
    print(f"encoder refitted to {len(gaps)} images, {asked.refits} steps of {batch}, {time.process_time() - begin:.0f} s")
    found["refitted"] = drawn(model.encode(gaps).sample(torch.Size((asked.draws,))))
    begin = time.process_time()
    posterior = _exact(model, gaps, asked.draws, asked.thin)
    print(f"{_CHAINS} chains, {asked.draws // _CHAINS} draws of {asked.thin} sweeps, {time.process_time() - begin:.0f} s")
    z = posterior.draws["z"]
    found["exact"] = drawn(z.flatten(0, 1))

    print(f"\n{len(truth)} images of the test set, half of the pixels missing\n{tools.HEADER}")
    for name, parts in found.items():
        print(tools.line(name, truth, gaps, _LEVELS, *parts))
    where = gaps.isnan()
    pixels = where.flatten(1).sum(1)
    errors = {n: ((g - truth).square() * where).flatten(1).sum(1) / pixels for n, (_, g, _) in found.items()}
    scores = {name: log_p / pixels for name, (*_, log_p) in found.items()}
    print(f"\n{'better than':14}{'squared error':>22}{'log-likelihood':>22}")
    for name in list(found)[:-1]:
        gains = (errors[name] - errors["exact"], scores["exact"] - scores[name])
        cells = [f"{gain.mean():+.5f} ± {gain.std() / len(gain) ** 0.5:.5f}" for gain in gains]
        print(f"{name:14}" + "".join(f"{cell:>22}" for cell in cells))
    rhat, size = (np.asarray(f(z.numpy())) for f in (arviz.rhat, arviz.ess))
    rhat, size = rhat.max(1), size.min(1)
    assert posterior.plan is not None and before is not None
    rates = before["z"].acceptance, posterior.plan["z"].acceptance
    print(f"\nproposals of the encoder that are taken: {rates[0]:.3f} as it was trained, {rates[1]:.3f} refitted")
    print(
        f"R-hat below 1.1 for {(rhat < 1.1).mean():.0%} of images, below 1.05 for {(rhat < 1.05).mean():.0%}, "
        f"{rhat.max():.2f} for the worst; effective draws {np.median(size):.0f} in the median, {size.min():.0f} at worst"
    )
    draws, level = found["exact"][0], (0.5, 0.9)
    spread, seen = (part + (torch.rand_like(part) - 0.5) / (_LEVELS - 1) for part in (truth, draws))
    covered = interval_calibration(spread, seen, where, level=level)
    rows, setting = Rows(), f"MNIST, half of the pixels of {len(truth)} images"
    more: dict[str, Any] = {"is_less_better": False}
    rows.add("share of images whose R-hat is below 1.1", setting, float((rhat < 1.1).mean()), target=0.9, **more)
    rows.add("share of the encoder's proposals taken", setting, rates[1], target=0.1, **more)
    for name in ("pseudo-Gibbs", "mean"):
        ours, theirs = float(errors["exact"].mean()), float(errors[name].mean())
        rows.add("squared error of missing pixels", setting, ours, theirs=theirs, peer=name, target=1.0)
        ours, theirs = float(scores["exact"].mean()), float(scores[name].mean())
        rows.add("log-likelihood, nats a missing pixel", setting, ours, theirs=theirs, peer=name, is_difference=True,
                 target=0.0, **more)  # fmt: skip
    for nominal, share, se in zip(level, covered.coverage, covered.se, strict=True):
        rows.add(f"standard errors from {nominal:.0%} of pixels in intervals", setting, float(abs(share - nominal) / se),
                 target=3.0)  # fmt: skip
    rows.show()


if __name__ == "__main__":
    main()
