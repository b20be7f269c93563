"""Posterior: what is known after a fit; one frozen result for every back-end."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference import arviz, checkpoint, relabel
from inference.arrays import as_numpy, is_whole
from inference.contract import Unsupported
from inference.diagnosis import diagnose
from inference.plan import Plan, Update

if TYPE_CHECKING:
    from inference.program import Program

__all__ = ["End", "Posterior"]

_TENSORS = ("draws", "stats", "history", "weights", "observed", "constants", "warmup_draws", "warmup_stats")
_ATTRIBUTES = ("created_at", "sampling_time", "seed", "model", "backend", "config", "versions")
_INFO: dict[str, Any] = {  # what is used of it, and its kinds
    "backend": str,
    "config": dict,
    "findings": list,
    "kind": str,
    "model": str,
    "sampling_time": (int, float),
    "seed": (int, type(None)),
    "structure": str,
    "versions": dict,
}
_POINTWISE_BYTES = 2**30
_VIEWS = {"denoising": {"is_run": False}, "adversarial": {"is_simulated": True}}  # what such fits see of a program


class End(NamedTuple):
    """What a run needs to go on: what json can hold of it, and its state as ``inference.codec`` writes it."""

    facts: dict[str, Any]
    tree: Any
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Posterior:
    """What is known after a fit.

    Variational fits have one chain, point estimates one chain of one draw, so that one set of tools reads them all.

    Where the structure of a program changes from run to run, every site that was ever there has draws of its largest shape:
    NaN where the site was absent, or beyond its size in that draw. Integers of such sites are floating.

    Attributes:
        draws: Site to draws on the constrained scale, (chain, draw, *site), on the CPU.
        stats: ArviZ's names ("lp", "acceptance_rate", "diverging" ...; "log_q" of a guide) to (chain, draw).
        history: Name to what the steps reported: "loss" or "log_joint" (step,), of samplers (step, chain).
        plan: Which site was updated how; None if the back-end has no plan.
        weights: Trained or fixed weights of the model, and what a module with weights saves beside them.
        info: What json can hold: "backend", "config", "model", "source" (text of the program), "kind"
            ("samples", "variational" or "point"), "seed", "sampling_time" in seconds, "created_at", "versions", "processes",
            "warmup", "draws", "thin", the "structure" of the program ("fixed" or "changing"), and the run's "findings".
        dims: Site to names of the dimensions of its value, those of plates among them.
        coords: Name of a dimension to its labels.
        observed: Observed site to the data.
        constants: Parameter of the program to those tensor arguments that are not observed.
        symmetry: Site to the axis of its value that runs over exchangeable labels, or to two of them; None where its values
            are labels.
        warmup_draws: As ``draws``, before the first one that counts; empty if not kept.
        warmup_stats: As ``stats``, of the warm-up.
        program: The program that was fitted; None after ``load`` without a model.
    """

    draws: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)
    history: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    coords: dict[str, np.ndarray] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    symmetry: dict[str, relabel.Axis] = field(default_factory=dict)
    warmup_draws: dict[str, Tensor] = field(default_factory=dict)
    warmup_stats: dict[str, Tensor] = field(default_factory=dict)
    program: Program | None = None
    # Not an argument, so that dataclasses.replace starts an empty one.
    _pointwise: dict[str, Tensor] = field(default_factory=dict, init=False)
    _ends: list[End] = field(default_factory=list, init=False)  # that of the run, one at most

    def __repr__(self) -> str:
        chains, draws = self.shape
        sites = ", ".join(f"{site} {tuple(values.shape[2:])}" for site, values in self.draws.items())
        who = f"{self.info.get('backend', 'draws')} on {self.info.get('model', 'a program')}"
        return f"Posterior({who}, {chains} x {draws} draws: {sites})"

    @property
    def matched(self) -> dict[str, Tensor]:
        """The draws with exchangeable labels matched to one pivot, the draw of highest density."""
        return relabel.match(self.draws, self.symmetry, lp=self.stats.get("lp"))

    def point(self) -> dict[str, Tensor]:
        """One value for each site, in the site's own shape.

        Returns:
            Site to the mean over chains and draws of continuous values, the median of floating values that are whole
            numbers (Bernoulli, Poisson), and the mode of integers. Exchangeable labels are matched before. Of what is not
            there in every draw, the mean or median over the draws that have it.
        """
        center = _center if self.info.get("structure") != "changing" else _center_of_present
        return {site: center(values.flatten(0, 1)) for site, values in self.matched.items()}

    def predict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior predictive draws.

        New arguments are new rows: what belongs to the fitted rows, such as a site in a plate over them or the states of a
        series, is drawn anew, and everything else keeps its posterior draws. See ``inference.predictive`` for how these are
        told apart.

        Args:
            *args: New arguments of the program; none at all means those that were fitted.
            **kwargs: New keyword arguments.

        Returns:
            Observed site to draws (chain, draw, *observation).

        Raises:
            RuntimeError: If the posterior was loaded without its model.
        """
        program = self._require_program("predict")
        seed = int(self.info.get("seed") or 0)
        if args or kwargs:
            return program.predict(self.draws, args, kwargs, seed=seed)
        return program.predict(self.draws, seed=seed)

    def log_likelihood(self) -> dict[str, Tensor]:
        """Pointwise log-likelihood of the data that were fitted, computed once.

        Finite sites local to an observation's plate are summed out, other sites are at their draws; where the structure of
        the program changes, all are.

        Returns:
            Observed site to (chain, draw, *observation), without event dimensions.

        Raises:
            RuntimeError: If the posterior was loaded without its model, and saved without the log-likelihood.
        """
        if not self._pointwise:
            self._pointwise.update(self._require_program("compute a log-likelihood").log_likelihood(self.draws))
        return dict(self._pointwise)

    def to_arviz(
        self,
        *,
        log_likelihood: bool = True,
        prior: int = 0,
        posterior_predictive: bool = False,
        warmup: bool = False,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Exports to ArviZ.

        Args:
            log_likelihood: Whether to include it, which LOO needs; left out where neither the program nor an earlier
                result is at hand, and, with a warning, where the program has no pointwise terms.
            prior: Number of draws for the groups prior and prior_predictive; 0 leaves them out.
            posterior_predictive: Whether to include draws of the observed sites.
            warmup: Whether to include the draws of the warm-up, if they were kept.
            coords: Name of a dimension to labels, instead of 0, 1, 2 ...
            dims: Site to names of its dimensions, instead of those of plates.

        Returns:
            ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

        Raises:
            ValueError: If ``coords`` or ``dims`` do not suit the draws.
            RuntimeError: If predictive draws are asked of a posterior that was loaded without its model.
        """
        groups: dict[str, Mapping[str, Tensor]] = {"posterior": self.draws, "sample_stats": self.stats}
        if log_likelihood and (self._pointwise or self.program is not None):
            try:
                groups["log_likelihood"] = self.log_likelihood()
            except Unsupported as refusal:
                warnings.warn(f"Exported without the pointwise log-likelihood: {refusal}", stacklevel=2)
        if posterior_predictive:
            groups["posterior_predictive"] = self.predict()
        if prior:
            program = self._require_program("draw from the prior")
            groups["prior"], groups["prior_predictive"] = program.prior(prior, int(self.info.get("seed") or 0))
        groups |= {"observed_data": self.observed, "constant_data": self.constants}
        if warmup:
            groups |= {"warmup_posterior": self.warmup_draws, "warmup_sample_stats": self.warmup_stats}
        named = {**self.dims, **(dims or {})}
        named |= {f"standard_error_{site}": names for site, names in named.items()}  # of EM, among the stats
        self._check_labels(coords or {}, dims or {}, named)
        info = self.info
        attrs = {
            "inference_library": "pyro-genmodels",
            "inference_library_version": info.get("versions", {}).get("pyro-genmodels"),
            "tuning_steps": info.get("warmup"),
            **{key: info.get(key) for key in _ATTRIBUTES},
        }
        arrays = {group: {name: as_numpy(value) for name, value in values.items()} for group, values in groups.items()}
        return arviz.export(arrays, {**self.coords, **(coords or {})}, named, attrs)

    def diagnose(self) -> list[str]:
        """Findings in words, each with what to do; an empty list if there is nothing to say.

        Samplers: R-hat above 1.01 and ESS below 100 per chain (of quantities that do not depend on the names of
        exchangeable labels), chains that never moved, divergences, refused proposals, certificates of exact updates. Of a
        site that is not there in every draw, or not in one size, the number of elements that are there is judged.
        Variational fits: k-hat above 0.7. All: what the run itself noticed.
        """
        return diagnose(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves into a folder: tensors as safetensors, the rest as json, and a copy for other tools, ``posterior.nc``.

        The folder is complete or is not there; an earlier save is replaced. The program is not saved. ``resume`` of the
        back-end goes on from where the run ended.

        Args:
            folder: Where to; it may not hold anything but an earlier save.

        Raises:
            FileExistsError: If the folder holds something else.
            OSError: If it cannot be written.
        """
        checkpoint.check(folder)
        self._try_log_likelihood()
        groups = {name: getattr(self, name) for name in _TENSORS} | {"log_likelihood": self._pointwise}
        groups["end"] = self._ends[0].tensors if self._ends else {}
        meta = {
            "info": self.info,
            "plan": None if self.plan is None else [update._asdict() for update in self.plan.updates],
            "dims": self.dims,
            "coords": {name: _labels_to_json(np.asarray(labels)) for name, labels in self.coords.items()},
            "symmetry": self.symmetry,
            "end": [self._ends[0].facts, self._ends[0].tree] if self._ends else None,
        }
        exported = self.to_arviz(log_likelihood=bool(self._pointwise), warmup=True)
        checkpoint.write(
            folder,
            {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()},
            meta,
            {"posterior.nc": partial(arviz.write, exported)},
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], /, model: Any = None, *args: Any, **kwargs: Any) -> Posterior:
        """Loads what ``save`` wrote.

        Args:
            folder: Where it was saved.
            model: The model that was fitted, for ``predict``; its weights are set to the saved ones. None does without.
            *args: The data that were fitted. Everything after ``model`` goes to the program.
            **kwargs: The program's keyword arguments.

        Raises:
            FileNotFoundError: If nothing was saved there.
            ValueError: If the files are damaged, or the model or its data are not those that were fitted.
        """
        tensors, meta = checkpoint.read(folder)
        with checkpoint.understood(folder, "posterior"):
            groups: dict[str, dict[str, Tensor]] = {name: {} for name in (*_TENSORS, "log_likelihood", "end")}
            for label, tensor in tensors.items():
                group, _, name = label.partition("/")
                groups[group][name] = tensor
            saved = {name: groups[name] for name in _TENSORS}
            _check_saved(groups, meta)
            fields: dict[str, Any] = {
                **saved,
                "plan": meta["plan"] and Plan(tuple(_update(row) for row in meta["plan"])),
                "info": meta["info"],
                "dims": {site: tuple(names) for site, names in meta["dims"].items()},
                "coords": {name: np.array(values, dtype=dtype) for name, (dtype, values) in meta["coords"].items()},
                "symmetry": {site: tuple(a) if isinstance(a, list) else a for site, a in meta["symmetry"].items()},
            }
            facts, tree = meta.get("end") or (None, None)
            ends = [] if facts is None else [End(facts, tree, groups["end"])]
        posterior = cls(**fields, program=None if model is None else _rebuild(model, args, kwargs, saved, meta["info"]))
        posterior._pointwise.update(groups["log_likelihood"])
        posterior._ends.extend(ends)
        return posterior

    @property
    def shape(self) -> tuple[int, int]:
        """Number of chains and of draws."""
        for values in (*self.draws.values(), *self.stats.values()):
            return values.shape[0], values.shape[1]
        return 0, 0

    def _require_program(self, what: str) -> Program:
        if self.program is None:
            raise RuntimeError(
                f"This Posterior has no program, so it cannot {what}. Give load the model and the data that "
                "were fitted: Posterior.load(folder, model, *data)."
            )
        return self.program

    def _check_labels(
        self, coords: Mapping[str, Sequence[Any]], dims: Mapping[str, Sequence[str]], named: Mapping[str, Sequence[str]]
    ) -> None:
        """Refuses names that would fit nothing: the export itself falls back to numbers without a word."""
        shapes = {site: values.shape[2:] for site, values in self.draws.items()}
        shapes |= {site: values.shape for site, values in (self.observed | self.constants).items()}
        if unknown := sorted(dims.keys() - shapes.keys()):
            raise ValueError(f"dims names '{unknown[0]}', but there is no such site. There are {', '.join(shapes)}.")
        for site, shape in shapes.items():
            for dim, size in zip(named.get(site, ()), shape):
                if dim in coords and len(coords[dim]) != size:
                    raise ValueError(f"coords has {len(coords[dim])} labels for '{dim}', but '{site}' has {size} there.")

    def _try_log_likelihood(self) -> None:
        """Computes the log-likelihood for a save, if it is not too large. Whatever stops it may not lose the draws."""
        chains, draws = self.shape
        size = 8 * chains * draws * sum(data.numel() for data in self.observed.values())
        has_none = not self.observed or self.info.get("kind") in _VIEWS
        if self.program is None or has_none or self._pointwise or size > _POINTWISE_BYTES:
            return
        try:
            self.log_likelihood()
        except Exception as error:
            warnings.warn(f"Saved without the pointwise log-likelihood, which failed: {error}", stacklevel=3)


