"""Groups without labels: mixtures by EM and a Dirichlet process by Gibbs sampling, beside scikit-learn.

    PYRO_GENMODELS_DATA=FOLDER python examples/clustering.py

All are told the number of classes but the Dirichlet process, which has to find it; its clustering is the one that stands for
all draws. ``Mixture`` takes columns as independent: normal ones, and for digits whether a pixel is on. Classes are seen by
the figures of merit alone: accuracy under the best matching, normalised mutual information, adjusted Rand index.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import Tensor

from inference import EM, Gibbs, relabel
from pyro_genmodels import GMM, Mixture
from pyro_genmodels.metrics import clustering as metrics

MERITS = (metrics.accuracy, metrics.normalised_mutual_information, metrics.adjusted_rand_index)
NAMES = ("KMeans, scikit-learn", "GaussianMixture, scikit-learn", "GMM, EM", "Mixture, EM", "Dirichlet process, Gibbs")


def table(name: str) -> tuple[Tensor, np.ndarray]:
    """Standardised columns and classes; of digits, the first ten principal components, and the pixels behind them."""
    if name == "digits":
        x, y = load_digits(return_X_y=True)
        return torch.from_numpy(x), y
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "classical.npz") as file:
        x, y = torch.from_numpy(file[f"{name}__X"].astype(float)), file[f"{name}__y"]
    return (x - x.mean(0)) / x.std(0), y


def main(smoke: bool = False, folder: str = "runs/clustering") -> None:
    """Fits, prints a table and saves ``clusters.png`` in a folder; one table and few draws if ``smoke``."""
    em = EM(steps=5 if smoke else 100, restarts=5, tolerance=1e-4, standard_errors=False, seed=0, progress=False)
    gibbs = Gibbs(chains=2, warmup=5 if smoke else 300, draws=5 if smoke else 200, seed=0, progress=False)
    names = ("iris",) if smoke else ("iris", "wine", "penguins", "digits")
    figure = Figure(figsize=(3.0 * len(names), 8.6), layout="constrained")
    axes = figure.subplots(3, len(names), squeeze=False)
    print(f"{'':32}classes  found   accuracy      NMI      ARI")
    for column, name in enumerate(names):
        raw, truth = table(name)
        count, x = len(set(truth)), raw
        if name == "digits":
            x = (raw - raw.mean(0)) @ torch.linalg.svd(raw - raw.mean(0), full_matrices=False).Vh[:10].mT
        pixels = (raw > 8.0).double() if name == "digits" else x
        process = GMM(2 * count, weights="stick-breaking", concentration=None)
        posterior = gibbs.fit(process, x)
        found = [
            KMeans(count, n_init=5, random_state=0).fit_predict(x),
            GaussianMixture(count, n_init=5, random_state=0).fit_predict(x),
        ]
        for model, data in ((GMM(count), x), (Mixture(count, "bernoulli" if name == "digits" else "normal"), pixels)):
            found.append(model.predict(data, em.fit(model, data)).numpy())
        found.append(relabel.partition(posterior.draws["z"], sweeps=0).numpy())
        print(name)
        for title, labels in zip(NAMES, found):
            scores = "".join(f"{merit(truth, labels):9.3f}" for merit in MERITS)
            print(f"  {title:30}{count:7}{len(set(labels.tolist())):7}  {scores}", flush=True)
        for axis, colour in zip(axes[:, column], (found[-1], truth)):
            flat = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2].mT
            axis.scatter(*flat.mT, c=colour, s=4, cmap="tab20" if len(set(colour.tolist())) > 10 else "tab10")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(f"{name}: {len(set(found[-1].tolist()))} clusters")
        axes[1, column].set_title(f"{name}: {count} classes")
        order = truth.argsort(kind="stable")
        axes[2, column].imshow(relabel.co_clustering(posterior.draws["z"])[order][:, order], cmap="Greys", vmin=0, vmax=1)
        axes[2, column].set(xticks=[], yticks=[], title="rows that go together")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "clusters.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'clusters.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
