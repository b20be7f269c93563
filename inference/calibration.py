"""Calibration: whether a sampler draws what its program says, found out without knowing any posterior.

    sbc        simulation-based calibration: data from the prior, and where the truth ranks among the draws
    geweke     getting it right: draws of (latents, data) made in two ways that must agree
    psis       Pareto-smoothed importance weights: how far an approximation is from its target, or leave-one-out

For all three the program is any program with proper priors and observed sites. ``sbc`` and ``geweke`` draw the observed
sites anew and give every replicate its data (``Program.replicate``), so that all replicates are chains of one run, and a
thousand of them cost little more than one. In ``sbc`` each replicate adapts alone, as a user's run would.

References:
    J. Geweke, Getting it right: joint distribution tests of posterior simulators (2004).
    S. Talts et al., Validating Bayesian inference algorithms with simulation-based calibration (2018).
    T. Säilynoja, P. Bürkner and A. Vehtari, Graphical test for discrete uniformity and its applications in goodness-of-fit
        evaluation and multiple sample comparison (2022).
    M. Modrák et al., Simulation-based calibration checking for Bayesian computation: the choice of test quantities shapes
        sensitivity (2025).
    A. Vehtari et al., Pareto smoothed importance sampling (2024).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from tqdm import tqdm

from inference import arviz
from inference.arrays import as_numpy
from inference.contract import Backend, Movable, Programmed, Unsupported
from inference.handlers import isolated, quiet, reproducible
from inference.posterior import Posterior
from inference.program import Program
from inference.simulation import simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PSIS", "SBC", "Geweke", "geweke", "psis", "sbc"]

Quantity = Callable[[dict[str, Tensor]], Tensor]
Model = Callable[..., Any] | Programmed

_ELEMENTS = 100  # looked at per site
_POINTS = 100  # at which an empirical distribution function is held against its band
_REMAINING = 0.05  # autocorrelation that thinning leaves
_FEWEST_RANKED = 20  # draws, below which a rank says little
_SMALLEST = 1e-13  # pointwise probability below which 1 − P(inside) has lost its digits


# ----------------------------------------------------------------------------------- what is drawn and looked at
def _check_generative(program: Program) -> None:
    """Raises unless the program's density is that of what it draws."""
    if not program.observed_sites:
        raise Unsupported(f"{program.name} has no observed site: there are no data to draw anew.")
    flat = [name for name, site in program.latents.items() if site.is_flat]
    if flat:
        raise Unsupported(
            f"'{flat[0]}' has an improper prior, from which nothing can be drawn. Calibrate with a proper one in its place."
        )
    if program.factors:
        raise Unsupported(
            f"{program.name} has pyro.factor('{program.factors[0]}'), which changes its density, but not what it "
            "draws. Write it as an observed site with a distribution."
        )
    with isolated(0, program.device), reproducible(program.dtype, program.device):
        trace = program.trace({})
    for name in (*program.latents, *program.observed_sites):
        node = trace.nodes[name]
        if torch.as_tensor(node["scale"] != 1.0).any():
            raise Unsupported(f"The density of '{name}' is scaled (poutine.scale), which changes it, but not what is drawn.")
        mask = node["mask"]
        if name in program.latents and mask is not None and not torch.as_tensor(mask).all():
            raise Unsupported(f"The prior of '{name}' is masked in part, which makes it flat there: nothing can be drawn.")


