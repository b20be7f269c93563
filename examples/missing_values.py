"""Half of a table is missing: fill it in, and say how sure that is.

    python examples/missing_values.py

Thirty measurements of 569 tumours, of which every second entry is deleted at random. A mixture with one component is a
multivariate normal; EM fits it to what is left, and the conditional distribution of what is missing is known exactly.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from torch import Tensor

from inference import EM
from pyro_genmodels import GMM


def table() -> Tensor:
    """Breast cancer of Wisconsin, (569, 30), standardised."""
    from sklearn.datasets import load_breast_cancer

    x = torch.from_numpy(load_breast_cancer().data).double()
    return (x - x.mean(0)) / x.std(0, correction=0)


def main(smoke: bool = False, folder: str | os.PathLike[str] = "runs/missing_values") -> dict[str, float]:
    x = table()[:60, :5] if smoke else table()
    generator = torch.Generator().manual_seed(0)
    is_gone = torch.rand(x.shape, generator=generator) < 0.5
    is_gone[:, is_gone.all(0)] = False
    gappy = torch.where(is_gone, torch.nan, x)

    model = GMM(1)
    posterior = EM(steps=20 if smoke else 100, standard_errors=False, seed=0, progress=False).fit(model, gappy)
    torch.manual_seed(0)
    drawn = model.imputations(gappy, posterior, 200)
    low, high = drawn.quantile(0.05, 0), drawn.quantile(0.95, 0)

    peers: dict[str, Any] = {
        "mean": SimpleImputer(),
        "KNNImputer": KNNImputer(),
        "IterativeImputer": IterativeImputer(random_state=0, tol=1.0 if smoke else 1e-3),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer stops after ten rounds, as it does by default
        filled = {name: torch.from_numpy(np.asarray(peer.fit_transform(gappy.numpy()))) for name, peer in peers.items()}
    filled["GMM(1), EM"] = model.impute(gappy, posterior)
    errors = {name: float((one - x)[is_gone].square().mean()) for name, one in filled.items()}
    print(f"{'':20}mean squared error")
    for name, error in errors.items():
        print(f"{name:20}{error:.3f}")
    inside = float(((x >= low) & (x <= high))[is_gone].double().mean())
    print(f"90 % intervals of GMM(1) hold {100 * inside:.1f} % of the {int(is_gone.sum())} missing entries")

    figure, axes = plt.subplots(figsize=(6, 4))
    shown = is_gone[:, 0].nonzero().squeeze(1)[:40]
    middle = filled["GMM(1), EM"][shown, 0]
    reach = [middle - low[shown, 0], high[shown, 0] - middle]
    axes.errorbar(range(len(shown)), middle, reach, fmt=".", label="imputed, 90 %")
    axes.plot(x[shown, 0], "x", label="deleted")
    axes.set(xlabel="row", ylabel="mean radius, standardised", title="What was deleted, and what is left of it")
    axes.legend()
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "imputed.png", dpi=120)
    plt.close(figure)
    return errors | {"coverage": inside}


if __name__ == "__main__":
    main()
