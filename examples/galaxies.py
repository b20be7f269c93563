"""How many components have the galaxies? Gibbs sampling of a mixture whose size is unknown, beside reversible jump.

    python examples/galaxies.py

The prior is Richardson and Green's: k uniform on 1 to 30, w ~ Dirichlet(1), μ_j ~ N(middle, R²), 1 / σ²_j ~ Gamma(2, β),
β ~ Gamma(0.2, 10 / R²), R the range. The first of 30 components is there, each other one or not, with a share that has a
uniform prior: then k is uniform. A weight is a Gamma variable over the sum of those that are there, and u ~ Gamma(n, sum),
on which no data depend, takes the sum out of their conditionals: every update is exact (James et al. 2009).

References:
    S. Richardson and P. Green, On Bayesian analysis of mixtures with an unknown number of components (1997), table 1.
    L. James, A. Lijoi and I. Prünster, Posterior analysis for normalized random measures with independent increments (2009).
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import Gibbs, arviz
from pyro_genmodels import datasets

MOST = 30
PUBLISHED = {
    3: 0.061, 4: 0.128, 5: 0.182, 6: 0.199, 7: 0.160, 8: 0.109, 9: 0.071, 10: 0.040, 11: 0.023, 12: 0.013, 13: 0.006,
}  # fmt: skip


def velocities(x: Tensor) -> None:
    """A normal mixture of at most ``MOST`` components."""
    reach, middle = x.max() - x.min(), (x.max() + x.min()) / 2
    one = x.new_ones(())
    share = pyro.sample("share", dist.Beta(one, 1.0))
    with pyro.plate("others", MOST - 1):
        is_there = pyro.sample("is_there", dist.Bernoulli(share))
    beta = pyro.sample("beta", dist.Gamma(0.2 * one, 10.0 / reach**2))
    with pyro.plate("components", MOST):
        size = pyro.sample("size", dist.Gamma(one, 1.0))
        mean = pyro.sample("mean", dist.Normal(middle, reach))
        variance = pyro.sample("variance", dist.InverseGamma(2.0 * one, beta))
    size = size * torch.cat([torch.ones_like(is_there[..., :1]), is_there], -1)
    total = size.sum(-1, keepdim=True)
    pyro.sample("u", dist.Gamma(len(x) * one, total[..., 0]))
    with pyro.plate("galaxies", len(x)):
        z = pyro.sample("z", dist.Categorical(size / total))
        pyro.sample("x", dist.Normal(mean[z], variance[z].sqrt()), obs=x)


def main(smoke: bool = False, folder: str = "runs/galaxies") -> None:
    """Fits, prints a table and saves ``components.png`` in a folder; few draws if ``smoke``."""
    chains, warmup, draws = (2, 10, 20) if smoke else (16, 300, 500)
    there = {"is_there": torch.ones(MOST - 1)}  # components leave in a few sweeps; to come, one has to hit upon its place
    backend = Gibbs(chains=chains, warmup=warmup, draws=draws, start=there, keep=["is_there"], seed=0, progress=False)
    posterior = backend.fit(velocities, datasets.load("galaxies").x[:, 0])
    k = (1 + posterior.draws["is_there"].sum(-1)).numpy()
    found = {i: (k == i).astype(float) for i in PUBLISHED}
    print(f"{posterior.plan}\n\n{'k':24}", *(f"{i:7}" for i in PUBLISHED))
    print(f"{'Richardson and Green':24}", *(f"{p:7.3f}" for p in PUBLISHED.values()))
    print(f"{'Gibbs':24}", *(f"{own.mean():7.3f}" for own in found.values()))
    print(f"{'    standard error':24}", *(f"{float(arviz.mcse(own)):7.3f}" for own in found.values()))
    print(f"\nEffective draws of k: {float(arviz.ess(k)):.0f} of {k.size}, R-hat {float(arviz.rhat(k)):.3f}")
    axis = (figure := Figure(figsize=(5.0, 3.6), layout="constrained")).subplots()
    axis.bar([*found], [own.mean() for own in found.values()], yerr=[2 * float(arviz.mcse(own)) for own in found.values()])
    axis.plot([*PUBLISHED], [*PUBLISHED.values()], "k_", markersize=16, label="Richardson and Green (1997)")
    axis.set(xlabel="components k", ylabel="probability, ± 2 standard errors", ylim=(0.0, None))
    axis.legend(frameon=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "components.png", dpi=150)
    print(f"Saved {Path(folder) / 'components.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
