"""Steps that a model brings for EM: they go beside EM's own, end where they lead, go on after a stop, and are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from inference import EM, Gibbs, Unsupported
from inference.contract import Stepped

X = torch.tensor([0.3, -1.2, 2.5, 0.8, 1.9], dtype=torch.float64)


class Plain:
    """Normal rows of unknown mean and variance."""

    def model(self, x: Tensor) -> None:
        variance = pyro.sample("variance", dist.InverseGamma(x.new_tensor(3.0), 2.0))
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(1.0), 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, variance.sqrt()), obs=x)


class Halfway(Plain):
    """Its own step takes the mean half the way to the mode given the variance, and counts."""

    def steps(self, x: Tensor) -> Mapping[tuple[str, ...], Callable[..., Any]]:
        def step(values: Mapping[str, Tensor], memory: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
            precision = len(x) / values["variance"] + 0.25
            mode = (x.sum() / values["variance"] + 0.25) / precision
            count = torch.zeros(()) if memory is None else memory
            return {"mean": 0.5 * (values["mean"] + mode)}, count + 1.0

        return {("mean",): step}


def em(**options: Any) -> EM:
    return EM(**{"seed": 0, "progress": False, "tolerance": 1e-12, "steps": 500, **options})


def test_steps_of_the_model_go_beside_those_of_em_to_the_same_maximum() -> None:
    own, usual = em().fit(Halfway(), X), em().fit(Plain(), X)
    assert isinstance(Halfway(), Stepped) and not isinstance(Plain(), Stepped)
    assert own.plan is not None and own.plan["mean"].update == "Own" and own.plan["variance"].update == "InverseGamma"
    assert "need not raise" in own.plan["mean"].note
    for name, value in usual.point().items():
        assert_close(own.point()[name], value, rtol=1e-9, atol=0.0)
    assert not [name for name in own.stats if name.startswith("standard_error")]
    assert [name for name in usual.stats if name.startswith("standard_error")]


def test_restarts_have_steps_of_their_own() -> None:
    start = {"mean": torch.tensor([-50.0, 50.0]), "variance": torch.tensor([1.0, 2.0])}
    whole = em(restarts=2, start=start, steps=3).fit(Halfway(), X)
    alone = [em(start={name: value[i] for name, value in start.items()}, steps=3).fit(Halfway(), X) for i in range(2)]
    best = max(alone, key=lambda posterior: float(posterior.stats["lp"]))
    assert_close(whole.point()["mean"], best.point()["mean"])


def test_what_steps_remember_is_in_checkpoints(tmp_path: Any) -> None:
    """A run that is killed at its fifth step goes on from the fourth, and ends as one long run does."""
    seen: list[float] = []

    class Watched(Halfway):
        def steps(self, x: Tensor) -> Mapping[tuple[str, ...], Callable[..., Any]]:
            (step,) = super().steps(x).values()

            def watched(values: Mapping[str, Tensor], memory: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
                found, count = step(values, memory)
                seen.append(float(count))
                return found, count

            return {("mean",): watched}

    def killed(step: int, info: Any) -> None:
        if len(seen) == 5:
            raise RuntimeError("killed")

    options: dict[str, Any] = {"steps": 7, "checkpoint": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(RuntimeError, match="killed"):
        em(**options, callbacks=(killed,)).fit(Watched(), X)
    resumed = em(**options).resume(tmp_path / "run", Watched(), X)
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 6.0, 7.0]
    assert torch.equal(resumed.draws["mean"], em(steps=7).fit(Watched(), X).draws["mean"])


def test_steps_are_not_taken_for_what_is_averaged() -> None:
    backend = em(maximise=("variance",), steps=5, e_step=Gibbs(chains=8, thin=1))
    posterior = backend.fit(Halfway(), X)
    assert posterior.plan is not None and posterior.plan["mean"].update != "Own"


@pytest.mark.parametrize(("options", "sentence"), [({"batch_size": 2}, "batch_size="), ({"objective": "mle"}, "'mle'")])
def test_what_steps_do_not_know_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Unsupported, match=f"know no {sentence}"):
        em(**options).fit(Halfway(), X)


def test_steps_for_unknown_sites_are_refused() -> None:
    class Wrong(Plain):
        def steps(self, x: Tensor) -> Mapping[tuple[str, ...], Callable[..., Any]]:
            return {("men",): lambda values, memory: (dict(values), memory)}

    with pytest.raises(ValueError, match=r"steps\(\) of Wrong names 'men'"):
        em().fit(Wrong(), X)