def _check_saved(groups: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    """Refuses a file, whole but made by others, that would fail where it is used."""
    of_draws = [*groups["draws"].items(), *groups["stats"].items(), *groups["log_likelihood"].items()]
    for name, values in of_draws:
        if values.dim() < 2 or values.shape[:2] != of_draws[0][1].shape[:2]:
            raise ValueError(f"'{name}' has the shape {tuple(values.shape)}, but others have chains and draws before it")
    for key, kinds in _INFO.items():
        if key in meta["info"] and not isinstance(meta["info"][key], kinds):
            raise TypeError(f"'{key}' is {meta['info'][key]!r}")
    for site, names in meta["dims"].items():
        _require(isinstance(names, list) and all(isinstance(name, str) for name in names), f"the dimensions of '{site}'")
    for site, axis in meta["symmetry"].items():
        axes = axis if isinstance(axis, list) else [] if axis is None else [axis]
        _require(site in groups["draws"] and all(type(a) is int for a in axes), f"the symmetry of '{site}'")
        size = groups["draws"][site].dim() - 2
        _require(all(-size <= a < size for a in axes) and len(axes) <= 2, f"the symmetry of '{site}'")


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise TypeError(f"{what} cannot be so")


def _update(row: Mapping[str, Any]) -> Update:
    update = Update(**{**row, "sites": tuple(row["sites"])})
    texts = (*update.sites, update.update, update.note, update.claim)
    _require(all(isinstance(text, str) for text in texts), f"the update {list(row.values())}")
    numbers = (update.acceptance, 0.0 if update.certificate is None else update.certificate)
    _require(all(type(number) in (int, float) for number in numbers), f"the update {list(row.values())}")
    return update


def _rebuild(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    saved: dict[str, dict[str, Tensor]],
    info: dict[str, Any],
) -> Program:
    """The program of a loaded posterior, with the saved weights, in the precision of the run."""
    from inference.program import Program

    floating = [t.dtype for name in ("draws", "observed") for t in saved[name].values() if t.is_floating_point()]
    is_fixed = info.get("structure") != "changing"
    dtype = floating[0] if floating else None
    view: dict[str, Any] = _VIEWS.get(info.get("kind", ""), {"takes_surrogates": True})
    program = Program(model, args, kwargs, dtype=dtype, is_fixed=is_fixed, **view)
    if program.observed.keys() != saved["observed"].keys():
        raise ValueError(f"The model observes {sorted(program.observed)}, but the saved one {sorted(saved['observed'])}.")
    for site, data in saved["observed"].items():
        given = program.observed[site].cpu().to(data.dtype)
        if given.shape != data.shape or not torch.equal(given.nan_to_num(), data.nan_to_num()):
            raise ValueError(
                f"The data of '{site}' are not those that were fitted. Give load the same data; predict takes others."
            )
    if missing := sorted(program.weights.keys() - saved["weights"].keys()):
        raise ValueError(f"The model has a weight '{missing[0]}' that was not saved. Give load the model that was fitted.")
    program.set_weights(saved["weights"])
    return program


def _center(values: Tensor) -> Tensor:
    """Centre of draws (draw, *site); see ``Posterior.point``."""
    if not values.is_floating_point():
        return values.long().mode(0).values.to(values.dtype)
    return values.median(0).values if is_whole(values) else values.mean(0)


def _center_of_present(values: Tensor) -> Tensor:
    """As ``_center``, of those draws of each element that are not NaN."""
    if not values.is_floating_point() or not values.isnan().any():
        return _center(values)
    return values.nanmedian(0).values if is_whole(values[~values.isnan()]) else values.nanmean(0)


def _labels_to_json(labels: np.ndarray) -> tuple[str, list[Any]]:
    """Type and values of a coordinate; times, which json lacks, as text."""
    return labels.dtype.str, (labels.astype(str) if labels.dtype.kind in "mM" else labels).tolist()
