"""Every back-end finds the posterior that is known by other means, or refuses with a sentence.

A law over the table of instances: means and standard deviations of samplers within four Monte-Carlo standard errors, the
point of EM at the mode of the constrained density, the guide of SVI at the posterior if its family contains it, and its
means not far off elsewhere.

False alarms. The samplers make about 1500 comparisons at 6.3e-5 each: under fresh seeds one of ten runs of this file would
fail if the errors were normal and independent. The seeds are fixed, so that a run that passes passes again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoGuide

from conftest import SAMPLERS
from exact import Moments
from inference import EM, HMC, SVI, Gibbs, MetropolisHastings, Posterior, Unsupported, arviz
from inference.program import Program
from programs.labels import CENTRES, ROWS, SHARES
from programs.scalars import Guide, NormalInverseGammaGuide
from zoo import BY_NAME, ZOO, Instance, markdown

LIMIT = 4.0  # Monte-Carlo standard errors
LEAST = 400  # effective draws, so that a standard error means something
NEAR = 0.5  # posterior standard deviations, of the means of a guide of independent normals
LONG_FITS = {
    "horseshoe": (10000, 0.01),
    "cox": (3000, 0.03),
    "schools_apart": (1500, 0.03),
}  # steps and learning rate where a guide is far from the start
AROUND = 0.5  # posterior standard deviations, of the point of an EM that averages by drawing


def cells(
    *backends: str,
    where: Callable[[Instance], bool] = lambda instance: True,
    in_turn: bool = False,
    every: int = 1,
) -> Any:
    """Parameters of a test: every instance with every back-end that takes it; what is slow is marked so.

    Args:
        *backends: Names of back-ends.
        where: Which instances.
        in_turn: Whether each instance leaves all but one of the back-ends to ``-m slow``, the next instance the next.
        every: Of how many instances one is not left to ``-m slow``.
    """

    def is_slow(number: int, backend: str) -> bool:
        instance = ZOO[number]
        quick = [name for name in backends if name not in instance.refused and name not in instance.slow]
        return number % every > 0 or backend not in (quick[number % len(quick) :][:1] if in_turn and quick else quick)

    return pytest.mark.parametrize(
        ("instance", "backend"),
        [
            pytest.param(
                instance,
                backend,
                id=f"{instance.name}-{backend}",
                marks=[pytest.mark.slow] if is_slow(number, backend) else [],
            )
            for number, instance in enumerate(ZOO)
            for backend in backends
            if backend not in instance.refused and where(instance)
        ],
    )


def z_scores(draws: np.ndarray, exact: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the means and of the standard deviations in combined Monte-Carlo standard errors, (*site) each.

    Args:
        draws: (chain, draw, *site).
        exact: What they should be.
    """
    mean = (draws.mean((0, 1)) - exact.mean) / np.hypot(arviz.mcse(draws), exact.mean_error)
    return mean, (draws.std((0, 1)) - exact.sd) / np.hypot(arviz.mcse(draws, method="sd"), exact.sd_error)


@cells(*SAMPLERS, in_turn=True, every=4)
def test_samplers_agree_with_the_exact_posterior(instance: Instance, backend: str, sampled: Any) -> None:
    known = instance.known(sampled(instance, backend))
    assert known.keys() == instance.moments.keys()
    for name, exact in instance.moments.items():
        draws = known[name]
        assert arviz.ess(draws).min() > LEAST, (name, arviz.ess(draws))
        assert arviz.rhat(draws).max() < 1.05, (name, arviz.rhat(draws))
        for what, z in zip(("mean", "sd"), z_scores(draws, exact), strict=True):
            assert np.abs(z).max() < LIMIT, (name, what, z)


@pytest.mark.parametrize(
    ("instance", "backend"),
    [(i, b) for i in ZOO for b in i.refused],
    ids=lambda part: part if isinstance(part, str) else part.name,
)
def test_what_cannot_work_says_so(instance: Instance, backend: str, device: torch.device) -> None:
    kind = {"Gibbs": Gibbs, "MetropolisHastings": MetropolisHastings, "HMC": HMC, "SVI": SVI, "EM": EM}[backend]
    with pytest.raises(Unsupported, match=instance.refused[backend]):
        kind(seed=0, progress=False).fit(instance.program, *instance.on(device))


def _em(instance: Instance, device: torch.device, **settings: Any) -> Posterior:
    return EM(maximise=instance.maximise, seed=0, progress=False, **settings).fit(instance.program, *instance.on(device))


