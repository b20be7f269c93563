"""Adversarial training: the weights of a program are fitted by a critic that tells its draws from data.

Any program will do whose observed sites are drawn with gradients (``rsample``), above all one with an implicit distribution,
which has no density: the critic is to it what a guide is to a program with hidden sites, a device of the back-end.

References:
    I. Goodfellow et al., Generative adversarial nets (2014).
    X. Chen et al., InfoGAN (2016): the bound on the information in codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from inference.contract import Draw, Unsupported
from inference.duel import Duel, DuelState
from inference.fit import Optimise
from inference.games import Game, NonSaturating
from inference.guides import Guide, is_drawn
from inference.handlers import isolated, reproducible
from inference.program import Program

__all__ = ["Adversarial", "AdversarialInfo", "Wiring"]


class AdversarialInfo(NamedTuple):
    """What a step has seen, each ().

    Attributes:
        value: What the critic raises, at its last step: an estimate of a divergence; see ``inference.games``.
        penalty: The penalties in its loss.
        loss: What the generator lowers, without the information; None where it does not learn.
        information: E[log q(hidden | x) − log p(hidden)] a row of draws, at most their mutual information; or None.
    """

    value: Tensor
    penalty: Tensor
    loss: Tensor | None = None
    information: Tensor | None = None


class Wiring(NamedTuple):
    """Which of the program's tensors are what.

    Attributes:
        sources: For each observed site, the place of its data among the program's tensors; None if it is none of them.
        beside: Places of the tensors with rows that are not data, which the critic is given, too.
    """

    sources: tuple[int | None, ...]
    beside: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Adversarial(Duel[AdversarialInfo]):
    """Trains the weights of a program against a critic. Both networks are trained in place.

    Each step takes ``critic_steps`` batches for the critic and then one step of the generator on the last of them. The
    critic gets the values of the observed sites, then the program's other tensors that have rows, such as a context. Data
    are compared as whole rows: none may be missing. There are no draws of hidden sites; ``posterior.weights`` has the
    weights (those of the critic as ``critic.*``), ``posterior.predict()`` draws new data.

    Where a program with hidden sites brings a guide, this is trained to recognise them in draws, and the program to make
    them recognisable, by the bound E[log q(hidden | x) − log p(hidden)]: InfoGAN.

    Args:
        critic: A module that gives one number a row, (rows,) or (rows, 1).
        objective: What for: ``NonSaturating()``, ``Minimax()``, ``Wasserstein()``, ``Hinge()``, ``LeastSquares()``.
        steps: Steps of the generator.
        critic_steps: Steps of the critic for each of them, at least 1. WGAN takes 5.
        learning_rate: Of Adam for the program's weights; None leaves them as they are and trains the critic alone, which
            with ``Minimax()`` learns log p(x) − log q(x) of data p and draws q. Sites without rsample will do then.
        critic_learning_rate: Of Adam for the critic's; None takes the same, or 2e-4.
        betas: Of Adam, for both. Little momentum: the other player moves, too.
        batch_size: Rows per step, and as many draws; None takes all.
        zero_penalty: γ of R1, γ/2 E_data ‖∇D‖², added to the critic's loss; 0 leaves it out.
        information: Weight of the bound on the information; None is 1 where there is a guide for hidden sites, else 0.
        average: Decay of an exponential moving average, such as 0.999, or a ``PowerAverage``, of the program's weights, or
            of the critic's where that is trained alone; it takes their place at the end. None keeps the last ones.
        autocast: Type of the arithmetic of networks, such as ``torch.bfloat16``.
        compile: Whether recorded steps are compiled by ``torch.compile``; pays on a GPU.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> class Shift(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.by = torch.nn.Parameter(torch.zeros(1))
        ...     def model(self, x):
        ...         with pyro.plate("rows", len(x)):
        ...             pyro.sample("x", dist.Normal(self.by, 1.0).to_event(1), obs=x)
        >>> fit = Adversarial(critic=torch.nn.Linear(1, 1), steps=20, seed=0, progress=False).fit(Shift(), torch.ones(64, 1))
        >>> sorted(fit.weights), fit.history["value"].shape
        (['by', 'critic.bias', 'critic.weight'], torch.Size([20]))
    """

    kind: ClassVar[str] = "adversarial"

    objective: Game = field(default_factory=NonSaturating)
    information: float | None = None

    @property
    def game(self) -> Game:
        return self.objective

    @property
    def schedule(self) -> Optimise:
        return Optimise(self.steps, 1)

    @property
    def view(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "is_simulated": True}

    def init(self, program: Program) -> DuelState:
        if not isinstance(self.objective, Game):
            raise TypeError(f"objective= must be one of inference.games, such as Hinge(), but is {self.objective!r}.")
        if self.information is not None and not self.information >= 0:
            raise ValueError(f"information is {self.information!r}, but must not be negative.")
        self._check_settings(program)
        if not program.observed_sites:
            raise Unsupported(f"{program.name} observes nothing that a critic could tell from its draws. Give it data.")
        if self._is_playing:
            self._check_paths(program)
        if self._is_playing and not program.weights:
            raise Unsupported(
                f"What {program.name} draws depends on no weights: there is nothing to train. learning_rate=None trains the "
                "critic alone."
            )
        self._check_data(program)
        wiring = self._wiring(program)
        self._check_beside(program, wiring)
        self.critic.to(program.device, program.dtype)
        guide = self._guide(program, wiring)
        self._check_critic(program, wiring)
        return self._begun(program, guide, wiring)

    # ------------------------------------------------------------------------------------ what is refused before
    def _check_data(self, program: Program) -> None:
        for name, value in program.observed.items():
            if not value.is_floating_point():
                raise Unsupported(
                    f"Site '{name}' has whole numbers for data, which no gradient reaches. Give floating data: x.float()."
                )
            missing = (~value.isfinite()).nonzero()
            if len(missing):
                raise ValueError(
                    f"Site '{name}' has {len(missing)} values that are missing or infinite (the first at "
                    f"{tuple(missing[0].tolist())}), but a critic compares whole rows. Fill them in, or drop those rows."
                )

    def _check_beside(self, program: Program, wiring: Wiring) -> None:
        names = [name for name, _ in program.tensors]
        for i in wiring.beside:
            bad = (~program.data[i].isfinite()).nonzero()
            if len(bad):
                raise ValueError(
                    f"'{names[i]}' of {program.name} has {len(bad)} values that are missing or infinite (the first at "
                    f"{tuple(bad[0].tolist())}). Fill them in, or drop those rows."
                )

    def _wiring(self, program: Program) -> Wiring:
        """Finds each observed site among the program's tensors, by what becomes of it where one of these changes."""
        data = program.glimpse
        real = program.trace({}, data=data, evaluated=False).nodes
        for name in program.observed_sites:
            node = real[name]
            is_scaled = isinstance(node["scale"], Tensor) or node["scale"] != 1.0
            if node["mask"] is not None or is_scaled or isinstance(node["fn"], MaskedDistribution):
                raise Unsupported(
                    f"Site '{name}' is masked or scaled, but a critic compares whole rows, which count alike. Leave rows "
                    "out of the data, or use SVI(), which needs a density."
                )
        sources = tuple(self._source(program, data, name, real[name]["value"]) for name in program.observed_sites)
        rows = len(data[0]) if data and data[0].dim() else None
        beside = (i for i, leaf in enumerate(data) if leaf.dim() and len(leaf) == rows and i not in sources)
        return Wiring(sources, tuple(beside))

    @staticmethod
    def _source(program: Program, data: list[Tensor], name: str, value: Tensor) -> int | None:
        """The place of the tensor that is the data of a site; None if none is.

        Raises:
            Unsupported: If they are made of one.
        """
        for i, leaf in enumerate(data):
            if leaf is value:
                return i
        for i, leaf in enumerate(data):
            if not leaf.is_floating_point():
                continue
            with isolated(0, program.device), reproducible(program.dtype, program.device):
                other = leaf + 0.1 * (1.0 + leaf.abs()) * torch.rand_like(leaf)
                try:
                    found = program.trace({}, data=[*data[:i], other, *data[i + 1 :]], evaluated=False).nodes[name]["value"]
                except Exception:  # whatever a program raises that looks at its data
                    continue
            if found.shape == other.shape and torch.equal(found.to(other.dtype), other):
                return i
            if found.shape != value.shape or not torch.equal(found, value):
                raise Unsupported(
                    f"The data of site '{name}' are made of argument {i} of {program.name}. A critic that were given both "
                    "would tell draws by that alone. Pass the data as they are observed."
                )
        return None

    def _guide(self, program: Program, wiring: Wiring) -> Guide | None:
        """What recognises hidden sites, if anything is to."""
        is_asked = self.information is not None and self.information > 0
        reasons = {
            "does not learn": not self._is_playing,
            "hides nothing": not program.latents,
            "brings no guide that recognises what it hides": program.guide is None,
        }
        if self.information == 0 or program.guide is None or any(reasons.values()):
            if is_asked:
                what = next(reason for reason, holds in reasons.items() if holds)
                raise Unsupported(f"information= is {self.information}, but {program.name} {what}. Leave it out.")
            return None
        if wiring.sources[0] is None:
            raise Unsupported(
                f"The guide of {program.name} reads the program's arguments, but the data of its site "
                f"'{next(iter(program.observed_sites))}' are none of them, so that it cannot read draws. Pass them as they "
                "are observed, or information=0."
            )
        guide = Guide(program.guide)
        guide.check(guide.trace(program, data=program.glimpse), program)
        return guide

    def _check_paths(self, program: Program) -> None:
        """Whether gradients reach the weights through all that is drawn."""
        trace = program.trace({}, data=program.glimpse, resampled=program.observed_sites, evaluated=False)
        for name in program.observed_sites:
            node, site = trace.nodes[name], program.observed_sites[name]
            if not node["fn"].has_rsample:
                raise Unsupported(
                    f"Site '{name}' is {site.family}, whose draws have no gradient, so that the critic cannot teach "
                    f"{program.name}. Use SVI(), which needs its density, or draw it from a distribution with rsample."
                )
        for name, site in program.latents.items():
            fn = trace.nodes[name]["fn"]
            if not fn.has_rsample and fn.log_prob(trace.nodes[name]["value"]).requires_grad:
                raise Unsupported(
                    f"Site '{name}' is {site.family} with weights that its draws have no gradient in. Give it a fixed "
                    "distribution, or one with rsample."
                )

    def _check_critic(self, program: Program, wiring: Wiring) -> None:
        with torch.no_grad():
            data = program.glimpse
            real, drawn = self._real(program, wiring, data), program.simulated(data)
            for name, value in zip(program.observed_sites, real, strict=True):
                if drawn[name].shape != value.shape:
                    raise ValueError(
                        f"{program.name} draws '{name}' of shape {tuple(drawn[name].shape)}, but its data have shape "
                        f"{tuple(value.shape)}."
                    )
                if not drawn[name].isfinite().all():
                    raise ValueError(
                        f"{program.name} draws values of '{name}' that are NaN or infinite. Look at its weights."
                    )
            given = [*real, *(data[i] for i in wiring.beside)]
            self._check_scores(given, "the data, then the program's other tensors with rows")

    # ------------------------------------------------------------------------------------------------ the losses
    def _real(self, program: Program, wiring: Wiring, data: list[Tensor]) -> list[Tensor]:
        """The data of the observed sites."""
        if None not in wiring.sources:
            return [data[i] for i in wiring.sources if i is not None]
        nodes = program.trace({}, data=data, evaluated=False).nodes
        return [nodes[name]["value"].detach() for name in program.observed_sites]

    def _critic_loss(
        self, program: Program, guide: Guide | None, wiring: Wiring, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        data = program.data if data is None else data
        with torch.no_grad():
            drawn = program.simulated(data)
        draws, beside = [drawn[name] for name in program.observed_sites], [data[i] for i in wiring.beside]
        return self._judged(self._real(program, wiring, data), draws, beside)

    def _generator_loss(
        self, program: Program, guide: Guide | None, wiring: Wiring, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What the program's weights lower; the loss and the information, (2,)."""
        data = program.data if data is None else data
        drawn, beside = program.simulated(data), [data[i] for i in wiring.beside]
        loss = self.objective.loss(self._told(*(drawn[name] for name in program.observed_sites), *beside))
        if guide is None:
            return loss, torch.stack([loss, torch.zeros_like(loss)]).detach()
        information = self._information(program, guide, wiring, data, drawn)
        weight = 1.0 if self.information is None else self.information
        return loss - weight * information, torch.stack([loss, information]).detach()

    def _information(
        self, program: Program, guide: Guide, wiring: Wiring, data: list[Tensor], drawn: dict[str, Tensor]
    ) -> Tensor:
        """E[log q(hidden | x) − log p(hidden)] a row, of what the guide recognises."""
        seen = [*data]
        for name, source in zip(program.observed_sites, wiring.sources, strict=True):
            if source is not None:
                seen[source] = drawn[name]
        hidden = {name: drawn[name] for name in program.latents}
        recognised = guide.trace(program, hidden, seen).nodes
        told = [name for name in program.latents if name in recognised and is_drawn(recognised[name])]
        prior = program.trace({name: drawn[name] for name in drawn}, data=data, evaluated=False).nodes
        terms = [recognised[n]["log_prob_sum"] - prior[n]["fn"].log_prob(drawn[n]).sum() for n in told]
        return torch.stack(terms).sum() / len(drawn[next(iter(program.observed_sites))])

    # ------------------------------------------------------------------------------------------------ what is told
    def _info(self, state: DuelState, judged: Tensor, moved: Tensor | None) -> AdversarialInfo:
        value, penalty = judged.unbind()
        loss, information = (None, None) if moved is None else moved.unbind()
        return AdversarialInfo(value, penalty, loss, None if state.guide is None else information)

    def _drawer(self, state: DuelState, program: Program, data: list[Tensor] | None) -> tuple[str, list[Tensor]]:
        drawn = program.simulated(program.data if data is None else data)
        return program.name, [drawn[name] for name in program.observed_sites]

    @torch.no_grad()
    def sample(self, state: DuelState, program: Program) -> tuple[DuelState, Draw]:
        """The value of the game at the last weights, of one batch."""
        state, data = self._batch(self._settled(state), program)
        _, told = self._critic_loss(program, state.guide, state.wiring, data, False)
        return state, Draw({}, {"value": told[:1]})

    def values(self, state: DuelState, program: Program) -> dict[str, Tensor]:
        return {}
