"""A program of your own, by five back-ends: when did accidents in British coal mines become fewer?

    python examples/your_own_program.py

Nothing to inherit and nothing to register: any function with ``pyro.sample`` in it is a model. The year of the change is
a discrete site: Gibbs draws it, the other back-ends sum it out and draw it back.
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings
from pyro_genmodels import datasets


def coal(years: Tensor, counts: Tensor) -> None:
    """Accidents come at one rate before the year of the switch, and at another from then on."""
    early = pyro.sample("early", dist.Gamma(2.0, 1.0))
    late = pyro.sample("late", dist.Gamma(2.0, 1.0))
    switch = pyro.sample("switch", dist.Categorical(logits=torch.zeros(len(years))))
    with pyro.plate("year", len(years)):
        pyro.sample("n", dist.Poisson(torch.where(years < years[switch], early, late)), obs=counts)


def main(smoke: bool = False, folder: str = "runs/your_own_program") -> None:
    """Fits, prints a table and saves ``switch.png``.

    Args:
        smoke: Whether to take a few steps only, to see that all runs.
        folder: Where the picture goes.
    """
    data = datasets.load("coal")
    years, counts = data["years"], data["counts"]
    size = 20 if smoke else 500
    backends = {
        "SVI": SVI(seed=0, steps=2 * size),
        "EM": EM(seed=0),
        "Gibbs": Gibbs(seed=0, draws=size, warmup=size // 5),
        "Metropolis-Hastings": MetropolisHastings(seed=0, draws=size, warmup=size, thin=10),
        "HMC": HMC(seed=0, draws=size, warmup=size // 2),
    }
    posteriors = {name: backend.fit(coal, years, counts) for name, backend in backends.items()}

    print(f"{'':20}  seconds      early rate       late rate   last year of the early rate")
    for name, posterior in posteriors.items():
        early, late, switch = (posterior.draws[site].flatten() for site in ("early", "late", "switch"))
        rates = [f"{rate.mean():.3f} ({rate.std(correction=0):.3f})" for rate in (early, late)]
        low, high = years[switch].quantile(torch.tensor([0.05, 0.95], dtype=years.dtype)) - 1
        span = f"{low:.0f} to {high:.0f}" if len(switch) > 1 else f"{low:.0f}"
        print(f"{name:20}  {posterior.info['sampling_time']:7.1f}  {rates[0]:>14}  {rates[1]:>14}   {span}")
    print(f"\nHow Gibbs updates each site:\n{posteriors['Gibbs'].plan}")

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.bar(years.numpy(), counts.numpy(), color="#d9dde3", width=0.9, label="accidents")
    for i, (name, posterior) in enumerate(posteriors.items()):
        early, late, switch = (posterior.draws[site].flatten()[:, None] for site in ("early", "late", "switch"))
        rate = torch.where(years < years[switch], early, late).mean(0)
        # from broad to narrow: they lie on each other
        axis.plot(years.numpy(), rate.numpy(), linewidth=7 - 1.5 * i, label=f"mean rate, {name}")
    axis.set(xlabel="year", ylabel="accidents with ten or more dead")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(picture := Path(folder) / "switch.png")
    print(f"\nSaved {picture}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # two threads are slower on tensors this small
    main()
