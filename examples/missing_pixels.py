"""Half of the pixels of handwritten digits, filled in from the other half, in under a minute.

    python examples/missing_pixels.py

A VAE is fitted to whole digits; then pixels of others are removed. What they were is guessed from what the pixel is in other
digits (mean); from the encoder's guess at z, for which it reads 0 where a pixel is missing (one pass of pseudo-Gibbs
sampling); and from draws of z from its exact posterior, which Gibbs makes of the same guesses by accepting them row by row.

Squared error of the mean of the draws; log-likelihood of all missing pixels of a digit together, per pixel, in nats; share of
missing pixels in central intervals of the draws, grey levels spread evenly so that none are tied, with standard errors.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from inference import SVI, Gibbs, GuideDraw
from pyro_genmodels import VAE, datasets, plots
from pyro_genmodels.autoencoders.likelihoods import DiscretisedLogistic
from pyro_genmodels.metrics.calibration import interval_calibration

LEVELS = 17
HEADER = f"{'':14}{'squared error':>14}{'log-likelihood':>16}{'in 50 %':>14}{'in 90 %':>14}"


def row(name: str, truth: Tensor, gaps: Tensor, draws: Tensor, guess: Tensor, log_p: Tensor, levels: int = LEVELS) -> str:
    """A row of the table, from draws (draw, row, *shape), a mean (row, *shape) and log-likelihoods (row,)."""
    where = gaps.isnan()
    error = float((guess - truth)[where].square().mean())
    spread = [part + (torch.rand_like(part) - 0.5) / (levels - 1) for part in (truth, draws)]
    found = interval_calibration(*spread, where, level=(0.5, 0.9))
    shares = "".join(f"{100 * share:8.1f} ± {100 * se:3.1f}" for share, se in zip(found.coverage, found.se, strict=True))
    return f"{name:14}{error:14.4f}{float(log_p.sum() / where.sum()):16.3f}{shares}"


def at(model: VAE, z: Tensor, truth: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Completions, their mean, and log p(missing pixels) of each row, at draws of z (draw, row, features)."""
    given, hidden = model.decode(z), torch.where(gaps.isnan(), truth, torch.nan)
    with torch.no_grad():
        log_p = given.log_prob(hidden).logsumexp(0) - math.log(len(z))
        drawn = model.complete(gaps, z=z)
    return drawn, drawn.mean(0), log_p


def by_pixel(x: Tensor, truth: Tensor, gaps: Tensor, levels: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, each pixel from what it is in other rows x, whatever the rest of the row."""
    drawn = torch.stack([x[torch.randint(len(x), x.shape[1:]), *torch.meshgrid(*map(torch.arange, x.shape[1:]), indexing="ij")]
                         for _ in range(count * len(truth))]).unflatten(0, (count, len(truth)))  # fmt: skip
    counts = torch.nn.functional.one_hot((x * (levels - 1)).round().long(), levels).sum(0) + 1.0  # one more of each level
    place = (truth * (levels - 1)).round().long()
    log_p = (counts / counts.sum(-1, keepdim=True)).log().expand(*place.shape, -1).gather(-1, place.unsqueeze(-1))
    return drawn, x.mean(0).expand_as(truth), torch.where(gaps.isnan(), log_p.squeeze(-1), 0.0).flatten(1).sum(1)


def main(smoke: bool = False, folder: str = "runs/missing_pixels") -> None:
    """Fits, fills in, prints a table and saves ``completions.png`` in a folder."""
    x = (datasets.load("digits").x / 16.0).float().reshape(-1, 8, 8)
    torch.manual_seed(0)
    x, truth = x[:-100], x[-100:]
    gaps = torch.where(torch.rand(truth.shape) < 0.5, torch.nan, truth)
    model = VAE((8, 8), 8, likelihood=DiscretisedLogistic(LEVELS), hidden=(256, 128))
    SVI(steps=30 if smoke else 2500, learning_rate=1e-3, batch_size=100, draws=1, seed=0, progress=False).fit(model, x)
    count = 4 if smoke else 25
    gibbs = Gibbs(blocks={"z": GuideDraw()}, chains=20, warmup=count, draws=count, thin=2, seed=0, progress=False)
    posterior = gibbs.fit(model, gaps)
    z = {"pseudo-Gibbs": model.encode(gaps).sample((20 * count,)), "exact": posterior.draws["z"].flatten(0, 1)}
    found = {"mean": by_pixel(x, truth, gaps, LEVELS, 100), **{name: at(model, z[name], truth, gaps) for name in z}}
    print(f"{len(x)} digits; of {len(truth)} others, half of the pixels are missing\n\n{HEADER}")
    for name, parts in found.items():
        print(row(name, truth, gaps, *parts))
    print(f"\n{posterior.plan}")
    pictures = {"data": truth[:10], "known": gaps[:10]} | {f"{n}\na draw": d[-1][:10] for n, (d, *_) in found.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images(pictures).savefig(Path(folder) / "completions.png")
    print(f"\nSaved {Path(folder) / 'completions.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
