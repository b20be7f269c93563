"""Mixtures of tables whose columns are of several kinds: labels, counts, numbers with and without outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_genmodels.classical.components import Draws, FiniteMixture
from pyro_genmodels.classical.seeding import apart
from pyro_genmodels.classical.tables import check_known, check_weights, moments
from pyro_genmodels.distributions import Columns, LatentScaleT, Mixed

__all__ = ["Mixture"]

KINDS = ("bernoulli", "categorical", "poisson", "normal", "student")
# Sites of each kind of column.
SITES = {
    "bernoulli": ("probabilities",),
    "categorical": ("shares",),
    "poisson": ("rates",),
    "normal": ("means", "variances"),
    "student": ("locations", "squares"),
}


class Mixture(FiniteMixture):
    """Mixture whose columns are independent within a component, each of a kind of its own.

        w ~ Dirichlet(1),  z_n ~ Categorical(w),  x_nj ~ p_j(· | θ_{z_n j})

        "bernoulli"     x ∈ {0, 1},       x ~ Bernoulli(p),        p ~ Beta(1, 1)
        "categorical"   x ∈ {0 … C − 1},  x ~ Categorical(q),      q ~ Dirichlet(1)
        "poisson"       x ∈ {0, 1, …},    x ~ Poisson(λ),          λ ~ Gamma(1, 1 / m)
        "normal"        x ∈ ℝ,            x ~ N(μ, v),             μ ~ N(m, 9 s²),  v ~ InverseGamma(3/2, s² / 2 K²)
        "student"       x ∈ ℝ,            x ~ t_ν(μ, v),           as "normal"

    with m and s the mean and standard deviation of the column. Priors are conjugate: Gibbs draws and EM maximises in closed
    form. (Student's t is a normal of random scale, which EM fills in; Gibbs moves its parameters by HMC.)

    Entries that are NaN have not been observed; ``row_weights`` are those of ``GMM``. Labels of components are exchangeable.

    Sites: ``weights`` (K,); ``probabilities``, ``rates``, ``means``, ``variances``, ``locations``, ``squares`` (K, columns
    of the kind); ``shares`` (K, columns of the kind, C); ``z`` (rows,), ``x`` (rows, D). Plates: ``components``, ``rows``.

    Args:
        components: Number of components K, at least 1.
        kinds: Kind of each column, or one for all of them.
        categories: C, common to the categorical columns; None takes the largest label of the data, plus one.
        freedom: ν of the columns of Student's t.

    References:
        G. McLachlan and D. Peel, Finite mixture models (2000).
        C. Bishop, Pattern Recognition and Machine Learning (2006), section 9.3.3.
    """

    def __init__(
        self, components: int, kinds: str | Sequence[str], categories: int | None = None, freedom: float = 4.0
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"Mixture needs at least 1 component, but components is {components}.")
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds holds '{kind}', but each must be one of {', '.join(KINDS)}.")
        if not freedom > 0:
            raise ValueError(f"freedom is {freedom}, but must be positive.")
        self.components, self.kinds, self.categories, self.freedom = components, kinds, categories, freedom
        self.location: Any
        self.scale: Any
        self.register_buffer("location", None)
        self.register_buffer("scale", None)
        self.found_levels: Any
        self.register_buffer("found_levels", torch.tensor(categories or 0))

    @property
    def _width(self) -> int:
        """The number of levels of categorical columns."""
        return int(self.found_levels)

    def columns(self, kind: str) -> tuple[int, ...]:
        """The columns of a kind."""
        every = [self.kinds] * len(self.location) if isinstance(self.kinds, str) else self.kinds
        return tuple(j for j, own in enumerate(every) if own == kind)

    def prepare(self, x: Tensor | None = None, size: int | None = None, row_weights: Tensor | None = None) -> None:
        """Scales the prior to the data.

        Args:
            x: All the data, (rows, D), floating; NaN where an entry is missing.
            size: Not used; ``prepare`` has the signature of ``model``.
            row_weights: How often each row counts, (rows,).

        Raises:
            ValueError: If x is no table of as many columns as there are kinds, or holds what a column of its kind cannot.
        """
        if x is None:
            return
        if x.dim() != 2 or not x.is_floating_point():
            came = f"shape {tuple(x.shape)} and type {str(x.dtype).removeprefix('torch.')}"
            raise ValueError(f"x must be a floating table (rows, columns), but has {came}.")
        if not isinstance(self.kinds, str) and x.shape[1] != len(self.kinds):
            raise ValueError(f"x has {x.shape[1]} columns, but this Mixture was built for {len(self.kinds)}.")
        if len(x) < self.components:
            raise ValueError(f"Mixture has {self.components} components, but x has only {len(x)} rows.")
        if row_weights is not None:
            check_weights(row_weights, len(x))
        check_known(x, row_weights)
        self.location, self.scale = moments(x, row_weights)
        self._check(x)

    def _check(self, x: Tensor) -> None:
        labels = x[:, self.columns("categorical")]
        if labels.numel():
            found = self.categories or int(labels.nan_to_num(nan=0.0, posinf=0.0).max()) + 1
            self.found_levels = torch.tensor(found, device=x.device)
        whole = x == x.round()
        good = {
            "bernoulli": (x == 0) | (x == 1), "categorical": whole & (x >= 0) & (x < self._width),
            "poisson": whole & (x >= 0) & x.isfinite(), "normal": x.isfinite(), "student": x.isfinite(),
        }  # fmt: skip
        wanted = {
            "bernoulli": "0 or 1", "categorical": f"labels 0 to {self._width - 1}", "poisson": "whole numbers from 0 on",
            "normal": "finite numbers", "student": "finite numbers",
        }  # fmt: skip
        for kind in KINDS:
            for column in self.columns(kind):
                bad = (~good[kind][:, column] & ~x[:, column].isnan()).nonzero()
                if len(bad):
                    row = int(bad[0])
                    raise ValueError(
                        f"Column {column} is of the kind '{kind}' and must hold {wanted[kind]}, or NaN, but row {row} has "
                        f"{float(x[row, column]):g}."
                    )

    def model(self, x: Tensor | None = None, size: int | None = None, row_weights: Tensor | None = None) -> Tensor:
        if self.location is None:
            if x is None:
                raise ValueError("This Mixture has seen no data: call prepare(x) before drawing from it.")
            self.prepare(x, row_weights=row_weights)
        if x is None and size is None:
            raise ValueError("Mixture.model needs data x, or the number of rows to draw, size.")
        rows = len(x) if x is not None else size
        weights = pyro.sample("weights", dist.Dirichlet(self.location.new_ones(self.components)))
        with pyro.plate("components", self.components):
            values = {name: pyro.sample(name, prior) for name, prior in self._priors().items()}
        with pyro.plate("rows", rows):
            if row_weights is None:
                z = pyro.sample("z", dist.Categorical(weights))
                return pyro.sample("x", self._rows_given(values, z), obs=x)
            z = torch.arange(self.components, device=weights.device)
            with poutine.scale(scale=row_weights.clamp(min=torch.finfo(row_weights.dtype).tiny)):
                return pyro.sample("x", Mixed(weights, self._rows_given(values, z)), obs=x)

    def _priors(self) -> dict[str, dist.TorchDistribution]:
        """Site to its prior for one component."""
        found: dict[str, Any] = {}
        one = self.location.new_ones(())
        for kind in KINDS:
            columns = list(self.columns(kind))
            if not columns:
                continue
            m, s = self.location[columns], self.scale[columns]
            if kind == "bernoulli":
                found["probabilities"] = dist.Beta(torch.ones_like(m), one).to_event(1)
            elif kind == "categorical":
                found["shares"] = dist.Dirichlet(m.new_ones(len(columns), self._width)).to_event(1)
            elif kind == "poisson":
                found["rates"] = dist.Gamma(torch.ones_like(m), 1.0 / torch.where(m > 0, m, 1.0)).to_event(1)
            else:
                place, spread = SITES[kind]
                found[place] = dist.Normal(m, 3.0 * s).to_event(1)
                found[spread] = dist.InverseGamma(1.5 * torch.ones_like(s), 0.5 * (s / self.components).square()).to_event(1)
        return found

    def _rows_given(self, values: Mapping[str, Tensor], z: Tensor) -> Columns:
        """Distribution of rows given the labels z (…) of their components."""
        parts: list[tuple[tuple[int, ...], Any]] = []
        for kind in KINDS:
            columns = self.columns(kind)
            if not columns:
                continue
            own = [values[name][z] for name in SITES[kind]]
            if kind == "bernoulli":
                parts.append((columns, dist.Bernoulli(own[0])))
            elif kind == "categorical":
                parts.append((columns, dist.Categorical(own[0])))
            elif kind == "poisson":
                parts.append((columns, dist.Poisson(own[0])))
            elif kind == "normal":
                parts.append((columns, dist.Normal(own[0], own[1].sqrt())))
            else:
                parts.append((columns, LatentScaleT(own[0].new_tensor(self.freedom), own[0], own[1].sqrt())))
        return Columns(parts)

    @torch.no_grad()
    def start(self, x: Tensor, size: int | None = None, row_weights: Tensor | None = None) -> dict[str, Tensor]:
        """Where a fit may start: the moments of clusters that k-means++ has chosen, drawn in with the prior's.

        Random numbers come from torch's global generator.

        Args:
            x: (rows, D).
            size: Not used.
            row_weights: How often each row counts, (rows,).

        Returns:
            Site to value, such as ``EM(start=...)`` takes.
        """
        if self.location is None:
            self.prepare(x, row_weights=row_weights)
        counts = x.new_ones(len(x)) if row_weights is None else row_weights.to(x)
        labels = self.columns("categorical")
        numbers = [j for j in range(x.shape[1]) if j not in labels]
        is_known, members = ~x.isnan(), one_hot(torch.where(x.isnan(), 0.0, x)[:, labels].long(), max(self._width, 1)).to(x)
        standard = ((x - self.location) / self.scale)[:, numbers]
        coded = torch.where(is_known[:, labels, None], members, math.nan).flatten(1)
        owner = one_hot(apart(torch.cat([standard, coded], 1), self.components, counts), self.components)
        owner = owner.to(x) * counts[:, None]
        known, filled = owner.mT @ is_known.to(x), torch.where(is_known, x, 0.0)
        sums = owner.mT @ filled
        means = (sums + self.location) / (known + 1.0)
        residual = torch.where(is_known, x - means[owner.argmax(1)], 0.0)
        spread = (owner.mT @ residual.square() + (self.scale / self.components).square()) / (known + 3.0)
        shares = torch.einsum("nk,njc->kjc", owner, members * is_known[:, labels, None])
        found = {"weights": (owner.sum(0) + 1.0) / (counts.sum() + self.components)}
        for kind in KINDS:
            columns = list(self.columns(kind))
            if columns:
                values = {
                    "bernoulli": ((sums + 1.0) / (known + 2.0),),
                    "categorical": ((shares + 1.0) / (known[:, labels, None] + self._width),),
                    "poisson": ((sums + torch.where(self.location > 0, self.location, 1.0)) / (known + 1.0),),
                }.get(kind, (means, spread))
                own = values if kind == "categorical" else [value[:, columns] for value in values]
                found |= dict(zip(SITES[kind], own, strict=True))
        return found

    # ------------------------------------------------------------------------------ what draws say
    def _tables(self, draws: Draws, is_matched: bool = True) -> list[dict[str, Tensor]]:
        """Sites of each draw."""
        table = draws if isinstance(draws, Mapping) else draws.matched if is_matched else draws.draws
        names = ["weights", *(name for kind in KINDS for name in SITES[kind] if name in table)]
        parts = {}
        for name in names:
            value = torch.as_tensor(table[name])
            own = 1 if name == "weights" else 3 if name == "shares" else 2
            parts[name] = value.reshape(-1, *value.shape[value.dim() - own :])
        return [dict(zip(names, row, strict=True)) for row in zip(*parts.values(), strict=True)]

    def _log_joint(self, x: Tensor, draws: Draws) -> Tensor:
        if self.location is None:
            self.prepare(x)
        labels = torch.arange(self.components, device=x.device)
        terms = []
        for table in self._tables(draws):
            values = {name: value.to(x) for name, value in table.items()}
            terms.append(self._rows_given(values, labels).log_prob(x[:, None]) + values["weights"].log())
        return torch.stack(terms)

    @torch.no_grad()
    def impute(self, x: Tensor, draws: Draws) -> Tensor:
        """x with its missing entries at their posterior mean, labels at the most probable one; (rows, D)."""
        joint, filled = self._log_joint(x, draws).softmax(-1), x.clone()
        labels, columns = torch.arange(self.components, device=x.device), list(self.columns("categorical"))
        means, shares = [], []
        for table, responsibility in zip(self._tables(draws), joint, strict=True):
            values = {name: value.to(x) for name, value in table.items()}
            means.append(responsibility @ self._rows_given(values, labels).mean.to(x))
            if columns:
                shares.append(torch.einsum("nk,kjc->njc", responsibility, values["shares"]))
        expected = torch.stack(means).mean(0)
        if columns:
            expected[:, columns] = torch.stack(shares).mean(0).argmax(-1).to(x)
        return torch.where(filled.isnan(), expected, filled)

    @torch.no_grad()
    def sample(self, size: int, draws: Draws) -> Tensor:
        """New rows from the posterior predictive, each from a draw chosen at random; (size, D)."""
        tables = self._tables(draws, is_matched=False)
        chosen = torch.randint(len(tables), (size,)).tolist()
        z = [int(torch.multinomial(tables[i]["weights"], 1)) for i in chosen]
        return torch.stack([self._rows_given(tables[i], torch.tensor(k)).sample() for i, k in zip(chosen, z, strict=True)])
