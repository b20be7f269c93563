"""The two nouns: a generative model is a Pyro program, a stochastic module is a distribution with weights.

Conventions. Data come first: ``model(x)`` conditions on data, ``model(None, size=n)`` draws n rows from the prior. Rows are
dimension 0. A model that hides something worth guessing has a ``guide`` of the same signature; one whose prior follows the
scale of the data has ``prepare``. Weights are ``nn.Parameter``s; nothing is kept in Pyro's global parameter store.
"""

from __future__ import annotations

import abc
from typing import Any

from pyro.distributions import TorchDistribution
from torch import nn

__all__ = ["GenerativeModel", "StochasticModule"]


class GenerativeModel(nn.Module, abc.ABC):
    """How the data came about, as a Pyro program."""

    @abc.abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The program, ``model(x=None, size=None)``: conditions on ``x`` (rows, …), or draws ``size`` rows if ``x`` is None.

        Responses and labels come after the data, ``model(x, y)``; without them they are drawn.
        """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in list(self._buffers):  # what prepare found in data: a new model has none, or others of another shape
            if prefix + name in state_dict:
                self._buffers[name] = state_dict[prefix + name].clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class StochasticModule(nn.Module, abc.ABC):
    """A distribution with weights: ``pyro.sample("x", module(context))`` works in any program."""

    @abc.abstractmethod
    def forward(self, context: Any = None) -> TorchDistribution:
        """The distribution, given ``context`` if it is conditional, such as a tensor (batch, …)."""
