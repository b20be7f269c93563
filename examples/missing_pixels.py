"""Half of the pixels of handwritten digits, filled in from the other half, in under a minute.

    python examples/missing_pixels.py

A VAE is fitted to digits partly hidden. Pixels of others are guessed: from what they are in other digits (mean), from the
encoder's guess at z (one pass of pseudo-Gibbs sampling), and from the posterior of z, which Gibbs makes of such guesses.

Squared error of the mean of the draws; log-likelihood of all missing pixels of a digit together, in nats per pixel; share
of missing pixels in central intervals of the draws, grey levels spread evenly so that none are tied, with standard errors.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from inference import SVI, Gibbs, GuideDraw, arviz
from pyro_genmodels import VAE, datasets, plots
from pyro_genmodels.autoencoders.likelihoods import DiscretisedLogistic
from pyro_genmodels.metrics.calibration import interval_calibration

HEADER = f"{'':14}{'squared error':>14}{'log-likelihood':>16}{'in 50 %':>14}{'in 90 %':>14}"


def line(name: str, truth: Tensor, gaps: Tensor, levels: int, draws: Tensor, guess: Tensor, log_p: Tensor) -> str:
    """A line of the table, from draws (draw, row, *shape), means (row, *shape) and log-likelihoods (row,)."""
    where = gaps.isnan()
    spread = [part + (torch.rand_like(part) - 0.5) / (levels - 1) for part in (truth, draws)]
    found = interval_calibration(*spread, where, level=(0.5, 0.9))
    shares = "".join(f"{100 * share:8.1f} ± {100 * se:3.1f}" for share, se in zip(found.coverage, found.se, strict=True))
    error = float((guess - truth)[where].square().mean())
    return f"{name:14}{error:14.4f}{float(log_p.sum() / where.sum()):16.3f}{shares}"


def by_code(model: VAE, z: Tensor, truth: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Completions, their mean, and log p(missing pixels) of each row, at draws of z (draw, row, features)."""
    drawn, hidden = model.complete(gaps, z=z), torch.where(gaps.isnan(), truth, torch.nan)
    return drawn, drawn.mean(0), model.decode(z).log_prob(hidden).logsumexp(0) - math.log(len(z))


def by_pixel(x: Tensor, truth: Tensor, gaps: Tensor, levels: int, draws: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """The same, each pixel from what it is in rows x."""
    counts = torch.nn.functional.one_hot((x * (levels - 1)).round().long(), levels).sum(0) + 1.0  # one more of each level
    known = torch.distributions.Categorical(counts)
    log_p = (known.log_prob((truth * (levels - 1)).round()) * gaps.isnan()).flatten(1).sum(1)
    return known.sample((draws, len(truth))) / (levels - 1), x.mean(0).expand_as(truth), log_p


def hide(x: Tensor) -> Tensor:
    """Each row without up to 60 % of its pixels."""
    return torch.where(torch.rand_like(x) < 0.6 * torch.rand(len(x), 1, 1), torch.nan, x)


def main(smoke: bool = False, folder: str = "runs/missing_pixels") -> None:
    """Fits, fills in, prints a table and saves ``completions.png`` in a folder."""
    x, count = (datasets.load("digits").x / 16.0).float().reshape(-1, 8, 8), 4 if smoke else 60
    torch.manual_seed(0)
    x, truth = x.split([len(x) - 50, 50])
    gaps = torch.where(torch.rand(truth.shape) < 0.5, torch.nan, truth)
    model = VAE((8, 8), 4, likelihood=DiscretisedLogistic(17), hidden=(256, 128), observed=True)
    SVI(steps=40 * count, learning_rate=1e-3, batch_size=100, draws=1, transform=hide, seed=0, progress=False).fit(model, x)
    gibbs = Gibbs(blocks={"z": GuideDraw()}, chains=20, warmup=count, draws=count, thin=3, seed=0, progress=False)
    posterior = gibbs.fit(model, gaps)
    z = {"pseudo-Gibbs": model.encode(gaps).sample((20 * count,)), "exact": posterior.draws["z"].flatten(0, 1)}
    found = {"mean": by_pixel(x, truth, gaps, 17)} | {name: by_code(model, z[name], truth, gaps) for name in z}
    lines = [line(name, truth, gaps, 17, *parts) for name, parts in found.items()]
    print(f"{len(x)} digits; half of the pixels of {len(truth)} others are missing\n", HEADER, *lines, sep="\n")
    rhat = arviz.rhat(posterior.draws["z"].numpy()).max(1)
    print(f"\n{posterior.plan}\nR-hat is below 1.1 for {(rhat < 1.1).sum()} digits, {rhat.max():.2f} for the worst")
    pictures = {"data": truth[:10], "known": gaps[:10]} | {f"{n}\na draw": d[-1][:10] for n, (d, *_) in found.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images(pictures).savefig(Path(folder) / "completions.png")
    print(f"Saved {Path(folder) / 'completions.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
