"""Anomalies are rows of low density: one mixture, the same for sixteen data sets, beside the detectors that are usual.

    PYRO_GENMODELS_DATA=FOLDER python examples/anomaly_detection.py

No label is seen by anything but the figure of merit: the probability that an anomaly has the higher score (area under the
ROC curve). Columns are standardised, ones of a single value left out; of large sets the same random rows are taken for all.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from inference import EM
from pyro_genmodels import GMM
from pyro_genmodels.metrics.anomaly import area_under_roc

ROWS, COMPONENTS = 2000, 2


def ours(z: np.ndarray) -> np.ndarray:
    """Minus the log-density under a mixture with diagonal covariances, at the mode of its posterior."""
    x, model = torch.tensor(z), GMM(COMPONENTS, "diagonal")
    posterior = EM(steps=50, tolerance=1e-3, restarts=2, standard_errors=False, seed=0, progress=False).fit(model, x)
    return -model.score_samples(x, posterior).numpy()


DETECTORS = {
    "GMM, ours": ours,
    "GMM, scikit-learn": lambda z: -GaussianMixture(COMPONENTS, random_state=0).fit(z).score_samples(z),
    "Isolation Forest": lambda z: -IsolationForest(random_state=0).fit(z).score_samples(z),
    "5 nearest neighbours": lambda z: NearestNeighbors(n_neighbors=6).fit(z).kneighbors(z)[0][:, -1],
}


def main(smoke: bool = False, folder: str = "runs/anomaly_detection") -> None:
    """Scores, prints a table and saves ``areas.png`` in a folder; takes three of the sets only if ``smoke``."""
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "adbench.npz") as file:
        names = sorted({key.split("__")[0] for key in file.files}, key=str.lower)
        tables = {name: (file[f"{name}__X"].astype(float), file[f"{name}__y"] == 1) for name in names}
    areas: dict[str, list[float]] = {}
    print(f"{'':18} {'rows':>5}", *(f"{name:>20}" for name in DETECTORS))
    for name, (x, y) in [*tables.items()][: 3 if smoke else None]:
        chosen = np.sort(np.random.default_rng(0).permutation(len(x))[:ROWS])
        x, y = x[chosen], y[chosen]
        x = x[:, x.std(0) > 0]
        z = (x - x.mean(0)) / x.std(0)
        areas[name] = [area_under_roc(y, detector(z)) for detector in DETECTORS.values()]
        print(f"{name:18} {len(x):5}", *(f"{area:20.3f}" for area in areas[name]), flush=True)
    means = np.mean(list(areas.values()), 0)
    print(f"{'mean':24}", *(f"{mean:20.3f}" for mean in means))
    best = list(DETECTORS)[int(means.argmax())]
    print(f"\nThe best mean is that of {best}." + ("" if best == "GMM, ours" else " Ours misses it."))

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.plot(list(areas.values()), range(len(areas)), "o", label=list(DETECTORS))
    axis.set_yticks(range(len(areas)), list(areas), fontsize=7)
    axis.set_xlabel("area under the ROC curve")
    axis.legend(frameon=False, fontsize=7)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "areas.png", dpi=150)
    print(f"Saved {Path(folder) / 'areas.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
