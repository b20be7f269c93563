"""Findings in words: what is wrong with a posterior, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from inference import arviz, relabel
from inference.arrays import as_numpy, is_whole

if TYPE_CHECKING:
    from inference.posterior import Posterior

__all__ = ["diagnose", "worst"]

_RARE = 0.01  # share of draws in which a site has another size; of less, chains know too little to agree
_CERTIFICATE = {torch.float64: 1e-8, torch.float32: 1e-2}  # rounding of a log-joint of 10⁴ terms, with room


def diagnose(posterior: Posterior) -> list[str]:
    """See ``Posterior.diagnose``."""
    findings = [*posterior.info.get("findings", ())]
    if posterior.info.get("kind", "samples") == "samples":
        findings += arviz.convergence(_quantities(posterior))
        findings += [*_unmoved(posterior), *_divergences(posterior), *_acceptance(posterior)]
    elif {"lp", "log_q"} <= posterior.stats.keys():
        findings += arviz.importance((posterior.stats["lp"].double() - posterior.stats["log_q"].double()).numpy())
    return findings + _standard_errors(posterior) + _certificates(posterior)


def worst(posterior: Posterior) -> tuple[float, float]:
    """The largest R-hat and the smallest effective sample size of what ``diagnose`` judges; NaN for too few draws."""
    return arviz.worst(_quantities(posterior))


def _quantities(posterior: Posterior) -> dict[str, np.ndarray]:
    """What is judged: draws that do not change when labels are renamed, and the log-joint."""
    invariant = relabel.invariant(posterior.draws, posterior.symmetry)
    if posterior.info.get("structure") == "changing":
        invariant = _measured(invariant)
    names = {site: f"sorted {site}" if site in posterior.symmetry else site for site in invariant}
    quantities = {names[site]: as_numpy(values) for site, values in invariant.items()}
    return quantities | {"lp": as_numpy(posterior.stats["lp"])} if "lp" in posterior.stats else quantities


def _measured(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sites that are whole in every draw; of the others the number of elements that are there, unless it hardly changes."""
    measured = {}
    for site, values in draws.items():
        size = (~values.isnan()).reshape(*values.shape[:2], -1).sum(-1)
        rare = 1.0 - float((size == size.flatten().mode().values).double().mean())
        if not values.isnan().any():
            measured[site] = values
        elif rare > _RARE:
            measured[f"size of {site}"] = size
    return measured


def _unmoved(posterior: Posterior) -> list[str]:
    """Chains in which an element of a continuous site kept one value, although it is no constant of the program."""
    chains, draws = posterior.shape
    sites = [site for site in posterior.draws if posterior.plan is None or site in posterior.plan]
    flat = {site: posterior.draws[site].reshape(chains, draws, -1) for site in sites}
    flat = {site: values for site, values in flat.items() if values.numel() and not is_whole(values)}
    if draws < 2:
        return []
    varies = {site: values.amax((0, 1)) > values.amin((0, 1)) for site, values in flat.items()}
    is_anything_moving = any(element.any() for element in varies.values())
    findings = []
    for site, values in flat.items():
        still = values.amax(1) == values.amin(1)
        # Equal in all chains: a constant such as the diagonal of a correlation, unless the site is one to update.
        if varies[site].any() or (posterior.plan is None and is_anything_moving):
            still &= varies[site]
        if stuck := still.any(1).nonzero().flatten().tolist():
            findings.append(
                f"'{site}' never moved in {_chains(stuck)}: every proposal was refused. Start elsewhere (start=), "
                "or raise warmup so that the steps can adapt."
            )
    return findings


def _divergences(posterior: Posterior) -> list[str]:
    diverging = posterior.stats.get("diverging")
    if diverging is None or not diverging.any():
        return []
    by_chain = diverging.sum(1)
    most = int(by_chain.argmax())
    return [
        f"{int(by_chain.sum())} of {diverging.numel()} transitions diverged, most of them in chain {most}. "
        "The draws may miss a strongly curved part of the posterior. Write the program with standardised latents "
        "(non-centred), or take smaller steps."
    ]


def _acceptance(posterior: Posterior) -> list[str]:
    if "acceptance_rate" not in posterior.stats:
        return []
    rate = posterior.stats["acceptance_rate"].double().nanmean(1)
    findings = []
    if low := (rate < 0.1).nonzero().flatten().tolist():
        findings.append(
            f"Acceptance is {rate.min():.3f} in {_chains(low)}, below 0.1: most proposals are refused. Raise "
            "warmup, or take a proposal closer to the posterior."
        )
    # A random walk that is hardly ever refused hardly moves; an independence proposal is then simply good.
    proposal = str(posterior.info.get("config", {}).get("proposal", ""))
    is_walk = "Independence" not in proposal and "Prior" not in proposal
    if "Unadjusted" in proposal:
        return [
            "Every move was taken, so that the draws are off by the size of the step. Halve it and compare; where there is "
            "a density, use Langevin()."
        ]
    high = (rate > 0.99).nonzero().flatten().tolist()
    if posterior.info.get("backend") == "MetropolisHastings" and is_walk and high:
        findings.append(
            f"Acceptance is {rate.max():.3f} in {_chains(high)}, above 0.99: the steps are too small to explore. "
            "Raise warmup so that they can grow."
        )
    return findings


def _standard_errors(posterior: Posterior) -> list[str]:
    prefix = "standard_error_"
    lost = [name for name, error in posterior.stats.items() if name.startswith(prefix) and bool(error.isnan().any())]
    if not lost:
        return []
    sites = ", ".join(f"'{name.removeprefix(prefix)}'" for name in lost)
    return [
        f"There is no standard error of {sites}: the density has a ridge there (several values fit equally well), or the "
        "point lies at an edge of the support, or is no maximum yet. Raise steps=, or fix what the data do not tell apart."
    ]


def _certificates(posterior: Posterior) -> list[str]:
    floating = {values.dtype for values in posterior.draws.values() if values.is_floating_point()}
    tolerance = _CERTIFICATE[torch.float64 if torch.float64 in floating or not floating else torch.float32]
    findings = []
    for update in () if posterior.plan is None else posterior.plan.updates:
        who = f"The {update.update} update of {', '.join(repr(site) for site in update.sites)}"
        is_exact = update.certificate is not None and update.claim == "exact"
        if not is_exact and update.acceptance < 0.1:
            findings.append(f"{who} accepts {update.acceptance:.3f} of its proposals. Raise warmup, or choose another.")
        if update.certificate is None:
            continue
        if not is_exact:
            if not update.certificate <= tolerance:
                findings.append(
                    f"{who} takes elements for independent that are not: they leave up to {update.certificate:.1e} of a "
                    "change of the log-joint unexplained, and the draws may be biased. Raise warmup, in which such a block "
                    "is found out and moves one element at a time, or choose another block (blocks=)."
                )
        elif not update.certificate <= tolerance or update.acceptance < 1.0 - tolerance:
            findings.append(
                f"{who} claims to be exact, but its largest |log acceptance ratio| is {update.certificate:.1e} "
                f"and its acceptance {update.acceptance:.4f}. Refusals keep the draws right, but they mix worse: "
                "choose the block by hand (blocks=), and please report the program."
            )
    return findings


def _chains(which: list[int]) -> str:
    return f"chain{'s' if len(which) > 1 else ''} {', '.join(str(chain) for chain in which)}"
