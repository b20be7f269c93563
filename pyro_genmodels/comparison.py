"""One model, one data set, several back-ends, one table; and what the command line knows by name.

Every back-end fits the same rows, starts on its own, and is seeded alike. Labels of all are then matched to one pivot, the
most probable point of the first, so that "the first component" is the same in every column.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference import EM, HMC, NUTS, SVI, Backend, Gibbs, MetropolisHastings, Posterior, arviz, checkpoint, relabel
from inference.contract import Prepared
from pyro_genmodels import plots
from pyro_genmodels.catalogue import MODELS, Entry

__all__ = [
    "METHODS",
    "MODELS",
    "Comparison",
    "Entry",
    "Estimate",
    "Folder",
    "check_writable",
    "compare",
    "is_interrupted",
    "labelled",
    "present",
    "sentence",
    "split",
    "summary",
]


# Settings that suffice for a few thousand rows and a dozen unknowns: R-hat below 1.01 with room, seconds each. A random
# walk needs some 200 steps for an independent draw in 11 dimensions, hence the thinning.
METHODS: dict[str, Backend[Any, Any]] = {
    "svi": SVI(steps=600, learning_rate=0.05, draws=500),
    "em": EM(restarts=10),
    "gibbs": Gibbs(warmup=100, draws=600),
    "mh": MetropolisHastings(chains=16, draws=500, thin=20),
    "hmc": HMC(chains=16, warmup=300, draws=600),
    "nuts": NUTS(warmup=300, draws=400),
}

_SCORED = 1000  # draws that the held-out density averages over
_PRINTED = 24  # elements in the printed table


def split(x: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows held out, at random but the same for the same seed; both in their old order.

    Args:
        x: (rows, features).
        share: Share of the rows to hold out, in [0, 1).
        seed: Any integer from 0 on.

    Raises:
        ValueError: If no row would be left to fit.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"The share of rows to hold out is {share}, but must be at least 0 and less than 1.")
    count = round(share * len(x))
    if len(x) and count >= len(x):
        raise ValueError(f"Holding out {count} of {len(x)} rows leaves none to fit.")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    return x[order[count:].sort().values], x[order[:count].sort().values]


def is_interrupted(posterior: Posterior) -> bool:
    """Whether Ctrl-C cut the run short."""
    return any(finding.startswith("Stopped by Ctrl-C") for finding in posterior.info.get("findings", ()))


class Estimate(NamedTuple):
    """Mean of the draws, its Monte-Carlo standard error, and the posterior's standard deviation; NaN where unknown."""

    mean: float
    error: float
    deviation: float


