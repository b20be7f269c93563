"""Topics of the AP news corpus by EM and by Gibbs sampling, with a table of their words and a picture.

    PYRO_GENMODELS_DATA=FOLDER python examples/topics.py

EM finds one blend of topics fast; Gibbs goes on from there to draws of the posterior, whose average predicts better. Every
tenth document is held out: half of its words are shown, and the perplexity is that of the others.
"""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
import torch

from inference import EM, Gibbs
from pyro_genmodels import LDA
from pyro_genmodels.bags import documents
from pyro_genmodels.metrics import topics as metrics


def corpus(smoke: bool) -> tuple[torch.Tensor, list[str]]:
    """Documents and their vocabulary; a try takes documents that the model draws."""
    if smoke:
        return LDA(3, 30, topic_concentration=0.1).model(None, size=40), [f"word{i}" for i in range(30)]
    if "PYRO_GENMODELS_DATA" not in os.environ:
        raise SystemExit("Set PYRO_GENMODELS_DATA to the folder that holds bow_ap.npz.")
    found = np.load(Path(os.environ["PYRO_GENMODELS_DATA"]) / "bow_ap.npz")
    parts = tuple(found[name].astype(int) for name in ("data", "indices", "indptr"))
    return documents(scipy.sparse.csr_matrix(parts, tuple(found["shape"]))), found["vocab"].tolist()


def main(smoke: bool = False, folder: str = "runs/topics") -> None:
    """Fits, prints a table and saves ``topics.png``.

    Args:
        smoke: Whether to take a few steps on made-up documents only, to see that all runs.
        folder: Where the picture goes.
    """
    x, words = corpus(smoke)
    is_held_out = torch.arange(len(x)) % 10 == 9
    training, (seen, rest) = x[~is_held_out], metrics.halves(x[is_held_out])
    components = 3 if smoke else 20

    maximised = LDA(components, len(words), share_concentration=1.1, topic_concentration=1.01)  # means for 0.1 and 0.01
    em = EM(maximise=("shares", "topics"), start=maximised.start(training), steps=10 if smoke else 60, seed=0)
    point = em.fit(maximised, training)

    model = LDA(components, len(words), share_concentration=0.1, topic_concentration=0.01)
    start = {name: value[0] for name, value in point.draws.items()}
    sampled = Gibbs(chains=1, warmup=10, draws=10, thin=1 if smoke else 3, start=start, seed=0).fit(model, training)

    print(f"{'':8}seconds  perplexity  coherence  diversity")
    for name, posterior in {"EM": point, "Gibbs": sampled}.items():
        draws = posterior.draws["topics"].flatten(0, 1)
        perplexity = metrics.completion_perplexity(draws, seen, rest, 0.1)
        coherence, diversity = metrics.coherence(draws[-1], training).mean(), metrics.diversity(draws[-1])
        print(f"{name:8}{posterior.info['sampling_time']:7.1f}{perplexity:12.0f}{coherence:11.3f}{diversity:11.3f}")
    table = model.topics(sampled, 8, words)
    print("\n" + "\n".join(" ".join(row) for row in table))

    shares = sampled.draws["shares"].mean((0, 1, 2)).sort(descending=True).values
    figure, axes = plt.subplots(figsize=(8, 0.3 * components + 1.5), layout="constrained")
    axes.barh([", ".join(row[:5]) for row in table], shares.numpy())
    axes.invert_yaxis()
    axes.set_xlabel("share of the corpus")
    Path(folder).mkdir(parents=True, exist_ok=True)
    picture = Path(folder) / "topics.png"
    figure.savefig(picture)
    plt.close(figure)
    print(f"\nSaved {picture}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
