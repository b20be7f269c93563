"""The two ends of an autoencoder: a network that reads x, and a network that says how x is distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_genmodels.autoencoders.likelihoods import Likelihood
from pyro_genmodels.base import StochasticModule
from pyro_genmodels.nets import MLP

__all__ = [
    "Decoder",
    "Encoder",
    "centre",
    "check_data",
    "check_labels",
    "check_shape",
    "filled",
    "like",
    "one_hot",
    "row_shape",
    "rows_of",
]


class Encoder(nn.Module):
    """A network that reads x, and what comes along with it: h(x, context).

    Entries that are missing, NaN, are read as 0.

    Args:
        shape: Of one x.
        outputs: Numbers that are wanted per row.
        reader: Who wants them, for an error.
        network: Takes (batch, *shape), or (batch, 2, *shape) for pictures (height, width) and (batch, 2 · first, *rest) else
            if it is to see gaps, and with a context also (batch, context); gives (batch, outputs). None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``.
        context: Numbers that come along with x.
        sees_gaps: Whether the network is told which entries are known: 1 for each that is, 0 for each that is not.
        activation: Class of the activations of the ``MLP``.

    Raises:
        ValueError: If the network does not take such x, or gives another number of outputs.
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        reader: str,
        network: nn.Module | None = None,
        hidden: Sequence[int] = (512, 256),
        context: int = 0,
        sees_gaps: bool = False,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.shape, self.outputs, self.context, self.sees_gaps = tuple(shape), outputs, context, sees_gaps
        inputs = math.prod(shape) * (2 if sees_gaps else 1) + context
        self.network = MLP(inputs, outputs, hidden, activation) if network is None else network
        if network is not None:
            with torch.no_grad():
                found = _probed(network, "encoder", self._seen(_zeros(network, *shape)), _zeros(network, context))
            if found.shape != (2, outputs):
                raise ValueError(
                    f"The encoder gives {_numbers(found)} for x of shape {self.shape}, but must give {outputs}: {reader} "
                    f"takes {outputs} numbers a row."
                )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The numbers of each row, (…, outputs), of x (…, *shape) and a context (…, context)."""
        cut = x.dim() - len(self.shape)
        lead = x.shape[:cut]
        if context is None:
            seen = self._seen(x.reshape(-1, *self.shape) if cut != 1 else x)
            result: Tensor = self.network(seen)
        else:
            lead = torch.broadcast_shapes(lead, context.shape[:-1])
            seen = self._seen(x.expand(*lead, *self.shape).reshape(-1, *self.shape))
            result = self.network(seen, context.expand(*lead, -1).reshape(-1, context.shape[-1]))
        return result if len(lead) == 1 else result.reshape(*lead, -1)

    def _seen(self, x: Tensor) -> Tensor:
        known = x.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)  # much faster than where
        if not self.sees_gaps:
            return known
        known, is_known = (part.unsqueeze(1) if len(self.shape) == 2 else part for part in (known, (~x.isnan()).to(x)))
        return torch.cat([known, is_known], 1)


class Decoder(StochasticModule):
    """A network that says how x is distributed: p(x | z, context).

    Args:
        shape: Of one x.
        features: Numbers in z.
        likelihood: What the network's numbers mean.
        network: Takes (batch, features), and with a context also (batch, context); gives the likelihood's k numbers for each
            entry of x, (batch, k, *shape) or any shape (batch, …) of as many numbers in this order. None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``.
        context: Numbers that come along with z.
        activation: Class of the activations of the ``MLP``.

    Raises:
        ValueError: If the network does not take such z, or gives another number of outputs.
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int,
        likelihood: Likelihood,
        network: nn.Module | None = None,
        hidden: Sequence[int] = (256, 512),
        context: int = 0,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape is {tuple(shape)}, but must be that of one x, such as (28, 28).")
        self.shape, self.features, self.likelihood = tuple(shape), features, likelihood
        size, kind = math.prod(shape), type(likelihood).__name__
        outputs = size * likelihood.outputs
        self.network = MLP(features + context, outputs, hidden, activation) if network is None else network
        if network is not None:
            with torch.no_grad():
                found = _probed(network, "decoder", _zeros(network, features), _zeros(network, context))
            if not found.dim() or found.shape[0] != 2 or found[0].numel() != outputs:
                raise ValueError(
                    f"The decoder gives {_numbers(found)} for z of {features} features, but must give {outputs}: "
                    f"{kind} takes {likelihood.outputs} for each of the {size} entries of x."
                )

    def numbers(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """What the network says, (…, k, *shape)."""
        if context is None:
            lead = z.shape[:-1]
            found = self.network(z if z.dim() == 2 else z.reshape(-1, z.shape[-1]))
        else:
            lead = torch.broadcast_shapes(z.shape[:-1], context.shape[:-1])
            wide = (part.expand(*lead, -1).reshape(-1, part.shape[-1]) for part in (z, context))
            found = self.network(*wide)
        result: Tensor = found.reshape(*lead, self.likelihood.outputs, *self.shape)
        return result

    def forward(self, z: Tensor, context: Tensor | None = None) -> TorchDistribution:  # type: ignore[override]
        """p(x | z, context), of event shape ``shape``, for z (…, features) and a context (…, context)."""
        return self.likelihood(self.numbers(z, context), len(self.shape))

    def mean(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Mean of each entry of x, (…, *shape)."""
        return self.likelihood.mean(self.numbers(z, context), len(self.shape))


def _zeros(network: nn.Module, *shape: int) -> Tensor:
    """Two rows of zeros, of the type and on the device of a network."""
    own = next((p for p in network.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)), None)
    return torch.zeros(2, *shape, dtype=None if own is None else own.dtype, device=None if own is None else own.device)


def _probed(network: nn.Module, role: str, *inputs: Tensor) -> Tensor:
    """What a network of the user says of zeros, without a trace left in it."""
    given = [part for part in inputs if part.shape[1:] != (0,)]
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        found = network(*given)
    except Exception as error:
        shapes = " and ".join(str(("batch", *part.shape[1:])).replace("'", "") for part in given)
        raise ValueError(f"The {role} does not take {shapes}: {str(error).splitlines()[0]}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(found, Tensor):
        raise ValueError(f"The {role} gives {type(found).__name__}, but must give one tensor, (batch, …).")
    return found


def _numbers(found: Tensor) -> str:
    shape = tuple(found.shape[1:])
    return f"{math.prod(shape)} numbers" if len(shape) < 2 else f"{math.prod(shape)} numbers, {shape},"


def centre(guess: Any) -> Tensor:
    """The mean of a guess; where transforms have moved it, what they make of the mean before."""
    if not hasattr(guess, "transforms"):
        mean: Tensor = guess.mean
        return mean
    value = centre(guess.base_dist)
    for transform in guess.transforms:
        value = transform(value)
    return value


# ------------------------------------------------------------------------------ data
def row_shape(shape: Sequence[int], owner: str) -> tuple[int, ...]:
    """The shape of a row, as a tuple; TypeError if it is none."""
    if isinstance(shape, int):
        raise TypeError(f"shape of a {owner} is that of a row, ({shape},) for {shape} numbers, but is {shape}.")
    return tuple(shape)


def check_shape(x: Tensor, shape: Sequence[int], owner: str) -> None:
    """Raises ValueError unless x is (rows, *shape), TypeError if it is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a tensor or an array of numpy, but came to {owner} as a {type(x).__name__}.")
    if tuple(x.shape[1:]) == tuple(shape) and x.dim():
        return
    wanted = f"{('rows', *shape)}".replace("'rows'", "rows")
    advice = ""
    if x.dim() > 1 and x[0].numel() == math.prod(shape):
        advice = f" Pass x.reshape{(-1, *shape)}."
    elif tuple(x.shape) == tuple(shape):
        advice = " Pass x[None] for a single row."
    raise ValueError(f"x has shape {tuple(x.shape)}, but this {owner} was built for {wanted}.{advice}")


def check_data(x: Tensor, shape: Sequence[int], likelihood: Likelihood, owner: str) -> None:
    """Looks at all the data, once.

    Args:
        x: (rows, *shape), floating; NaN where an entry is missing.
        shape: Of one row.
        likelihood: Which has values that it may have drawn.
        owner: The model.

    Raises:
        ValueError: If they are of another shape or type, have values that the likelihood has not, or a row without any.
    """
    check_shape(x, shape, owner)
    if not len(x):
        raise ValueError("x has no rows.")
    if not x.is_floating_point():
        scaled = "x.float() / 255" if x.dtype == torch.uint8 else "x.float()"
        raise ValueError(f"x holds {str(x.dtype).removeprefix('torch.')}, but must be floating: pass {scaled}.")
    likelihood.check(x)
    empty = x.isnan().flatten(1).all(1).nonzero()
    if len(empty):
        count = f"{len(empty)} rows, the first of them {int(empty[0])}," if len(empty) > 1 else f"Row {int(empty[0])}"
        raise ValueError(
            f"{count} of x {'have' if len(empty) > 1 else 'has'} no entry that is known. Remove what says nothing."
        )


def check_labels(y: Tensor, rows: int, classes: int, least: int = 0, name: str = "y") -> None:
    """Raises ValueError unless each row has a label from ``least`` (−1 where some are not known) to classes − 1."""
    if y.shape != (rows,):
        raise ValueError(f"{name} has shape {tuple(y.shape)}, but must be ({rows},): a label for each row of x.")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"{name} holds {str(y.dtype).removeprefix('torch.')}, but labels are integers: pass {name}.long().")
    if bool(((y < least) | (y >= classes)).any()):
        unknown = ", or −1 where the label is not known" if least < 0 else ""
        raise ValueError(
            f"{name} has labels from {int(y.min())} to {int(y.max())}, but must be 0 to {classes - 1}{unknown}."
        )


def rows_of(x: Tensor | None, size: int | None, shape: Sequence[int], owner: str) -> int:
    """How many rows a program is to have; looks at shapes alone, at every run."""
    if x is not None:
        check_shape(x, shape, owner)
        return x.shape[0]
    if size is None:
        raise ValueError(f"{owner}.model needs data x, or the number of rows to draw, size.")
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"size is the number of rows to draw, an integer of at least 1, but is {size!r}.")
    return int(size)


def filled(x: Tensor, drawn: Tensor) -> Tensor:
    """x where it is known, else what was drawn, (draws, rows, *shape)."""
    return torch.where(x.isnan(), drawn.to(x), x)


def like(x: Tensor | np.ndarray, module: nn.Module) -> Tensor:
    """x in the type of a module's weights, where they are."""
    weight: Any = next(module.parameters(), None)
    x = torch.as_tensor(x)
    return x if weight is None else x.to(weight)


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(…, classes); ``torch.nn.functional.one_hot`` looks at values, which no graph can record."""
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).to(dtype)
