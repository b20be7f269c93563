"""Clusters of handwritten digits, 8x8: variational deep embedding beside k-means and Gaussian mixtures, in under a minute.

    python examples/vade_clusters.py

Accuracy is that of the best matching of clusters to digits, one to one, on digits that no fit has seen; labels are used for
nothing else. VaDE starts from a mixture that is fitted to the codes of an autoencoder of the same networks; the last row
shows why: from random weights the decoder learns to use z before the mixture takes shape.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from inference import EM, SVI
from pyro_genmodels import GMM, VaDE, datasets, plots
from pyro_genmodels.metrics.clustering import accuracy, normalised_mutual_information

CLUSTERS, FEATURES, TEST = 10, 10, 297


def mixture(x: Tensor, new: Tensor, covariance: str, hard: bool = False) -> Tensor:
    """Clusters of new rows by a mixture, by EM; hard EM of equal spheres is k-means."""
    model = GMM(CLUSTERS, covariance)
    return model.predict(new, EM(seed=0, hard=hard, progress=False, standard_errors=False).fit(model, x).point())


def main(smoke: bool = False, folder: str = "runs/vade_clusters") -> None:
    """Fits, prints a table and saves ``clusters.png`` in a folder."""
    data = datasets.load("digits")
    x, y = (data.x / 16.0).float().reshape(-1, 8, 8), data.arrays["y"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # they come writer by writer
    x, y = x[order], y[order]
    x, y = (x[-600:], y[-600:]) if smoke else (x, y)
    x, new, truth = x[:-TEST], x[-TEST:], y[-TEST:]
    svi = SVI(steps=20 if smoke else 2500, learning_rate=2e-3, batch_size=100, draws=1, seed=0, progress=False,
              transform=torch.bernoulli)  # fmt: skip
    found = {"k-means on pixels": mixture(x.flatten(1), new.flatten(1), "spherical", hard=True)}
    torch.manual_seed(0)
    model, raw = (VaDE((8, 8), CLUSTERS, FEATURES, hidden=(256, 128), covariance="full") for _ in range(2))
    autoencoder = model.autoencoder()
    svi.fit(autoencoder, x)
    codes, codes_new = autoencoder.codes(x), autoencoder.codes(new)
    found["k-means on codes"] = mixture(codes, codes_new, "spherical", hard=True)
    found["GMM on codes"] = mixture(codes, codes_new, "full")
    model.start_from(codes)
    found["VaDE where it starts"] = model.predict(new)
    svi.fit(model, x)
    found["VaDE"] = model.predict(new)
    svi.fit(raw, x)
    found["VaDE from random weights"] = raw.predict(new)
    print(f"{len(x)} digits, {svi.steps} steps; on {TEST} others\n\n{'':26} accuracy    NMI   clusters in use")
    for name, labels in found.items():
        scores = accuracy(truth, labels), normalised_mutual_information(truth, labels)
        print(f"{name:26} {scores[0]:8.3f} {scores[1]:6.3f} {len(labels.unique()):10}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    pictures = {"mean": model.cluster_means()}
    share = model.responsibilities(new)
    for i in range(5):
        pictures[f"test digit {i + 1}"] = new[share.argsort(0, descending=True)[i]]
    plots.images(pictures).savefig(Path(folder) / "clusters.png")
    print(f"\nSaved {Path(folder) / 'clusters.png'}: the digits that each cluster is surest of")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same clusters on any machine
    main()
