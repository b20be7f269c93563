"""Anomalies are rows of low density: one score, the same for sixteen data sets, beside the detectors that are usual.

    PYRO_GENMODELS_DATA=FOLDER python examples/anomaly_detection.py [--full]

No label is seen by anything but the figure of merit: the probability that an anomaly has the higher score (area under the
ROC curve). Columns are standardised; of large sets the same random rows are taken for all. Our score was chosen on every
second set; the mean over the others, which are all that runs without ``--full``, owes nothing to that choice.
"""

from __future__ import annotations

import os
import sys
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

ROWS, POOL = 2000, [(components, shape) for components in (1, 2) for shape in ("diagonal", "full")]


def ours(z: np.ndarray) -> np.ndarray:
    """Minus the mean log-density under four mixtures, of columns whose tails arcsinh has drawn in.

    A mixture that anomalies have a component of finds them likely: the mean of logarithms heeds those that do not.
    """
    x, backend = torch.tensor(np.arcsinh(z)), EM(steps=50, tolerance=1e-3, standard_errors=False, seed=0, progress=False)
    models = [GMM(components, shape) for components, shape in POOL]
    return -np.mean([model.score_samples(x, backend.fit(model, x)).numpy() for model in models], 0)


DETECTORS = {
    "GMMs, ours": ours,
    "GMM, scikit-learn": lambda z: -GaussianMixture(2, random_state=0).fit(z).score_samples(z),
    "Isolation Forest": lambda z: -IsolationForest(random_state=0).fit(z).score_samples(z),
    "5 nearest neighbours": lambda z: NearestNeighbors(n_neighbors=6).fit(z).kneighbors(z)[0][:, -1],
}


def main(smoke: bool = False, folder: str = "runs/anomaly_detection", full: bool = False) -> None:
    """Scores, prints a table and saves ``areas.png``; of one small set if ``smoke``, of all sets if ``full``."""
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "adbench.npz") as file:
        names = sorted({key.split("__")[0] for key in file.files}, key=str.lower)
        tables = {name: (file[f"{name}__X"].astype(float), file[f"{name}__y"] == 1) for name in names}
    halves = {"others": names[1::2], "chosen on": names[0::2] if full else []}
    areas: dict[str, list[float]] = {}
    print(f"{'':18} {'rows':>5}", *(f"{name:>20}" for name in DETECTORS))
    for name in (halves["others"] + halves["chosen on"])[: 1 if smoke else None]:
        chosen = np.sort(np.random.default_rng(0).permutation(len(tables[name][1]))[: 200 if smoke else ROWS])
        x, y = (part[chosen] for part in tables[name])
        x = x[:, x.std(0) > 0]
        z = (x - x.mean(0)) / x.std(0)
        areas[name] = [area_under_roc(y, detector(z)) for detector in DETECTORS.values()]
        print(f"{name:18} {len(x):5}", *(f"{area:20.3f}" for area in areas[name]), flush=True)
    for title, members in [*halves.items(), ("all", names)][: 3 if full else 1]:
        means = np.mean([areas[name] for name in members if name in areas], 0)
        verdict = "met" if means[0] >= means.max() else f"ours MISSES {[*DETECTORS][int(means.argmax())]}"
        print(f"{'mean, ' + title:24}", *(f"{mean:20.3f}" for mean in means), f" {verdict}")

    axis = Figure(figsize=(6.0, 4.0), layout="constrained").subplots()
    axis.plot(list(areas.values()), range(len(areas)), "o", label=list(DETECTORS))
    axis.set(yticks=range(len(areas)), yticklabels=list(areas), xlabel="area under the ROC curve")
    axis.legend(frameon=False, fontsize=7)
    (path := Path(folder) / "areas.png").parent.mkdir(parents=True, exist_ok=True)
    axis.figure.savefig(path, dpi=150)
    print(f"Saved {path}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(full="--full" in sys.argv)
