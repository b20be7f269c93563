"""Simulation-based calibration: where the truth ranks among the draws.

References:
    S. Talts et al., Validating Bayesian inference algorithms with simulation-based calibration (2018).
    M. Modrák et al., Simulation-based calibration checking for Bayesian computation: the choice of test quantities shapes
        sensitivity (2025).
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inference import arviz
from inference.calibration import uniformity
from inference.calibration.joint import Bench, Model, Quantities, Quantity, at_least, check_level
from inference.calibration.result import Result, canvas, table, verdict
from inference.contract import Backend
from inference.posterior import Posterior
from inference.program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SBC", "sbc"]

_REMAINING = 0.05  # autocorrelation that thinning leaves
_FEWEST_RANKED = 20  # draws, below which a rank says little


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SBC(Result):
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
        """Number of points at which the empirical distribution is judged."""
        return uniformity.points_for(self.draws, len(self.pit))

    @property
    def is_inside(self) -> np.ndarray:
        """Whether the distribution function of each quantity stays inside the simultaneous band, (quantity,)."""
        return verdict(self.p_value, self.level)

    @property
    def passed(self) -> bool:
        """Whether all of them do."""
        return bool(self.is_inside.all())

    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points z, and the least and the largest share of ``pit`` below each with which a quantity passes."""
        return uniformity.band(1.0 - (1.0 - self.level) / len(self.quantities), len(self.pit), self.points)

    def to_arviz(self) -> Any:
        """The group ``prior_sbc``: quantity to its values of ``pit``, (1, replicate)."""
        arrays = {label: self.pit[None, :, i] for i, label in enumerate(self.quantities)}
        return arviz.export({"prior_sbc": arrays}, attrs={"model": self.model, "backend": self.backend, **self.info})

    def plot(self) -> Figure:
        """The empirical distribution functions of ``pit`` less that of the uniform, and their simultaneous band."""
        figure, axes = canvas(self.title)
        z, low, high = self.band()
        axes.fill_between(z, low - z, high - z, color="0.85", label=f"{100 * self.level:g} % band")
        for i in np.argsort(self.p_value)[::-1]:
            share = np.searchsorted(np.sort(self.pit[:, i]), z, side="right") / len(self.pit)
            is_inside = bool(self.is_inside[i])
            axes.plot(
                z, share - z, lw=0.8 if is_inside else 1.5, color="0.4" if is_inside else None,
                label=None if is_inside else self.quantities[i],
            )  # fmt: skip
        axes.set(xlabel="rank of the truth, as a share", ylabel="difference to uniform")
        axes.legend(fontsize="small")
        return figure

    @property
    def title(self) -> str:
        return f"SBC of {self.backend} on {self.model}: {'passed' if self.passed else 'failed'}"

    def __str__(self) -> str:
        lines = [
            f"{self.title}. {len(self.pit)} replicates, {self.draws} draws each (every "
            f"{'one' if self.thin == 1 else f'{self.thin}th'} taken), {len(self.quantities)} quantities, band of "
            f"{100 * self.level:g} %, {self.info.get('sampling_time', 0.0):.0f} s."
        ]
        rows = []
        for i in np.argsort(self.p_value):
            place = "inside" if self.is_inside[i] else "OUTSIDE"
            rows.append((self.quantities[i], f"{self.gamma[i]:.2g}", f"{self.p_value[i]:.2g}", place))
        lines.append(table(("quantity", "gamma", "p", "band"), rows, rest="of larger p"))
        return "\n".join([*lines, *self.findings])


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
    at_least("replicates", replicates, 20)
    at_least("at_once", at_once or replicates, 1)
    at_least("thin", thin or 1, 1)
    check_level(level)
    with Bench(backend, program, args, kwargs) as bench:
        if backend.start is not None and isinstance(backend.start, Posterior):
            raise ValueError("sbc gives every replicate other data: a Posterior is no start for them. Leave start= out.")
        truth = bench.joint(replicates)
        looked = Quantities(bench.program, sites, quantities)
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
        draws = ranked.shape[1]
        points = uniformity.points_for(draws, replicates)
        findings = _noticed(looked.labels, true, ranked, every)
        below = (ranked < true.unsqueeze(1)).sum(1)
        ties = (ranked == true.unsqueeze(1)).sum(1)
        ranks = below + (torch.rand(ties.shape, dtype=torch.float64) * (ties + 1)).long()
        pit = (ranks + torch.rand(ranks.shape, dtype=torch.float64)) / (draws + 1)
        gamma = np.array([uniformity.gamma(column, points) for column in pit.T.numpy()])
        return SBC(
            model=bench.program.name,
            backend=bench.name,
            quantities=tuple(looked.labels),
            ranks=ranks.numpy(),
            pit=pit.numpy(),
            draws=draws,
            thin=every,
            gamma=gamma,
            p_value=np.array([uniformity.p_value(g, replicates, points) for g in gamma]),
            level=level,
            findings=findings,
            info={
                "seed": bench.seed,
                "replicates": replicates,
                "chains": int(values.shape[1]),
                "sampling_time": time.perf_counter() - bench.started,
            },
        )


def _run(sampler: Any, program: Program, looked: Quantities, bench: Bench) -> Tensor:
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
