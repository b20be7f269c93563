"""ArviZ, both majors of it: the export, and the diagnostics that are ArviZ's and never copied here.

Everything here takes numpy arrays of shape (chain, draw, ...) and knows nothing of programs. The export builds one
``xarray.Dataset`` per group: ArviZ 0.x (Python 3.11) wraps them in an ``InferenceData``, ArviZ 1.x in a ``DataTree``.
ArviZ and xarray are imported where they are used, since they cost as much as torch.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inference.arrays import label, spaced

__all__ = [
    "LeaveOneOut",
    "convergence",
    "efficiency",
    "ess",
    "export",
    "importance",
    "loo",
    "mcse",
    "pareto_k",
    "pareto_k_of_largest",
    "rhat",
    "smoothed",
    "tail_length",
    "worst",
    "write",
]

Arrays = Mapping[str, np.ndarray]

_WITHOUT_DRAWS = ("observed_data", "constant_data")
_FEWEST_DRAWS = 4  # below, split chains have no variance
_FEWEST_WEIGHTS = 25  # below, the tail of a fifth of them has fewer than five
_RHAT, _ESS_PER_CHAIN, LARGEST_K = 1.01, 100, 0.7  # Vehtari et al. (2021, 2024)
_ELEMENTS = 200  # judged per site: R-hat and ESS of one element take ArviZ two milliseconds


class LeaveOneOut(NamedTuple):
    """Leave-one-out cross-validation: elpd, its standard error, effective parameters, and k-hat of each observation."""

    elpd: float
    se: float
    p: float
    pareto_k: np.ndarray


def export(
    groups: Mapping[str, Arrays],
    coords: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Builds what ArviZ reads.

    Args:
        groups: ArviZ's name of a group to name to array: (chain, draw, *shape), or (*shape) in observed_data and
            constant_data. Empty groups are left out.
        coords: Name of a dimension to its labels; 0, 1, 2 ... where there is none of the right length.
        dims: Name of a variable to names of its dimensions without chain and draw; ``name_dim_0`` ... where there is
            none. A log-likelihood, which has no event dimensions, takes the first ones.
        attrs: Attributes of every group; None values are left out, mappings and lists become json.

    Returns:
        ``arviz.InferenceData`` for ArviZ 0.x, ``xarray.DataTree`` for 1.x.

    Raises:
        ValueError: If ``dims`` does not suit an array.
    """
    stamp = {"created_at": datetime.datetime.now(datetime.UTC).isoformat()}
    safe = stamp | {name: _attribute(value) for name, value in (attrs or {}).items() if value is not None}
    datasets = {group: _dataset(group, arrays, coords or {}, dims or {}, safe) for group, arrays in groups.items() if arrays}
    az = _import()
    if _is_tree(az):
        import xarray as xr

        tree = xr.DataTree.from_dict(datasets)
        tree.attrs = dict(safe)
        return tree
    return az.InferenceData(attrs=safe, warn_on_custom_groups=False, **datasets)


def write(data: Any, path: Path) -> None:
    """Writes an export as netCDF, by the one back-end that both majors share."""
    data.to_netcdf(str(path), engine="h5netcdf")


