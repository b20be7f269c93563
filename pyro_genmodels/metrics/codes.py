"""What the codes of a model are good for: how many of their units say anything, and whether labels can be read off them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from inference.contract import Programmed, Unsupported
from inference.evidence import check_count
from inference.rowwise import Rowwise

__all__ = ["ActiveUnits", "Codes", "LinearProbe", "active_units", "linear_probe", "posterior_means"]


class Codes(NamedTuple):
    """Means of what rows hide, under the guide.

    Attributes:
        mean: Site to (row, …), float64.
        variance: Site to the variance of each mean by the draws that it comes from, (row, …).
    """

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


class ActiveUnits(NamedTuple):
    """Which units of a code follow the data.

    Attributes:
        variance: Site to Var_x E_q[z | x] of each unit, without the noise of the draws, so that it may be below zero.
        threshold: Above which a unit is active.
    """

    variance: dict[str, Tensor]
    threshold: float

    @property
    def active(self) -> int:
        """Number of active units, of all sites."""
        return sum(int((value > self.threshold).sum()) for value in self.variance.values())

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(value.numel() for value in self.variance.values())


class LinearProbe(NamedTuple):
    """A logistic regression of labels on codes.

    Attributes:
        accuracy: Share of the test rows whose label is found; of the training rows, if there are no others.
        train_accuracy: That of the training rows.
        weight: Of standardised codes, (class, column).
        bias: (class,).
        classes: Labels in the order of the weights.
    """

    accuracy: float
    train_accuracy: float
    weight: np.ndarray
    bias: np.ndarray
    classes: np.ndarray


@torch.no_grad()
def posterior_means(
    model: Callable[..., Any] | Programmed,
    x: Any,
    *context: Any,
    guide: Callable[..., Any] | None = None,
    samples: int = 100,
    seed: int = 0,
) -> Codes:
    """E_q[z | x_n] of each row, by draws from the guide.

    Args:
        model: A Pyro program with a plate of the rows, or an object with the methods ``model`` and ``guide``.
        x: Data, of which dimension 0 are the rows.
        *context: What else the program takes.
        guide: The guide; None takes that of the model.
        samples: Draws of each row, at least 2.
        seed: Of the draws.

    Raises:
        ValueError: If the data do not fit the program.
        Unsupported: If a hidden site is discrete or belongs to no row, rows depend on one another, or there is no guide.
    """
    check_count("samples", samples)
    if samples < 2:
        raise ValueError("samples is 1, but the noise of a mean shows in 2 draws at least.")
    view = Rowwise(model, (x, *context), guide, purpose="posterior_means")
    for name, site in view.sites.items():
        if not site.is_continuous:
            raise Unsupported(
                f"'{name}' ({site.family}) is discrete: a mean of its values says nothing. Leave it out of the guide."
            )
    if not view.sites:
        raise Unsupported("There are no means of what is hidden: all sites are discrete.")
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in view.sites}
    with view.running(seed):
        view.check_data()
        for index in view.blocks():
            sums: dict[str, Tensor] = {}
            squares: dict[str, Tensor] = {}
            shifts: dict[str, Tensor] = {}
            most = view.unit(len(index))
            for begin in range(0, samples, most):
                values, _ = view.draw(index, min(most, samples - begin))
                for name, value in values.items():
                    table = value.movedim(view.axis(name), 0).unflatten(0, (-1, len(index))).double()
                    shift = shifts.setdefault(name, table.mean(0))
                    sums[name] = sums.get(name, 0.0) + (table - shift).sum(0)
                    squares[name] = squares.get(name, 0.0) + (table - shift).square().sum(0)
            for name, shift in shifts.items():
                off = sums[name] / samples
                variance = (squares[name] / samples - off.square()).clamp(min=0.0) / (samples - 1)
                found[name].append((shift + off, variance))
    joined = {name: [torch.cat(column) for column in zip(*parts)] for name, parts in found.items()}
    return Codes({name: pair[0] for name, pair in joined.items()}, {name: pair[1] for name, pair in joined.items()})


def active_units(
    model: Callable[..., Any] | Programmed,
    x: Any,
    *context: Any,
    threshold: float = 0.01,
    guide: Callable[..., Any] | None = None,
    samples: int = 100,
    seed: int = 0,
) -> ActiveUnits:
    """How many units of a code change with the data: those with Var_x E_q[z | x] above a threshold.

    The variance of the means is that between rows less what their draws add to it, so that few draws will do.

    Args:
        model: A Pyro program with a plate of the rows, or an object with the methods ``model`` and ``guide``.
        x: Data, of which dimension 0 are the rows, at least 2.
        *context: What else the program takes.
        threshold: Of the variance, positive; by default that of the paper.
        guide: The guide; None takes that of the model.
        samples: Draws of each row, at least 2.
        seed: Of the draws.

    Raises:
        ValueError: If the data do not fit the program, or there is only one row.
        Unsupported: As ``posterior_means``.

    References:
        Y. Burda, R. Grosse and R. Salakhutdinov, Importance weighted autoencoders (2016), section 5.2.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, but must be positive.")
    codes = posterior_means(model, x, *context, guide=guide, samples=samples, seed=seed)
    if len(next(iter(codes.mean.values()))) < 2:
        raise ValueError("A variance between rows needs at least 2 of them, but x has one.")
    return ActiveUnits({n: mean.var(0) - codes.variance[n].mean(0) for n, mean in codes.mean.items()}, threshold)


