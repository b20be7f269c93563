"""Twenty labels a class, and thousands of texts without one: naive Bayes on 20 Newsgroups, by the date of the messages.

    PYRO_GENMODELS_DATA=FOLDER python examples/semi_supervised_text.py [--full]

EM sums the missing labels out, so that words which go along with known ones count, too. A word counts once a message: that
words repeat is what naive Bayes has most wrong. An unlabelled message may weigh less than a labelled one. Seen are the 1,000
words that are in most messages, or 3,000 (``--full``, minutes); ``benchmarks/semi_supervised_text.py`` takes all of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import EM
from pyro_genmodels import NaiveBayes

FILE = "bow_20news_full.npz"
WORDS, MORE_WORDS, WEIGHTS = 1000, 3000, (1.0, 0.2)


def texts(folder: str, part: str, words: np.ndarray | int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Which words are in each message, the classes, and those words: given, or how many of those in most messages."""
    with np.load(Path(folder) / FILE) as file:
        index, starts = file[f"{part}_indices"].astype(int), file[f"{part}_indptr"].astype(int)
        vocabulary, y = int(file[f"{part}_shape"][1]), torch.tensor(file[f"{part}_y"].astype(int))
    if isinstance(words, int):
        words = np.argsort(-np.bincount(index, minlength=vocabulary), kind="stable")[:words]
    x = torch.zeros(len(y), vocabulary)
    x[np.repeat(np.arange(len(y)), np.diff(starts)), index] = 1.0
    return x[:, words].double(), y, words


def main(smoke: bool = False, folder: str = "runs/semi_supervised_text", full: bool = False) -> None:
    """Fits, prints a table and saves ``accuracy.png`` in a folder; takes a tenth of the messages only if ``smoke``."""
    source = os.environ.get("PYRO_GENMODELS_DATA", "")
    x, y, words = texts(source, "train", MORE_WORDS if full else WORDS)
    new, truth, _ = texts(source, "test", words)
    if smoke:
        x, y, new, truth = x[::10], y[::10], new[::10], truth[::10]
    names = ["labels only", *(f"EM, weight {weight}" for weight in WEIGHTS)]
    print(f"{len(x)} messages, {len(words)} words; accuracy on {len(new)} later ones\n")
    print("labels a class", *(f"{name:>15}" for name in names))
    fit = {"steps": 8, "tolerance": 1e-3, "standard_errors": False, "seed": 0, "progress": False}
    table: dict[int, list[float]] = {}
    for labels in (20,) if smoke else (5, 20):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        known = torch.cat([order[y[order] == k][:labels] for k in range(20)])
        seen = torch.full_like(y, -1)
        seen[known] = y[known]
        model = NaiveBayes(20, "multinomial", concentration=1.1)
        first = EM(**fit).fit(model, x[known], y[known])
        table[labels] = [model.score(new, truth, first)]
        for weight in WEIGHTS:
            model = NaiveBayes(20, "multinomial", concentration=1.1, unlabelled_weight=weight)
            posterior = EM(start=first.point(), **fit).fit(model, x, seen)
            table[labels].append(model.score(new, truth, posterior))
        print(f"{labels:14}", *(f"{score:15.3f}" for score in table[labels]), flush=True)
    figure = Figure(figsize=(5.0, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.semilogx(list(table), list(table.values()), marker="o", label=names)
    axis.set(xlabel="labels a class", ylabel="accuracy on later messages")
    axis.legend(frameon=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "accuracy.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'accuracy.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main(full="--full" in sys.argv)
