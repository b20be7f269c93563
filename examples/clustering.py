"""Groups without labels: mixtures by EM and a Dirichlet process by Gibbs sampling, beside scikit-learn.

    PYRO_GENMODELS_DATA=FOLDER python examples/clustering.py

All are told the number of classes but the Dirichlet process, which has to find it; one clustering then stands for its draws.
BIC chooses the kind of covariances, for scikit-learn and for us; ``Mixture`` takes columns as independent. Classes are seen
by accuracy under the best matching, normalised mutual information and the adjusted Rand index alone.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from torch import Tensor

from inference import EM, Gibbs, relabel
from pyro_genmodels import GMM, Mixture
from pyro_genmodels.metrics import clustering as metrics

MERITS = (metrics.accuracy, metrics.normalised_mutual_information, metrics.adjusted_rand_index)
KINDS = {"full": "full", "tied": "tied", "diag": "diagonal"}


def table(name: str) -> tuple[Tensor, np.ndarray]:
    """Standardised columns, and classes."""
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "classical.npz") as file:
        x, y = torch.from_numpy(file[f"{name}__X"].astype(float)), file[f"{name}__y"]
    return (x - x.mean(0)) / x.std(0, correction=0), y


def main(smoke: bool = False, folder: str = "runs/clustering") -> None:
    """Fits, prints a table and saves ``clusters.png`` in a folder; one table and few draws if ``smoke``."""
    em = EM(steps=5 if smoke else 100, restarts=5, tolerance=1e-4, standard_errors=False, seed=0, progress=False)
    gibbs = Gibbs(chains=2, warmup=5 if smoke else 200, draws=5 if smoke else 200, seed=0, progress=False)
    names = ("iris", "wine", "penguins")[: 1 if smoke else None]
    figure = Figure(figsize=(3.0 * len(names), 8.8), layout="constrained")
    axes = figure.subplots(3, len(names), squeeze=False)
    print(f"{'':40}  classes  found   accuracy      NMI      ARI")
    for column, name in enumerate(names):
        x, truth = table(name)
        peers = [GaussianMixture(3, covariance_type=kind, n_init=5, random_state=0).fit(x.numpy()) for kind in KINDS]
        peer = min(peers, key=lambda peer: peer.bic(x.numpy()))
        kind = KINDS[peer.covariance_type]
        model, mixture, process = GMM(3, kind), Mixture(3, "normal"), GMM(6, kind, weights="stick-breaking")
        posterior = dataclasses.replace(gibbs, start=em.fit(process, x)).fit(process, x)
        found = {
            "KMeans, scikit-learn": KMeans(3, n_init=5, random_state=0).fit_predict(x.numpy()),
            "GaussianMixture, scikit-learn": peer.predict(x.numpy()),
            "GMM, EM": model.predict(x, em.fit(model, x)).numpy(),
            "Mixture, EM": mixture.predict(x, em.fit(mixture, x)).numpy(),
            "Dirichlet process, Gibbs": relabel.partition(posterior.draws["z"], sweeps=1).numpy(),
        }
        for title, labels in found.items():
            scores = "".join(f"{merit(truth, labels):9.3f}" for merit in MERITS)
            print(f"{name:10}{title:32}{3:7}{len(set(labels.tolist())):7}  {scores}", flush=True)
        flat = (torch.linalg.svd(x, full_matrices=False).Vh[:2] @ x.mT).numpy()
        for axis, shown, title in zip(axes[:2, column], (labels, truth), ("clusters", "classes")):
            axis.scatter(*flat, c=shown, s=6, cmap="tab10", vmax=9)
            axis.set_title(f"{name}: {len(set(shown.tolist()))} {title}")
        together = relabel.co_clustering(posterior.draws["z"][:, :, truth.argsort(kind="stable")]).numpy()
        axes[2, column].imshow(together, cmap="Greys", vmin=0.0, vmax=1.0)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[2, 0].set_ylabel("how often rows go together")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "clusters.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'clusters.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