class _Quantities:
    """Scalars of (latents, data) by which draws are compared.

    Elements of the latents, log p(latents, data) and log p(data | latents), which see what no latent shows alone, and the
    user's own.
    """

    def __init__(self, program: Program, sites: Collection[str] | None, own: Mapping[str, Quantity] | None) -> None:
        self.program, self.own = program, dict(own or {})
        unknown = [name for name in sites or () if name not in program.latents]
        if unknown:
            raise ValueError(f"sites= names '{unknown[0]}', but the latent sites are {', '.join(program.latents)}.")
        taken = [name for name in self.own if name in (*program.latents, "log_joint", "log_likelihood")]
        if taken:
            raise ValueError(f"quantities= gives '{taken[0]}' a meaning that it has already. Choose another name.")
        chosen = [n for n, site in program.latents.items() if not site.is_constant and (sites is None or n in sites)]
        self.elements = {name: _spaced(program.latents[name].shape.numel()) for name in chosen}
        self.labels = [
            _label(name, int(i), program.latents[name].shape) for name, index in self.elements.items() for i in index
        ]
        self.labels += ["log_joint", "log_likelihood"]
        self._is_complete = False

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of all latent and observed sites, (row, *site) -> (row, quantity)."""
        joint, likelihood = self.program.density.stage("log densities", self._log_densities, (True,))(dict(values))
        parts = [values[name].reshape(len(joint), -1)[:, index] for name, index in self.elements.items() if len(index)]
        parts += [joint.unsqueeze(1), likelihood.unsqueeze(1)]
        for name, function in self.own.items():
            value = torch.as_tensor(function(dict(values)))
            if value.dim() not in (1, 2) or len(value) != len(joint):
                raise ValueError(
                    f"Quantity '{name}' returned the shape {tuple(value.shape)}, but must return one number, or a vector, "
                    f"for each of the {len(joint)} rows that it was given."
                )
            parts.append(value.reshape(len(joint), -1))
            if not self._is_complete:
                count = parts[-1].shape[1]
                self.labels += [name] if value.dim() == 1 else [f"{name}[{i}]" for i in range(count)]
        self._is_complete = True
        return torch.cat([part.to(torch.float64) for part in parts], 1).cpu()

    def _log_densities(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        trace = self.program.trace(values)
        terms = {
            name: trace.nodes[name]["log_prob_sum"].to(self.program.dtype)
            for name in (*self.program.latents, *self.program.observed_sites)
        }
        return torch.stack([*terms.values()]).sum(), torch.stack([terms[n] for n in self.program.observed_sites]).sum()


def _spaced(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, _ELEMENTS)).round().astype(int))


def _label(name: str, index: int, shape: tuple[int, ...]) -> str:
    if not shape:
        return name
    return f"{name}[{', '.join(str(i) for i in np.unravel_index(index, shape))}]"


class _Bench:
    """A back-end, a program and the contexts of a run, in which both tests work."""

    def __init__(self, backend: Backend[Any, Any], model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not isinstance(backend, Backend):
            raise TypeError(f"A back-end is an object such as Gibbs() or HMC(), but this is {backend!r}.")
        self.sampler: Any = backend
        self.name = type(backend).__name__
        if backend.kind != "samples" or not isinstance(backend, Movable):
            raise Unsupported(
                f"{self.name} is no sampler, and its draws are not meant to be calibrated. Use psis(posterior)."
            )
        self.seed = int.from_bytes(os.urandom(4), "little") if backend.seed is None else int(backend.seed)
        self.stack, self.started = ExitStack(), time.perf_counter()
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
        self.stack.enter_context(isolated(self.seed, device))
        try:
            self.program = Program(
                model,
                args,
                kwargs,
                dtype=backend.dtype,
                device=backend.device,
                evaluations=backend.schedule.evaluations,
                is_fixed=backend.changing is None,
            )
            if self.program.is_changing:
                raise Unsupported(
                    f"The structure of {self.program.name} changes from run to run, but a calibration compares the same "
                    "sites in every run. Sample them always, and choose with torch.where."
                )
            _check_generative(self.program)
            self.stack.enter_context(reproducible(self.program.dtype, self.program.device))
            self.stack.enter_context(quiet())
            torch.manual_seed(self.seed)
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def joint(self, count: int) -> dict[str, Tensor]:
        """Draws of all latent and observed sites, (count, *site)."""
        return simulate(self.program, {}, count)

    def data(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name] for name in self.program.observed_sites}

    def bar(self, total: int, what: str) -> tqdm[Any]:
        return tqdm(total=total, desc=f"{self.name} {what}", disable=not self.sampler.progress, leave=False)


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}.")


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level!r}: must lie between 0 and 1.")


# ----------------------------------------------------------------------------------- uniformity
@functools.lru_cache(maxsize=16)
def _tails(count: int, points: int) -> np.ndarray:
    """2 min(P(N ≤ n), P(N ≥ n)) for N ~ Binomial(count, i / points), (points − 1, count + 1)."""
    z = np.arange(1, points)[:, None] / points
    n = np.arange(count + 1)
    return 2.0 * np.minimum(scipy.stats.binom.cdf(n, count, z), scipy.stats.binom.sf(n - 1, count, z))


def uniformity(values: np.ndarray, points: int) -> float:
    """γ of values that should be uniform on (0, 1): the least tail probability of their distribution function.

    γ = 2 min_i min(P(N_i ≤ n_i), P(N_i ≥ n_i)),  n_i values lie below i / points,  N_i ~ Binomial(n, i / points).
    """
    counts = np.searchsorted(np.sort(values), np.arange(1, points) / points, side="right")
    return float(_tails(len(values), points)[np.arange(points - 1), counts].min())


@functools.lru_cache(maxsize=4096)
def p_value(gamma: float, count: int, points: int) -> float:
    """P(γ(U) ≤ ``gamma``) for ``count`` uniform values: exact, by the Markov chain of the counts from point to point."""
    if gamma < _SMALLEST:
        return 0.0
    tails, factorial = _tails(count, points), scipy.special.gammaln(np.arange(count + 1) + 1.0)
    states, mass = np.zeros(1, dtype=int), np.ones(1)
    for i in range(points - 1):
        inside = np.flatnonzero(tails[i] > gamma)
        if not inside.size:
            return 1.0
        share = 1.0 / (points - i)
        new, left = inside[:, None] - states, count - states
        is_possible = (new >= 0) & (new <= left)
        new = np.where(is_possible, new, 0)
        log_mass = factorial[left] - factorial[new] - factorial[np.where(is_possible, left - new, 0)]
        log_mass = log_mass + new * math.log(share) + (left - new) * math.log1p(-share)
        mass = np.exp(np.where(is_possible, log_mass, -np.inf)) @ mass
        states = inside
    return float(min(1.0, max(0.0, 1.0 - mass.sum())))


@functools.lru_cache(maxsize=64)
def critical(level: float, count: int, points: int) -> float:
    """The largest γ that uniform values fall short of, or reach, with a probability of at most 1 − ``level``."""
    low, high = math.log(_SMALLEST), 0.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if p_value(math.exp(middle), count, points) <= 1.0 - level else (low, middle)
    return math.exp(low)


def _verdict(p_values: np.ndarray, level: float) -> np.ndarray:
    """Whether each of several tests is passed, when all of them together err with a probability of 1 − ``level``."""
    return p_values * len(p_values) > 1.0 - level


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])


# ----------------------------------------------------------------------------------- simulation-based calibration
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SBC:
    """What simulation-based calibration found. It prints as a sentence and a table, the worst quantities first.

    Attributes:
        model: Name of the program.
        backend: Name of the back-end.
        quantities: Labels of the scalars that were ranked.
        ranks: Of the truth among the draws, (replicate, quantity), 0 to ``draws``; ties are broken at random.
        pit: (rank + uniform) / (draws + 1), (replicate, quantity): uniform on (0, 1) if the draws are right.
        draws: Near-independent draws of each replicate, over its chains.
        thin: Every which of the back-end's draws was ranked.
        gamma: Of each quantity, the least pointwise tail probability of the distribution function of ``pit``.
        p_value: P(gamma or less) if the draws are right, exact, of each quantity.
        level: Probability that right draws pass, all quantities together (Bonferroni).
        findings: What else was noticed.
        info: "seed", "replicates", "chains", "sampling_time".
    """

    model: str
    backend: str
    quantities: tuple[str, ...]
    ranks: np.ndarray
    pit: np.ndarray
    draws: int
    thin: int
    gamma: np.ndarray
    p_value: np.ndarray
    level: float
    findings: tuple[str, ...]
    info: dict[str, Any]

    @property
    def points(self) -> int:
        return min(_POINTS, self.draws + 1, len(self.pit))

    @property
    def is_inside(self) -> np.ndarray:
        """Whether the distribution function of each quantity stays inside the simultaneous band, (quantity,)."""
        return _verdict(self.p_value, self.level)

    @property
    def passed(self) -> bool:
        """Whether all of them do."""
        return bool(self.is_inside.all())

    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points z, and the least and the largest share of ``pit`` below each with which a quantity passes."""
        count, points = len(self.pit), self.points
        gamma = critical(1.0 - (1.0 - self.level) / len(self.quantities), count, points)
        inside = _tails(count, points) > gamma
        low, high = inside.argmax(1), count - inside[:, ::-1].argmax(1)
        return np.arange(1, points) / points, low / count, high / count

    def to_arviz(self) -> Any:
        """The group ``prior_sbc``: quantity to its values of ``pit``, (1, replicate)."""
        arrays = {label: self.pit[None, :, i] for i, label in enumerate(self.quantities)}
        return arviz.export({"prior_sbc": arrays}, attrs={"model": self.model, "backend": self.backend, **self.info})

    def plot(self) -> Figure:
        """The empirical distribution functions of ``pit`` less that of the uniform, and their simultaneous band."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        z, low, high = self.band()
        axes.fill_between(z, low - z, high - z, color="0.85", label=f"{100 * self.level:g} % band")
        for i in np.argsort(self.p_value)[::-1]:
            share = np.searchsorted(np.sort(self.pit[:, i]), z, side="right") / len(self.pit)
            is_inside = bool(self.is_inside[i])
            axes.plot(
                z, share - z, lw=0.8 if is_inside else 1.5, color="0.4" if is_inside else None,
                label=None if is_inside else self.quantities[i],
            )  # fmt: skip
        axes.set(xlabel="rank of the truth, as a share", ylabel="difference to uniform", title=self._title())
        axes.legend(fontsize="small")
        return figure

    def _title(self) -> str:
        return f"SBC of {self.backend} on {self.model}: {'passed' if self.passed else 'failed'}"

    def __str__(self) -> str:
        lines = [
            f"{self._title()}. {len(self.pit)} replicates, {self.draws} draws each (every "
            f"{'one' if self.thin == 1 else f'{self.thin}th'} taken), {len(self.quantities)} quantities, band of "
            f"{100 * self.level:g} %, {self.info.get('sampling_time', 0.0):.0f} s."
        ]
        rows = []
        for i in np.argsort(self.p_value):
            place = "inside" if self.is_inside[i] else "OUTSIDE"
            rows.append((self.quantities[i], f"{self.gamma[i]:.2g}", f"{self.p_value[i]:.2g}", place))
        lines.append(_table(("quantity", "gamma", "p", "band"), rows[:12]))
        if len(rows) > 12:
            lines.append(f"({len(rows) - 12} more, of larger p)")
        return "\n".join([*lines, *self.findings])

    __repr__ = __str__


def sbc(
    program: Model,
    backend: Backend[Any, Any],
    *args: Any,
    replicates: int = 1000,
    thin: int | None = None,
    sites: Collection[str] | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    level: float = 0.999,
    at_once: int | None = None,
    **kwargs: Any,
) -> SBC:
    """Simulation-based calibration: is the truth anywhere among the draws, as often as it should be?

        θ* ~ p(θ),  y* ~ p(y | θ*),  θ_1 … θ_L ~ backend(y*):   the rank of f(θ*, y*) among f(θ_l, y*) is uniform

    All replicates run at once, each with ``backend.chains`` chains that adapt to its data alone, as one fit would. The
    observed sites are drawn anew; whatever else the program takes from its arguments stays as it is.

    Args:
        program: A Pyro program, or a model object, with proper priors. Priors that allow anything make for data that no
            sampler was meant for: calibrate with those that you would use.
        backend: A sampler; its ``chains``, ``warmup``, ``draws`` and ``thin`` are those of one replicate, its ``seed``
            that of the whole.
        *args: The program's arguments; the data among them give shapes only.
        replicates: Number of data sets.
        thin: Every which draw is ranked; None takes as many steps as leave an autocorrelation of 0.05.
        sites: Latent sites whose elements are ranked; None takes all. Exchangeable labels rank uniformly only if
            the sampler moves between labellings: leave them out, and give ``quantities`` that do not depend on labels.
        quantities: Name to a function of all latent and observed sites, site to (row, *site), that returns (row,) or
            (row, k). Beside them log p(θ, y) and log p(y | θ) are always ranked.
        level: Probability that a right sampler passes, all quantities together.
        at_once: Replicates that run together; None takes all. Fewer take less memory.
        **kwargs: The program's keyword arguments.

    Raises:
        Unsupported: If the program cannot draw its own data, or the back-end cannot run it.
    """
    _at_least("replicates", replicates, 20)
    _at_least("at_once", at_once or replicates, 1)
    _at_least("thin", thin or 1, 1)
    _check_level(level)
    with _Bench(backend, program, args, kwargs) as bench:
        if backend.start is not None and isinstance(backend.start, Posterior):
            raise ValueError("sbc gives every replicate other data: a Posterior is no start for them. Leave start= out.")
        truth = bench.joint(replicates)
        looked = _Quantities(bench.program, sites, quantities)
        true, drawn = looked(truth), []
        share, replicated, sampler = at_once or replicates, bench.program, bench.sampler
        for begin in range(0, replicates, share):
            rows = {name: value[begin : begin + share] for name, value in bench.data(truth).items()}
            count = len(next(iter(rows.values())))
            replicated = replicated.replicate(rows, groups=count)
            wide = dataclasses.replace(sampler, chains=count * sampler.chains)
            drawn.append(_run(wide, replicated, looked, bench).unflatten(0, (count, -1)))
        values = torch.cat(drawn)  # (replicate, chain, draw, quantity)
        every = thin or _near_independent(values)
        ranked = values[:, :, ::every].flatten(1, 2)
        draws, points = ranked.shape[1], min(_POINTS, ranked.shape[1] + 1, replicates)
        findings = _noticed(looked.labels, true, ranked, every)
        below = (ranked < true.unsqueeze(1)).sum(1)
        ties = (ranked == true.unsqueeze(1)).sum(1)
        ranks = below + (torch.rand(ties.shape, dtype=torch.float64) * (ties + 1)).long()
        pit = (ranks + torch.rand(ranks.shape, dtype=torch.float64)) / (draws + 1)
        gamma = np.array([uniformity(column, points) for column in pit.T.numpy()])
        return SBC(
            model=bench.program.name,
            backend=bench.name,
            quantities=tuple(looked.labels),
            ranks=ranks.numpy(),
            pit=pit.numpy(),
            draws=draws,
            thin=every,
            gamma=gamma,
            p_value=np.array([p_value(g, replicates, points) for g in gamma]),
            level=level,
            findings=findings,
            info={
                "seed": bench.seed,
                "replicates": replicates,
                "chains": int(values.shape[1]),
                "sampling_time": time.perf_counter() - bench.started,
            },
        )


def _run(sampler: Any, program: Program, looked: _Quantities, bench: _Bench) -> Tensor:
    """Quantities of all draws of all chains, (chain, draw, quantity)."""
    schedule = sampler.schedule
    data = program.chain_data(schedule.chains)
    state = sampler.init(program)
    with bench.bar(schedule.warmup + schedule.draws, "under calibration") as bar:
        for _ in range(schedule.warmup):
            state, _info = sampler.step(state, program)
            bar.update()
        rows = []
        for _ in range(schedule.draws):
            state, draw = sampler.sample(state, program)
            rows.append(looked({**draw.values, **data}))
            bar.update()
    return torch.stack(rows, 1)


def _near_independent(values: Tensor) -> int:
    """Thinning that leaves an autocorrelation of 0.05 in the slowest quantity, if it decays like that of an AR(1).

    The effective sample size n / τ of an AR(1) with autocorrelation ρ has τ = (1 + ρ) / (1 − ρ).
    """
    replicates, chains, draws, count = values.shape
    few = min(replicates, max(4, 600 // count))  # arviz.ess takes two milliseconds for each
    looked = values[torch.linspace(0, replicates - 1, few).round().long()]
    sizes = arviz.ess(looked.movedim(0, 2).flatten(2).numpy()).reshape(few, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a quantity that never moves has no ESS
        times = chains * draws / np.nanmedian(sizes, 0)
    slowest = float(np.nanmax(times, initial=1.0))
    if not slowest > 1.0:
        return 1
    return min(draws, math.ceil(math.log(_REMAINING) / math.log((slowest - 1.0) / (slowest + 1.0))))


def _noticed(labels: list[str], true: Tensor, ranked: Tensor, thin: int) -> tuple[str, ...]:
    findings = []
    for i, label in enumerate(labels):
        bad = int((~ranked[..., i].isfinite()).sum()) + int((~true[:, i].isfinite()).sum())
        if bad:
            findings.append(f"{bad} values of '{label}' are NaN or infinite.")
        elif bool((ranked[..., i] == ranked[:, :1, i]).all(1).any()):
            still = int((ranked[..., i] == ranked[:, :1, i]).all(1).sum())
            findings.append(f"'{label}' never moved in {still} of {len(ranked)} replicates.")
    if ranked.shape[1] < _FEWEST_RANKED:
        findings.append(
            f"Only {ranked.shape[1]} draws of a replicate are near independent (every {thin}th): raise the back-end's thin."
        )
    return tuple(findings)


# ----------------------------------------------------------------------------------- Geweke's test
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Geweke:
    """What the test of two joint simulators found. It prints as a sentence and a table, the worst quantities first.

    Attributes:
        model: Name of the program.
        backend: Name of the back-end.
        quantities: Labels of the scalars that were compared.
        marginal: What the program draws, (draw, quantity).
        successive: What the back-end and the program draw in turns, (chain, iteration, quantity).
        z: Difference of the two by its standard error, (2, quantity): location and spread.
        level: Probability that a right sampler passes, all quantities together (Bonferroni).
        info: "seed", "chains", "iterations", "sampling_time".
    """

    model: str
    backend: str
    quantities: tuple[str, ...]
    marginal: np.ndarray
    successive: np.ndarray
    z: np.ndarray
    level: float
    info: dict[str, Any]

    @property
    def p_value(self) -> np.ndarray:
        """Of each difference, (2, quantity); those of chains have as many degrees of freedom as there are chains."""
        return 2.0 * scipy.stats.t.sf(np.abs(self.z), len(self.successive) - 1)

    @property
    def is_equal(self) -> np.ndarray:
        """Whether both simulators agree in each quantity, (2, quantity)."""
        return _verdict(self.p_value.ravel(), self.level).reshape(self.z.shape)

    @property
    def passed(self) -> bool:
        """Whether they agree in all."""
        return bool(self.is_equal.all())

    def to_arviz(self) -> Any:
        """What the program draws as ``prior``, what both draw in turns as ``posterior``; quantity to (chain, draw)."""
        prior = {label: self.marginal[None, :, i] for i, label in enumerate(self.quantities)}
        posterior = {label: self.successive[:, :, i] for i, label in enumerate(self.quantities)}
        attrs = {"model": self.model, "backend": self.backend, **self.info}
        return arviz.export({"prior": prior, "posterior": posterior}, attrs=attrs)

    def plot(self) -> Figure:
        """z of location and spread of each quantity, and the bounds between which all must lie."""
        from matplotlib.figure import Figure

        count = len(self.quantities)
        figure = Figure(figsize=(6.4, 1.6 + 0.22 * count), layout="constrained")
        axes = figure.subplots()
        bound = float(scipy.stats.t.isf(0.5 * (1.0 - self.level) / self.z.size, len(self.successive) - 1))
        axes.axvspan(-bound, bound, color="0.9", label=f"{100 * self.level:g} % bounds")
        axes.axvline(0.0, color="0.6", lw=0.8)
        for row, (name, marker) in enumerate((("location", "o"), ("spread", "x"))):
            axes.plot(self.z[row], np.arange(count), marker, ms=4, label=name)
        axes.set_yticks(np.arange(count), self.quantities)
        axes.invert_yaxis()
        axes.set(xlabel="z", title=self._title())
        axes.legend(fontsize="small")
        return figure

    def _title(self) -> str:
        return f"Geweke's test of {self.backend} on {self.model}: {'passed' if self.passed else 'failed'}"

    def __str__(self) -> str:
        chains, iterations = self.successive.shape[:2]
        lines = [
            f"{self._title()}. {chains} chains, {iterations} iterations, {len(self.marginal)} draws of the program, "
            f"{len(self.quantities)} quantities, level {100 * self.level:g} %, {self.info.get('sampling_time', 0.0):.0f} s."
        ]
        rows = []
        for i in np.argsort(self.p_value.min(0)):
            agreement = "equal" if self.is_equal[:, i].all() else "DIFFERENT"
            rows.append((self.quantities[i], f"{self.z[0, i]:.2f}", f"{self.z[1, i]:.2f}", agreement))
        lines.append(_table(("quantity", "z of location", "z of spread", ""), rows[:12]))
        if len(rows) > 12:
            lines.append(f"({len(rows) - 12} more, of smaller |z|)")
        return "\n".join(lines)

    __repr__ = __str__


def geweke(
    program: Model,
    backend: Backend[Any, Any],
    *args: Any,
    chains: int = 500,
    iterations: int = 100,
    sites: Collection[str] | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    level: float = 0.999,
    **kwargs: Any,
) -> Geweke:
    """Geweke's joint distribution test: two ways to draw latents and data, which agree if the sampler is right.

        marginal      θ ~ p(θ), y ~ p(y | θ)
        successive    θ' ~ sampler(θ, y), y ~ p(y | θ'), over and over, from a draw of the first kind

    Chains start in the joint distribution, and a right sampler never leaves it: there is no burn-in, convergence is not
    asked for, and the average of each chain is independent of the others, which gives the standard errors. Warm-up happens
    before, with other data for each chain, and nothing adapts afterwards. Looked at is (θ', y) before y is drawn anew, which
    sees a sampler that neglects the data.

    Compared are location and spread, the first and second moments of F(f) − ½ with F the distribution function of a
    quantity f in the draws of the first kind: bounded, so that they exist under heavy tails too.

    Args:
        program: A Pyro program, or a model object, with proper priors.
        backend: A sampler; its ``warmup`` is how long it learns, its ``thin`` how many transitions an iteration has.
        *args: The program's arguments; the data among them give shapes only.
        chains: Number of chains, which replaces that of the back-end.
        iterations: How often latents and data are drawn in turns. A slow drift away from the truth needs many.
        sites: Latent sites whose elements are looked at; None takes all.
        quantities: As in ``sbc``. The mean and mean square of each observed site are always looked at, and log p(θ, y)
            and log p(y | θ).
        level: Probability that a right sampler passes, all quantities together.
        **kwargs: The program's keyword arguments.

    Raises:
        Unsupported: If the program cannot draw its own data, or the back-end cannot run it.
    """
    _at_least("chains", chains, 20)
    _at_least("iterations", iterations, 1)
    _check_level(level)
    with _Bench(backend, program, args, kwargs) as bench:
        looked = _Quantities(bench.program, sites, {**_moments(bench.program), **(quantities or {})})
        sampler = dataclasses.replace(bench.sampler, chains=chains)
        marginal = torch.cat([looked(bench.joint(chains)) for _ in range(4)])
        replicated = bench.program.replicate(bench.data(bench.joint(chains)))
        state = sampler.init(replicated)
        rows = []
        with bench.bar(sampler.warmup + iterations, "in turns with its program") as bar:
            for _ in range(sampler.warmup):
                state, _info = sampler.step(state, replicated)
                bar.update()
            values = bench.joint(chains)
            data = bench.data(values)
            for _ in range(iterations):
                replicated = replicated.replicate(data)
                state = sampler.moved(state, {name: values[name] for name in bench.program.latents}, replicated)
                state, draw = sampler.sample(state, replicated)
                values = draw.values
                rows.append(looked({**values, **data}))
                data = simulate(bench.program, values, chains)
                bar.update()
        successive = torch.stack(rows, 1).numpy()
        return Geweke(
            model=bench.program.name,
            backend=bench.name,
            quantities=tuple(looked.labels),
            marginal=marginal.numpy(),
            successive=successive,
            z=_differences(marginal.numpy(), successive),
            level=level,
            info={
                "seed": bench.seed,
                "chains": chains,
                "iterations": iterations,
                "sampling_time": time.perf_counter() - bench.started,
            },
        )


def _moments(program: Program) -> dict[str, Quantity]:
    """Mean and mean square of each observed site."""

    def moment(name: str, power: int) -> Quantity:
        return lambda values: values[name].double().pow(power).reshape(len(values[name]), -1).mean(1)

    found = {f"mean of {name}": moment(name, 1) for name in program.observed_sites}
    return found | {f"mean square of {name}": moment(name, 2) for name in program.observed_sites}


def _differences(marginal: np.ndarray, successive: np.ndarray) -> np.ndarray:
    """z of the first and second moments of F − ½, (2, quantity); F is estimated too, which its own error accounts for.

    An average of F_m(x) over x has, to first order, the variance of that of F(x) plus that of F(y) over the m draws y
    that F_m is made of (Hájek's projection of the Mann-Whitney statistic); likewise for its square.
    """
    found = np.zeros((2, marginal.shape[1]))
    for i in range(marginal.shape[1]):
        ordered = np.sort(marginal[:, i])

        def share(x: np.ndarray, ordered: np.ndarray = ordered) -> np.ndarray:
            both = np.searchsorted(ordered, x, side="left") + np.searchsorted(ordered, x, side="right")
            return both / (2.0 * len(ordered)) - 0.5  # ties count by half

        u, v = share(marginal[:, i]), share(successive[..., i])
        for row, power in enumerate((1, 2)):
            average, of_chains = (u**power).mean(), (v**power).mean(1)
            error = math.sqrt((u**power).var() / len(u) + of_chains.var(ddof=1) / len(of_chains))
            difference = of_chains.mean() - average
            found[row, i] = difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
    return found


# ----------------------------------------------------------------------------------- importance weights
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PSIS:
    """Pareto-smoothed importance weights.

    Of a guide (draws of q with their densities): one set of weights p(θ, y) / q(θ), whose average is the evidence. Of a
    sampler: leave-one-out, one set of weights 1 / p(y_i | θ) for each observation i.

    Attributes:
        estimand: "log evidence", or "elpd": the expected log pointwise predictive density.
        pareto_k: k-hat, the shape of the tail of the weights, () or (observation,): below 0.7 averages can be relied on;
            minus infinity where the largest weights are equal.
        log_weights: Smoothed, on the scale of the raw ones, (draw,) or (observation, draw).
        raw: As they were.
        ess: Effective sample size of the weights, () or (observation,); of draws of a Markov chain, as if independent.
        estimate: Of the estimand.
        se: Its standard error. That of the evidence comes from the weights, and is worth nothing if k-hat is above 0.7.
        model: Name of the program.
        backend: Name of the back-end.
    """

    estimand: str
    pareto_k: np.ndarray
    log_weights: np.ndarray
    raw: np.ndarray
    ess: np.ndarray
    estimate: float
    se: float
    model: str
    backend: str

    @property
    def passed(self) -> bool:
        """Whether k-hat is nowhere above 0.7."""
        return bool((self.pareto_k <= arviz.LARGEST_K).all())

    def to_arviz(self) -> Any:
        """Group ``psis``: "log_weights" (1, draw, *observation); ``psis_diagnostic``: "pareto_k" (1, 1, *observation)."""
        weights = np.moveaxis(self.log_weights, -1, 0)[None]
        dims = {} if self.pareto_k.ndim == 0 else {"log_weights": ["observation"], "pareto_k": ["observation"]}
        attrs = {"model": self.model, "backend": self.backend, "estimand": self.estimand, "estimate": self.estimate}
        # a group has one number of draws
        groups = {"psis": {"log_weights": weights}, "psis_diagnostic": {"pareto_k": self.pareto_k[None, None]}}
        return arviz.export(groups, dims=dims, attrs={**attrs, "se": self.se})

    def plot(self) -> Figure:
        """Of a guide: the largest weights by rank, raw and smoothed. Leave-one-out: k-hat of each observation."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        if self.pareto_k.ndim:
            axes.plot(np.arange(len(self.pareto_k)), self.pareto_k, ".")
            axes.axhline(arviz.LARGEST_K, color="0.6", lw=0.8)
            axes.set(xlabel="observation", ylabel="k-hat", title=self._title())
            return figure
        rank = np.arange(1, self.raw.size + 1)
        top = self.raw.max()
        for label, values, style in (("raw", self.raw, "."), ("smoothed", self.log_weights, "-")):
            axes.loglog(rank, np.exp(np.sort(values)[::-1] - top), style, label=label)
        axes.set(xlabel="rank", ylabel="weight, by the largest", title=self._title())
        axes.legend(fontsize="small")
        return figure

    def _title(self) -> str:
        up_to = "up to " if self.pareto_k.ndim else ""
        return f"PSIS of {self.backend} on {self.model}: k-hat {up_to}{self.pareto_k.max():.2f}"

    def __str__(self) -> str:
        verdict = "reliable" if self.passed else "not reliable, since k-hat is above 0.7"
        size = f"{float(self.ess.min()):.0f} of {self.log_weights.shape[-1]} draws"
        lines = [
            f"{self._title()}, ESS {'at least ' if self.ess.ndim else ''}{size}.",
            f"{self.estimand} {self.estimate:.4g} ± {self.se:.2g} ({verdict})",
        ]
        bad = int((self.pareto_k > arviz.LARGEST_K).sum())
        if self.pareto_k.ndim and bad:
            lines.append(f"{bad} of {self.pareto_k.size} observations have a k-hat above 0.7: refit without them.")
        return "\n".join(lines)

    __repr__ = __str__


def psis(posterior: Posterior) -> PSIS:
    """Pareto-smoothed importance sampling, of an approximation towards its target or of a sampler towards leave-one-out.

    Args:
        posterior: Of a back-end whose draws have densities ("lp" and "log_q" among its stats, as SVI has, or "log_weight" of
            its proposals, as ``MetropolisHastings(proposal=Independence(...))`` has), or of a sampler with observed sites.

    Raises:
        ValueError: If the weights are not finite.
        Unsupported: If there is neither: a point estimate.
    """
    names = {"model": str(posterior.info.get("model", "")), "backend": str(posterior.info.get("backend", ""))}
    if "log_q" in posterior.stats and "lp" in posterior.stats:
        weights = posterior.stats.get("log_weight", posterior.stats["lp"] - posterior.stats["log_q"])  # of the proposals
        raw = weights.double().flatten().numpy()
        if np.isnan(raw).any() or np.isposinf(raw).any() or not np.isfinite(raw).any():
            raise ValueError("Some importance weights are NaN or infinite: the guide has no usable density.")
        log_weights = arviz.smoothed(raw)
        total = scipy.special.logsumexp(log_weights)
        squares = float(np.exp(scipy.special.logsumexp(2.0 * (log_weights - total))))
        return PSIS(
            estimand="log evidence",
            pareto_k=np.asarray(arviz.pareto_k(raw)),
            log_weights=log_weights,
            raw=raw,
            ess=np.asarray(1.0 / squares),
            estimate=float(total - math.log(raw.size)),
            se=math.sqrt(max(0.0, squares - 1.0 / raw.size)),
            **names,
        )
    if posterior.info.get("kind", "samples") != "samples":
        raise Unsupported(
            f"{names['backend']} gives no draws with a density. psis needs SVI, or a sampler for leave-one-out."
        )
    terms = [as_numpy(value.double().reshape(*value.shape[:2], -1)) for value in posterior.log_likelihood().values()]
    if not terms:
        raise Unsupported("Leave-one-out needs observed sites, but the program has none.")
    pointwise = np.concatenate(terms, 2)  # (chain, draw, observation)
    draws = {name: as_numpy(value) for name, value in posterior.draws.items()}
    found = arviz.loo(pointwise, draws)
    raw = -pointwise.reshape(-1, pointwise.shape[2]).T
    efficiency = arviz.efficiency(draws)
    log_weights = np.stack([arviz.smoothed(row, efficiency) for row in raw])
    normalised = log_weights - scipy.special.logsumexp(log_weights, 1, keepdims=True)
    return PSIS(
        estimand="elpd",
        pareto_k=found.pareto_k.ravel(),
        log_weights=log_weights,
        raw=raw,
        ess=np.exp(-scipy.special.logsumexp(2.0 * normalised, 1)),
        estimate=found.elpd,
        se=found.se,
        **names,
    )
