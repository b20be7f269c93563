"""Calibration: whether a sampler draws what its program says, found out without knowing any posterior.

    sbc           simulation-based calibration: data from the prior, and where the truth ranks among the draws
    geweke        getting it right: draws of (latents, data) made in two ways that must agree
    psis          Pareto-smoothed importance weights: how far an approximation is from its target, or leave-one-out
    score_test    Stein's identities: whether a program is the one whose posterior these draws are from

Each returns a result that prints, plots and exports to ArviZ. ``sbc`` and ``geweke`` take any program with proper priors
and observed sites. They draw the observed sites anew and give every replicate its data (``Program.replicate``), so that
all replicates are chains of one run, and a thousand of them cost little more than one. In ``sbc`` each replicate adapts
alone, as a user's run would.
"""

from inference.calibration.geweke import Geweke, geweke
from inference.calibration.psis import PSIS, psis
from inference.calibration.result import Result
from inference.calibration.sbc import SBC, sbc
from inference.calibration.score import ScoreTest, score_test

__all__ = ["PSIS", "SBC", "Geweke", "Result", "ScoreTest", "geweke", "psis", "sbc", "score_test"]
