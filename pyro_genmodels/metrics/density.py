"""How well a model with hidden variables describes data: log p(x), and what its codes say, row by row and in nats.

Everything takes any program with a plate of rows, and its guide, however they were fitted: a model object with the methods
``model`` and ``guide``, or a program and ``guide=``. Weights are taken as they are; modules are in evaluation mode
meanwhile. A ``poutine.scale`` weighs a term of an objective, as β does, and is taken off.

References:
    M. Hoffman and M. Johnson, ELBO surgery: yet another way to carve up the variational evidence lower bound (2016).
    A. Alemi et al., Fixing a broken ELBO (2018): rate and distortion.
    B. Poole et al., On variational bounds of mutual information (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.annealing import AnnealedEvidence, Simulated, annealed_evidence, simulated
from inference.contract import Programmed
from inference.evidence import Evidence, check_count, check_weights, log_evidence
from inference.rowwise import Rowwise

__all__ = [
    "AnnealedEvidence",
    "Bracket",
    "Evidence",
    "RateDistortion",
    "Simulated",
    "aggregate_posterior_kl",
    "annealed_evidence",
    "log_evidence",
    "mutual_information",
    "rate_distortion",
    "simulated",
]

Model = Callable[..., Any] | Programmed


class RateDistortion(NamedTuple):
    """The two parts of the evidence lower bound, in nats.

    Attributes:
        rate: KL(q(z | x_n) ‖ p(z)), (row,), float64.
        distortion: −E_q log p(x_n | z), (row,).
        rate_se: Standard error of the rate, from the draws, (row,).
        distortion_se: That of the distortion, (row,).
    """

    rate: Tensor
    distortion: Tensor
    rate_se: Tensor
    distortion_se: Tensor

    @property
    def elbo(self) -> Tensor:
        """−rate − distortion ≤ log p(x_n), (row,)."""
        return -self.rate - self.distortion


class Bracket(NamedTuple):
    """Two estimates, whose expectations are on either side of what is estimated, in nats.

    Attributes:
        lower: Its expectation is at most the truth.
        upper: Its expectation is at least the truth.
        lower_se: Standard error of the first, from the spread between rows.
        upper_se: That of the second.
    """

    lower: float
    upper: float
    lower_se: float
    upper_se: float


@torch.no_grad()
def rate_distortion(
    model: Model,
    x: Any,
    *context: Any,
    guide: Callable[..., Any] | None = None,
    samples: int = 100,
    chunk: int | None = None,
    seed: int = 0,
) -> RateDistortion:
    """What a code costs, and what it leaves out.

        R_n = E_q [log q(z | x_n) − log p(z)],    D_n = −E_q log p(x_n | z),    −R_n − D_n ≤ log p(x_n)

    Finite sites c that the guide lacks are summed out: log p(z) = log Σ_c p(z, c).

    Args:
        model: A Pyro program with a plate of the rows, or an object with the methods ``model`` and ``guide``.
        x: Data, of which dimension 0 are the rows.
        *context: What else the program takes.
        guide: The guide; None takes that of the model.
        samples: Draws of each row.
        chunk: How many rows, repeated ones among them, a network is given at once.
        seed: Of the draws.

    Raises:
        ValueError: If the data do not fit the program.
        Unsupported: If a hidden site belongs to no row, rows depend on one another, or no guide draws what is hidden.
    """
    view = _view(model, x, context, guide, "rate_distortion", samples, chunk)
    parts = []
    with view.running(seed):
        for index in view.blocks():
            mean, square = torch.zeros(2, 2, len(index), dtype=torch.float64, device=index.device)
            shift = None  # sums of squares are about the first draws
            for values, log_q, count in _units(view, index, samples):
                terms = view.terms(values, index, count, chunk)
                pair = torch.stack([log_q - terms.prior, terms.prior - terms.joint])  # (2, draw, row)
                check_weights(pair.sum(0), index, view.name)
                shift = pair[:, :1].mean(1) if shift is None else shift
                mean += (pair - shift.unsqueeze(1)).sum(1)
                square += (pair - shift.unsqueeze(1)).square().sum(1)
            assert shift is not None
            variance = (square / samples - (mean / samples).square()).clamp(min=0.0)
            se = (variance / (samples - 1)).sqrt() if samples > 1 else torch.full_like(variance, math.inf)
            parts.append((*(shift + mean / samples), *se))
    return RateDistortion(*(torch.cat(column) for column in zip(*parts)))


def mutual_information(
    model: Model,
    x: Any,
    *context: Any,
    guide: Callable[..., Any] | None = None,
    samples: int = 10,
    seed: int = 0,
) -> Bracket:
    """Mutual information of x and z where rows come from the data and codes from the guide.

        I = E log q(z | x) / q(z),    q(z) = E_x q(z | x)

    q(z) is a mixture over the N rows. With the row that z came from among them, the estimate is the mutual information of
    these rows exactly, up to the noise of the draws; of the population that they came from it is a lower bound, and at most
    log N: where ``lower`` is near log N, it says no more than that. Without that row (leave-one-out) the expectation is an
    upper bound for the population. The bounds meet as N grows.

    Args:
        model: A Pyro program with a plate of the rows, or an object with the methods ``model`` and ``guide``.
        x: Data, of which dimension 0 are the rows, at least 2.
        *context: What else the program takes.
        guide: The guide; None takes that of the model.
        samples: Draws of each row; N² of them times as many densities are computed.
        seed: Of the draws.

    Raises:
        ValueError: If the data do not fit the program.
        Unsupported: As ``rate_distortion``.
    """
    own, mixed, others, _ = _aggregate("mutual_information", model, x, context, guide, samples, seed, False)
    return _bracket(own - mixed, own - others)


def aggregate_posterior_kl(
    model: Model,
    x: Any,
    *context: Any,
    guide: Callable[..., Any] | None = None,
    samples: int = 10,
    seed: int = 0,
) -> Bracket:
    """KL(q(z) ‖ p(z)) of the average posterior from the prior: the rate that tells rows from noise, and no row from another.

        KL(q(z) ‖ p(z)) = rate − I(x; z)

    With the row that z came from in q(z) it is that of these rows exactly, up to the noise of the draws, and an upper bound
    for the population; without it (leave-one-out), a lower bound. See ``mutual_information``, also for the arguments.
    """
    _, mixed, others, prior = _aggregate("aggregate_posterior_kl", model, x, context, guide, samples, seed, True)
    return _bracket(others - prior, mixed - prior)


def _view(model: Model, x: Any, context: Any, guide: Any, purpose: str, samples: int, chunk: int | None = None) -> Rowwise:
    check_count("samples", samples)
    if chunk is not None:
        check_count("chunk", chunk)
    view = Rowwise(model, (x, *context), guide, purpose=purpose)
    if not view.sites:
        raise ValueError(f"{purpose} is about what a guide draws, but it draws nothing: all sites are summed out.")
    with view.running(0), torch.no_grad():
        view.check_data()
    return view


def _units(view: Rowwise, index: Tensor, samples: int) -> Iterator[tuple[dict[str, Tensor], Tensor, int]]:
    """Draws of rows, log q and how many draws, until there are enough."""
    most = view.unit(len(index))
    for begin in range(0, samples, most):
        count = min(most, samples - begin)
        yield *view.draw(index, count), count


@torch.no_grad()
def _aggregate(
    purpose: str, model: Model, x: Any, context: Any, guide: Any, samples: int, seed: int, needs_prior: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q(z | x_n), log q(z), log q(z) without row n, and log p(z), of draws z of row n, averaged over draws, (row,)."""
    view = _view(model, x, context, guide, purpose, samples)
    if view.rows < 2:
        raise ValueError(f"{purpose} compares rows, but there is only one.")
    parts = []
    with view.running(seed):
        blocks = [*view.blocks()]
        for index in blocks:
            sums = torch.zeros(4, len(index), dtype=torch.float64, device=index.device)
            for values, own, count in _units(view, index, samples):
                prior = view.terms(values, index, count).prior if needs_prior else torch.zeros_like(own)
                others = _mixed(view, values, index, count, blocks)
                mixed = torch.logaddexp(own, others) - math.log(view.rows)
                sums += torch.stack([own, mixed, others - math.log(view.rows - 1), prior]).sum(1)
            parts.append(sums / samples)
    own, mixed, others, prior = torch.cat(parts, 1)
    return own, mixed, others, prior


def _mixed(view: Rowwise, values: dict[str, Tensor], index: Tensor, count: int, blocks: list[Tensor]) -> Tensor:
    """log Σ_m q(z | x_m) over all rows m but the one that z came from, (draw, row)."""
    size = count * len(index)
    total = torch.full((size,), -torch.inf, dtype=torch.float64, device=index.device)
    source = index.repeat(count)
    for components in blocks:
        step = view.unit(len(components))
        for begin in range(0, size, step):
            length = min(step, size - begin)
            repeated = {}
            for name, value in values.items():
                axis = view.axis(name)
                repeated[name] = value.narrow(axis, begin, length).repeat_interleave(len(components), axis)
            table = view.log_q(repeated, components, length)  # (draw, component)
            is_own = source[begin : begin + length].unsqueeze(1) == components
            part = table.masked_fill(is_own, -torch.inf).logsumexp(1)
            total[begin : begin + length] = torch.logaddexp(total[begin : begin + length], part)
    return total.unflatten(0, (count, -1))


def _bracket(lower: Tensor, upper: Tensor) -> Bracket:
    root = math.sqrt(len(lower))
    return Bracket(float(lower.mean()), float(upper.mean()), float(lower.std() / root), float(upper.std() / root))
