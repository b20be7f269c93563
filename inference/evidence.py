"""log p(x) of each row, by importance sampling from a guide: any number of draws, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference import arviz
from inference.contract import Programmed
from inference.rowwise import Rowwise

__all__ = ["Evidence", "Tally", "check_count", "check_weights", "log_evidence"]


class Evidence(NamedTuple):
    """Estimates of log p(x_n).

    Attributes:
        log_p: Of each row, (row,), float64. Expected below log p(x_n), for many draws by half the square of ``se``.
        se: Its standard error, from the weights, (row,); worth nothing where k-hat is above 0.7.
        pareto_k: k-hat of the weights of each row, (row,): below 0.7 the estimate can be relied on; minus infinity where the
            largest weights are equal, NaN for fewer than 25 draws.
        samples: Draws of each row; 0 where nothing had to be drawn.
    """

    log_p: Tensor
    se: Tensor
    pareto_k: Tensor
    samples: int

    @property
    def mean(self) -> float:
        """Mean log-likelihood of the rows, in nats; minus what is reported as NLL."""
        return float(self.log_p.mean())

    @property
    def findings(self) -> list[str]:
        """What speaks against the estimates, in words."""
        bad, rows = int((self.pareto_k > arviz.LARGEST_K).sum()), len(self.log_p)
        found = []
        if bad:
            found.append(
                f"k-hat is above 0.7 at {bad} of {rows} rows: a few draws decide what is estimated there, which is then too "
                "low. Take more samples, or compare with annealed_evidence."
            )
        if gone := int((self.log_p == -torch.inf).sum()):
            found.append(f"No draw of {gone} of {rows} rows has a density under the model: their log p is minus infinity.")
        return found


class Tally:
    """Sums over log weights that come in parts: log Σ w, log Σ w², and the largest.

    Args:
        rows: Number of sets of weights.
        samples: Weights of each set in all.
        device: Where they are.
    """

    def __init__(self, rows: int, samples: int, device: torch.device | None = None) -> None:
        empty = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.samples, self.total, self.squares = samples, empty, empty
        self.finite = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top = torch.full(
            (rows, min(samples, arviz.tail_length(samples) + 1)), -torch.inf, dtype=torch.float64, device=device
        )

    def add(self, log_weights: Tensor) -> None:
        """Takes log weights, (draw, row)."""
        log_weights = log_weights.double()
        self.total = torch.logaddexp(self.total, log_weights.logsumexp(0))
        self.squares = torch.logaddexp(self.squares, (2.0 * log_weights).logsumexp(0))
        self.finite = self.finite + (log_weights > -torch.inf).sum(0)
        self.top = torch.cat([self.top, log_weights.mT], 1).topk(self.top.shape[1], 1).values

    def evidence(self) -> Evidence:
        """The logarithm of the mean weight of each set, its standard error, and k-hat."""
        variance = (self.squares - 2.0 * self.total).exp() - 1.0 / self.samples
        return Evidence(
            self.total - math.log(self.samples),
            variance.clamp(min=0.0).sqrt(),
            torch.tensor(
                [arviz.pareto_k_of_largest(*each) for each in zip(self.top.cpu().numpy(), self.finite.tolist())]
            ).to(self.total),
            self.samples,
        )


@torch.no_grad()
def log_evidence(
    model: Callable[..., Any] | Programmed,
    x: Any,
    *context: Any,
    guide: Callable[..., Any] | None = None,
    samples: int = 5000,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evidence:
    """log p(x_n) of each row, by importance sampling from the guide.

        log p(x_n) ≈ log (1/S) Σ_s p(x_n, z_ns) / q(z_ns | x_n),    z_ns ~ q(z | x_n)

    Finite sites that the guide lacks are summed out; where nothing else is hidden, the answer is exact. In expectation the
    estimate is below log p(x_n), the less so the more samples (Burda et al.); it says so itself, by ``pareto_k``.
    A ``pyro.factor`` inside of the plate is part of what is averaged, as it is of any joint density of the program: one that
    belongs to an objective alone, such as the loss of a classifier, is to be left out first.

    Args:
        model: A Pyro program with a plate of the rows, or an object with the methods ``model`` and ``guide``. Its weights
            are taken as they are; modules are in evaluation mode meanwhile. ``poutine.scale`` is taken off.
        x: Data, of which dimension 0 are the rows.
        *context: What else the program takes; a tensor with as many rows as x is taken row by row.
        guide: The guide; None takes that of the model.
        samples: Draws of each row, S.
        chunk: How many rows, repeated ones among them, a network is given at once, by default as many as fit into a cache.
            The answer does not depend on it, but for the rounding of matrix products.
        seed: Of the draws.
        progress: Whether to show a bar over rows.

    Returns:
        Estimates with their standard errors, float64.

    Raises:
        ValueError: If the data do not fit the program, or a weight is not a number.
        Unsupported: If a hidden site belongs to no row, rows depend on one another, or no guide draws what is hidden.

    References:
        Y. Burda, R. Grosse and R. Salakhutdinov, Importance weighted autoencoders (2016).
        A. Vehtari et al., Pareto smoothed importance sampling (2024).
    """
    check_count("samples", samples)
    if chunk is not None:
        check_count("chunk", chunk)
    view = Rowwise(model, (x, *context), guide, purpose="log_evidence")
    found = []
    with view.running(seed):
        view.check_data()
        for index in view.blocks(progress=progress):
            if not view.sites:
                exact = view.terms({}, index, 1, chunk).joint[0]
                found.append(Evidence(exact, torch.zeros_like(exact), torch.full_like(exact, -torch.inf), 0))
                continue
            tally, most = Tally(len(index), samples, index.device), view.unit(len(index))
            for begin in range(0, samples, most):
                count = min(most, samples - begin)
                values, log_q = view.draw(index, count)
                log_weights = view.terms(values, index, count, chunk).joint - log_q
                check_weights(log_weights, index, view.name)
                tally.add(log_weights)
            found.append(tally.evidence())
    log_p, se, pareto_k = (torch.cat(column) for column in zip(*(part[:3] for part in found)))
    return Evidence(log_p, se, pareto_k, found[0].samples)


def check_count(name: str, count: int) -> None:
    """Refuses a number that is no integer of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} is {count!r}, but must be an integer of at least 1.")


def check_weights(log_weights: Tensor, index: Tensor, name: str) -> None:
    """Raises if a log weight, (draw, row), is NaN or plus infinity."""
    bad = (log_weights.isnan() | (log_weights == torch.inf)).any(0).nonzero()
    if len(bad):
        raise ValueError(
            f"The log-density of row {int(index[bad[0]])} under {name} or its guide is NaN or infinite. Look for missing or "
            "extreme values in that row, and for an overflow in the program."
        )
