"""Topics of the AP corpus: time and held-out perplexity beside tomotopy, scikit-learn and gensim, in one run.

    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/lda.py | tee examples/benchmarks/results/lda.txt

2,246 documents, K = 50, α = 0.1, β = 0.01; every tenth document is held out. Whoever found the topics, the shares of the
held-out documents are fitted to one half of their tokens by the same code (``bags.folded``), and the perplexity is that of
the other half. EM takes α + 1 and β + 1, whose maximum stands for the mean (Asuncion et al., 2009). Seconds are those of a
whole fit, our looking at the program and planning included, without the reading of the data. A row with several draws
averages p(word | document) over them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from inference import EM, SVI, Gibbs
from pyro_genmodels import LDA
from pyro_genmodels.bags import documents
from pyro_genmodels.metrics import topics as metrics

K, ALPHA, BETA, WORKERS = 50, 0.1, 0.01, 2
Row = tuple[str, str, float, Tensor]


def corpus(smoke: bool) -> tuple[scipy.sparse.csr_matrix, scipy.sparse.csr_matrix]:
    """Documents to fit and held out."""
    folder = os.environ.get("PYRO_GENMODELS_DATA")
    if folder is None:
        raise SystemExit("Set PYRO_GENMODELS_DATA to the folder that holds bow_ap.npz.")
    found = np.load(Path(folder) / "bow_ap.npz")
    parts = tuple(found[name].astype(np.int64) for name in ("data", "indices", "indptr"))
    matrix = scipy.sparse.csr_matrix(parts, tuple(found["shape"]))
    matrix = matrix[:100] if smoke else matrix
    is_held_out = np.arange(matrix.shape[0]) % 10 == 9
    return matrix[~is_held_out], matrix[is_held_out]


def tomotopy(matrix: scipy.sparse.csr_matrix, sweeps: list[int]) -> list[Row]:
    import tomotopy as tp

    model = tp.LDAModel(k=K, alpha=ALPHA, eta=BETA, seed=1)
    for row in matrix:
        model.add_doc(np.repeat(row.indices, row.data).astype(str).tolist())
    model.optim_interval = 0  # α and β stay what they are
    rows, seconds, done = [], 0.0, 0
    for count in sweeps:
        begin = time.perf_counter()
        model.train(count - done, workers=WORKERS, show_progress=False)
        seconds, done = seconds + time.perf_counter() - begin, count
        topics = np.zeros((K, matrix.shape[1]))
        topics[:, np.array(model.used_vocabs, dtype=int)] = [model.get_topic_word_dist(k) for k in range(K)]
        topics += BETA / (matrix.sum() / K + BETA * matrix.shape[1])  # words that are not in training
        rows.append(("tomotopy", f"{count} sweeps, {WORKERS} workers", seconds, normal(topics)))
    return rows


def scikit_learn(matrix: scipy.sparse.csr_matrix, method: str, passes: int) -> list[Row]:
    from sklearn.decomposition import LatentDirichletAllocation

    model = LatentDirichletAllocation(
        K, doc_topic_prior=ALPHA, topic_word_prior=BETA, learning_method=method, max_iter=passes, n_jobs=1, random_state=0
    )
    begin = time.perf_counter()
    model.fit(matrix)
    return [("scikit-learn", f"{method}, {passes} passes", time.perf_counter() - begin, normal(model.components_))]


def gensim(matrix: scipy.sparse.csr_matrix, passes: int) -> list[Row]:
    from gensim.models import LdaModel

    texts = [list(zip(row.indices.tolist(), row.data.tolist(), strict=True)) for row in matrix]
    names = {i: str(i) for i in range(matrix.shape[1])}
    begin = time.perf_counter()
    model = LdaModel(texts, K, id2word=names, alpha=[ALPHA] * K, eta=BETA, passes=passes, eval_every=None, random_state=0)
    return [("gensim", f"online, {passes} passes", time.perf_counter() - begin, normal(model.get_topics()))]


def normal(topics: Any) -> Tensor:
    found = torch.as_tensor(np.asarray(topics), dtype=torch.float64)
    return found / found.sum(-1, keepdim=True)


def fitted(name: str, note: str, backend: Any, model: LDA, x: Tensor) -> Row:
    begin = time.perf_counter()
    posterior = backend.fit(model, x)
    seconds = time.perf_counter() - begin
    topics = posterior.draws["topics"].flatten(0, 1).double()
    return name, note, seconds, topics


def em(x: Tensor, words: int, steps: int) -> list[Row]:
    model = LDA(K, words, 1.0 + ALPHA, 1.0 + BETA)
    backend = EM(
        maximise=("shares", "topics"), start=model.start(x), steps=steps, seed=0, progress=False, standard_errors=False,
        dtype=torch.float32,
    )  # fmt: skip
    return [fitted("EM", f"{steps} steps", backend, model, x)]


def gibbs(x: Tensor, words: int, is_collapsed: bool, warmup: int, draws: int, thin: int) -> list[Row]:
    model = LDA(K, words, ALPHA, BETA, is_collapsed=is_collapsed)
    ends: list[float] = []  # seconds of the processor: what else runs on the machine does not count
    backend = Gibbs(
        chains=1, start=model.start(x), warmup=warmup, draws=draws, thin=thin, seed=0, progress=False, keep=("topics",),
        callbacks=(lambda step, info: ends.append(time.process_time()),),
    )  # fmt: skip
    kind = "partially collapsed" if is_collapsed else "blocked"
    row = fitted("Gibbs", f"{kind}, {warmup + draws * thin} sweeps, {draws} draws", backend, model, x)
    pace = float(np.median(np.diff(ends[:warmup])[-min(warmup - 1, 50) :]))
    print(
        f"  {kind}: {pace:.3f} s of the processor a sweep, {int(x[..., 1].sum()) / pace / 1e6:.2f} million tokens a second",
        flush=True,
    )
    return [row, (row[0], f"{kind}, its last draw alone", row[2], row[3][-1:])]


def gibbs_from_em(x: Tensor, words: int, steps: int, draws: int, thin: int) -> list[Row]:
    begin = time.perf_counter()
    model = LDA(K, words, 1.0 + ALPHA, 1.0 + BETA)
    point = EM(
        maximise=("shares", "topics"), start=model.start(x), steps=steps, seed=0, progress=False, standard_errors=False,
        dtype=torch.float32,
    ).fit(model, x)  # fmt: skip
    spent = time.perf_counter() - begin
    start = {name: value[0].double() for name, value in point.draws.items()}
    start = {name: value / value.sum(-1, keepdim=True) for name, value in start.items()}
    backend = Gibbs(chains=1, start=start, warmup=20, draws=draws, thin=thin, seed=0, progress=False, keep=("topics",))
    model = LDA(K, words, ALPHA, BETA)
    name, _, seconds, topics = fitted("Gibbs", "", backend, model, x)
    return [(name, f"from EM's {steps} steps, {20 + draws * thin} sweeps, {draws} draws", spent + seconds, topics)]


def svi(x: Tensor, words: int, steps: int, batch: int) -> list[Row]:
    model = LDA(K, words, ALPHA, BETA)
    backend = SVI(steps=steps, batch_size=min(batch, len(x) // 2), learning_rate=0.1, draws=20, seed=0, progress=False)
    return [fitted("SVI", f"{steps} batches of {batch}", backend, model, x)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few documents and steps, to see that all runs")
    parser.add_argument("--few", action="store_true", help="only Gibbs from EM's point, beside tomotopy")
    options = parser.parse_args()
    smoke = options.smoke
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    training, held_out = corpus(smoke)
    x, (seen, rest) = documents(training), metrics.halves(documents(held_out))
    words = training.shape[1]
    packages = ("torch", "pyro-ppl", "tomotopy", "scikit-learn", "gensim")
    command = "python examples/benchmarks/lda.py" + " --few" * options.few
    print(f"PYRO_GENMODELS_DATA=FOLDER {command}")
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}")
    print(f"2 cores, shared; torch with {torch.get_num_threads()} thread; {int(training.sum())} tokens\n", flush=True)
    Gibbs(chains=1, warmup=2, draws=2, seed=0, progress=False).fit(LDA(2), documents(([0, 1], [1, 0], [2, 2])))  # imports

    few = 5 if smoke else 1
    runs: list[Callable[[], list[Row]]] = [
        lambda: tomotopy(training, [100 // few, 400 // few, 1000 // few]),
        *(lambda steps=steps: em(x, words, steps // few) for steps in (20, 30, 40, 60, 100)),  # type: ignore[misc]
        lambda: tomotopy(training, [400 // few]),
        lambda: scikit_learn(training, "online", 5 // few),
        lambda: scikit_learn(training, "batch", 15 // few),
        lambda: gensim(training, 5 // few),
        lambda: svi(x, words, 250 // few, 200),
        lambda: gibbs(x, words, False, 200 // few, 20 // few, 5),
        lambda: gibbs(x, words, True, 120 // few, 20 // few, 3),
        lambda: tomotopy(training, [400 // few]),
    ]
    from_em = lambda: gibbs_from_em(x, words, 60 // few, 30 // few, 3)  # noqa: E731
    runs = [runs[0], from_em, runs[-1]] if options.few else [*runs[:-1], from_em, runs[-1]]
    rows = []
    for run in runs:
        for name, note, seconds, topics in run():
            perplexity = metrics.completion_perplexity(topics, seen, rest, ALPHA)
            rows.append((name, note, seconds, perplexity))
            print(f"{name:14}{note:48}{seconds:9.2f} s{perplexity:10.1f}", flush=True)

    goal = [row for row in rows if row[0] == "tomotopy" and row[1].startswith(f"{400 // few} ")]
    seconds, perplexity = np.median([row[2] for row in goal]), np.median([row[3] for row in goal])
    longest = next(row for row in rows if row[1].startswith(f"{1000 // few} "))
    own = [row for row in rows if row[0] in ("EM", "Gibbs", "SVI")]
    reached = [row for row in own if row[3] <= perplexity]
    print(f"\ntomotopy's 400th sweep, median of {len(goal)}: {seconds:.2f} s, {perplexity:.1f}.")
    if reached:
        best = min(reached, key=lambda row: row[2])
        verdict = "met" if best[2] <= seconds / 3 else "MISSED"
        print(
            f"Reached by {best[0]} ({best[1]}) in {best[2]:.2f} s, {best[2] / seconds:.2f} of it; at most 0.33: {verdict}."
        )
    else:
        print("None of ours reaches that: MISSED.")
    lowest = min(own, key=lambda row: row[3])
    print(f"Our lowest: {lowest[0]} ({lowest[1]}), {lowest[3]:.1f}; tomotopy's after 1,000 sweeps {longest[3]:.1f}.")
    for name in ("EM", "Gibbs", "SVI"):
        ends = min((row[3] for row in own if row[0] == name), default=np.nan)
        if np.isnan(ends):
            continue
        verdict = "met" if ends <= 1.05 * longest[3] else "MISSED"
        print(f"{name} ends at {ends:.1f}, {100 * (ends / longest[3] - 1):+.1f} % of that; at most +5 %: {verdict}.")


if __name__ == "__main__":
    main()
