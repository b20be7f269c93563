"""Hidden Markov models: every observation of a series comes from a state, and the states follow one another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.func import grad, vmap

from inference.contract import Fitted
from inference.sequences import drawn_back, passage
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.classical.seeding import apart
from pyro_genmodels.distributions import InverseWishart, MarkovChain

__all__ = ["HMM"]

EMISSIONS = ("normal", "diagonal", "categorical", "poisson")
_CHUNK = 2**22  # numbers in the tables of draws that are looked at together

Draws = Fitted | Mapping[str, Tensor]


class HMM(GenerativeModel):
    """Hidden Markov model of one series.

        p ~ Dirichlet(1),  A_k ~ Dirichlet(1 + κ e_k),  z_1 ~ Categorical(p),  z_t ~ Categorical(A_{z_{t−1}}),  x_t ~ f(z_t)

        normal       μ_k ~ N(m, 9 diag s²),  Σ_k ~ InverseWishart(D + 2, diag s² / K^(2/D)),       x_t ~ N(μ_{z_t}, Σ_{z_t})
        diagonal     μ_k the same,  σ²_k ~ InverseGamma(D/2 + 1, s² / 2 K^(2/D)),                  x_t ~ N(μ_{z_t}, σ²_{z_t})
        categorical  π_k ~ Dirichlet(1),                                                           x_t ~ Categorical(π_{z_t})
        poisson      λ_k ~ Gamma(1, 1 / m),                                                        x_t ~ Poisson(λ_{z_t})

    with m and s the mean and the standard deviation of the data, which keep a state from collapsing onto a point. The
    sequence of states is one site: ``EM`` is Baum and Welch's algorithm, ``Gibbs`` draws the whole sequence by forward
    filtering and backward sampling, the others sum it out, all in logarithmic depth.

    Steps at which nothing is observed are NaN (in all columns, or -1 for symbols and counts): their states are inferred from
    their neighbours. NaN at the end of a series is a forecast.

    Labels of states are exchangeable: compare posteriors through label-free functions, or relabel first.

    Sites: ``initial`` (K,), ``transitions`` (K, K), ``z`` (T,), ``x`` (T, D) or (T,); ``means`` (K, D), ``covariances``
    (K, D, D) or diagonal variances (K, D); ``probabilities`` (K, symbols); ``rates`` (K,). Plates: ``states``, ``steps``.

    Args:
        states: Number of states K, at least 1.
        emission: "normal", "diagonal" (normal with independent columns), "categorical" or "poisson".
        symbols: Number of symbols of categorical observations; None takes it from the first data seen.
        stickiness: κ, at least 0: how many more times than to another state a state is expected to lead to itself, before
            any data.

    References:
        L. Baum, T. Petrie, G. Soules and N. Weiss, A maximization technique occurring in the statistical analysis of
        probabilistic functions of Markov chains (1970).
        L. Rabiner, A tutorial on hidden Markov models and selected applications in speech recognition (1989).
        S. Scott, Bayesian methods for hidden Markov models: recursive computing in the 21st century (2002).
    """

    def __init__(self, states: int, emission: str = "normal", symbols: int | None = None, stickiness: float = 0.0) -> None:
        super().__init__()
        if states < 1:
            raise ValueError(f"HMM needs at least 1 state, but states is {states}.")
        if emission not in EMISSIONS:
            raise ValueError(f"emission is '{emission}', but must be one of {', '.join(EMISSIONS)}.")
        if not stickiness >= 0:
            raise ValueError(f"stickiness is {stickiness}, but must be at least 0.")
        if symbols is not None and symbols < 1:
            raise ValueError(f"symbols is {symbols}, but must be at least 1.")
        self.states, self.emission, self.symbols, self.stickiness = states, emission, symbols, stickiness
        self._has_symbols = symbols is not None
        self.location: Any
        self.scale: Any
        self.register_buffer("location", None)
        self.register_buffer("scale", None)

    @property
    def _is_normal(self) -> bool:
        return self.emission in ("normal", "diagonal")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.emission == "categorical" and self.location is not None:
            self.symbols = len(self.location)

    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Scales the prior to the data.

        Args:
            x: The series, (T, D) floating for normal emissions, (T,) whole numbers else.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If x has another shape, values that the emission does not have, or none at all.
        """
        if x is None:
            return
        self._check(x)
        seen = x[self._is_seen(x)].to(x.dtype if x.is_floating_point() else torch.get_default_dtype())
        deviation = seen.std(0, correction=0)
        self.location = seen.mean(0)
        self.scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        if self.emission == "categorical":
            self.symbols = self.symbols if self._has_symbols else int(seen.max()) + 1
            self.location = torch.bincount(seen.long(), minlength=int(self.symbols or 1)).to(seen) / len(seen)
        if self.emission == "poisson":  # a series of zeros has a rate, too
            self.location = self.location.clamp(min=1.0 / len(seen))

    def _check(self, x: Tensor) -> None:
        if self._is_normal:
            if x.dim() != 2 or not x.shape[1]:
                raise ValueError(f"x has shape {tuple(x.shape)}, but must be a series of rows (steps, features).")
            if not x.is_floating_point():
                raise ValueError(f"x holds {str(x.dtype).removeprefix('torch.')}, but must be floating: pass x.double().")
            if bool(x.isinf().any()):
                raise ValueError("x holds values that are infinite. Set what is not known to NaN.")
            partly = (x.isnan().any(1) & ~x.isnan().all(1)).nonzero()
            if len(partly):
                raise ValueError(
                    f"Row {int(partly[0])} of x is NaN in some columns only, but a step is observed or not. Fill it in, or "
                    "make the whole row NaN."
                )
        else:
            if x.dim() != 1:
                raise ValueError(f"x has shape {tuple(x.shape)}, but must be a series of numbers (steps,).")
            known = x[self._is_seen(x)]
            if len(known) and (bool((known < 0).any()) or bool((known != known.round()).any())):
                raise ValueError(
                    f"x holds {float(known[(known < 0) | (known != known.round())][0]):g}, but a {self.emission} series has "
                    "whole numbers from 0 on, or -1 for a step that was not observed."
                )
            if (
                self.emission == "categorical"
                and self._has_symbols
                and len(known)
                and int(known.max()) >= (self.symbols or 0)
            ):
                raise ValueError(f"x holds the symbol {int(known.max())}, but there are {self.symbols}, numbered from 0.")
        if not bool(self._is_seen(x).any()):
            raise ValueError("Nothing of x is observed.")

    def _is_seen(self, x: Tensor) -> Tensor:
        """Which steps are observed, (T,)."""
        return ~x.isnan().any(-1) if self._is_normal else ~x.isnan() & (x != -1)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        steps, like = self._steps(x, size), self._like(x)
        initial = pyro.sample("initial", dist.Dirichlet(like.new_ones(self.states)))
        stays = 1.0 + self.stickiness * torch.eye(self.states, dtype=like.dtype, device=like.device)
        with pyro.plate("states", self.states):
            transitions = pyro.sample("transitions", dist.Dirichlet(stays))
            own = self._emissions(like)
        z = pyro.sample("z", MarkovChain(initial, transitions, steps))
        with pyro.plate("steps", steps):
            given = self._given(own, z)
            if x is None or bool((is_seen := self._is_seen(x)).all()):
                return pyro.sample("x", given, obs=x)
            filled = torch.where(is_seen.unsqueeze(-1) if self._is_normal else is_seen, x, self._blank(x))
            with poutine.mask(mask=is_seen):
                return pyro.sample("x", given, obs=filled)

    def _blank(self, x: Tensor) -> Tensor:
        """What stands where nothing was observed: a value that the emission has."""
        return torch.zeros_like(x[:1]) if self.location is None or not self._is_normal else self.location.to(x)

    def _emissions(self, like: Tensor) -> tuple[Tensor, ...]:
        """Samples the parameters of the emissions, one for each state."""
        if self.emission == "categorical":
            return (pyro.sample("probabilities", dist.Dirichlet(like.new_ones(self.states, int(self.symbols or 1)))),)
        if self.emission == "poisson":
            return (pyro.sample("rates", dist.Gamma(torch.ones_like(self.location), 1.0 / self.location)),)
        means = pyro.sample("means", dist.Normal(self.location, 3.0 * self.scale).to_event(1))
        features = self.scale.shape[0]
        variance = self.scale.square() / self.states ** (2.0 / features)
        if self.emission == "normal":
            return means, pyro.sample("covariances", InverseWishart(features + 2.0, torch.diag(variance)))
        return means, pyro.sample("covariances", dist.InverseGamma(0.5 * features + 1.0, 0.5 * variance).to_event(1))

    def _given(self, own: tuple[Tensor, ...], z: Tensor) -> dist.TorchDistribution:
        """Distribution of observations given their states z (…)."""
        if self.emission == "categorical":
            return dist.Categorical(own[0][z])
        if self.emission == "poisson":
            return dist.Poisson(own[0][z])
        means, covariances = own
        if self.emission == "normal":
            return dist.MultivariateNormal(means[z], scale_tril=torch.linalg.cholesky(covariances)[z])
        return dist.Normal(means[z], covariances.sqrt()[z]).to_event(1)

    def _like(self, x: Tensor | None) -> Tensor:
        if self.location is not None:
            found: Tensor = self.location
            return found
        return x if x is not None and x.is_floating_point() else torch.zeros(())

    def _steps(self, x: Tensor | None, size: int | None) -> int:
        if self.location is None:
            if x is None:
                raise ValueError("This HMM has seen no data, to which its prior is scaled: call prepare(x) to draw from it.")
            self.prepare(x)
        if x is not None:
            if self._is_normal and x.shape[-1] != len(self.location):
                raise ValueError(f"x has {x.shape[-1]} features, but this HMM was built for {len(self.location)}.")
            return x.shape[0]
        if size is None:
            raise ValueError("HMM.model needs a series x, or the number of steps to draw, size.")
        return size

    @torch.no_grad()
    def start(self, x: Tensor, size: int | None = None) -> dict[str, Tensor]:
        """Where a fit may start: states that last, with the moments of clusters that k-means++ has chosen.

        Random numbers come from torch's global generator.

        Args:
            x: The series.
            size: Not used.

        Returns:
            Site to value, such as ``EM(start=...)`` takes.
        """
        if self.location is None:
            self.prepare(x)
        like, states = self._like(x), self.states
        eye = torch.eye(states, dtype=like.dtype, device=like.device)
        found = {
            "initial": like.new_full((states,), 1.0 / states),
            "transitions": (0.5 * eye + 0.5 / states) / (0.5 + 0.5),
        }
        seen = x[self._is_seen(x)]
        if self.emission == "categorical":
            jitter = 0.5 + torch.rand(states, int(self.symbols or 1), dtype=like.dtype, device=like.device)
            counts = torch.bincount(seen.long(), minlength=int(self.symbols or 1)).to(jitter) + 1.0
            found["probabilities"] = jitter * counts / (jitter * counts).sum(-1, keepdim=True)
            return found
        if self.emission == "poisson":
            owner = apart(seen.to(like)[:, None].sqrt(), states)
            sizes = like.new_zeros(states).index_add(0, owner, torch.ones_like(seen, dtype=like.dtype))
            sums = like.new_zeros(states).index_add(0, owner, seen.to(like))
            found["rates"] = (sums + 1.0) / (sizes + 1.0 / self.location)
            return found
        owner = apart((seen - self.location) / self.scale, states)
        member = torch.nn.functional.one_hot(owner, states).to(seen)
        sizes, features = member.sum(0), seen.shape[1]
        means = (member.mT @ seen + self.location) / (sizes + 1.0)[:, None]
        residual = seen - means[owner]
        variance = self.scale.square() / states ** (2.0 / features)
        if self.emission == "normal":
            scatter = torch.stack([(residual * weight[:, None]).mT @ residual for weight in member.mT])
            spread = (torch.diag(variance) + scatter) / (sizes + features + 2.0)[:, None, None]
        else:
            spread = (variance + member.mT @ residual.square()) / (sizes + features + 2.0)[:, None]
        return found | {"means": means, "covariances": spread}

    # ------------------------------------------------------------------------------------------ what draws say
    @property
    def _sites(self) -> dict[str, int]:
        """The parameters and their dimensions."""
        own = {"categorical": {"probabilities": 2}, "poisson": {"rates": 1}, "normal": {"means": 2, "covariances": 3}}
        return {"initial": 1, "transitions": 2, **own.get(self.emission, {"means": 2, "covariances": 2})}

    def _tables(self, x: Tensor, draws: Draws) -> Iterator[tuple[Tensor, Tensor]]:
        """For some draws at a time, log-weights of states (draw, T, K) and of steps (draw, T − 1, K, K); see ``passage``."""
        self._check(x)
        table = draws if isinstance(draws, Mapping) else draws.matched
        like = x if x.is_floating_point() else torch.as_tensor(table["initial"]).to(x.device)
        parts = [torch.as_tensor(table[name]).to(like) for name in self._sites]
        parts = [
            part.reshape(-1, *part.shape[part.dim() - own :]) for part, own in zip(parts, self._sites.values(), strict=True)
        ]
        is_seen, labels = self._is_seen(x), torch.arange(self.states, device=x.device)
        filled = torch.where(is_seen.unsqueeze(-1) if self._is_normal else is_seen, x, self._blank(x))
        if self._is_normal and parts[2].shape[-1] != x.shape[1]:
            raise ValueError(f"x has {x.shape[1]} features, but these draws are of {parts[2].shape[-1]}.")
        for some in zip(*(part.split(max(1, _CHUNK // (len(x) * self.states**2))) for part in parts), strict=True):
            initial, transitions, *rest = some
            terms = [
                self._given(tuple(part[i] for part in rest), labels).log_prob(filled[:, None]) for i in range(len(initial))
            ]
            states = torch.where(is_seen[:, None], torch.stack(terms), 0.0)
            states = torch.cat([states[:, :1] + initial.log()[:, None], states[:, 1:]], 1)
            yield states, transitions.log().unsqueeze(1).expand(-1, len(x) - 1, -1, -1)

    def predict_proba(self, x: Tensor, draws: Draws) -> Tensor:
        """Probability of each state at each step given the whole series, averaged over draws whose labels are matched.

        Args:
            x: The series; steps that are not observed (NaN, or -1) have probabilities, too.
            draws: A Posterior, or site to (…, *site).

        Returns:
            (T, K), rows sum to 1.
        """
        # the derivative of log Z in the log-weight of a state is its probability
        smoothed = vmap(grad(lambda states, steps: passage(states, steps).log_z))
        found = [smoothed(*tables) for tables in self._tables(x, draws)]
        return torch.cat(found).mean(0)

    @torch.no_grad()
    def predict(self, x: Tensor, draws: Draws) -> Tensor:
        """The most probable sequence of states (Viterbi's path), at the mean of the matched draws, (T,).

        References:
            A. Viterbi, Error bounds for convolutional codes and an asymptotically optimum decoding algorithm (1967).
        """
        table = draws if isinstance(draws, Mapping) else draws.matched
        point = {}
        for name, own in self._sites.items():
            part = torch.as_tensor(table[name])
            point[name] = part.reshape(-1, *part.shape[part.dim() - own :]).mean(0)
        ((states, steps),) = self._tables(x, point)
        return drawn_back(passage(states[0], steps[0], maximise=True), lambda logits, _: logits.argmax(-1))[0]

    @torch.no_grad()
    def score(self, x: Tensor, draws: Draws) -> float:
        """Log predictive density of a series: log-mean over the draws of p(x | draw), all sequences of states summed out."""
        found = torch.cat([vmap(lambda s, a: passage(s, a).log_z)(*tables) for tables in self._tables(x, draws)])
        return float(found.logsumexp(0)) - math.log(len(found))
