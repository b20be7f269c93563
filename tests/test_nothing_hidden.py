"""A program with weights in which nothing is hidden: back-ends that train weights maximise its likelihood, others refuse."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import EM, HMC, NUTS, SVI, Gibbs, MetropolisHastings, Posterior, Unsupported

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + torch.randn(60, generator=torch.Generator().manual_seed(1)).double()


class Line(nn.Module):
    """y ~ N(x w, 1), with a guide that has no site."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ self.slopes, 1.0), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        pass


@pytest.mark.parametrize("batch_size", [None, 20])
def test_svi_maximises_the_likelihood(batch_size: int | None) -> None:
    fit = SVI(steps=800, learning_rate=0.05, batch_size=batch_size, draws=3, seed=0, progress=False)
    posterior = fit.fit(Line(), X, Y)
    solution = torch.linalg.lstsq(X, Y[:, None]).solution.squeeze(1)
    # of batches, the learning rate has fallen to a hundredth; the last steps are within 0.01 of the solution
    torch.testing.assert_close(posterior.weights["slopes"], solution, rtol=0.0, atol=1e-6 if batch_size is None else 0.02)
    expected = dist.Normal(X @ posterior.weights["slopes"], 1.0).log_prob(Y).sum()
    assert posterior.draws == {} and posterior.shape == (1, 3)
    torch.testing.assert_close(posterior.stats["lp"], expected.expand(1, 3))
    assert posterior.predict()["y"].shape == (1, 1, 60)


def test_em_maximises_the_likelihood() -> None:
    posterior = EM(steps=100, seed=0, progress=False).fit(Line(), X, Y)
    solution = torch.linalg.lstsq(X, Y[:, None]).solution.squeeze(1)
    torch.testing.assert_close(posterior.weights["slopes"], solution, rtol=0.0, atol=1e-4)


def test_a_fit_can_be_saved_and_gone_on_from(tmp_path: Any) -> None:
    posterior = SVI(steps=20, draws=3, seed=0, progress=False).fit(Line(), X, Y)
    with pytest.warns(UserWarning, match="no latent site outside the plates of its data"):
        posterior.save(tmp_path / "line")
    loaded = Posterior.load(tmp_path / "line")
    assert loaded.draws == {} and loaded.shape == (1, 3)
    more = SVI(steps=20, draws=5, seed=0, progress=False).resume(posterior, Line(), X, Y)
    assert more.shape == (1, 5)
    torch.testing.assert_close(more.stats["lp"][:, :3], posterior.stats["lp"])


@pytest.mark.parametrize("sampler", [Gibbs, MetropolisHastings, HMC, NUTS])
def test_samplers_refuse_it(sampler: Any) -> None:
    with pytest.raises(Unsupported, match=f"Line hides nothing that {sampler.__name__} could draw. Use SVI"):
        sampler(progress=False).fit(Line(), X, Y)