def linear_probe(
    codes: Any, labels: Any, test_codes: Any = None, test_labels: Any = None, penalty: float = 1.0
) -> LinearProbe:
    """Accuracy of the labels that a multinomial logistic regression reads off codes.

        minimise  −Σ_n log softmax(W u_n + b)_{y_n} + ½ λ |W|²,    u_n the standardised code of row n

    Args:
        codes: (row, …), flattened.
        labels: Of any kind, (row,), of at least two classes.
        test_codes: Rows to judge by, standardised like the others; None judges by the training rows.
        test_labels: Their labels.
        penalty: λ, positive.

    Raises:
        ValueError: If shapes do not fit, a code is not finite, or there is only one class.

    Example:
        >>> linear_probe([[0.0], [1.0], [4.0], [5.0]], ["a", "a", "b", "b"]).accuracy
        1.0
    """
    if not penalty > 0:
        raise ValueError(f"penalty is {penalty}, but must be positive.")
    x, y = _table(codes, labels, "codes")
    classes, index = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"A probe tells labels apart, but all {len(y)} rows have the label {classes[0]!r}.")
    centre, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    u, target = (x - centre) / spread, np.eye(len(classes))[index]
    width = u.shape[1]

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = parameters[: len(classes) * width].reshape(-1, width), parameters[len(classes) * width :]
        logits = u @ weight.T + bias
        log_p = logits - scipy.special.logsumexp(logits, 1, keepdims=True)
        off = np.exp(log_p) - target
        gradient = np.concatenate([(off.T @ u + penalty * weight).ravel(), off.sum(0)])
        return float(0.5 * penalty * np.square(weight).sum() - (target * log_p).sum()), gradient

    start = np.zeros(len(classes) * (width + 1))
    options = {"maxiter": 2000, "maxfun": 4000, "gtol": 1e-6, "ftol": 1e-14}
    best = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    weight, bias = best[: len(classes) * width].reshape(-1, width), best[len(classes) * width :]

    def accuracy(table: np.ndarray, truth: np.ndarray) -> float:
        return float((classes[((table - centre) / spread @ weight.T + bias).argmax(1)] == truth).mean())

    train = accuracy(x, y)
    if test_codes is None:
        return LinearProbe(train, train, weight, bias, classes)
    other, truth = _table(test_codes, test_labels, "test_codes")
    if other.shape[1] != width:
        raise ValueError(f"test_codes has {other.shape[1]} columns, but codes has {width}.")
    return LinearProbe(accuracy(other, truth), train, weight, bias, classes)


def _table(codes: Any, labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(codes, float), np.asarray(labels)
    if x.ndim < 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(f"{name} has shape {x.shape}, but must be (row, …) with the {y.shape} of its labels.")
    x = x.reshape(len(x), -1)
    if not np.isfinite(x).all():
        raise ValueError(
            f"{name} holds values that are NaN or infinite; the first in row {np.argwhere(~np.isfinite(x))[0][0]}."
        )
    return x, y
