"""What finite mixtures share: the component of a row, and its density, averaged over draws."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from inference.contract import Fitted
from pyro_genmodels.base import GenerativeModel

__all__ = ["Draws", "FiniteMixture"]

Draws = Fitted | Mapping[str, Tensor]


class FiniteMixture(GenerativeModel):
    """Rows come from one of K components."""

    @abc.abstractmethod
    def _log_joint(self, x: Tensor, draws: Draws) -> Tensor:
        """log p(x_n, z_n = k | draw), (draw, rows, K), of draws whose labels have been matched."""

    @final
    @torch.no_grad()
    def predict_proba(self, x: Tensor, draws: Draws) -> Tensor:
        """Probability of each component for each row, averaged over draws whose labels have been matched.

        Args:
            x: (rows, D), NaN where an entry is missing.
            draws: A Posterior, or site to (…, *site).

        Returns:
            (rows, K), rows sum to 1.
        """
        return self._log_joint(x, draws).softmax(-1).mean(0)

    @final
    def predict(self, x: Tensor, draws: Draws) -> Tensor:
        """Most probable component of each row, (rows,)."""
        return self.predict_proba(x, draws).argmax(-1)

    @final
    @torch.no_grad()
    def score_samples(self, x: Tensor, draws: Draws) -> Tensor:
        """Log predictive density of what is known of each row: log-mean over the draws of p(x_n | draw), (rows,)."""
        log_densities = self._log_joint(x, draws).logsumexp(-1)
        return log_densities.logsumexp(0) - math.log(len(log_densities))
