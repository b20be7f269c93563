"""Fourteen posteriors of posteriordb as Pyro programs, written anew from the Stan programs, and their reference draws.

    reference = BY_NAME["arma-arma11"]
    posterior = HMC().fit(reference.program, *reference.data())
    reference.quantities(posterior.draws)             # parameter to (chain, draw), comparable with reference.draws()

The archive is looked for in the folder that ``PYRO_GENMODELS_DATA`` names. It holds ten thousand nearly independent draws
of each posterior, in single precision.

References:
    M. Magnusson et al., posteriordb: a set of posteriors for Bayesian inference and probabilistic programming (2023).
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from inference import HMC, Gibbs, MetropolisHastings, arviz

__all__ = ["ARCHIVE", "BY_NAME", "REFERENCES", "SAMPLERS", "Comparison", "Reference", "compared", "sampler"]

FOLDER = Path(os.environ.get("PYRO_GENMODELS_DATA") or Path(__file__).parents[2] / "shared" / "data")
ARCHIVE = FOLDER / "posteriordb.zip"


# ------------------------------------------------------------------------------------------ programs
def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """eight_schools_noncentered.stan"""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", len(y)):
        offset = pyro.sample("offset", dist.Normal(y.new_tensor(0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * offset)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def flat_regression(y: Tensor, x: Tensor) -> None:
    """logearn_height.stan, nes.stan, mesquite.stan: beta and sigma are flat."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore(y: Tensor, x: Tensor) -> None:
    """kidscore_momiq.stan, kidscore_interaction.stan: beta is flat."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def blr(y: Tensor, x: Tensor) -> None:
    """blr.stan"""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(10.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kilpisjarvi(y: Tensor, x: Tensor, alpha_prior: Tensor, beta_prior: Tensor) -> None:
    """kilpisjarvi.stan: sigma is flat, the other priors are given by mean and standard deviation."""
    alpha = pyro.sample("alpha", dist.Normal(alpha_prior[0], alpha_prior[1]))
    beta = pyro.sample("beta", dist.Normal(beta_prior[0], beta_prior[1]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def autoregression(y: Tensor, order: int) -> None:
    """arK.stan: the first values are given."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_tensor(0.0), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(order), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    before = y.unfold(0, order, 1)[:-1].flip(-1)
    with pyro.plate("steps", len(y) - order):
        pyro.sample("y", dist.Normal(alpha + before @ beta, sigma), obs=y[order:])


