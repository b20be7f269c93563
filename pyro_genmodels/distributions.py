"""Distributions that Pyro lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

import inference.transforms  # noqa: F401  (the bijection to positive definite matrices)
from inference.contract import Augmented

__all__ = ["Classwise", "Columns", "InverseWishart", "LatentScaleT", "MarkovChain", "Mixed", "PartialNormal"]

_MATRICES = 2**19  # numbers in the matrices of rows with gaps that are looked at together, at least


class Classwise(TorchDistribution):
    """Rows whose columns are independent given the class of the row.

        p(x | k) = Π_j p_kj(x_j),    k = index

    The log-probabilities of all rows under all K classes come first, as a product of matrices where the family allows for
    one, and each row picks its own: parameters are never gathered row by row, which text has no memory for.

    Args:
        given: Distributions of columns, batch shape (K, D); or a ``Multinomial``, batch shape (K,), of which only the
            probabilities are used: its counts have the log-probability of their words in some order, Σ_j x_j log θ_kj,
            without the multinomial coefficient, which depends on no parameter.
        index: Class of each row, (*batch).
        is_seen: Which entries count, (*batch, D); None: all.
        lengths: Number of words of each row that is drawn from a multinomial, (*batch).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        given: TorchDistribution,
        index: Tensor,
        is_seen: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.given, self.index, self.is_seen, self.lengths = given, index, is_seen, lengths
        rows = Size() if is_seen is None else is_seen.shape[:-1]
        batch = torch.broadcast_shapes(index.shape, rows)
        columns = given.event_shape if given.event_shape else given.batch_shape[-1:]
        super().__init__(batch, columns, validate_args=False)

    @property
    def support(self) -> Any:
        if isinstance(self.given, dist.Multinomial):
            return constraints.independent(constraints.nonnegative_integer, 1)
        if isinstance(self.given, dist.Categorical):
            return constraints.independent(constraints.integer_interval(0, self.given.logits.shape[-1] - 1), 1)
        return constraints.independent(self.given.support, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Classwise:
        batch_shape = Size(batch_shape)
        return Classwise(self.given, self.index.expand(batch_shape), self.is_seen, self.lengths)

    @staticmethod
    def table(given: TorchDistribution, value: Tensor, is_seen: Tensor | None = None) -> Tensor:
        """log p(x | k) of every row under every class, (*batch, K)."""
        if isinstance(given, dist.Multinomial):
            return _product(value, given.logits)
        if isinstance(given, dist.Bernoulli):
            seen = torch.ones_like(value) if is_seen is None else is_seen.to(value)
            return _product(seen * value, given.logits) - _product(seen, torch.nn.functional.softplus(given.logits))
        if isinstance(given, dist.Poisson):
            seen = torch.ones_like(value) if is_seen is None else is_seen.to(value)
            rate = given.rate.clamp(min=torch.finfo(value.dtype).tiny)  # 0 log 0 = 0
            constant = (seen * torch.lgamma(value + 1.0)).sum(-1, keepdim=True)
            return _product(seen * value, rate.log()) - _product(seen, rate) - constant
        terms = given.log_prob(value.unsqueeze(-2))
        return (terms if is_seen is None else torch.where(is_seen.unsqueeze(-2), terms, 0.0)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        table = self.table(self.given, value, self.is_seen)
        shape = torch.broadcast_shapes(table.shape[:-1], self.index.shape)
        index = self.index.expand(shape).unsqueeze(-1)
        return table.expand(*shape, -1).gather(-1, index).squeeze(-1)

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape) + self.batch_shape
        index = self.index.expand(shape)
        if not isinstance(self.given, dist.Multinomial):
            rows = self.given.sample(shape)  # of every class, (*batch, K, D)
            chosen = index[..., None, None].expand(*shape, 1, rows.shape[-1])
            return rows.gather(-2, chosen).squeeze(-2).to(_floating(self.given))
        probs = self.given.probs[index]
        lengths = torch.as_tensor(1.0 if self.lengths is None else self.lengths).to(probs).expand(shape)
        longest = max(int(lengths.max()), 1)
        words = torch.multinomial(probs.reshape(-1, probs.shape[-1]), longest, replacement=True).reshape(*shape, longest)
        is_word = torch.arange(longest, device=probs.device) < lengths.unsqueeze(-1)
        return torch.zeros_like(probs).scatter_add(-1, words, is_word.to(probs))


def _product(value: Tensor, parameters: Tensor) -> Tensor:
    """Products of rows (*batch, D) with those of every class (K, D), (*batch, K).

    With the rows on the right: where chains have parameters of their own, a product of matrices, and no copies of the rows.
    """
    flat = value.reshape(-1, value.shape[-1])
    return (parameters @ flat.mT).mT.reshape(*value.shape[:-1], -1)


def _floating(given: TorchDistribution) -> torch.dtype:
    """The type of the parameters, which counts and labels have in a table."""
    return next(value.dtype for value in vars(given).values() if isinstance(value, Tensor))


class InverseWishart(TorchDistribution):
    """Inverse Wishart distribution of a covariance matrix Σ (D × D).

        p(Σ) ∝ |Σ|^(−(ν + D + 1)/2) exp(−½ tr(Ψ Σ⁻¹)),    E Σ = Ψ / (ν − D − 1)

    Args:
        df: Degrees of freedom ν > D − 1, (*batch).
        scale_matrix: Ψ, positive definite, (*batch, D, D).

    References:
        A. Gelman et al., Bayesian Data Analysis (2013), appendix A.
    """

    arg_constraints = {"df": constraints.positive, "scale_matrix": constraints.positive_definite}  # noqa: RUF012
    support = constraints.positive_definite
    has_rsample = True

    def __init__(self, df: Tensor | float, scale_matrix: Tensor, validate_args: bool | None = None) -> None:
        df = torch.as_tensor(df, dtype=scale_matrix.dtype, device=scale_matrix.device)
        batch = torch.broadcast_shapes(df.shape, scale_matrix.shape[:-2])
        self.df = df.expand(batch)
        self.scale_matrix = scale_matrix.expand(*batch, *scale_matrix.shape[-2:])
        super().__init__(batch, scale_matrix.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InverseWishart:
        batch_shape = Size(batch_shape)
        matrix = self.scale_matrix.expand(*batch_shape, *self.event_shape)
        return InverseWishart(self.df.expand(batch_shape), matrix, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.scale_matrix / (self.df - self.event_shape[-1] - 1.0)[..., None, None]

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        """Σ = C A⁻ᵀ A⁻¹ Cᵀ with Ψ = C Cᵀ and A the lower triangle of Bartlett's decomposition of a Wishart matrix."""
        size, shape = self.event_shape[-1], Size(sample_shape) + self.batch_shape
        steps = torch.arange(size, dtype=self.df.dtype, device=self.df.device)
        freedom = (self.df.unsqueeze(-1) - steps).expand(*shape, size)
        diagonal = (2.0 * torch._standard_gamma(0.5 * freedom)).sqrt()
        noise = torch.randn(*shape, size, size, dtype=self.df.dtype, device=self.df.device)
        bartlett = noise.tril(-1) + torch.diag_embed(diagonal)
        factor = torch.linalg.cholesky(self.scale_matrix).expand(*shape, size, size)
        root = torch.linalg.solve_triangular(bartlett, factor.mT, upper=False)
        return root.mT @ root

    def log_prob(self, value: Tensor) -> Tensor:
        size = self.event_shape[-1]
        root, factor = torch.linalg.cholesky(value), torch.linalg.cholesky(self.scale_matrix)
        log_det = 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det_scale = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        shape = torch.broadcast_shapes(root.shape, factor.shape)
        trace = torch.linalg.solve_triangular(root.expand(shape), factor.expand(shape), upper=False).square().sum((-2, -1))
        log_gamma = torch.lgamma(0.5 * (self.df.unsqueeze(-1) - torch.arange(size, device=value.device))).sum(-1)
        log_gamma = log_gamma + 0.25 * size * (size - 1) * math.log(math.pi)
        log_scale = 0.5 * self.df * (log_det_scale - size * math.log(2.0)) - log_gamma
        return log_scale - 0.5 * (self.df + size + 1.0) * log_det - 0.5 * trace


class Filled(NamedTuple):
    """What the known entries of rows say of all of them: x | known ~ N(mean, covariance).

    Attributes:
        mean: Known entries as they are, (…, D).
        covariance: Zero in the rows and columns of known entries, (…, D, D).
    """

    mean: Tensor
    covariance: Tensor


class PartialNormal(TorchDistribution):
    """Multivariate normal of which some entries are not observed.

    An entry that is NaN has been integrated out: the log-density is that of the others. EM fills it in.

    Args:
        loc: Mean, (*batch, D).
        scale_tril: Lower Cholesky factor of the covariance, (*batch, D, D).

    References:
        D. Rubin, Inference and missing data (1976).
        Z. Ghahramani and M. Jordan, Supervised learning from incomplete data via an EM approach (1994).
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None, batch_shape: Size | None = None
    ) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        shape = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2]) if batch_shape is None else batch_shape
        super().__init__(shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PartialNormal:
        return PartialNormal(self.loc, self.scale_tril, batch_shape=Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def _pieces(self, value: Tensor, weights: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """Values, and weights in the shape of their log-probabilities, few rows at a time: each takes a matrix."""
        axis = 1 - value.dim()  # of the rows, from the right, without the event
        shape = torch.broadcast_shapes(self.loc.shape[:-1], self.scale_tril.shape[:-2])
        if value.dim() < 2 or (len(shape) >= -axis and shape[axis] > 1):
            return [(value, weights)]
        width, most = self.event_shape[0], max(_MATRICES, 32 * value.numel())
        each = max(1, shape.numel() * value[:1].numel() * width)
        count = max(1, most // each)
        parts = value.split(count)
        cut = [None] * len(parts) if weights is None else weights.split(count, axis)
        return list(zip(parts, cut, strict=True))

    def _known(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which entries are known, how far they are from the mean, and a Cholesky factor of their covariance.

        Unknown entries take part as independent ones of variance 1, at their mean.
        """
        is_known = ~value.isnan()
        residual = torch.where(is_known, value - self.loc, 0.0)
        known = is_known.to(self.loc.dtype)
        covariance = self.scale_tril @ self.scale_tril.mT
        masked = covariance * (known.unsqueeze(-1) * known.unsqueeze(-2)) + torch.diag_embed(1.0 - known)
        return is_known, residual, torch.linalg.cholesky(masked)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = [self._log_prob(part) for part, _ in self._pieces(value)]
        log_prob = parts[0] if len(parts) == 1 else torch.cat(parts, 1 - value.dim())
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _log_prob(self, value: Tensor) -> Tensor:
        is_known, residual, factor = self._known(value)
        scaled = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        count = is_known.sum(-1).to(log_det.dtype)
        return -0.5 * (scaled.square().sum(-1) + count * math.log(2.0 * math.pi)) - log_det

    def filled(self, value: Tensor) -> Filled:
        """The distribution of all entries, given those that are known."""
        is_known, residual, factor = self._known(value)
        covariance = self.scale_tril @ self.scale_tril.mT
        to_known = covariance * is_known.to(self.loc.dtype).unsqueeze(-2)
        root = torch.linalg.solve_triangular(factor, to_known.mT, upper=False)  # of what the known entries explain
        slope = torch.linalg.solve_triangular(factor.mT, root, upper=True).mT
        mean = torch.where(is_known, value, self.loc + (slope @ residual.unsqueeze(-1)).squeeze(-1))
        unknown = (~is_known).to(self.loc.dtype)
        left = (covariance - root.mT @ root) * (unknown.unsqueeze(-1) * unknown.unsqueeze(-2))
        return Filled(mean, left)

    def summary(self, value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ w, Σ w E(x − c) and Σ w E(x − c)(x − c)ᵀ in the shape of the parameters, and c, the mean."""
        shape = torch.broadcast_shapes(self.loc.shape[:-1], self.scale_tril.shape[:-2])
        totals = []
        for part, own in self._pieces(value, weights):
            assert own is not None
            filled = self.filled(part)
            residual = filled.mean - self.loc
            first = own.unsqueeze(-1) * residual
            second = own[..., None, None] * (filled.covariance + residual.unsqueeze(-1) * residual.unsqueeze(-2))
            sums = (own, shape), (first, shape + self.event_shape), (second, shape + self.event_shape * 2)
            totals.append([_summed(term.double(), goal) for term, goal in sums])
        count, first, second = (torch.stack(list(terms)).sum(0).to(value.dtype) for terms in zip(*totals, strict=True))
        return count, first, second, self.loc.expand(first.shape)

    def expected_log_prob(self, value: Tensor, summary: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        count, first, second, centre = summary
        shift = self.loc - centre
        moved = first.unsqueeze(-1) * shift.unsqueeze(-2)
        scatter = second - moved - moved.mT + count[..., None, None] * (shift.unsqueeze(-1) * shift.unsqueeze(-2))
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * self.event_shape[0] * math.log(2.0 * math.pi)
        return -0.5 * (torch.cholesky_inverse(self.scale_tril) * scatter).sum() - (count * (log_det + constant)).sum()


def _summed(table: Tensor, shape: Size) -> Tensor:
    """A table summed over what it has more of than a shape."""
    extra = table.dim() - len(shape)
    table = table.sum(tuple(range(extra))) if extra else table
    dims = tuple(i for i, (have, want) in enumerate(zip(table.shape, shape, strict=True)) if want == 1 and have > 1)
    return table.sum(dims, keepdim=True) if dims else table


class Columns(TorchDistribution):
    """Rows whose columns are independent, each of a family of its own. Entries that are NaN have not been observed.

    Args:
        parts: Pairs of the numbers of columns and a distribution of one number, with these columns for its last batch
            dimension, (*batch, columns).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, parts: Sequence[tuple[Sequence[int], Any]], batch_shape: Size | None = None) -> None:
        self.parts = tuple((tuple(columns), part) for columns, part in parts)
        shape = torch.broadcast_shapes(*(part.batch_shape[:-1] for _, part in self.parts))
        width = sum(len(columns) for columns, _ in self.parts)
        super().__init__(shape if batch_shape is None else batch_shape, Size((width,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Columns:
        return Columns(self.parts, batch_shape=Size(batch_shape))

    @property
    def _is_plain(self) -> bool:
        """Whether there is one family, whose columns are in order."""
        return len(self.parts) == 1 and self.parts[0][0] == tuple(range(self.event_shape[0]))

    def _joined(self, values: Sequence[Tensor]) -> Tensor:
        order = torch.tensor([column for columns, _ in self.parts for column in columns]).argsort()
        return torch.cat(list(values), -1)[..., order.to(values[0].device)]

    @property
    def mean(self) -> Tensor:
        shape = self.batch_shape
        return self._joined([_mean(part).expand(*shape, len(columns)) for columns, part in self.parts])

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = self.batch_shape
        drawn = [part.expand(Size((*shape, len(columns)))).sample(Size(sample_shape)) for columns, part in self.parts]
        wide = torch.get_default_dtype() if not any(value.is_floating_point() for value in drawn) else None
        like = next((value.dtype for value in drawn if value.is_floating_point()), wide)
        return self._joined([value.to(like) for value in drawn])

    def log_prob(self, value: Tensor) -> Tensor:
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for columns, part in self.parts:
            own, is_known = self._own(value, columns, part)
            total = total + torch.where(is_known, part.log_prob(own), 0.0).sum(-1)
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    def _own(self, value: Tensor, columns: tuple[int, ...], part: Any) -> tuple[Tensor, Tensor]:
        """The columns of a part, something inside the support where they are unknown; and which entries are known."""
        own = value if self._is_plain else value[..., torch.tensor(columns, device=value.device)]
        is_known = ~own.isnan()
        return torch.where(is_known, own, float(part.support is constraints.positive)), is_known

    def summary(self, value: Tensor, weights: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The weights, and the expected precisions of the parts that hide a scale."""
        precisions = {}
        for i, (columns, part) in enumerate(self.parts):
            if isinstance(part, LatentScaleT):
                precisions[i] = part.precision(self._own(value, columns, part)[0])
        return weights, precisions

    def expected_log_prob(self, value: Tensor, summary: tuple[Tensor, dict[int, Tensor]]) -> Tensor:
        weights, precisions = summary
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for i, (columns, part) in enumerate(self.parts):
            own, is_known = self._own(value, columns, part)
            log_prob = part.log_prob_at(own, precisions[i]) if i in precisions else part.log_prob(own)
            total = total + torch.where(is_known, log_prob, 0.0).sum(-1)
        return _weighted(weights, total)


def _weighted(weights: Tensor, table: Tensor) -> Tensor:
    """Sum of a table with weights; what has no weight may be infinite."""
    return torch.where(weights > 0, weights * torch.where(weights > 0, table, 0.0), 0.0).sum()


def _mean(part: Any) -> Tensor:
    """Mean of a distribution of one number; the most probable label of labels."""
    mean: Tensor = part.probs.argmax(-1).to(part.probs) if isinstance(part, torch.distributions.Categorical) else part.mean
    return mean


class Mixed(TorchDistribution):
    """A mixture, its component summed out; EM fills it in.

        p(x) = Σ_k w_k p_k(x)

    Args:
        weights: w, (*batch, K).
        components: A distribution with the components in its last batch dimension, (*batch, K).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, weights: Tensor, components: Any, batch_shape: Size | None = None) -> None:
        self.weights, self.components = weights, components
        shape = torch.broadcast_shapes(weights.shape, components.batch_shape)[:-1] if batch_shape is None else batch_shape
        super().__init__(shape, components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.components.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixed:
        return Mixed(self.weights, self.components, batch_shape=Size(batch_shape))

    def _terms(self, value: Tensor) -> Tensor:
        """log w_k p_k(x), (…, K)."""
        log_prob: Tensor = self.weights.log() + self.components.log_prob(self._spread(value))
        return log_prob

    def _spread(self, value: Tensor) -> Tensor:
        return value.unsqueeze(value.dim() - len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self._terms(value).logsumexp(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def summary(self, value: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """How much each component counts for each row, and what the components hide."""
        shares = weights.unsqueeze(-1) * self._terms(value).softmax(-1)
        is_hiding = isinstance(self.components, Augmented)
        return shares, {"components": self.components.summary(self._spread(value), shares)} if is_hiding else {}

    def expected_log_prob(self, value: Tensor, summary: tuple[Tensor, dict[str, Any]]) -> Tensor:
        shares, hidden = summary
        if hidden:
            inside = self.components.expected_log_prob(self._spread(value), hidden["components"])
        else:
            inside = _weighted(shares, self.components.log_prob(self._spread(value)))
        total: Tensor = inside + _weighted(shares, self.weights.log())
        return total

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape, components = Size(sample_shape) + self.batch_shape, self.weights.shape[-1]
        z = torch.distributions.Categorical(probs=self.weights.expand(*self.batch_shape, components)).sample(
            Size(sample_shape)
        )
        rows = self.components.expand(Size((*self.batch_shape, components))).sample(Size(sample_shape))
        index = z.reshape(*shape, 1, *(1,) * len(self.event_shape)).expand(*shape, 1, *self.event_shape)
        return rows.gather(len(shape), index).squeeze(len(shape))


class LatentScaleT(torch.distributions.StudentT, TorchDistribution):
    """Student's t as a normal of random scale, which EM fills in; its degrees of freedom are known.

        u ~ Gamma(ν/2, ν/2),  x ~ N(μ, s² / u)

    References:
        C. Liu and D. Rubin, ML estimation of the t distribution using EM and its extensions, ECM and ECME (1995).
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> LatentScaleT:
        shape = Size(batch_shape)
        return LatentScaleT(self.df.expand(shape), self.loc.expand(shape), self.scale.expand(shape), validate_args=False)

    def precision(self, value: Tensor) -> Tensor:
        """E u given x."""
        return (self.df + 1.0) / (self.df + ((value - self.loc) / self.scale).square())

    def log_prob_at(self, value: Tensor, precision: Tensor) -> Tensor:
        """E log p(x | u) at the expected precision, up to a constant."""
        return -self.scale.log() - 0.5 * precision * ((value - self.loc) / self.scale).square()


class MarkovChain(TorchDistribution):
    """A sequence of finitely many states, each of which depends on the one before it alone.

        z_1 ~ Categorical(initial),  z_t ~ Categorical(transitions[z_{t−1}]),    t = 2, …, T

    Every back-end sums a latent one out, or draws it as one, in logarithmic depth; statements in a plate of T elements may
    depend on it element by element: the states of a hidden Markov model.

    Args:
        initial: Probabilities of the first state, (K,).
        transitions: Probabilities of the next state given the present one, rows sum to 1, (K, K); or (T − 1, K, K).
        length: T, at least 1.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> stays = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> MarkovChain(torch.tensor([0.5, 0.5]), stays, 3).log_prob(torch.tensor([0, 0, 1])).exp()
        tensor(0.0450)

    References:
        L. Rabiner, A tutorial on hidden Markov models and selected applications in speech recognition (1989).
    """

    arg_constraints: dict[str, Any] = {  # noqa: RUF012
        "initial": constraints.simplex,
        "transitions": constraints.independent(constraints.simplex, 1),
    }

    def __init__(self, initial: Tensor, transitions: Tensor, length: int, validate_args: bool | None = None) -> None:
        states = initial.shape[-1]
        if initial.dim() != 1:
            raise ValueError(
                f"initial has shape {tuple(initial.shape)}, but a MarkovChain is one sequence, which has ({states},). "
                "Sample each sequence in a Python loop."
            )
        if length < 1:
            raise ValueError(f"A MarkovChain has at least 1 state, but length is {length}.")
        if transitions.shape[-2:] != (states, states) or (transitions.dim() > 2 and transitions.shape[-3] != length - 1):
            raise ValueError(
                f"transitions has shape {tuple(transitions.shape)}, but must be ({states}, {states}), or ({length - 1}, "
                f"{states}, {states}), for {states} states and a length of {length}."
            )
        self.initial, self.transitions, self.length = initial, transitions, length
        super().__init__(initial.shape[:-1], Size([length]), validate_args=validate_args)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.initial.shape[-1] - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovChain:
        if Size(batch_shape) != self.batch_shape:
            raise ValueError("A MarkovChain is one sequence: sample each sequence in a Python loop, not in a plate.")
        return self

    def links(self) -> tuple[Tensor, Tensor]:
        states = self.initial.shape[-1]
        return self.initial.log(), self.transitions.log().expand(self.length - 1, states, states)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.long()
        first, steps = self.links()
        here, there = value[..., :-1], value[..., 1:]
        moves = steps[torch.arange(self.length - 1, device=value.device), here, there]
        return first[value[..., 0]] + moves.sum(-1)

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape)
        with torch.no_grad():
            first, steps = self.initial.cumsum(-1), self.transitions.cumsum(-1)
            uniforms = torch.rand(shape.numel(), self.length, 1, dtype=first.dtype, device=first.device)
            state = (first < uniforms[:, 0] * first[-1]).sum(-1, keepdim=True)
            # each step is a map from state to state; maps are composed with those 1, 2, 4, … steps before
            maps = (steps < uniforms[:, 1:, None] * steps[..., -1:]).sum(-1)
            distance = 1
            while distance < self.length - 1:
                maps = torch.cat([maps[:, :distance], maps[:, distance:].gather(-1, maps[:, :-distance])], 1)
                distance *= 2
            later = maps.gather(-1, state.unsqueeze(1).expand(-1, self.length - 1, -1)).squeeze(-1)
            return torch.cat([state, later], 1).reshape(shape + self.event_shape)