@dataclass
class Comparison:
    """What several back-ends say of one model and the same rows.

    Attributes:
        entry: The model's entry.
        model: A model that was not fitted, for densities.
        x: The rows that were fitted, (rows, features).
        test: The rows that were held out, (rows, features), maybe none.
        columns: Names of the features.
        y: Labels of the rows that were fitted, (rows,), if the model has any.
        test_y: Those of the rows that were held out.
        posteriors: Method to posterior, labels matched.
        failures: Method to the sentence with which it refused.
        interrupted: The method during which Ctrl-C came.
    """

    entry: Entry
    model: Any
    x: Tensor
    test: Tensor
    columns: tuple[str, ...]
    y: Tensor | None = None
    test_y: Tensor | None = None
    posteriors: dict[str, Posterior] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: str | None = None
    _pivot: dict[str, Tensor] = field(default_factory=dict)
    _summaries: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, method: str, posterior: Posterior) -> None:
        """Takes a posterior in, its labels matched to those of the first, and its dimensions named."""
        if not self._pivot:
            self._pivot = _ordered(posterior.point(), posterior.symmetry)
        self.posteriors[method] = labelled(posterior, self.entry, self.columns, self._pivot)

    @property
    def samplers(self) -> list[str]:
        """The methods whose draws come from Markov chains."""
        return [name for name, posterior in self.posteriors.items() if posterior.info["kind"] == "samples"]

    def estimates(self, method: str, sites: Sequence[str]) -> dict[str, Estimate]:
        """What a method says of every element of some sites."""
        found = {}
        for label, draws in plots.elements(self.posteriors[method], present(sites, self.posteriors[method])).items():
            has_spread = draws.size > 1
            found[label] = Estimate(
                float(draws.mean()),
                float(arviz.mcse(draws)) if has_spread else math.nan,
                float(draws.std(ddof=1)) if has_spread else math.nan,
            )
        return found

    def summary(self, method: str) -> dict[str, float]:
        """Wall time, held-out density, and how well the chains mixed, judged on what renaming labels leaves alone."""
        if method not in self._summaries:
            self._summaries[method] = self._summarised(self.posteriors[method], method in self.samplers)
        return self._summaries[method]

    def _summarised(self, posterior: Posterior, has_chains: bool) -> dict[str, float]:
        seconds = float(posterior.info["sampling_time"])
        worst = least = math.nan
        if has_chains:
            judged = present(self.entry.judged, posterior)
            draws = {site: posterior.draws[site] for site in judged} | {"lp": posterior.stats["lp"]}
            invariant = relabel.invariant(draws, posterior.symmetry)
            worst = _extreme(np.max, [arviz.rhat(values.double().numpy()) for values in invariant.values()])
            least = _extreme(np.min, [arviz.ess(values.double().numpy()) for values in invariant.values()])
        return {
            "wall time, s": seconds,
            "held-out log density per row": self._held_out(posterior),
            "worst R-hat": worst,
            "least ESS": least,
            "least ESS per second": least / seconds,
        }

    def _held_out(self, posterior: Posterior) -> float:
        if not len(self.test) or self.entry.score is None:
            return math.nan
        flat = {site: values.flatten(0, 1) for site, values in posterior.draws.items() if values.is_floating_point()}
        count = len(next(iter(flat.values())))
        chosen = torch.linspace(0, count - 1, min(count, _SCORED)).round().long()
        data = self.entry.arguments(self.model, self.test, self.test_y)
        return float(self.entry.score(self.model, data, {site: values[chosen] for site, values in flat.items()}).mean())

    def table(self) -> str:
        """The table as text: a column for each method."""
        methods = [*self.posteriors]
        summaries = [self.summary(method) for method in methods]
        estimates = [self.estimates(method, self.entry.shown) for method in methods]
        formats = {"wall time, s": ".1f", "least ESS": ",.0f", "least ESS per second": ",.3g"}
        rows = [["", *methods]]
        for name in summaries[0]:
            rows.append([name, *(_number(summary[name], formats.get(name, ".4f")) for summary in summaries)])
        rows.append([""])
        labels = [*estimates[0]]
        for label in labels[:_PRINTED]:
            rows.append([label, *(_with_error(of[label]) for of in estimates)])
            rows.append(["    posterior sd", *(_number(of[label].deviation, ".3g") for of in estimates)])
        text = _aligned(rows)
        if len(labels) > _PRINTED:
            text += f"\n... and {len(labels) - _PRINTED} more."
        return text

    def findings(self) -> list[str]:
        """What is to be said of each method, "none" included."""
        lines = []
        for method, posterior in self.posteriors.items():
            lines += [f"{method}: {finding}" for finding in posterior.diagnose() or ["none"]]
        return lines + [f"{method}: failed. {sentence}" for method, sentence in self.failures.items()]

    def agreement(self) -> list[str]:
        """How far apart the methods are: samplers in standard errors, the others as shares of the data's spread."""
        samplers = self.samplers
        if not samplers or len(self.posteriors) < 2:
            return []
        estimates = {method: self.estimates(method, self.entry.shown) for method in self.posteriors}
        labels = [*estimates[samplers[0]]]
        lines = []
        apart = {
            (label, a, b): abs(estimates[a][label].mean - estimates[b][label].mean)
            / math.hypot(estimates[a][label].error, estimates[b][label].error)
            for a, b in itertools.combinations(samplers, 2)
            for label in labels
        }
        if apart := {key: value for key, value in apart.items() if math.isfinite(value)}:
            (label, a, b), most = max(apart.items(), key=lambda pair: pair[1])
            lines.append(
                f"{_listed(samplers)} differ by at most {most:.1f} Monte-Carlo standard errors of the difference "
                f"({label}, {a} and {b})."
            )
        middle = {label: _pooled([estimates[method][label] for method in samplers]) for label in labels}
        for method in self.posteriors:
            if method in samplers:
                continue
            parts = []
            for units, name in ((True, "{:.2%} of the data's standard deviation"), (False, "{:.4f}")):
                distances = {
                    label: abs(estimates[method][label].mean - middle[label]) / (scale or 1.0)
                    for label, scale in self._scales(labels).items()
                    if (scale is not None) == units
                }
                if distances:
                    label = max(distances, key=distances.__getitem__)
                    parts.append(f"{name.format(distances[label])} ({label})")
            lines.append(f"{method} differs from {_listed(samplers)} by at most {' and '.join(parts)}.")
        return lines

    def _scales(self, labels: Sequence[str]) -> dict[str, float | None]:
        """The standard deviation of the column that an element is about, None if it is about none."""
        deviations, scales = self.x.std(0).tolist(), []
        first = next(iter(self.posteriors.values()))
        for site in present(self.entry.shown, first):
            count = first.draws[site][0, 0].numel()
            is_about_columns = self.entry.dims.get(site, ())[-1:] == ("features",)
            scales += [deviations[i % len(deviations)] if is_about_columns else None for i in range(count)]
        return dict(zip(labels, scales))

    def records(self) -> list[tuple[str, str, float, float, float]]:
        """The table for other tools: method, quantity, value, its standard error, the posterior's standard deviation."""
        rows = []
        for method in self.posteriors:
            rows += [(method, name, value, math.nan, math.nan) for name, value in self.summary(method).items()]
            rows += [(method, name, *estimate) for name, estimate in self.estimates(method, self.entry.judged).items()]
        return rows

    def write_table(self, path: Path) -> None:
        """Writes ``records`` as a .csv; what is not known is an empty cell."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "quantity", "value", "standard_error", "standard_deviation"])
            for method, quantity, *numbers in self.records():
                writer.writerow([method, quantity, *("" if math.isnan(number) else repr(number) for number in numbers)])

    def figures(self) -> Iterator[tuple[str, Any]]:
        """File names and figures: the density, and, where there are chains, traces and effective sizes."""
        if self.entry.pictured:
            yield "density.png", plots.density_contours(self.model, self.x, self.posteriors, self.columns)
        if any(self.posteriors[name].stats["lp"].shape[1] > 3 for name in self.samplers):
            shown, judged = (present(s, self.posteriors[self.samplers[0]]) for s in (self.entry.shown, self.entry.judged))
            yield "traces.png", plots.traces(self.posteriors, shown)
            yield "effective_sizes.png", plots.effective_sizes(self.posteriors, judged)


def compare(
    entry: Entry,
    options: Mapping[str, Any],
    x: Tensor,
    columns: Sequence[str],
    methods: Mapping[str, Backend[Any, Any]],
    *,
    y: Tensor | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    after: Callable[[str, Posterior], None] | None = None,
) -> Comparison:
    """Fits one model with several back-ends.

    Args:
        entry: The model's entry.
        options: Options for ``entry.build``.
        x: The table, (rows, features).
        columns: Names of the features.
        methods: Name to back-end, in the order in which they run.
        y: Labels of its rows, (rows,), if the model has any.
        held_out: Share of the rows that no back-end sees; nothing of models whose rows cannot be scored one by one.
        seed: Seed of the split.
        after: Called with a method's name and posterior as soon as it has been fitted.

    Returns:
        The comparison; after Ctrl-C, of what there is.

    Raises:
        ValueError: If every back-end refuses the model or the data: what the first one says.
    """
    kept, left = split(torch.arange(len(x)), 0.0 if entry.score is None else held_out, seed)
    labels, test_labels = (None, None) if y is None else (y[kept], y[left])
    model = entry.build(**options)
    data = entry.arguments(model, x[kept], labels)
    if isinstance(model, Prepared):
        model.prepare(*data)
    comparison = Comparison(entry, model, x[kept], x[left], tuple(columns), labels, test_labels)
    for name, backend in methods.items():
        try:
            posterior = backend.fit(entry.build(**options), *data)
        except KeyboardInterrupt:
            comparison.interrupted = name
            break
        except (ValueError, RuntimeError, ArithmeticError) as error:
            comparison.failures[name] = sentence(error)
            continue
        comparison.add(name, posterior)
        if after is not None:
            after(name, comparison.posteriors[name])
        if is_interrupted(posterior):
            comparison.interrupted = name
            break
    if comparison.failures and not comparison.posteriors and comparison.interrupted is None:
        raise ValueError(next(iter(comparison.failures.values())))
    return comparison


def labelled(
    posterior: Posterior, entry: Entry, columns: Sequence[str], pivot: Mapping[str, Tensor] | None = None
) -> Posterior:
    """The posterior with its exchangeable labels matched to a pivot, and with names for its dimensions.

    Args:
        posterior: What was inferred.
        entry: The model's entry.
        columns: Names of the features.
        pivot: Site to value; None takes the posterior's own point, components in order of their weight.
    """
    pivot = _ordered(posterior.point(), posterior.symmetry) if pivot is None else pivot
    return dataclasses.replace(
        posterior,
        draws=relabel.match(posterior.draws, posterior.symmetry, pivot),
        dims={**posterior.dims, **{site: names for site, names in entry.dims.items() if site in posterior.draws}},
        coords={**posterior.coords, **_coords(columns)},
    )


def summary(posterior: Posterior, sites: Sequence[str], **options: Any) -> Any:
    """ArviZ's summary of some sites, a pandas table; columns that there is no sense in are left out.

    Args:
        posterior: What was inferred.
        sites: Names of the sites.
        **options: For ``arviz.summary``.
    """
    import arviz as az

    chains, draws = posterior.shape
    kind: Any = "all" if chains > 1 and draws > 3 else "stats"  # what is no chain has no R-hat
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = posterior.to_arviz(log_likelihood=False)
        table: Any = az.summary(data, var_names=list(sites), kind=kind, **options)
    return table[["mean"]] if draws == 1 else table.dropna(axis=1, how="all")


def present(sites: Sequence[str], posterior: Posterior) -> list[str]:
    """Those of the sites that a posterior has draws of."""
    names = {site: site if site in sites else site.rstrip("0123456789").removesuffix("_") for site in posterior.draws}
    return [site for wanted in sites for site, name in names.items() if name == wanted]


def _coords(columns: Sequence[str]) -> dict[str, Any]:
    """Names for the dimensions that are about columns."""
    names = np.array(columns)
    return {"features": names, "words": names, "terms": np.array([*columns, "intercept"])}


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder in which nothing can be written, before work is done whose result would go there.

    Raises:
        OSError: If its nearest existing parent (or itself) takes no file.
    """
    path = Path(folder).resolve()
    existing = next(place for place in (path, *path.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"Cannot write to folder '{folder}': {error.strerror or error}. Choose another one.") from error


class Folder:
    """A folder for the files of one comparison: its own, each of them complete or absent.

    An earlier comparison in it is replaced as soon as there is a first result of the new one; anything else is refused.

    Args:
        path: Where; it need not exist.
        settings: What json can hold, for the record.

    Raises:
        FileExistsError: If it is a file, or holds what no comparison has put there.
        OSError: If it cannot be written.
    """

    _RECORD, _FORMAT = "comparison.json", "pyro-genmodels comparison"

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path, self.settings = Path(path), settings
        self.files: list[str] = []
        self.problems: list[str] = []
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"'{path}' is a file, but a folder is to be written there. Choose another name.")
        self._old = self._recorded()
        held = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if foreign := sorted(held - {self._RECORD, *self._old} if self._old else held):
            raise FileExistsError(
                f"Folder '{path}' exists and holds something else ('{foreign[0]}'). Choose a new folder, or empty this one "
                "first."
            )
        check_writable(path)

    def _recorded(self) -> list[str]:
        """The files of an earlier comparison."""
        try:
            record = json.loads((self.path / self._RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return []
        is_ours = (
            isinstance(record, dict) and record.get("format") == self._FORMAT and checkpoint.are_plain(record.get("files"))
        )
        return [self._RECORD, *record["files"]] if is_ours else []

    def write(self, name: str, writer: Callable[[Path], Any]) -> None:
        """Writes one file whole: ``writer`` is given the place to write to.

        What cannot be written, to a full disk say, may not cost what has yet to be computed: it goes to ``problems``.
        """
        try:
            self._write(name, writer)
        except OSError as error:
            self.problems.append(f"Cannot write '{self.path / name}': {sentence(error)}.")

    def _write(self, name: str, writer: Callable[[Path], Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for old in self._old:
            (self.path / old).unlink(missing_ok=True)
        self._old = []
        self._replace(name, writer)
        self.files.append(name)
        record = {"format": self._FORMAT, "files": self.files, **self.settings}
        self._replace(self._RECORD, lambda path: path.write_text(json.dumps(record, indent=1), encoding="utf-8"))

    def _replace(self, name: str, writer: Callable[[Path], Any]) -> None:
        fresh = self.path / f".{uuid.uuid4().hex[:8]}.{name}"  # the ending tells a writer the format
        try:
            writer(fresh)
            fresh.replace(self.path / name)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)


def sentence(error: Exception) -> str:
    """What an error says, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def _ordered(point: Mapping[str, Tensor], symmetry: Mapping[str, relabel.Axis]) -> dict[str, Tensor]:
    """A pivot whose components come by size of their first number, the largest first: of a mixture, its weight."""
    axes = {site: axis for site, axis in symmetry.items() if isinstance(axis, int) and site in point}
    pivot: dict[str, Tensor] = {}
    orders: dict[int, Tensor] = {}
    for site, axis in sorted(axes.items(), key=lambda item: point[item[0]].numel()):
        values = point[site].movedim(axis, 0)
        order = orders.setdefault(len(values), values.reshape(len(values), -1)[:, 0].argsort(descending=True))
        pivot[site] = values[order].movedim(0, axis)
    return pivot


def _extreme(of: Callable[..., Any], arrays: Sequence[np.ndarray]) -> float:
    values = np.concatenate([array.ravel() for array in arrays])
    values = values[np.isfinite(values)]
    return float(of(values)) if values.size else math.nan


def _pooled(estimates: Sequence[Estimate]) -> float:
    """Mean of several, weighted by their precision."""
    weights = [1.0 / estimate.error**2 for estimate in estimates if estimate.error > 0]
    if len(weights) < len(estimates):
        return sum(estimate.mean for estimate in estimates) / len(estimates)
    return sum(weight * estimate.mean for weight, estimate in zip(weights, estimates)) / sum(weights)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _with_error(estimate: Estimate) -> str:
    """Mean ± Monte-Carlo standard error, to the second digit of the error."""
    if not estimate.error > 0:
        return f"{estimate.mean:.5g}"
    digits = max(0, 1 - math.floor(math.log10(estimate.error)))
    return f"{estimate.mean:.{digits}f} ± {estimate.error:.{digits}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