def arma(y: Tensor) -> None:
    """arma11.stan: nu_t = mu + phi y_(t−1) + theta (y_(t−1) − nu_(t−1)), with nu_1 = mu + phi mu."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 10.0))
    phi = pyro.sample("phi", dist.Normal(y.new_tensor(0.0), 2.0))
    theta = pyro.sample("theta", dist.Normal(y.new_tensor(0.0), 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    before = torch.cat([mu.unsqueeze(0), y[:-1]])
    # the errors solve (1 + theta L) err = r with the lag L, and 1 / (1 + x) = (1 − x) (1 + x²) (1 + x⁴) …
    error, power, lag = y - mu - phi * before, -theta, 1
    while lag < len(y):
        error = error + power * torch.nn.functional.pad(error[:-lag], (lag, 0))
        power, lag = power.square(), 2 * lag
    with pyro.plate("steps", len(y)):
        pyro.sample("y", dist.Normal(y - error, sigma), obs=y)


def gp_regression(x: Tensor, k: Tensor) -> None:
    """gp_pois_regr.stan"""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    with pyro.plate("points", len(x)):
        f_tilde = pyro.sample("f_tilde", dist.Normal(x.new_tensor(0.0), 1.0))
    f = pyro.deterministic("f", gp_factor(x, rho, alpha) @ f_tilde)
    with pyro.plate("counts", len(x)):
        pyro.sample("k", dist.Poisson(f.exp()), obs=k)


def gp_factor(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    """Cholesky factor of the squared exponential covariance, (…, N, N)."""
    square = (x[:, None] - x).square() / rho[..., None, None].square()
    covariance = alpha[..., None, None].square() * (-0.5 * square).exp()
    return torch.linalg.cholesky(covariance + 1e-10 * torch.eye(len(x), dtype=x.dtype))


def mixture(y: Tensor) -> None:
    """low_dim_gauss_mix.stan without its ordering: labels are sorted afterwards, which is the same posterior."""
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(2.0)))
    with pyro.plate("rows", len(y)):
        second = pyro.sample("second", dist.Bernoulli(1.0 - theta)).long()
        pyro.sample("y", dist.Normal(mu[second], sigma[second]), obs=y)


def transitions(concentration: Tensor) -> Tensor:
    """Rows theta1 and theta2 of a transition matrix."""
    theta1 = pyro.sample("theta1", dist.Dirichlet(concentration[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(concentration[1]))
    return torch.stack([theta1, theta2])


def ordered(name: str, prior: Any) -> Tensor:
    """0 < z_1 < z_2 with a prior that is not normalised on this wedge."""
    value = pyro.sample(name, dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    pyro.factor(f"{name}_prior", prior.log_prob(value).sum())
    return value


def chain(theta: Tensor, emission: Tensor) -> Tensor:
    """log Σ over paths of Π theta[z_(t−1), z_t] exp emission[t, z_t], the matrices multiplied in pairs."""
    product = theta.log() + emission[1:, None, :]
    while len(product) > 1:
        left, right = product[:-1:2], product[1::2]
        pairs = (left[:, :, :, None] + right[:, None, :, :]).logsumexp(-2)
        product = torch.cat([pairs, product[2 * len(pairs) :]])
    return (emission[0][:, None] + product[0]).logsumexp((0, 1))


def hmm(y: Tensor) -> None:
    """hmm_example.stan, its states summed out; the first of them has a flat prior."""
    theta = transitions(y.new_ones(2, 2))
    mu = ordered("mu", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0))
    pyro.factor("y", chain(theta, dist.Normal(mu, 1.0).log_prob(y[:, None])))


def hmm_states(y: Tensor) -> None:
    """As ``hmm``, with its states, and without the ordering: the other order has e⁻⁴⁰ of the mass."""
    theta = transitions(y.new_ones(2, 2))
    with pyro.plate("states", 2):
        mu = pyro.sample("mu", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0))
    state = None
    for t in pyro.markov(range(len(y))):
        probs = y.new_full((2,), 0.5) if state is None else theta[state]
        state = pyro.sample(f"state_{t}", dist.Categorical(probs))
        pyro.sample(f"y_{t}", dist.Normal(mu[state], 1.0), obs=y[t])


def drive(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    """hmm_drive_0.stan: as ``hmm`` with two exponential emissions, of rates phi and lambda."""
    theta = transitions(alpha)
    prior = dist.Normal(u.new_tensor([0.0, 3.0]), 1.0)
    phi, rate = ordered("phi", prior), ordered("lambda", prior)
    emission = dist.Exponential(phi).log_prob(u[:, None]) + dist.Exponential(rate).log_prob(v[:, None])
    pyro.factor("x", chain(theta, emission))


# ---------------------------------------------------------------------------------------- references
Values = Mapping[str, Any]


def _stacked(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters "beta[1]", "beta[2]" … to the site "beta", (chain, draw, *site)."""
    groups: dict[str, list[Tensor]] = {}
    for name, value in draws.items():
        groups.setdefault(name.split("[")[0], []).append(value)
    return {name: torch.stack(v, -1) if f"{name}[1]" in draws else v[0] for name, v in groups.items()}