def ess(values: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective sample size of each element, (*shape), by ``arviz.ess``; NaN for fewer than 4 draws a chain."""
    return _reduce("ess", values, method=method)


def efficiency(draws: Arrays) -> float:
    """Effective sample size of draws (chain, draw, ...) by their number, averaged over all elements; 1 for one chain."""
    sizes = np.concatenate([ess(values.astype(np.float64), "mean").ravel() for values in draws.values()])
    chains, count = next(iter(draws.values())).shape[:2]
    return float(np.nanmean(sizes) / (chains * count)) if chains > 1 and np.isfinite(sizes).any() else 1.0


def mcse(values: np.ndarray, method: str = "mean") -> np.ndarray:
    """Monte-Carlo standard error of each element, (*shape), by ``arviz.mcse``; NaN for fewer than 4 draws a chain."""
    return _reduce("mcse", values, method=method)


def rhat(values: np.ndarray) -> np.ndarray:
    """R-hat of each element, (*shape), by ``arviz.rhat`` (ranks, split); one chain is judged by its two halves."""
    if len(values) == 1:
        half = values.shape[1] // 2
        values = values[0, : 2 * half].reshape(2, half, *values.shape[2:])
    return _reduce("rhat", values)


def tail_length(count: int) -> int:
    """How many of ``count`` importance weights, the largest, the shape of their tail is fitted to."""
    return math.ceil(min(count / 5, 3 * count**0.5))


def pareto_k_of_largest(top: np.ndarray, count: int) -> float:
    """k-hat of ``count`` importance weights, of which the largest are known: those below its tail do not move it.

    Args:
        top: The largest log weights, (at least ``tail_length(count)`` + 1,), or all of them if they are fewer.
        count: How many weights there are that are not zero.
    """
    known = top[np.isfinite(top)]
    below = np.full(max(0, count - known.size), known.min() if known.size else 0.0)
    return pareto_k(np.concatenate([below, known]))


def pareto_k(log_weights: np.ndarray) -> float:
    """Shape k-hat of the tail of importance weights, by ArviZ's Pareto smoothing.

    Args:
        log_weights: log p - log q at draws of q, any shape; minus infinity is a weight of zero.

    Returns:
        k-hat; minus infinity where the largest weights are equal, so that there is no tail; infinity where a few
        weights are all that count; NaN for fewer than 25 weights that are not zero.
    """
    finite = np.sort(log_weights[np.isfinite(log_weights)].astype(np.float64))
    if finite.size < _FEWEST_WEIGHTS:
        return float("nan")
    tail = finite[-tail_length(finite.size) :]
    # Rounding has a Pareto tail as well, and ArviZ 1.x refuses ties.
    if np.ptp(tail) < 1e-3:
        return float("-inf")
    az = _import()
    with _quiet():
        if _is_tree(az):
            # Its psislw takes minus the log weights, and its pareto_khat forgets that weights are logarithms.
            array_stats = importlib.import_module("arviz_stats.base").array_stats
            shape = float(array_stats.pareto_khat(np.exp(finite - finite[-1])[None], r_eff=1.0, tail="right"))
        else:
            shape = float(az.psislw(finite)[1])
    return float("inf") if np.isnan(shape) else shape


def smoothed(log_weights: np.ndarray, efficiency: float = 1.0) -> np.ndarray:
    """Pareto-smoothed importance weights, by ArviZ's psislw.

    Args:
        log_weights: log p - log q at draws of q, (draw,); minus infinity is a weight of zero.
        efficiency: Effective sample size of the draws by their number.

    Returns:
        Their logarithms on the scale of the raw ones, (draw,): the largest are replaced by the expected order statistics
        of the tail that was fitted. The raw ones where there is nothing to fit (see ``pareto_k``).
    """
    shape, result = pareto_k(log_weights), log_weights.astype(np.float64)
    if not np.isfinite(shape):
        return result
    finite = np.isfinite(result)
    raw, az = result[finite], _import()
    with _quiet():
        if _is_tree(az):
            array_stats = importlib.import_module("arviz_stats.base").array_stats
            normalised = np.asarray(array_stats.psislw(-raw, r_eff=efficiency)[0])  # it takes minus the log weights
        else:
            normalised = np.asarray(az.psislw(raw.copy(), reff=efficiency)[0])
    least = int(raw.argmin())  # in the body, which smoothing leaves alone
    result[finite] = normalised + (raw[least] - normalised[least])
    return result


def loo(log_likelihood: np.ndarray, draws: Arrays) -> LeaveOneOut:
    """Expected log pointwise predictive density by Pareto-smoothed leave-one-out, by ``arviz.loo``.

    Args:
        log_likelihood: Pointwise log-likelihood, (chain, draw, *observations).
        draws: Posterior draws (chain, draw, ...), from which ArviZ takes the relative efficiency.
    """
    az = _import()
    with _quiet():
        found = az.loo(export({"posterior": draws, "log_likelihood": {"y": log_likelihood}}), pointwise=True)
    elpd, p = (found.elpd, found.p) if _is_tree(az) else (found.elpd_loo, found.p_loo)
    return LeaveOneOut(float(elpd), float(found.se), float(p), np.asarray(found.pareto_k))


def convergence(quantities: Arrays) -> list[str]:
    """Findings about Markov chains, in words: draws that are not finite, R-hat above 1.01, ESS below 100 per chain.

    Of a quantity with more than 200 elements, 200 evenly spaced ones are judged.

    Args:
        quantities: Name to (chain, draw, *shape). Elements that are constant over all chains are left out.

    References:
        A. Vehtari et al., Rank-normalization, folding, and localization: an improved R-hat (2021).
    """
    findings = []
    disagreement: dict[str, float] = {}
    sizes: dict[str, float] = {}
    chains, draws = next(iter(quantities.values())).shape[:2] if quantities else (0, 0)
    if quantities and draws < _FEWEST_DRAWS:
        return [f"{draws} draws a chain are too few to judge convergence. Raise draws."]
    for name, values in quantities.items():
        if bad := int((~np.isfinite(values)).sum()):
            findings.append(
                f"{bad} of the {values.size} drawn values of '{name}' are NaN or infinite. Look for an overflow in the "
                "program, or for a start outside the support."
            )
            continue
        judged, looked = _judged(values)
        labels = [f"'{label(name, index, values.shape[2:])}'" for index in looked]
        disagreement |= dict(zip(labels, rhat(judged).tolist(), strict=True))
        sizes |= dict(zip(labels, ess(judged).tolist(), strict=True))
    apart = {label: value for label, value in disagreement.items() if value > _RHAT}
    if apart:
        worst = max(apart, key=apart.__getitem__)
        findings.append(
            f"R-hat of {worst} is {apart[worst]:.4g}{_others(apart, 'above 1.01')}: the chains do not agree yet. Raise "
            "warmup and draws; if that does not help, the posterior may have several modes."
        )
    few = {label: value for label, value in sizes.items() if value < _ESS_PER_CHAIN * chains}
    if few:
        worst = min(few, key=few.__getitem__)
        wanted = int(np.ceil(1.1 * draws * _ESS_PER_CHAIN * chains / few[worst]))
        findings.append(
            f"The effective sample size of {worst} is {few[worst]:.0f} in {chains} chains of {draws} draws"
            f"{_others(few, 'below 100 per chain')}: less than 100 per chain. Take about {wanted} draws a chain, or "
            "another back-end."
        )
    return findings


def worst(quantities: Arrays) -> tuple[float, float]:
    """The largest R-hat and the smallest effective sample size of what ``convergence`` judges; NaN if that is nothing."""
    found = [judged for judged, _ in (_judged(values) for values in quantities.values()) if judged.shape[2]]
    if not found:
        return float("nan"), float("nan")
    return (
        float(np.max(np.concatenate([rhat(judged) for judged in found]))),
        float(np.min(np.concatenate([ess(judged) for judged in found]))),
    )


def _judged(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elements of a quantity that are not constant, 200 at most: (chain, draw, element), and their indices."""
    flat = values.reshape(*values.shape[:2], -1)
    looked = spaced(flat.shape[2], _ELEMENTS)
    judged = flat[..., looked].astype(np.float64)
    moving = np.ptp(judged, axis=(0, 1)) > 0
    return judged[..., moving], looked[moving]


def importance(log_weights: np.ndarray) -> list[str]:
    """Findings about an approximation q by its importance weights, in words: k-hat above 0.7.

    Args:
        log_weights: log p(z, x) - log q(z) at draws of q, any shape.

    References:
        A. Vehtari et al., Pareto smoothed importance sampling (2024).
        Y. Yao et al., Yes, but did it work? Evaluating variational inference (2018).
    """
    if bad := int((np.isnan(log_weights) | np.isposinf(log_weights)).sum()):
        return [f"{bad} of {log_weights.size} importance weights are NaN or infinite: the guide has no usable density."]
    shape = pareto_k(log_weights)
    if not shape > LARGEST_K:
        return []
    return [
        f"k-hat of the guide is {shape:.2f}, above 0.7: its draws miss a part of the posterior. Take more steps, a "
        "richer guide (guide=AutoMultivariateNormal), or a sampler."
    ]


def _dataset(
    group: str,
    arrays: Arrays,
    coords: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    attrs: Mapping[str, Any],
) -> Any:
    import xarray as xr

    lead = () if group in _WITHOUT_DRAWS else ("chain", "draw")
    sizes: dict[str, int] = {}
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for site, array in arrays.items():
        array = np.asarray(array)
        shape = array.shape[len(lead) :]
        named = dims.get(site, [f"{site}_dim_{i}" for i in range(len(shape))])
        if len(named) < len(shape) or (len(named) > len(shape) and group != "log_likelihood"):
            raise ValueError(
                f"dims names {len(named)} dimensions of '{site}' ({', '.join(named)}), but it has {len(shape)}."
            )
        name = _name(site, {*lead, *variables})
        labels: list[str] = []
        for i, size in enumerate(shape):
            # A plate's name stands for one size in a group; it may not be a variable's name too.
            dim = _name(named[i], {*lead, *arrays, *labels})
            known = sizes.get(dim, len(coords[dim]) if dim in coords else size)
            labels.append(dim if known == size else _name(f"{site}_dim_{i}", {*lead, *arrays, *labels}))
            sizes[labels[-1]] = size
        variables[name] = ((*lead, *labels), array)
    dataset = xr.Dataset(variables)
    index = {
        dim: np.asarray(coords[dim]) if dim in coords and len(coords[dim]) == size else np.arange(size)
        for dim, size in ((str(dim), size) for dim, size in dataset.sizes.items())
    }
    dataset = dataset.assign_coords(index)
    dataset.attrs = dict(attrs) | ({"sample_dims": list(lead)} if lead else {})
    return dataset


def _name(name: str, taken: set[str]) -> str:
    """A name that netCDF can hold, where a slash is a folder, and that nothing else has."""
    name = name.replace("/", ".")
    while name in taken:
        name += "_"
    return name


def _attribute(value: Any) -> str | int | float:
    """A value that netCDF can hold as an attribute: it knows no None, no booleans, no mappings, no long integers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    return value if isinstance(value, str | float) else json.dumps(value, default=str)


def _reduce(statistic: str, values: np.ndarray, **options: Any) -> np.ndarray:
    """``arviz.statistic`` of each element; an xarray Dataset is what both majors take in the same way."""
    import xarray as xr

    if values.shape[1] < _FEWEST_DRAWS or not values.size:
        return np.full(values.shape[2:], np.nan)
    data = xr.Dataset({"x": (("chain", "draw", "element"), values.reshape(*values.shape[:2], -1))})
    az = _import()
    with _quiet(), _without_numba(az):
        return np.asarray(getattr(az, statistic)(data, **options)["x"]).reshape(values.shape[2:])


def _others(found: Mapping[str, float], what: str) -> str:
    return f" ({len(found) - 1} more {what})" if len(found) > 1 else ""


def _import() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces 1.x on import
        import arviz

    return arviz


def _is_tree(az: Any) -> bool:
    return int(az.__version__.split(".")[0]) >= 1


@contextmanager
def _without_numba(az: Any) -> Iterator[None]:
    """ArviZ 0.x takes Numba where it is installed, and its standard error of a deviation then fails under NumPy 2.4."""
    switch = getattr(az, "Numba", None)
    if switch is None:
        yield
        return
    before, switch.numba_flag = switch.numba_flag, False
    try:
        yield
    finally:
        switch.numba_flag = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without numpy's warnings about a constant element: its R-hat is infinite or NaN, and that is said otherwise."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
