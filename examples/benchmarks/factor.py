"""EM on factor models beside scikit-learn's, and half of a table filled in, with the thirty measurements of 569 tumours.

    python examples/benchmarks/factor.py

Complete table: scikit-learn's PCA is the closed form, its FactorAnalysis maximises exactly over the loadings in every step;
ours averages over the factors, with the prior left out, accelerated (SQUAREM) and from two starts: where the noise of a
column goes to zero (a Heywood case) EM creeps, and another start may end at another such column. Half of the table: the mean
squared error of the deleted entries, in standard units, and how many of them intervals of 90 % hold. Seconds are those of
one fit, compilation included.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from rows import Rows
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as Peer
from sklearn.impute import KNNImputer
from torch import Tensor

from inference import EM
from pyro_genmodels import GMM, PPCA, FactorAnalysis

ROWS = Rows()
_ERROR = 0.23  # of a full covariance, GMM(1), which factors are to come near


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def complete(x: Tensor, factors: int) -> None:
    print(f"\n{'complete, ' + str(factors) + ' factors':28}{'log-likelihood':>16}{'seconds':>10}{'steps':>8}")
    for ours, theirs in ((PPCA(factors), PCA(factors)), (FactorAnalysis(factors), Peer(factors, svd_method="lapack"))):
        name = type(ours).__name__
        _, seconds = timed(lambda peer=theirs: peer.fit(x.numpy()))
        best = float(theirs.score(x.numpy())) * len(x)
        if name == "PPCA":  # scikit-learn divides by rows − 1, which is not the maximum
            values = torch.linalg.svdvals(x - x.mean(0)).square() / len(x)
            left = values[factors:].mean()
            log_det = values[:factors].log().sum() + (len(values) - factors) * left.log()
            best = float(-0.5 * len(x) * (len(values) * (1.0 + math.log(2.0 * math.pi)) + log_det))
        print(f"{'scikit-learn ' + type(theirs).__name__:28}{best:16.3f}{seconds:10.2f}")
        backend = EM(objective="mle", acceleration="squarem", restarts=2, steps=120, standard_errors=False, seed=0,
                     progress=False)  # fmt: skip
        posterior, seconds = timed(lambda model=ours, backend=backend: backend.fit(model, x))
        climb = posterior.history["log_joint"]
        verdict = "" if float(climb[-1]) >= best - 1e-6 * abs(best) else "   MISS: below the peer by more than 1e-6"
        ROWS.add("log-likelihood", f"{name}({factors}), breast cancer, complete", float(climb[-1]), theirs=best,
                 peer="scikit-learn", is_less_better=False, is_difference=True, target=-1e-6 * abs(best))  # fmt: skip
        print(f"{name + ', EM':28}{float(climb[-1]):16.3f}{seconds:10.2f}{len(climb):8}{verdict}", flush=True)


def half(x: Tensor, numbers: list[int]) -> None:
    is_gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    gaps = torch.where(is_gone, torch.nan, x)
    print(f"\n{'half of the table':28}{'squared error':>16}{'seconds':>10}{'inside':>8}")
    filled, seconds = timed(lambda: torch.from_numpy(KNNImputer().fit_transform(gaps.numpy())))
    peer = float((filled - x)[is_gone].square().mean())
    print(f"{'scikit-learn KNNImputer':28}{float((filled - x)[is_gone].square().mean()):16.3f}{seconds:10.2f}")
    models = {"GMM(1)": GMM(1), "PPCA(5)": PPCA(5)} | {f"FactorAnalysis({q})": FactorAnalysis(q) for q in numbers}
    for name, model in models.items():
        backend = EM(standard_errors=False, seed=0, progress=False)
        posterior, seconds = timed(lambda model=model, backend=backend: backend.fit(model, gaps))
        error = float((model.impute(gaps, posterior) - x)[is_gone].square().mean())
        torch.manual_seed(0)
        drawn = model.imputations(gaps, posterior, 200)
        inside = float(((x >= drawn.quantile(0.05, 0)) & (x <= drawn.quantile(0.95, 0)))[is_gone].double().mean())
        verdict = "" if error <= _ERROR else f"   MISS: above {_ERROR}"
        ROWS.add("squared error of what was missing", f"{name}, breast cancer, half missing", error, theirs=peer,
                 peer="scikit-learn KNNImputer", target=peer / _ERROR)  # fmt: skip
        print(f"{name + ', EM':28}{error:16.3f}{seconds:10.1f}{inside:8.3f}{verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="+", default=[5, 8], help="of the incomplete table")
    numbers = parser.parse_args().factors
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl", "scikit-learn"))
    print("python examples/benchmarks/factor.py")
    print(f"{datetime.date.today()}, 2 cores, shared; one thread, float64")
    print(f"Python {platform.python_version()}, {versions}")
    x = torch.from_numpy(load_breast_cancer().data).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    complete(x, 5)
    half(x, numbers)
    ROWS.show()
    print("\nWhere a miss is: the measurements of a tumour correlate in more ways than so few factors hold.")


if __name__ == "__main__":
    main()
