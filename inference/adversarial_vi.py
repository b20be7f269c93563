"""Variational inference by a guide that is known through its draws: a critic tells what its density is.

References:
    L. Mescheder, S. Nowozin and A. Geiger, Adversarial variational Bayes (2017).
    F. Huszár, Variational inference using implicit distributions (2017).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from inference.contract import Draw, Unsupported
from inference.duel import Duel, DuelState
from inference.enumeration import log_normalizer
from inference.fit import Optimise
from inference.games import Game, Minimax
from inference.guides import Guide, batched, is_drawn, mapped
from inference.program import Program
from inference.training import at_once

__all__ = ["AdversarialVI", "AdversarialVIInfo"]

_PARTICLES = 256  # of a guide whose sites belong to no row
_DECAY = 0.95  # of the moments of the contrast: they follow the last twenty steps of the critic
_LEAST_SCALE = 1e-6  # of a guide that has come down to a point


class AdversarialVIInfo(NamedTuple):
    """What a step has seen, each ().

    Attributes:
        value: What the critic raises; −log 4 where the guide is normal, more where it is not.
        penalty: The penalties in its loss.
        loss: Minus the bound, in nats for all rows; None where the guide does not learn.
        divergence: E_q critic, that of the guide from the normal of its own moments, in nats for all rows.
    """

    value: Tensor
    penalty: Tensor
    loss: Tensor | None = None
    divergence: Tensor | None = None


class _Contrast(nn.Module):
    """r(u) = N(mean, scale²), of the moments of the guide's last draws, and where in the program these are.

    Args:
        program: The program.
        sites: Latent sites that the guide draws.
        is_local: Whether each row has its own.
        like: Some positions, (count, size).
    """

    def __init__(self, program: Program, sites: tuple[str, ...], is_local: bool, like: Tensor) -> None:
        super().__init__()
        self.sites, self.is_local = sites, is_local
        self.enumerated = tuple(name for name in program.finite if name not in sites)
        rows = [i for i, leaf in enumerate(program.data) if leaf.dim() and len(leaf) == program.rows]
        self.beside = rows if is_local else []
        self.count: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("count", like.new_zeros(()))
        self.register_buffer("mean", like.new_zeros(like.shape[1]))
        self.register_buffer("variance", like.new_ones(like.shape[1]))

    @torch.no_grad()
    def follow(self, position: Tensor) -> None:
        """Moves the moments towards those of draws (count, size); at first they are means of all that there were."""
        self.count += 1.0
        share = torch.maximum(1.0 / self.count, torch.full_like(self.count, 1.0 - _DECAY))
        self.mean += share * (position.mean(0) - self.mean)
        self.variance += share * ((position - self.mean).square().mean(0) - self.variance)

    @property
    def scale(self) -> Tensor:
        return self.variance.sqrt() + _LEAST_SCALE

    def standardised(self, position: Tensor) -> Tensor:
        return (position - self.mean) / self.scale

    def log_prob(self, position: Tensor) -> Tensor:
        """log r of positions (count, size), (count,)."""
        z = self.standardised(position)
        return -(0.5 * z.square() + self.scale.log() + 0.5 * math.log(2.0 * math.pi)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class AdversarialVI(Duel[AdversarialVIInfo]):
    """Fits a guide without a density, and the weights of the program, by the evidence lower bound that a critic tells.

        log p(x) ≥ E_q [log p(x, h) − log q(h | x)],   log q = log r + T,   T the best critic of q against r

    The guide may sample its sites from an ``ImplicitDistribution``, such as a ``Generator`` of the data, or compute them
    from auxiliary noise. r is a normal with the moments of the guide's latest draws ("adaptive contrast"), so that the
    critic has to find what is not normal about them, and no more. The bound is one as far as the critic is at its best: take
    several ``critic_steps``, and look at ``posterior.diagnose()``.

    The critic gets the position, the unconstrained numbers of all latent sites that the guide draws, standardised by r:
    (particles, size). Where each row has latent sites of its own it gets one position a row and particle, and then the
    program's tensors that have rows: ``Critic((size,), context=numbers in these)``.

    ``posterior.stats`` has ``lp`` = log p(x, h), and ``log_q``, which is the critic's word for log q(h | x). After
    ``average`` its word is on the last guide, not on the averaged one: go on with the critic alone, ``learning_rate=None``.

    Args:
        critic: A module that gives one number a row, (rows,) or (rows, 1).
        guide: A Pyro guide all of whose sites are drawn with gradients (``rsample``); None takes the model's own.
        particles: Draws of the guide a step; None takes 1 where rows have sites of their own, else 256.
        draws: Draws of the fitted guide.
        steps: Steps of the guide.
        critic_steps: Steps of the critic for each of them, at least 1.
        learning_rate: Of Adam for the weights of guide and program; None leaves them and trains the critic alone.
        critic_learning_rate: Of Adam for the critic's; None takes the same, or 2e-4.
        betas: Of Adam, for both. Little momentum: the other player moves, too.
        batch_size: Rows per step; None takes all.
        zero_penalty: γ of R1, γ/2 E_q ‖∇T‖², added to the critic's loss; 0 leaves it out.
        average: Decay of an exponential moving average, such as 0.999, or a ``PowerAverage``, of the weights of guide and
            program, or of the critic's where that is trained alone; it takes their place at the end. None keeps the last
            ones.
        autocast: Type of the arithmetic of networks, such as ``torch.bfloat16``.
        compile: Whether recorded steps are compiled by ``torch.compile``; pays on a GPU.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def program(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> class Pushed(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.push = torch.nn.Linear(1, 1)
        ...     def forward(self, x):
        ...         noise = pyro.sample("noise", dist.Normal(torch.zeros(1), 1.0).to_event(1), infer={"is_auxiliary": True})
        ...         pyro.sample("z", dist.Delta(self.push(noise)[0]))
        >>> fit = AdversarialVI(critic=torch.nn.Linear(1, 1), guide=Pushed(), steps=20, draws=100, seed=0, progress=False)
        >>> fit.fit(program, torch.tensor(1.0)).draws["z"].shape
        torch.Size([1, 100])
    """

    kind: ClassVar[str] = "adversarial"

    guide: Callable[..., Any] | None = None
    particles: int | None = None
    draws: int = 1000

    @property
    def game(self) -> Game:
        return Minimax()

    @property
    def schedule(self) -> Optimise:
        return Optimise(self.steps, self.draws)

    @property
    def view(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}

    # ------------------------------------------------------------------------------------------------- beginning
    def init(self, program: Program) -> DuelState:
        if self.particles is not None and (not isinstance(self.particles, int) or self.particles < 1):
            raise ValueError(f"particles is {self.particles!r}, but must be an integer of at least 1.")
        self._check_settings(program)
        guide = self._guide(program)
        contrast = self._contrast(program, guide)
        self.critic.to(contrast.mean)
        count = self._particles(contrast)
        if count == 1 and not contrast.is_local:
            raise ValueError("particles is 1, but the critic needs several draws of what belongs to no row, such as 256.")
        if self._is_playing and not any(w.requires_grad for w in (*guide.weights().values(), *program.weights.values())):
            raise Unsupported(f"Neither the guide nor {program.name} has weights to train.")
        with torch.no_grad():
            position, _ = self._position(contrast, program, self._drawn(guide, program, program.glimpse, count))
            beside = self._beside(contrast, program.glimpse, count)
            what = "positions of the latent sites" + (", then the program's tensors with rows" if beside else "")
            self._check_scores([position, *beside], what)
        return self._begun(program, guide, contrast)

    def _guide(self, program: Program) -> Guide:
        chosen = self.guide if self.guide is not None else program.guide
        if inspect.isclass(chosen):
            raise TypeError(f"guide= must be a Pyro guide, but is the class {chosen.__name__}. Give one that is made.")
        if chosen is None:
            raise Unsupported(
                f"AdversarialVI trains a guide of your own, but guide= is None and {program.name} brings none. SVI() makes "
                "an automatic one, with a density."
            )
        return Guide(chosen)

    def _contrast(self, program: Program, guide: Guide) -> _Contrast:
        """Looks at what the guide draws.

        Raises:
            Unsupported: If gradients do not go through it, or some of it belongs to rows and some does not.
        """
        with torch.no_grad():
            trace = guide.trace(program, data=program.glimpse, evaluated=False)
        guide.check(trace, program)
        for name, node in trace.nodes.items():
            if is_drawn(node) and not node["fn"].has_rsample:
                remedy = "Leave it out of the guide, it is summed out" if name in program.finite else "Use SVI()"
                raise Unsupported(f"The guide draws '{name}' without gradients (rsample). {remedy}.")
        sites = tuple(name for name in program.latents if name in trace.nodes)
        rows = set(program.row_plates)
        local = [name for name in sites if rows & {plate.name for plate in program.latents[name].plates}]
        nested = [name for name in local if len(program.latents[name].batch_shape) != 1]
        if nested or (local and len(local) < len(sites)):
            why = (
                f"'{nested[0]}' is in other plates, too"
                if nested
                else f"'{local[0]}' is drawn for every row, but '{min({*sites} - {*local})}' once"
            )
            raise Unsupported(f"The critic compares the latent sites of a row, or of all rows together; {why}. Use SVI().")
        values = {name: trace.nodes[name]["value"][None] for name in sites}
        for name in sites:
            site, value = program.latents[name], trace.nodes[name]["value"]
            event, drawn = site.shape[len(site.batch_shape) :], value.shape[value.dim() - site.event_dim :]
            if drawn != event:
                raise ValueError(
                    f"The guide draws '{name}' of shape {tuple(drawn)}, but in {program.name} it is {tuple(event)}."
                )
            if not bool(site.support.check(value).all()):
                raise ValueError(
                    f"The guide draws values of '{name}' that are NaN or lie outside its support {site.support}. Push them "
                    "there, such as by exp() to positive ones."
                )
        like, _ = _positions(program, values, bool(local))
        return _Contrast(program, sites, bool(local), like)

    def _particles(self, contrast: _Contrast) -> int:
        return self.particles or (1 if contrast.is_local else _PARTICLES)

    # ------------------------------------------------------------------------------------------------ the losses
    def _drawn(self, guide: Guide, program: Program, data: list[Tensor] | None, count: int) -> dict[str, Tensor]:
        """Draws of the guide, site to (count, *site)."""

        def draw() -> dict[str, Tensor]:
            nodes = guide.trace(program, data=data, evaluated=False).nodes
            return {name: nodes[name]["value"] for name in program.latents if name in nodes}

        values: dict[str, Tensor] = batched(draw, count)
        return values

    def _position(self, contrast: _Contrast, program: Program, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _positions(program, values, contrast.is_local)

    def _beside(self, contrast: _Contrast, data: list[Tensor], count: int) -> list[Tensor]:
        """What the critic is given with positions of all particles, each (particles · rows, …)."""
        return [data[i].expand(count, *data[i].shape).flatten(0, 1) for i in contrast.beside]

    def _critic_loss(
        self, program: Program, guide: Guide | None, wiring: _Contrast, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        assert guide is not None
        data, count = program.data if data is None else data, self._particles(wiring)
        with torch.no_grad():
            position, _ = self._position(wiring, program, self._drawn(guide, program, data, count))
            wiring.follow(position)
            drawn = wiring.standardised(position)
        return self._judged([drawn], [torch.randn_like(drawn)], self._beside(wiring, data, count))

    def _generator_loss(
        self, program: Program, guide: Guide | None, wiring: _Contrast, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """Minus the bound, and the divergence from the contrast, (2,)."""
        assert guide is not None
        scale = 1.0 if data is None else (program.rows or 1) / (self.batch_size or 1)
        values = self._drawn(guide, program, data, self._particles(wiring))
        scales = None if data is None else dict.fromkeys(program.row_plates, scale)
        lp = mapped(lambda value: log_normalizer(program, value, wiring.enumerated, data, scales), values)
        log_q, score = self._log_q(wiring, program, values, data)
        own = scale if wiring.is_local else 1.0
        loss = (own * log_q - lp).mean()
        return loss, torch.stack([loss, own * score.mean()]).detach()

    def _log_q(
        self, contrast: _Contrast, program: Program, values: Mapping[str, Tensor], data: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """log q of all that the guide has drawn, as the critic tells it, and the critic's part in it, each (particle,)."""
        data = program.data if data is None else data
        position, log_jacobian = self._position(contrast, program, values)
        count = len(log_jacobian)
        score = self._told(contrast.standardised(position), *self._beside(contrast, data, count)).reshape(count, -1).sum(-1)
        return contrast.log_prob(position).reshape(count, -1).sum(-1) + score - log_jacobian, score

    # ------------------------------------------------------------------------------------------------ what is told
    def _info(self, state: DuelState, judged: Tensor, moved: Tensor | None) -> AdversarialVIInfo:
        value, penalty = judged.unbind()
        loss, divergence = (None, None) if moved is None else moved.unbind()
        return AdversarialVIInfo(value, penalty, loss, divergence)

    def _drawer(self, state: DuelState, program: Program, data: list[Tensor] | None) -> tuple[str, list[Tensor]]:
        assert state.guide is not None
        return f"The guide of {program.name}", [*self._drawn(state.guide, program, data, 1).values()]

    def sample(self, state: DuelState, program: Program) -> tuple[DuelState, Draw]:
        state, draw = self.readings(state, program, 1)
        return state, Draw({n: v[:, 0] for n, v in draw.values.items()}, {n: v[:, 0] for n, v in draw.stats.items()})

    def most_readings(self, program: Program) -> int:
        return at_once(program)

    @torch.no_grad()
    def readings(self, state: DuelState, program: Program, count: int) -> tuple[DuelState, Draw]:
        state = self._settled(state)
        assert state.guide is not None
        values = self._drawn(state.guide, program, None, count)
        enumerated = state.wiring.enumerated
        lp = mapped(partial(log_normalizer, program, enumerated=enumerated), values)
        log_q, _ = self._log_q(state.wiring, program, values, None)
        if enumerated:
            values |= program.density.draw(enumerated)(values, program.density.uniforms(enumerated, count))[0]
        return state, Draw({n: values[n][None] for n in program.latents}, {"lp": lp[None], "log_q": log_q[None]})

    def values(self, state: DuelState, program: Program) -> dict[str, Tensor]:
        return self.sample(state, program)[1].values


def _positions(program: Program, values: Mapping[str, Tensor], is_local: bool) -> tuple[Tensor, Tensor]:
    """Unconstrained positions of values (particle, *site), and log |d values / d position|.

    Returns:
        (particle, size), or (particle · row, size) of sites that rows have; and (particle,).
    """
    parts, jacobians = [], []
    for name, value in values.items():
        transform = program.latents[name].transform
        part, count = transform.inv(value), len(value)
        parts.append(part.reshape(count * value.shape[1] if is_local else count, -1))
        jacobians.append(transform.log_abs_det_jacobian(part, value).reshape(count, -1).sum(-1))
    return torch.cat(parts, -1), torch.stack(jacobians).sum(0)