@cells("EM", where=lambda instance: instance.peak is not None and not instance.rough, every=2)
def test_em_finds_the_mode(instance: Instance, backend: str, device: torch.device) -> None:
    """Within 1e-6 of the mode's size, element by element where that is not zero; 1e-5 where it had to climb a gradient."""
    posterior = _em(instance, device, steps=1000, tolerance=1e-9)
    assert not posterior.info["findings"]
    for site, exact in instance.mode.items():
        assert posterior.draws[site].shape == (1, 1, *exact.shape)
        limit = 1e-5 if posterior.plan is not None and posterior.plan[site].update == "L-BFGS" else 1e-6
        found = posterior.draws[site][0, 0].numpy()
        np.testing.assert_allclose(found, exact, rtol=limit, atol=limit * np.abs(exact).max())


@cells("EM", where=lambda instance: instance.rough, every=2)
def test_em_by_drawing_stays_near_the_mode(instance: Instance, backend: str, device: torch.device) -> None:
    """Within half a posterior standard deviation: an eighth is the error of an average over 64 draws, and steps add up."""
    posterior = _em(instance, device, steps=100, tolerance=0.0)
    for site, exact in instance.mode.items():
        far = np.abs(posterior.draws[site][0, 0].numpy() - exact) / instance.moments[site].sd
        assert far.max() < AROUND, (site, far)


@cells("EM", where=lambda instance: instance.stepped)
def test_steps_of_a_model_end_near_the_means(instance: Instance, backend: str, device: torch.device) -> None:
    """Within half a posterior standard deviation, though they take sites for less dependent than they are."""
    known = instance.known(_em(instance, device, steps=300, tolerance=1e-9))
    for name, exact in instance.moments.items():
        far = np.abs(known[name].mean((0, 1)) - exact.mean) / exact.sd
        assert far.max() < NEAR, (name, far)


@cells("EM", where=lambda instance: instance.peak is None and not instance.stepped, every=2)
def test_em_climbs_to_a_top(instance: Instance, backend: str, device: torch.device) -> None:
    """The objective never falls, and where it can be written down no point nearby is higher than the last."""
    posterior = _em(instance, device, steps=300, tolerance=1e-9)
    objective = posterior.history["log_joint"]
    assert (objective.diff() >= -1e-9 * objective.abs().max()).all()
    program = Program(instance.program, instance.on(device))
    averaged = {
        name for name in program.continuous if posterior.plan is not None and posterior.plan[name].update == "Gaussian"
    }
    if posterior.info["findings"] or averaged:
        return
    generator = torch.Generator().manual_seed(0)
    top = {name: posterior.draws[name][0].to(device) for name in program.continuous}
    around = {}
    for name, value in top.items():
        free = program.latents[name].transform.inv(value)
        noise = torch.randn((200, *free.shape[1:]), generator=generator, dtype=free.dtype).to(device)
        around[name] = program.latents[name].transform(free + 1e-3 * noise)
    density = program.density.marginal(program.finite)
    assert density(around).max() <= density(top)


def guided(posterior: Posterior, instance: Instance, guide: Any, device: torch.device) -> dict[str, Moments]:
    """Moments of the fitted guide by formula, not by draws, which would cost more than the fit."""
    weights = {
        name.removeprefix("guide."): weight for name, weight in posterior.weights.items() if name.startswith("guide.")
    }
    if isinstance(guide, Guide):
        guide.load_state_dict(weights)
        return guide.moments()
    with pyro.settings.context(module_local_params=True):
        automatic = guide(instance.program)
        automatic(*instance.on(device))
        automatic.load_state_dict(weights)
        quantiles = automatic.quantiles([0.15865525393145707, 0.5, 0.8413447460685429])
    found = {}
    for site, value in quantiles.items():
        # normal on the whole line: the median is the mean, the others lie one standard deviation away
        low, middle, high = (torch.as_tensor(part).detach().cpu().numpy() for part in value)
        found[site] = Moments(middle, (high - low) / 2)
    return found


@pytest.mark.parametrize("instance", [i for i in ZOO if i.guide is not None], ids=lambda instance: instance.name)
def test_a_guide_that_contains_the_posterior_finds_it(instance: Instance, device: torch.device) -> None:
    """Within 2 % of the posterior's standard deviation, in mean and in standard deviation."""
    assert instance.guide is not None
    guide: Any = instance.guide if issubclass(instance.guide, AutoGuide) else instance.guide().to(device)  # type: ignore[call-arg]
    steps = 3000 if instance.guide is NormalInverseGammaGuide else 1000  # three parameters along a ridge
    backend = SVI(steps=steps, learning_rate=0.1, guide=guide, draws=1, seed=0, progress=False)
    posterior = backend.fit(instance.program, *instance.on(device))
    found = guided(posterior, instance, guide, device)
    assert found.keys() == instance.moments.keys()
    for site, exact in instance.moments.items():
        assert np.abs(found[site].mean - exact.mean).max() < 0.02 * exact.sd.min(), site
        assert (np.abs(found[site].sd / exact.sd - 1)).max() < 0.02, site


