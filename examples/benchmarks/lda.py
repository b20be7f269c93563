"""Topics of the AP corpus: time and held-out perplexity beside tomotopy, scikit-learn and gensim, in one run.

    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/run.py lda

2,246 documents, K = 50, α = 0.1, β = 0.01; every tenth document is held out. Whoever found the topics, the shares of the
held-out documents are fitted to one half of their tokens by the same code (``bags.folded``), and the perplexity is that of
the other half. The posterior has many modes and the bound of mean field many maxima: from topics at random each back-end
needs a search of its own, from those that collapsed EM has found it only has to say how sure they are (``--ends``). EM
takes α + 1 and β + 1, whose maximum stands for the mean (Asuncion et al., 2009), as does SVI with a point for its guide;
collapsed (CVB0) it takes α and β. Seconds are those of a whole fit, our looking at the program and planning included,
without the reading of the data: of the wall, and of the processor, in which two workers count twice. torch has as many
threads as tomotopy has workers. A row with several draws averages p(word | document) over them.
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
from pyro.infer.autoguide import AutoDelta
from rows import Rows
from torch import Tensor

from inference import EM, SVI, Gibbs
from pyro_genmodels import LDA
from pyro_genmodels.bags import documents
from pyro_genmodels.metrics import topics as metrics

K, ALPHA, BETA, WORKERS = 50, 0.1, 0.01, 2
Seconds = tuple[float, float]  # of the wall, and of the processor
Row = tuple[str, str, Seconds, Tensor]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        return time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]


def plus(*spent: Seconds) -> Seconds:
    return sum(each[0] for each in spent), sum(each[1] for each in spent)


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
    rows, seconds, done = [], (0.0, 0.0), 0
    for count in sweeps:
        clock = Clock()
        model.train(count - done, workers=WORKERS, show_progress=False)
        seconds, done = plus(seconds, clock.read()), count
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
    clock = Clock()
    model.fit(matrix)
    return [("scikit-learn", f"{method}, {passes} passes", clock.read(), normal(model.components_))]


def gensim(matrix: scipy.sparse.csr_matrix, passes: int) -> list[Row]:
    from gensim.models import LdaModel

    texts = [list(zip(row.indices.tolist(), row.data.tolist(), strict=True)) for row in matrix]
    names = {i: str(i) for i in range(matrix.shape[1])}
    clock = Clock()
    model = LdaModel(texts, K, id2word=names, alpha=[ALPHA] * K, eta=BETA, passes=passes, eval_every=None, random_state=0)
    return [("gensim", f"online, {passes} passes", clock.read(), normal(model.get_topics()))]


def kind_of(row: Any) -> str:
    return f"{row[0]}, {row[1].partition(',')[0]}"


PARTS: list[Callable[[Any], float]] = [lambda row: row[2][0], lambda row: row[2][1], lambda row: row[3]]


def normal(topics: Any) -> Tensor:
    found = torch.as_tensor(np.asarray(topics), dtype=torch.float64)
    return found / found.sum(-1, keepdim=True)


def fitted(name: str, note: str, backend: Any, model: LDA, x: Tensor) -> Row:
    clock = Clock()
    posterior = backend.fit(model, x)
    seconds = clock.read()
    topics = posterior.draws["topics"].flatten(0, 1).double()
    return name, note, seconds, topics


def em(x: Tensor, words: int, steps: int, seed: int = 0) -> list[Row]:
    model = LDA(K, words, 1.0 + ALPHA, 1.0 + BETA)
    backend = EM(
        maximise=("shares", "topics"), start=model.start(x, seed), steps=steps, seed=0, progress=False,
        standard_errors=False, dtype=torch.float32,
    )  # fmt: skip
    return [fitted("EM", f"maximum, {steps} steps", backend, model, x)]


def collapsed(x: Tensor, words: int, steps: int, seed: int = 0) -> list[Row]:
    model = LDA(K, words, ALPHA, BETA, is_collapsed=True)
    backend = EM(start=model.start(x, seed), steps=steps, seed=0, progress=False, dtype=torch.float32)
    return [fitted("EM", f"collapsed, {steps} steps, start {seed}", backend, model, x)]


def gibbs(x: Tensor, words: int, is_collapsed: bool, warmup: int, draws: int, thin: int) -> list[Row]:
    model = LDA(K, words, ALPHA, BETA, is_collapsed=is_collapsed)
    ends: list[float] = []  # seconds of the processor: what else runs on the machine does not count
    backend = Gibbs(
        chains=1, start=model.start(x, 0), warmup=warmup, draws=draws, thin=thin, seed=0, progress=False, keep=("topics",),
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


def start_from_em(x: Tensor, words: int, steps: int) -> tuple[dict[str, Tensor], Seconds]:
    """What collapsed EM finds, for another back-end to start from, and its seconds."""
    clock = Clock()
    model = LDA(K, words, ALPHA, BETA, is_collapsed=True)
    point = EM(start=model.start(x, 0), steps=steps, seed=0, progress=False, dtype=torch.float32).fit(model, x)
    start = {name: value[0].double() for name, value in point.draws.items()}
    return {name: value / value.sum(-1, keepdim=True) for name, value in start.items()}, clock.read()


def gibbs_from_em(x: Tensor, words: int, is_collapsed: bool, steps: int, draws: int, thin: int) -> list[Row]:
    start, spent = start_from_em(x, words, steps)
    model = LDA(K, words, ALPHA, BETA, is_collapsed=is_collapsed)
    backend = Gibbs(chains=1, start=start, warmup=20, draws=draws, thin=thin, seed=0, progress=False, keep=("topics",))
    name, _, seconds, topics = fitted("Gibbs", "", backend, model, x)
    kind = "partially collapsed" if is_collapsed else "blocked"
    note = f"{kind}, from EM's {steps} steps, {20 + draws * thin} sweeps, {draws} draws"
    return [(name, note, plus(spent, seconds), topics)]


def svi_from_em(x: Tensor, words: int, em_steps: int, steps: int, batch: int) -> list[Row]:
    start, spent = start_from_em(x, words, em_steps)
    backend = SVI(start={name: value.float() for name, value in start.items()}, steps=steps,
                  batch_size=min(batch, len(x) // 2), learning_rate=0.02, draws=20, seed=0, progress=False)  # fmt: skip
    name, _, seconds, topics = fitted("SVI", "", backend, LDA(K, words, ALPHA, BETA), x)
    note = f"mean field, from EM's {em_steps} steps, {steps} batches of {batch}"
    return [(name, note, plus(spent, seconds), topics)]


def svi(x: Tensor, words: int, steps: int, batch: int) -> list[Row]:
    model = LDA(K, words, ALPHA, BETA)
    backend = SVI(steps=steps, batch_size=min(batch, len(x) // 2), learning_rate=0.1, draws=20, seed=0, progress=False)
    return [fitted("SVI", f"mean field, {steps} batches of {batch}", backend, model, x)]


def svi_to_a_point(x: Tensor, words: int, steps: int) -> list[Row]:
    model = LDA(K, words, 1.0 + ALPHA, 1.0 + BETA)
    backend = SVI(
        steps=steps, guide=AutoDelta, start=model.start(x, 0), learning_rate=0.1, draws=1, seed=0, progress=False
    )  # fmt: skip
    return [fitted("SVI", f"point, {steps} steps", backend, model, x)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few documents and steps, to see that all runs")
    parser.add_argument("--few", action="store_true", help="only collapsed EM, beside tomotopy")
    parser.add_argument("--ends", action="store_true", help="only back-ends that start from collapsed EM, beside tomotopy")
    options = parser.parse_args()
    smoke = options.smoke
    torch.set_num_threads(WORKERS)
    warnings.simplefilter("ignore")
    training, held_out = corpus(smoke)
    x, (seen, rest) = documents(training), metrics.halves(documents(held_out))
    words = training.shape[1]
    packages = ("torch", "pyro-ppl", "tomotopy", "scikit-learn", "gensim")
    command = "python examples/benchmarks/lda.py" + " --few" * options.few + " --ends" * options.ends
    print(f"PYRO_GENMODELS_DATA=FOLDER {command}")
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}")
    print(f"2 cores, shared; torch with {torch.get_num_threads()} threads; {int(training.sum())} tokens\n", flush=True)
    for backend in (Gibbs(chains=1, warmup=2, draws=2, seed=0, progress=False), EM(steps=2, seed=0, progress=False)):
        backend.fit(LDA(2), documents(([0, 1], [1, 0], [2, 2])))  # imports

    few = 5 if smoke else 1
    race: list[Callable[[], list[Row]]] = [lambda: tomotopy(training, [100 // few, 400 // few, 1000 // few])]
    for seed in range(3):
        race += [lambda seed=seed: collapsed(x, words, 3, seed), lambda: tomotopy(training, [400 // few])]  # type: ignore[misc]
    from_em: list[Callable[[], list[Row]]] = [
        lambda: gibbs_from_em(x, words, False, 20 // few, 40 // few, 2),
        lambda: gibbs_from_em(x, words, True, 20 // few, 20 // few, 3),
        lambda: svi_from_em(x, words, 10 // few, 60 // few, 200),
    ]
    others: list[Callable[[], list[Row]]] = [
        *(lambda steps=steps: collapsed(x, words, steps // few) for steps in (10, 20, 40)),  # type: ignore[misc]
        *(lambda steps=steps: em(x, words, steps // few) for steps in (40, 100)),  # type: ignore[misc]
        lambda: svi_to_a_point(x, words, 300 // few),
        lambda: gibbs(x, words, False, 200 // few, 20 // few, 5),
        lambda: gibbs(x, words, True, 120 // few, 20 // few, 3),
        lambda: scikit_learn(training, "online", 5 // few),
        lambda: scikit_learn(training, "batch", 15 // few),
        lambda: gensim(training, 5 // few),
        lambda: svi(x, words, 250 // few, 200),
        lambda: tomotopy(training, [400 // few]),
    ]
    runs = race if options.few else race[:1] + from_em if options.ends else race + from_em + others
    rows = []
    for run in runs:
        for name, note, seconds, topics in run():
            perplexity = metrics.completion_perplexity(topics, seen, rest, ALPHA)
            rows.append((name, note, seconds, perplexity))
            print(f"{name:14}{note:58}{seconds[0]:8.2f} s{seconds[1]:8.2f} s{perplexity:10.1f}", flush=True)

    goal = [row for row in rows if row[0] == "tomotopy" and row[1].startswith(f"{400 // few} ")]
    wall, processor, perplexity = (float(np.median([part(row) for row in goal])) for part in PARTS)
    longest = next(row for row in rows if row[1].startswith(f"{1000 // few} "))
    own = [row for row in rows if row[0] in ("EM", "Gibbs", "SVI")]
    print(f"\ntomotopy's 400th sweep, median of {len(goal)}: {wall:.2f} s, {processor:.2f} s, {perplexity:.1f}.")
    ours_now = Rows()
    first = [row for row in own if row[1].startswith("collapsed, 3 steps")]
    if first:
        found, spent, reached = (float(np.median([part(row) for row in first])) for part in PARTS)
        share, verdict = (
            found / wall,
            "met" if found <= wall / 3 and max(row[3] for row in first) <= perplexity else "MISSED",
        )
        print(
            f"Collapsed EM's 3 steps, median of {len(first)} starts: {found:.2f} s, {spent:.2f} s, {reached:.1f} (at most "
            f"{max(row[3] for row in first):.1f}): {share:.2f} of the seconds of the wall; at most 0.33: {verdict}."
        )
        ours_now.add("seconds to the perplexity of the 400th sweep", "LDA, AP, EM collapsed, 3 steps", found, theirs=wall,
                     peer="tomotopy, 400 sweeps", target=3.0)  # fmt: skip
        ours_now.add("perplexity there, the worst start", "LDA, AP, EM collapsed, 3 steps", max(row[3] for row in first),
                     theirs=perplexity, peer="tomotopy, 400 sweeps", target=1.0)  # fmt: skip
    lowest = min(own, key=lambda row: row[3])
    print(f"Our lowest: {lowest[0]} ({lowest[1]}), {lowest[3]:.1f}; tomotopy's after 1,000 sweeps {longest[3]:.1f}.")
    for kind in dict.fromkeys(kind_of(row) for row in own):
        ends = min(row[3] for row in own if kind_of(row) == kind)
        verdict = "met" if ends <= 1.05 * longest[3] else "MISSED"
        print(f"{kind} ends at {ends:.1f}, {100 * (ends / longest[3] - 1):+.1f} % of that; at most +5 %: {verdict}.")
        ours_now.add("held-out perplexity at the end", f"LDA, AP, {kind}", ends, theirs=longest[3],
                     peer="tomotopy, 1,000 sweeps", target=1.0 / 1.05)  # fmt: skip
    ours_now.show()


if __name__ == "__main__":
    main()
