"""Whether draws are of a posterior that is known by other means, or of the same one as other draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from exact import Moments
from inference import arviz

__all__ = ["FEWEST", "LIMIT", "assert_agree", "assert_alike"]

LIMIT = 4.0  # Monte-Carlo standard errors; a false alarm in 16,000 comparisons of independent normal errors
FEWEST = 400  # effective draws, so that a standard error means something


def assert_agree(draws: Mapping[str, Any], exact: Mapping[str, Moments]) -> None:
    """Means and standard deviations of draws (chain, draw, *site) lie within ``LIMIT`` standard errors of the exact ones."""
    for name, moments in exact.items():
        found = np.asarray(draws[name], float)
        assert arviz.ess(found).min() > FEWEST, (name, arviz.ess(found))
        mean = (found.mean((0, 1)) - moments.mean) / np.hypot(arviz.mcse(found), moments.mean_error)
        sd = (found.std((0, 1)) - moments.sd) / np.hypot(arviz.mcse(found, method="sd"), moments.sd_error)
        assert np.abs(mean).max() < LIMIT, (name, "mean", mean)
        assert np.abs(sd).max() < LIMIT, (name, "sd", sd)


def assert_alike(left: Mapping[str, Any], right: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Two samplers agree in means and standard deviations within ``LIMIT`` of their combined standard errors."""
    exact = {}
    for name in names:
        other = np.asarray(right[name], float)
        assert arviz.ess(other).min() > FEWEST, (name, arviz.ess(other))
        errors = arviz.mcse(other), arviz.mcse(other, method="sd")
        exact[name] = Moments(other.mean((0, 1)), other.std((0, 1)), *errors)
    assert_agree(left, exact)