@cells("SVI", where=lambda instance: instance.guide is None and not instance.scattered, every=8)
def test_means_of_an_automatic_guide_are_not_far_off(instance: Instance, backend: str, device: torch.device) -> None:
    """Within half a posterior standard deviation, though independent normals do not contain the posterior."""
    steps, rate = LONG_FITS.get(instance.name, (500, 0.03))
    fitted = SVI(steps=steps, learning_rate=rate, draws=1000, seed=0, progress=False).fit(
        instance.program, *instance.on(device)
    )
    known = instance.known(fitted)
    for name, exact in instance.moments.items():
        far = np.abs(known[name].mean((0, 1)) - exact.mean) / exact.sd
        assert far.max() < NEAR, (name, far)


@cells("SVI", where=lambda instance: instance.scattered)
def test_a_guide_takes_a_mode_of_weight_where_they_are_apart(instance: Instance, backend: str, device: torch.device) -> None:
    """Given an event of probability p, a mean is within √((1 − p) / p) standard deviations of the whole: 3 for a tenth."""
    fitted = SVI(steps=500, learning_rate=0.03, draws=1000, seed=0, progress=False).fit(
        instance.program, *instance.on(device)
    )
    known = instance.known(fitted)
    for name, exact in instance.moments.items():
        assert (np.abs(known[name].mean((0, 1)) - exact.mean) / exact.sd).max() < 3.0, name
    loss = fitted.history["loss"]
    assert loss[-50:].mean() < loss[:50].mean()


def test_the_readme_has_the_table() -> None:
    """``python tests/zoo.py`` prints it."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    found = readme.split("<!-- zoo -->\n")[1].split("\n<!-- /zoo -->")[0]
    assert found == markdown()


def test_draws_of_a_guide_are_draws_of_it(device: torch.device) -> None:
    """Means and standard deviations of 2000 draws within four standard errors of the fitted guide's own."""
    instance = BY_NAME["beta_binomial"]
    assert instance.guide is not None
    guide: Any = instance.guide().to(device)  # type: ignore[call-arg]
    backend = SVI(steps=50, learning_rate=0.05, guide=guide, draws=2000, seed=0, progress=False)
    posterior = backend.fit(instance.program, *instance.on(device))
    draws = posterior.draws["fairness"].numpy()
    exact = guided(posterior, instance, guide, device)["fairness"]
    assert abs(draws.mean() - exact.mean) < LIMIT * exact.sd / np.sqrt(draws.size)
    assert abs(draws.std() / exact.sd - 1) < LIMIT / np.sqrt(2 * draws.size)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_finite_sites_are_drawn_with_their_exact_probabilities(sampler: str, sampled: Any) -> None:
    """Every label of every row of the mixture: probabilities, not only means, within four standard errors."""
    draws = sampled(BY_NAME["mixture"], sampler).draws["z"].numpy()
    z = np.array(list(itertools.product(range(3), repeat=len(ROWS))))
    member = z[:, :, None] == np.arange(3)
    counts, sums = member.sum(1), (member * ROWS.numpy()[:, None]).sum(1)
    precision = 1.0 + counts / 0.64
    location = (CENTRES.numpy() + sums / 0.64) / precision
    log_weights = torch.lgamma(SHARES + torch.tensor(counts)).sum(1).numpy() - 0.5 * np.log(precision).sum(1)
    log_weights = log_weights + 0.5 * (precision * location**2).sum(1)
    weights = torch.tensor(log_weights).softmax(0).numpy()
    exact = np.tensordot(weights, member, 1)
    drawn = (draws[..., None] == np.arange(3)).astype(float)
    rare = np.minimum(exact, 1 - exact) * drawn[..., 0].size / drawn.shape[2] < 50  # too few to have a standard error
    error = arviz.mcse(drawn)
    assert (np.abs(drawn.mean((0, 1)) - exact)[~rare] < LIMIT * error[~rare]).all()
    assert (np.abs(drawn.mean((0, 1)) - exact)[rare] < 0.03).all()
