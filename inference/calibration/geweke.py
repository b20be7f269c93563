"""Geweke's test: draws of latents and data, made in two ways that must agree.

References:
    J. Geweke, Getting it right: joint distribution tests of posterior simulators (2004).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference import arviz
from inference.calibration.joint import Bench, Model, Quantities, Quantity, at_least, check_level
from inference.calibration.result import Result, plotted, table, verdict
from inference.contract import Backend
from inference.program import Program
from inference.simulation import simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Geweke", "differences", "geweke"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Geweke(Result):
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
        from scipy.stats import t

        return 2.0 * t.sf(np.abs(self.z), len(self.successive) - 1)

    @property
    def is_equal(self) -> np.ndarray:
        """Whether both simulators agree in each quantity, (2, quantity)."""
        return verdict(self.p_value.ravel(), self.level).reshape(self.z.shape)

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
        from scipy.stats import t

        bound = float(t.isf(0.5 * (1.0 - self.level) / self.z.size, len(self.successive) - 1))
        return plotted(self.title, self.quantities, {"location": self.z[0], "spread": self.z[1]}, bound, self.level)

    @property
    def title(self) -> str:
        return f"Geweke's test of {self.backend} on {self.model}: {'passed' if self.passed else 'failed'}"

    def __str__(self) -> str:
        chains, iterations = self.successive.shape[:2]
        lines = [
            f"{self.title}. {chains} chains, {iterations} iterations, {len(self.marginal)} draws of the program, "
            f"{len(self.quantities)} quantities, level {100 * self.level:g} %, {self.info.get('sampling_time', 0.0):.0f} s."
        ]
        rows = []
        for i in np.argsort(self.p_value.min(0)):
            agreement = "equal" if self.is_equal[:, i].all() else "DIFFERENT"
            rows.append((self.quantities[i], f"{self.z[0, i]:.2f}", f"{self.z[1, i]:.2f}", agreement))
        lines.append(table(("quantity", "z of location", "z of spread", ""), rows, rest="of smaller |z|"))
        return "\n".join(lines)


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
    at_least("chains", chains, 20)
    at_least("iterations", iterations, 1)
    check_level(level)
    with Bench(backend, program, args, kwargs) as bench:
        looked = Quantities(bench.program, sites, {**_moments(bench.program), **(quantities or {})})
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
            z=differences(marginal.numpy(), successive),
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


def differences(marginal: np.ndarray, successive: np.ndarray) -> np.ndarray:
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
