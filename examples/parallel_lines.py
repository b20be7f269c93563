"""What divergences see of two parallel lines that approach each other: the example for which Wasserstein GANs were made.

    python examples/parallel_lines.py

Data lie evenly on the line from (0, 0) to (0, 1), draws on that from (θ, 0) to (θ, 1). As θ goes to 0, KL stays infinite and
Jensen-Shannon log 2, which tell a generator nothing of the way; the Wasserstein distance is θ. With noise of standard
deviation σ across the lines, KL = θ² / 2σ², JS is an integral on the line, and W is θ still. Each is found from draws or
quantiles by ``pyro_genmodels.metrics.divergences``, and stands beside its closed form or the integral.

References:
    M. Arjovsky, S. Chintala and L. Bottou, Wasserstein generative adversarial networks (2017), example 1.
    M. Arjovsky and L. Bottou, Towards principled methods for training generative adversarial networks (2017): noise.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch.distributions import Normal

from pyro_genmodels.metrics.divergences import jensen_shannon, kullback_leibler, wasserstein, wasserstein_quantiles


def log_density(x, at, sigma):  # of points (rows, 2), along the line or across it
    return torch.where(x[:, 0] == at, 0.0, -torch.inf) if sigma == 0.0 else Normal(at, sigma).log_prob(x[:, 0])


def exact(theta, sigma):  # KL, JS and W₁
    if sigma == 0.0:
        return (math.inf, math.log(2.0), theta) if theta else (0.0, 0.0, 0.0)
    x, step = np.linspace(-12.0, 12.0, 2001, retstep=True)  # in standard deviations; p and q mirror each other
    odds = theta / sigma * (x - 0.5 * theta / sigma)  # log q(x) - log p(x)
    shared = step * (stats.norm.pdf(x) * (math.log(2.0) - np.logaddexp(0.0, odds))).sum()  # of p log(p / m)
    return theta**2 / (2.0 * sigma**2), shared, theta


def main(smoke: bool = False, folder: str = "runs/parallel_lines") -> None:
    """Prints what is found beside what is true, and saves ``lines.png``."""
    torch.manual_seed(0)
    rows, height = 1000 if smoke else 50_000, torch.rand(100, dtype=torch.float64)
    print(f"{'':22}{'KL':>9}{'exact':>9}{'JS':>9}{'exact':>9}{'W':>9}{'exact':>9}")
    for sigma in (0.0, 0.2):
        for theta in (1.0, 0.3, 0.1, 0.01, 0.0):
            x, y = (torch.stack([at + sigma * torch.randn(rows).double(), torch.rand(rows)], -1) for at in (0.0, theta))
            p, q = (partial(log_density, at=at, sigma=sigma) for at in (0.0, theta))
            transport = wasserstein(*(torch.stack([torch.full_like(height, at), height], -1) for at in (0.0, theta)))
            if sigma > 0.0:
                transport = wasserstein_quantiles(stats.norm(0.0, sigma).ppf, stats.norm(theta, sigma).ppf)
            found = kullback_leibler(p, q, x).value, max(jensen_shannon(p, q, x, y).value, 0.0), transport
            pairs = "".join(f"{a:9.4f}{b:9.4f}" for a, b in zip(found, exact(theta, sigma), strict=True))
            print(f"sigma {sigma:.1f}, theta {theta:4.2f} {pairs}")

    figure, thetas = Figure(figsize=(10.0, 3.4), layout="constrained"), np.linspace(-1.0, 1.0, 161)
    panels = figure.subplots(1, 3)
    for sigma, colour, style in ((0.0, "#d1603d", "-"), (0.2, "#3b6fb6", "--"), (0.05, "#c29b22", ":")):
        values = np.array([exact(abs(round(float(theta), 12)), sigma) for theta in thetas])
        for axis, curve in zip(panels, values.T, strict=True):
            label = "no noise" if sigma == 0.0 else f"noise σ = {sigma:g}"
            axis.plot(thetas, curve.clip(max=1e3 if sigma else 6.0), style, color=colour, label=label)
    names = ("KL is infinite unless they meet", "JS is log 2 unless they meet", "Wasserstein: how far they are")
    for axis, name, most in zip(panels, names, (6.3, 0.75, 1.05), strict=True):
        axis.set(title=name, xlabel="θ, from line to line", ylim=(-0.02 * most, most))
    panels[0].set_yticks([0, 2, 4, 6], ["0", "2", "4", "∞"])
    panels[2].legend(frameon=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "lines.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'lines.png'}")


if __name__ == "__main__":
    main()
