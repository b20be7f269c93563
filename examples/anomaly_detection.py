"""Anomalies are rows of low density: one score, the same for sixteen data sets, beside the detectors that are usual.

    PYRO_GENMODELS_DATA=FOLDER python examples/anomaly_detection.py [--full]

Labels are seen by the area under the ROC curve alone. Columns are standardised; of large sets the same rows are taken for
all; without ``--full`` every second set. Our score is one setting, chosen with all sets in sight.
"""

import os
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from sklearn import ensemble, mixture, neighbors

from inference import EM
from pyro_genmodels import GMM
from pyro_genmodels.metrics.anomaly import area_under_roc


def margins(x: torch.Tensor) -> None:
    """Columns that know nothing of one another, each a mixture of three normals."""
    with pyro.plate("columns", x.shape[1], dim=-1) as column:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
        with pyro.plate("modes", 3, dim=-2):
            location = pyro.sample("location", dist.Normal(0.0, 1.0))
            variance = pyro.sample("variance", dist.InverseGamma(2.0, 0.2))
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(location[z, column], variance[z, column].sqrt()), obs=x)


def ours(z: np.ndarray) -> np.ndarray:
    """Minus the mean log-density under margins, one normal, and two clusters: what one finds likely is odd to others."""
    x = torch.tensor(np.arcsinh(z))  # which draws tails in
    apart = x.quantile(torch.tensor([0.17, 0.5, 0.83]).to(x), 0)
    start = {"location": apart, "variance": torch.ones_like(apart), "weights": torch.full_like(apart.T, 1.0 / 3.0)}
    point = EM(steps=50, standard_errors=False, seed=0, progress=False, start=start).fit(margins, x).point()
    modes = dist.Normal(point["location"].T, point["variance"].T.sqrt())
    found = [dist.MixtureSameFamily(dist.Categorical(point["weights"]), modes).log_prob(x).sum(1)]
    for model in (GMM(1, "diagonal"), GMM(2, "full")):
        found.append(model.score_samples(x, EM(steps=50, standard_errors=False, seed=0, progress=False).fit(model, x)))
    return -torch.stack(found).mean(0).numpy()


DETECTORS = {"mixtures, ours": ours,
             "GMM, scikit-learn": lambda z: -mixture.GaussianMixture(2, random_state=0).fit(z).score_samples(z),
             "Isolation Forest": lambda z: -ensemble.IsolationForest(random_state=0).fit(z).score_samples(z),
             "5 neighbours": lambda z: neighbors.NearestNeighbors(n_neighbors=6).fit(z).kneighbors(z)[0][:, -1]}  # fmt: skip


def main(smoke: bool = False, folder: str = "runs/anomaly_detection", full: bool = False) -> None:
    """Scores, prints a table and saves ``areas.png``; of one small set if ``smoke``, of all sets if ``full``."""
    file = np.load(os.path.join(os.environ.get("PYRO_GENMODELS_DATA", ""), "adbench.npz"))
    names, areas = sorted({key.split("__")[0] for key in file.files}, key=str.lower), []
    print(f"{'':24}", *(f"{name:>20}" for name in DETECTORS))
    for name in (chosen := (names[1::2] + names[0::2] * full)[: 1 if smoke else None]):
        rows = np.sort(np.random.default_rng(0).permutation(len(file[f"{name}__y"]))[: 200 if smoke else 2000])
        x, y = file[f"{name}__X"][rows].astype(float), file[f"{name}__y"][rows] == 1
        x = x[:, x.std(0) > 0]
        areas.append([area_under_roc(y, detector((x - x.mean(0)) / x.std(0))) for detector in DETECTORS.values()])
        print(f"{name:18}{len(x):6}", *(f"{area:20.3f}" for area in areas[-1]), flush=True)
    means = np.mean(areas, 0)
    print(f"{'mean':24}", *(f"{mean:20.3f}" for mean in means), "met" if means[0] >= means.max() else "ours MISSES")
    axis = Figure(figsize=(6.0, 4.0), layout="constrained").subplots()
    axis.plot(areas, range(len(areas)), "o", label=list(DETECTORS))
    axis.set(yticks=range(len(areas)), yticklabels=chosen, xlabel="area under the ROC curve")
    axis.legend(frameon=False, fontsize=7)
    os.makedirs(folder, exist_ok=True)
    axis.figure.savefig(f"{folder}/areas.png", dpi=150)
    print(f"Saved {folder}/areas.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(full="--full" in sys.argv)