def _same(draws: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return draws


def _schools(draws: Mapping[str, Tensor], data: tuple[Any, ...]) -> Mapping[str, Tensor]:
    offset = (draws["theta"] - draws["mu"][..., None]) / draws["tau"][..., None]
    return {"mu": draws["mu"], "tau": draws["tau"], "offset": offset}


def _whitened(draws: Mapping[str, Tensor], data: tuple[Any, ...]) -> Mapping[str, Tensor]:
    factor = gp_factor(data[0], draws["rho"], draws["alpha"])
    f_tilde = torch.linalg.solve_triangular(factor, draws["f"].unsqueeze(-1), upper=False).squeeze(-1)
    return {"rho": draws["rho"], "alpha": draws["alpha"], "f_tilde": f_tilde}


def _sorted(draws: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names the components by their means, as Stan's ordered vector does; theta is the weight of the first."""
    order = draws["mu"].argsort(-1)
    theta = torch.where(order[..., 0] == 0, draws["theta"], 1.0 - draws["theta"])
    return {"mu": draws["mu"].gather(-1, order), "sigma": draws["sigma"].gather(-1, order), "theta": theta}


def _design(target: str, *columns: str) -> Callable[[Values], tuple[Any, ...]]:
    """The target and the columns after a column of ones."""

    def arguments(values: Values) -> tuple[Any, ...]:
        rows = [torch.ones(len(values[target]))] + [_tensor(values[name]) for name in columns]
        return _tensor(values[target]), torch.stack([row.double() for row in rows], -1)

    return arguments


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _interaction(values: Values) -> tuple[Any, ...]:
    y, x = _design("kid_score", "mom_hs", "mom_iq")(values)
    return y, torch.cat([x, x[:, 1:2] * x[:, 2:]], -1)


def _log_earnings(values: Values) -> tuple[Any, ...]:
    y, x = _design("earn", "height")(values)
    return y.log(), x


def _nes(values: Values) -> tuple[Any, ...]:
    _, x = _design("partyid7", "real_ideo", "race_adj", "educ1", "gender", "income")(values)
    age = torch.tensor(values["age_discrete"])
    groups = torch.stack([age == group for group in (2, 3, 4)], -1).double()
    return _tensor(values["partyid7"]), torch.cat([x[:, :3], groups, x[:, 3:]], -1)


def _kilpisjarvi(values: Values) -> tuple[Any, ...]:
    priors = (_tensor([values[f"pmu{name}"], values[f"ps{name}"]]) for name in ("alpha", "beta"))
    return _tensor(values["y"]), _tensor(values["x"]), *priors


class Reference(NamedTuple):
    """A posterior of posteriordb.

    Attributes:
        name: Its name.
        program: The program, in Pyro.
        arguments: The data of posteriordb to the program's arguments.
        sites: Reference draws (parameters of one name stacked) and arguments to values of our sites; None if they are they.
        canonical: Draws of our sites to ones that mean the same as the reference draws.
        explicit: A program with the same posterior whose discrete sites are not summed out, for Gibbs; None if it is.
    """

    name: str
    program: Callable[..., None]
    arguments: Callable[[Values], tuple[Any, ...]]
    sites: Callable[[Mapping[str, Tensor], tuple[Any, ...]], Mapping[str, Tensor]] | None = None
    canonical: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = _same
    explicit: Callable[..., None] | None = None

    @property
    def label(self) -> str:
        """The name of the model."""
        return self.name.split("-")[1]

    def data(self, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        """The arguments of the program."""
        arguments = self.arguments(_read(self.name)[0])
        return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)

    def draws(self) -> dict[str, Tensor]:
        """Reference draws by parameter, (10, 1000) each."""
        return dict(_read(self.name)[1])

    def values(self) -> Mapping[str, Tensor]:
        """Reference draws by site of ours, (10, 1000, *site) each."""
        stacked = _stacked(self.draws())
        return self.sites(stacked, self.data()) if self.sites else stacked

    def quantities(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our draws by parameter of posteriordb, (chain, draw) each."""
        ours, found = self.canonical(draws), {}
        for name in self.draws():
            site, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name).groups()  # type: ignore[union-attr]
            found[name] = ours[site][..., int(index) - 1] if index else ours[site]
        return found


@functools.cache
def _read(name: str) -> tuple[Values, dict[str, Tensor]]:
    with zipfile.ZipFile(ARCHIVE) as archive:
        info = json.loads(archive.read(f"info/{name}.json"))
        values = json.loads(archive.read(info["data_file"]))
        draws = torch.from_numpy(np.load(io.BytesIO(archive.read(info["draws_file"]))).astype(float))
    return values, dict(zip(info["parameter_names"], draws.unbind(-1), strict=True))


def _named(*names: str) -> Callable[[Values], tuple[Any, ...]]:
    return lambda values: tuple(_tensor(values[name]) for name in names)


REFERENCES = (
    Reference("eight_schools-eight_schools_noncentered", eight_schools, _named("y", "sigma"), _schools),
    Reference("kidiq-kidscore_momiq", kidscore, _design("kid_score", "mom_iq")),
    Reference("kidiq-kidscore_interaction", kidscore, _interaction),
    Reference("earnings-logearn_height", flat_regression, _log_earnings),
    Reference("nes1980-nes", flat_regression, _nes),
    Reference(
        "mesquite-mesquite", flat_regression,
        _design("weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group"),
    ),
    Reference("sblrc-blr", blr, _named("y", "X")),
    Reference("kilpisjarvi_mod-kilpisjarvi", kilpisjarvi, _kilpisjarvi),
    Reference("arK-arK", autoregression, lambda values: (_tensor(values["y"]), values["K"])),
    Reference("arma-arma11", arma, _named("y")),
    Reference("gp_pois_regr-gp_pois_regr", gp_regression, _named("x", "k"), _whitened),
    Reference("low_dim_gauss_mix-low_dim_gauss_mix", mixture, _named("y"), canonical=_sorted),
    Reference("hmm_example-hmm_example", hmm, _named("y"), explicit=hmm_states),
    Reference("bball_drive_event_0-hmm_drive_0", drive, _named("u", "v", "alpha")),
)  # fmt: skip
BY_NAME = {reference.name: reference for reference in REFERENCES}


# ------------------------------------------------------------------------------------------ samplers
# Where the defaults of ``sampler`` do not suffice.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("eight_schools_noncentered", "Gibbs"): {"chains": 32, "warmup": 300, "thin": 3},
    ("eight_schools_noncentered", "HMC"): {"chains": 32, "warmup": 300},
    ("eight_schools_noncentered", "MetropolisHastings"): {"chains": 32, "warmup": 2000, "thin": 25},
    ("low_dim_gauss_mix", "Gibbs"): {"chains": 8, "draws": 300},
    ("low_dim_gauss_mix", "HMC"): {"chains": 8, "warmup": 150},
    ("low_dim_gauss_mix", "MetropolisHastings"): {"chains": 8, "draws": 300},
    ("blr", "MetropolisHastings"): {"thin": 20},
    ("kidscore_interaction", "MetropolisHastings"): {"warmup": 2000, "thin": 30},
    ("nes", "MetropolisHastings"): {"warmup": 3000, "thin": 30},
    ("mesquite", "MetropolisHastings"): {"warmup": 10_000, "thin": 30},
    ("mesquite", "HMC"): {"warmup": 1000},
    ("kilpisjarvi", "HMC"): {"warmup": 1000, "mass": "dense"},
    ("kilpisjarvi", "MetropolisHastings"): {"warmup": 20_000, "thin": 400},
    ("hmm_drive_0", "HMC"): {"warmup": 1000},
    ("gp_pois_regr", "MetropolisHastings"): {"warmup": 10_000, "thin": 300},
}


def sampler(name: str, reference: Reference) -> Any:
    """A back-end that is long enough for a posterior: "Gibbs", "MetropolisHastings" or "HMC"."""
    options = OPTIONS.get((reference.label, name), {})
    if name == "Gibbs":
        return Gibbs(**{"chains": 16, "warmup": 100, "draws": 250, **options}, seed=1, progress=False)
    if name == "HMC":
        return HMC(**{"chains": 16, "warmup": 300, "draws": 400, **options}, seed=3, progress=False)
    return MetropolisHastings(
        **{"chains": 16, "warmup": 1000, "draws": 250, "thin": 10, **options}, seed=2, progress=False
    )  # fmt: skip


SAMPLERS = ("Gibbs", "MetropolisHastings", "HMC")


# ---------------------------------------------------------------------------------------- comparison
class Comparison(NamedTuple):
    """Draws of one parameter beside the reference draws: differences in Monte-Carlo standard errors, and R-hat of all."""

    mean: float
    sd: float
    rhat: float


def compared(draws: Mapping[str, Tensor], reference: Reference) -> dict[str, Comparison]:
    """Parameter of posteriordb to how our draws of it compare."""
    ours, theirs = reference.quantities(draws), reference.draws()
    found = {}
    for name in theirs:
        a, b = ours[name].numpy(), theirs[name].numpy()
        z = []
        for method, statistic in (("mean", np.mean), ("sd", np.std)):
            error = np.hypot(arviz.mcse(a, method=method), arviz.mcse(b, method=method))
            z.append(float((statistic(a) - statistic(b)) / error))
        length = min(a.shape[1], b.shape[1])
        together = np.concatenate([a[:, :length], b[:, :length]])
        found[name] = Comparison(z[0], z[1], float(arviz.rhat(together)))
    return found
