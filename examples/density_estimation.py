"""How well is a table described that nobody has shown? Log-density of held-out rows, in nats, on eight tables.

    PYRO_GENMODELS_DATA=FOLDER python examples/density_estimation.py

One model for all, with nothing to choose: a Dirichlet process mixture, by EM (its mode) and by Gibbs sampling (the average
over its posterior). scikit-learn's mixture is the best of 24 by BIC; the bandwidth of the kernel density is cross-validated.
Every fifth row is held out; columns are standardised by the others; of large tables, the same 1,000 rows are taken for all.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from inference import EM, Gibbs
from pyro_genmodels import GMM

TABLES = ("faithful", "iris", "penguins", "power_plant", "kin8nm", "winequality_white", "wine", "breast_cancer_wdbc")
ROWS, COMPONENTS = 1000, 8


def table(name: str) -> np.ndarray:
    file, key = ("uci_regression", name) if name in ("power_plant", "kin8nm") else ("classical", f"{name}__X")
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / f"{file}.npz") as found:
        x = found[key].astype(float)
    return x[np.random.default_rng(0).permutation(len(x))[:ROWS]]


def by_bic(x: np.ndarray) -> GaussianMixture:
    """The best of eight numbers of components and three kinds of covariances."""
    settings = [(k, kind) for k in range(1, 9) for kind in ("full", "tied", "diag") if k < len(x) // 10]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return min(
            (GaussianMixture(k, covariance_type=c, random_state=0).fit(x) for k, c in settings), key=lambda g: g.bic(x)
        )


def main(smoke: bool = False, folder: str = "runs/density_estimation") -> None:
    """Fits, prints a table and saves ``densities.png`` in a folder; two tables and few draws if ``smoke``."""
    chain = {
        "chains": 2,
        "warmup": 5 if smoke else 150,
        "draws": 5 if smoke else 150,
        "thin": 1,
        "seed": 0,
        "progress": False,
    }
    backends = {
        "EM": EM(steps=5 if smoke else 100, tolerance=1e-4, standard_errors=False, seed=0, progress=False),
        "Gibbs": Gibbs(**chain),
    }
    names = ("scikit-learn, BIC", "kernel density", *(f"ours, {name}" for name in backends))
    gains: dict[str, np.ndarray] = {}
    print(f"{'':20}{'rows':>6}{'columns':>9}" + "".join(f"{name:>20}" for name in names))
    for title in TABLES[: 2 if smoke else None]:
        x = table(title)
        held = np.arange(len(x)) % 5 == 4
        x = (x - x[~held].mean(0)) / x[~held].std(0)
        seen, new = x[~held], x[held]
        kernel = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.05, 1.5, 20)}, cv=5).fit(seen).best_estimator_
        scores = [by_bic(seen).score_samples(new), kernel.score_samples(new)]
        for backend in backends.values():
            model = GMM(COMPONENTS, weights="stick-breaking")
            posterior = backend.fit(model, torch.tensor(seen))
            scores.append(model.score_samples(torch.tensor(new), posterior).numpy())
        print(f"{title:20}{len(seen):6}{x.shape[1]:9}" + "".join(f"{one.mean():20.3f}" for one in scores), flush=True)
        gains[title] = np.array(
            [[(one - scores[0]).mean(), (one - scores[0]).std() / len(new) ** 0.5] for one in scores[1:]]
        )
    print("\nGain over scikit-learn's, in units of its standard error over held-out rows (below -2: ours misses it):")
    for title, gain in gains.items():
        print(f"{title:35}" + "".join(f"{mean / error:20.1f}" for mean, error in gain))

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(names[1:]):
        gain, error = np.array([gain[i] for gain in gains.values()]).T
        axis.errorbar(gain, np.arange(len(gains)) + 0.2 * (i - 1), xerr=2.0 * error, fmt="o", label=name)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(gains)), list(gains))
    axis.set(xlabel="log-density of a held-out row, less that of scikit-learn's mixture (nats, 2 standard errors)")
    axis.legend(frameon=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "densities.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'densities.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
