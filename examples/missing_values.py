"""Half of a table is missing: fill it in, and say how sure that is.

    python examples/missing_values.py [--full]

Thirty measurements of 569 tumours, of which every second entry is deleted at random. A mixture with one component is a
multivariate normal; EM fits it to what is left. Intervals that take the fit for the truth are too narrow; Gibbs on the same
program (``--full``, minutes) averages over all fits that the data leave possible.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from torch import Tensor

from inference import EM, Gibbs, Posterior
from pyro_genmodels import GMM


def table() -> Tensor:
    """Breast cancer of Wisconsin, (569, 30), standardised."""
    x = torch.from_numpy(load_breast_cancer().data).double()
    return (x - x.mean(0)) / x.std(0, correction=0)


def interval(model: GMM, gappy: Tensor, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """What holds a missing entry with a probability of 90 %: low and high, each (rows, D)."""
    torch.manual_seed(0)
    drawn = model.imputations(gappy, posterior, 200)
    return drawn.quantile(0.05, 0), drawn.quantile(0.95, 0)


def main(smoke: bool = False, folder: str = "runs/missing_values", full: bool = False) -> None:
    x = table()[:60, :5] if smoke else table()
    is_gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    gappy = torch.where(is_gone, torch.nan, x)

    model, run = GMM(1), {"seed": 0, "progress": False}
    fits = {"EM": EM(steps=20 if smoke else 100, standard_errors=False, **run).fit(model, gappy)}
    if smoke or full:
        backend = Gibbs(chains=2, warmup=50, draws=5 if smoke else 100, start=fits["EM"], **run)
        fits["Gibbs"] = backend.fit(GMM(1, missing="drawn"), gappy)
    peers = [SimpleImputer(), KNNImputer(), IterativeImputer(random_state=0, tol=1.0 if smoke else 1e-3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer stops after ten rounds, as it does by default
        filled = {type(peer).__name__: torch.from_numpy(np.asarray(peer.fit_transform(gappy.numpy()))) for peer in peers}
    filled |= {f"GMM(1), {name}": model.impute(gappy, fit) for name, fit in fits.items()}
    print(f"{'':20}mean squared error")
    for name, one in filled.items():
        print(f"{name:20}{float((one - x)[is_gone].square().mean()):.3f}")
    for name, fit in fits.items():
        low, high = interval(model, gappy, fit)
        is_in, gone = (is_gone & (x >= low) & (x <= high)).sum(1), is_gone.sum(1)
        inside = float(is_in.sum() / gone.sum())
        error = float((is_in - inside * gone).square().sum().sqrt() / gone.sum())  # rows are independent, entries are not
        print(f"90 % intervals of {name} hold {100 * inside:.1f} ± {100 * error:.1f} % of {int(gone.sum())} entries")

    figure, axes = plt.subplots(figsize=(6, 4))
    shown = is_gone[:, 0].nonzero().squeeze(1)[:40]
    middle, low, high = (one[shown, 0] for one in (filled[f"GMM(1), {name}"], low, high))
    axes.errorbar(range(len(shown)), middle, [middle - low, high - middle], fmt=".", label="imputed, 90 %")
    axes.plot(x[shown, 0], "x", label="deleted")
    axes.set(xlabel="row", ylabel="mean radius, standardised", title=f"What was deleted, and what {name} knows of it")
    axes.legend(loc="lower left")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "imputed.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(full="--full" in sys.argv)
