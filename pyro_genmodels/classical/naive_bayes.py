"""Naive Bayes: columns of any kind, independent within a class that need not be known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from inference.contract import Fitted
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.distributions import Classwise

__all__ = ["NaiveBayes"]

KINDS = ("gaussian", "bernoulli", "categorical", "poisson", "multinomial")


class NaiveBayes(GenerativeModel):
    """Naive Bayes classifier: the columns of a row are independent given its class.

        π ~ Dirichlet(1),  y_n ~ Categorical(π), and with k = y_n, column by column

        gaussian       x_nj ~ N(μ_kj, v_kj),         μ_kj ~ N(m_j, 9 s_j²),  v_kj ~ InverseGamma(3/2, s_j² / 2)
        bernoulli      x_nj ~ Bernoulli(p_kj),       p_kj ~ Beta(a, a)
        categorical    x_nj ~ Categorical(c_kj),     c_kj ~ Dirichlet(a, …, a)
        poisson        x_nj ~ Poisson(λ_kj),         λ_kj ~ Gamma(a, a / m_j)
        multinomial    x_n· ~ Multinomial(θ_k),      θ_k ~ Dirichlet(a, …, a)      (all such columns together, as words)

    with m and s the mean and standard deviation of a column. A label of −1 is not known: such rows are summed out or drawn,
    so that any back-end learns from them, too. An entry that is NaN is left out (its column says nothing of its row).

    With all labels known, ``EM`` gives the classifiers of scikit-learn: with concentration a its BernoulliNB, CategoricalNB
    and MultinomialNB of ``alpha = a − 1``, and with ``objective="mle"`` its GaussianNB of ``var_smoothing=0``. With none known,
    it is a mixture, whose labels are exchangeable.

    Sites: ``share`` (K,); ``means``, ``variances`` (K, gaussian), ``rates`` (K, bernoulli), ``chances_L`` (K, categorical
    columns with L levels, L), ``intensities`` (K, poisson), ``words`` (K, multinomial); ``y`` (rows,); ``x_gaussian``,
    ``x_bernoulli``, ``x_categorical_L``, ``x_poisson``, ``x_multinomial`` (rows, columns). Plates: ``classes``, ``rows``.

    Args:
        classes: Number of classes K, at least 1.
        columns: The kind of all columns, or of each: "gaussian", "bernoulli", "categorical", "poisson" or "multinomial".
        concentration: a, at least 1; 2 makes the mode of the posterior that of Laplace's smoothing by one count.
        levels: Number of values of each categorical column, in their order; None takes them from the data.
        unlabelled_weight: Power, in (0, 1], to which the density of each unlabelled row is raised (``poutine.scale``), with
            that of its label: less than 1 where they are many and the model is wrong. Other than in the reference,
            the probabilities of the labels are tempered by it, too.
        length: Words of a row that is drawn from the prior, for multinomial columns.

    References:
        K. Nigam, A. McCallum, S. Thrun and T. Mitchell, Text classification from labeled and unlabeled documents using EM (2000).
    """  # noqa: E501

    def __init__(
        self,
        classes: int,
        columns: str | Sequence[str] = "gaussian",
        concentration: float = 2.0,
        levels: Sequence[int] | None = None,
        unlabelled_weight: float = 1.0,
        length: int = 100,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"NaiveBayes needs at least 1 class, but classes is {classes}.")
        unknown = [kind for kind in ([columns] if isinstance(columns, str) else columns) if kind not in KINDS]
        if unknown:
            raise ValueError(f"columns names '{unknown[0]}', but a column is one of {', '.join(KINDS)}.")
        if not concentration >= 1.0:
            raise ValueError(f"concentration is {concentration}, but must be at least 1, or the density has no mode.")
        if not 0.0 < unlabelled_weight <= 1.0:
            raise ValueError(f"unlabelled_weight is {unlabelled_weight}, but must be in (0, 1].")
        self.classes, self.columns = classes, columns if isinstance(columns, str) else tuple(columns)
        self.concentration, self.unlabelled_weight, self.length = concentration, unlabelled_weight, length
        self.levels = None if levels is None else tuple(levels)
        self._groups: dict[str, list[int]] = {}
        self._has_missing, self._is_partly_labelled = False, False
        self.location: Any
        self.scale: Any
        self.register_buffer("location", None)
        self.register_buffer("scale", None)
        self.found_levels: Any
        self.register_buffer("found_levels", None)
        if not isinstance(columns, str) and (self.levels is not None or "categorical" not in self.columns):
            self._shape(torch.zeros(len(self.columns)), torch.ones(len(self.columns)))

    def _kinds(self, width: int) -> tuple[str, ...]:
        return (self.columns,) * width if isinstance(self.columns, str) else self.columns

    def _shape(self, location: Tensor, scale: Tensor, levels: Mapping[int, int] | None = None) -> None:
        """Which columns go together, and the constants of their priors."""
        self.location, self.scale = location, scale
        kinds, self._groups = self._kinds(len(location)), {}
        categorical = [j for j, kind in enumerate(kinds) if kind == "categorical"]
        if self.levels is not None:
            if len(self.levels) != len(categorical):
                raise ValueError(
                    f"levels has {len(self.levels)} numbers, but there are {len(categorical)} categorical columns."
                )
            levels = dict(zip(categorical, self.levels, strict=True))
        self.found_levels = torch.tensor([(levels or {}).get(j, 0) for j in range(len(location))], device=location.device)
        for j, kind in enumerate(kinds):
            name = f"categorical_{(levels or {})[j]}" if kind == "categorical" else kind
            self._groups.setdefault(name, []).append(j)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "location" in state_dict:
            levels = dict(enumerate(state_dict[prefix + "found_levels"].tolist()))
            self._shape(state_dict[prefix + "location"].clone(), state_dict[prefix + "scale"].clone(), levels)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def prepare(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> None:
        """Scales the priors to the data, and looks which entries and labels are missing.

        Args:
            x: All the data, (rows, D), floating; NaN is missing.
            y: Labels 0, …, K − 1, or −1 where not known, (rows,); None: none is known.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If x is no table of the kinds that the columns have, or a label is none.
        """
        if x is None:
            return
        self._check(x, y)
        is_seen = ~x.isnan()
        numbers = is_seen.sum(0).clamp(min=1)
        filled = x if bool(is_seen.all()) else x.nan_to_num(nan=0.0)
        location = filled.sum(0) / numbers
        scale = (torch.where(is_seen, filled - location, 0.0).square().sum(0) / numbers).sqrt()
        levels = {
            j: max(2, 1 + int(filled[:, j].max())) for j, k in enumerate(self._kinds(x.shape[1])) if k == "categorical"
        }
        self._shape(location, torch.where(scale > 0, scale, torch.ones_like(scale)), levels)
        self._check_levels(filled)
        self._has_missing = not bool(is_seen.all())
        self._is_partly_labelled = y is not None and bool((y < 0).any())

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        if x.dim() != 2 or not x.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be a table (rows, columns).")
        if not x.is_floating_point():
            raise ValueError(f"x holds {str(x.dtype).removeprefix('torch.')}, but must be floating: pass x.double().")
        kinds = self._kinds(x.shape[1])
        if len(kinds) != x.shape[1]:
            raise ValueError(f"x has {x.shape[1]} columns, but this NaiveBayes was built for {len(kinds)}.")
        for kind in KINDS:
            index = [j for j, own in enumerate(kinds) if own == kind]
            if not index:
                continue
            part = x if len(index) == x.shape[1] else x[:, index]
            is_wrong, wanted = self._wrong(part, kind)
            if bool(is_wrong.any()):
                row, column = is_wrong.nonzero()[0].tolist()
                value = float(part[row, column])
                raise ValueError(
                    f"x is {value:g} in row {row}, column {index[column]}, but a {kind} column must be {wanted}."
                )
        if y is None:
            return
        if y.shape != x.shape[:1]:
            raise ValueError(f"y has shape {tuple(y.shape)}, but x has {x.shape[0]} rows.")
        if y.is_floating_point():
            raise ValueError("y is floating, but labels are integers: pass y.long(), with −1 where the label is not known.")
        if bool(((y < -1) | (y >= self.classes)).any()):
            raise ValueError(
                f"y has labels from {int(y.min())} to {int(y.max())}, but must be 0 to {self.classes - 1}, or −1 where the "
                "label is not known."
            )

    @staticmethod
    def _wrong(x: Tensor, kind: str) -> tuple[Tensor, str]:
        """Which entries a column of this kind cannot have, and what it must be."""
        if kind == "gaussian":
            return x.isinf(), "finite, or NaN where it is missing"
        if kind == "bernoulli":
            return ~((x == 0) | (x == 1) | x.isnan()), "0 or 1, or NaN where it is missing"
        is_count = (x >= 0) & x.isfinite() & (x == x.floor())
        if kind == "multinomial":
            return (
                ~is_count,
                "a whole number of at least 0 (how long a row with an unknown count is, is unknown; use poisson)",
            )
        return ~(is_count | x.isnan()), "a whole number of at least 0, or NaN where it is missing"

    def _check_levels(self, filled: Tensor) -> None:
        for name, index in self._groups.items():
            if name.startswith("categorical"):
                levels = int(name.split("_")[1])
                for j in index:
                    if float(filled[:, j].max()) >= levels:
                        raise ValueError(
                            f"x is {float(filled[:, j].max()):g} in column {j}, which has {levels} levels from 0."
                        )

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> dict[str, Tensor]:
        rows = self._rows(x, y, size)
        share = pyro.sample("share", dist.Dirichlet(self.location.new_ones(self.classes)))
        with pyro.plate("classes", self.classes):
            parameters = {name: self._own(name, index) for name, index in self._groups.items()}
        with pyro.plate("rows", rows), poutine.scale(scale=self._weight(y)):
            label = self._labels(share, y)
            found = {"y": label}
            for name, index in self._groups.items():
                part = None if x is None else self._part(x, index)
                is_seen = ~part.isnan() if part is not None and self._has_missing and name != "multinomial" else None
                lengths = self.location.new_full((rows,), self.length) if part is None else part.sum(-1)
                given = Classwise(self._given(name, parameters[name]), label, is_seen, lengths)
                seen = part if is_seen is None or part is None else part.nan_to_num(nan=0.0)
                found[f"x_{name}"] = pyro.sample(f"x_{name}", given, obs=seen)
        return found

    def _weight(self, y: Tensor | None) -> Tensor | float:
        """Power of each row's density; one number where all are the same."""
        if y is None or not self._is_partly_labelled or self.unlabelled_weight == 1.0:
            return 1.0
        return torch.where(y < 0, self.location.new_tensor(self.unlabelled_weight), self.location.new_tensor(1.0))

    def _labels(self, share: Tensor, y: Tensor | None) -> Tensor:
        if y is None or not self._is_partly_labelled:
            return pyro.sample("y", dist.Categorical(share), obs=y)
        return pyro.sample("y", dist.Categorical(share), obs=y.clamp(min=0), obs_mask=y >= 0)

    def _own(self, name: str, index: list[int]) -> tuple[Tensor, ...]:
        """What a class has of its own, for the columns ``index`` of one kind."""
        kind, _, levels = name.partition("_")
        location, scale = self.location[index], self.scale[index]
        a = torch.full_like(location, self.concentration)
        if kind == "gaussian":
            means = pyro.sample("means", dist.Normal(location, 3.0 * scale).to_event(1))
            prior = dist.InverseGamma(torch.full_like(scale, 1.5), 0.5 * scale.square()).to_event(1)
            return means, pyro.sample("variances", prior)
        if kind == "bernoulli":
            return (pyro.sample("rates", dist.Beta(a, a).to_event(1)),)
        if kind == "categorical":
            concentration = a.unsqueeze(-1).expand(-1, int(levels))
            return (pyro.sample(f"chances_{levels}", dist.Dirichlet(concentration).to_event(1)),)
        if kind == "poisson":
            rate = a / torch.where(location > 0, location, torch.ones_like(location))
            return (pyro.sample("intensities", dist.Gamma(a, rate).to_event(1)),)
        return (pyro.sample("words", dist.Dirichlet(a)),)

    @staticmethod
    def _given(name: str, parameters: tuple[Tensor, ...]) -> dist.TorchDistribution:
        """The distributions of the columns of one kind in all classes, batch shape (K, columns)."""
        kind = name.partition("_")[0]
        if kind == "gaussian":
            return dist.Normal(parameters[0], parameters[1].sqrt())
        if kind == "bernoulli":
            return dist.Bernoulli(parameters[0])
        if kind == "poisson":
            return dist.Poisson(parameters[0])
        return dist.Categorical(parameters[0]) if kind == "categorical" else dist.Multinomial(1, parameters[0])

    @staticmethod
    def _part(x: Tensor, index: list[int]) -> Tensor:
        return x if len(index) == x.shape[1] else x[:, index]

    def _rows(self, x: Tensor | None, y: Tensor | None, size: int | None) -> int:
        if not self._groups:
            if x is None:
                raise ValueError(
                    "This NaiveBayes has seen no data: name the kind of each column, and levels=, to draw from it."
                )
            self.prepare(x, y)
        if x is not None:
            if x.shape[-1] != len(self.location):
                raise ValueError(f"x has {x.shape[-1]} columns, but this NaiveBayes was built for {len(self.location)}.")
            return x.shape[0]
        if size is None:
            raise ValueError("NaiveBayes.model needs data x, or the number of rows to draw, size.")
        return size

    @torch.no_grad()
    def _log_joint(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """log p(x_n, y_n = k | draw), (draw, rows, K)."""
        self._check(x, None)
        table = draws if isinstance(draws, Mapping) else draws.matched
        share = torch.as_tensor(table["share"])
        flat = share.to(x).reshape(-1, self.classes)
        found = flat.log().unsqueeze(1).expand(-1, len(x), -1).clone()
        for name, index in self._groups.items():
            part = self._part(x, index)
            parameters = []
            for site in _SITES[name.partition("_")[0]]:
                value = torch.as_tensor(table[site.replace("*", name.partition("_")[2])]).to(x)
                parameters.append(value.reshape(-1, *value.shape[share.dim() - 1 :]))
            for i in range(len(found)):
                given = self._given(name, tuple(value[i] for value in parameters))
                found[i] += Classwise.table(given, part.nan_to_num(nan=0.0), ~part.isnan())
        return found

    def predict_proba(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Probability of each class for each row, averaged over draws.

        Args:
            x: (rows, D), NaN where missing.
            draws: A Posterior, or site to (…, *site).

        Returns:
            (rows, K), rows sum to 1.
        """
        return self._log_joint(x, draws).softmax(-1).mean(0)

    def predict(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Most probable class of each row, (rows,)."""
        return self.predict_proba(x, draws).argmax(-1)

    def score(self, x: Tensor, y: Tensor, draws: Fitted | Mapping[str, Tensor]) -> float:
        """Share of the rows whose class is predicted."""
        return float((self.predict(x, draws) == y).double().mean())

    def score_samples(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Log posterior predictive density of each row without its label, (rows,)."""
        log_densities = self._log_joint(x, draws).logsumexp(-1)
        return log_densities.logsumexp(0) - math.log(len(log_densities))


_SITES = {
    "gaussian": ("means", "variances"), "bernoulli": ("rates",), "categorical": ("chances_*",),
    "poisson": ("intensities",), "multinomial": ("words",),
}  # fmt: skip
