"""How well is a table described that nobody has shown? Log-densities of held-out rows, in nats, on six tables.

    PYRO_GENMODELS_DATA=FOLDER python examples/density_estimation.py

One model for all, with nothing to choose: a Dirichlet process mixture, by EM (its mode) and by Gibbs sampling (the average
over its posterior). scikit-learn's mixture is the best of 24 by BIC; the bandwidth of the kernel density is cross-validated.
Every fifth row is held out; columns are standardised by the others; of large tables, the same 500 rows are taken for all.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from inference import EM, Gibbs
from pyro_genmodels import GMM

TABLES = ("faithful", "iris", "penguins", "wine", "winequality_white", "power_plant")
METHODS = ("GMM by BIC", "kernel density", "ours, EM", "ours, Gibbs")
ROWS, COMPONENTS = 500, 6


def table(name: str) -> np.ndarray:
    file, key = ("uci_regression", name) if name == "power_plant" else ("classical", f"{name}__X")
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / f"{file}.npz") as found:
        x = found[key].astype(float)
    return x[np.random.default_rng(0).permutation(len(x))[:ROWS]]


def main(smoke: bool = False, folder: str = "runs/density_estimation") -> None:
    """Fits, prints a table and saves ``densities.png`` in a folder; two tables and few draws if ``smoke``."""
    em = EM(steps=5 if smoke else 100, tolerance=1e-4, standard_errors=False, seed=0, progress=False)
    gibbs = Gibbs(chains=2, warmup=5 if smoke else 150, draws=5 if smoke else 150, seed=0, progress=False)
    gains: dict[str, list[list[float]]] = {}
    print(f"{'':18}{'rows':>5}{'columns':>8}" + "".join(f"{name:>16}" for name in METHODS) + "   Gibbs less BIC")
    for name in TABLES[: 2 if smoke else None]:
        x = table(name)
        is_held = np.arange(len(x)) % 5 == 4
        x = (x - x[~is_held].mean(0)) / x[~is_held].std(0)
        seen, new = x[~is_held], x[is_held]
        choices = [(k, kind) for k in range(1, 9) for kind in ("full", "tied", "diag")]
        peers = [GaussianMixture(k, covariance_type=kind, max_iter=500, random_state=0).fit(seen) for k, kind in choices]
        kernels = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.05, 1.5, 20)}, cv=5).fit(seen)
        scores = [min(peers, key=lambda peer: peer.bic(seen)).score_samples(new), kernels.best_estimator_.score_samples(new)]
        for backend in (em, gibbs):
            model = GMM(COMPONENTS, weights="stick-breaking")
            posterior = backend.fit(model, torch.tensor(seen))
            scores.append(model.score_samples(torch.tensor(new), posterior).numpy())
        gains[name] = [[(one - scores[0]).mean(), 2.0 * (one - scores[0]).std() / len(new) ** 0.5] for one in scores[1:]]
        line = f"{name:18}{len(seen):5}{x.shape[1]:8}" + "".join(f"{one.mean():16.3f}" for one in scores)
        print(line + "{:9.3f} ± {:.3f}".format(*gains[name][-1]), flush=True)
    print("(± 2 standard errors over the held-out rows; below zero, ours misses)")

    axis = (figure := Figure(figsize=(7.0, 4.0), layout="constrained")).subplots()
    for i, method in enumerate(METHODS[1:]):
        gain, error = np.array([gain[i] for gain in gains.values()]).T
        axis.errorbar(gain, np.arange(len(gains)) + 0.2 * (i - 1), xerr=error, fmt="o", label=method)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(gains)), list(gains))
    axis.set_xlabel("gain over the mixture chosen by BIC, nats a held-out row (± 2 standard errors)")
    axis.legend(frameon=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "densities.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'densities.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
