"""What back-ends share that train a critic beside a program: two players, who take their steps in turn.

References:
    I. Goodfellow et al., Generative adversarial nets (2014).
    M. Heusel et al., GANs trained by a two time-scale update rule (2017): a learning rate for each network.
    Y. Yazıcı et al., The unusual effectiveness of averaging in GAN training (2019).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inference.contract import Backend, I, Unsupported
from inference.games import Game, Wasserstein, gradient_penalty, zero_penalty
from inference.guides import Guide
from inference.handlers import refill
from inference.networks import first_not_finite
from inference.objective import Objective
from inference.program import Program
from inference.training import NOT_FINITE, PowerAverage, are_finite, check_settings, follow, in_networks, put, rows_of_step

__all__ = ["Duel", "DuelState"]

_RATE = 2e-4  # of DCGAN (Radford et al. 2016)


class DuelState(NamedTuple):
    """The two players and their optimisers; torch trains all of them in place.

    Attributes:
        critic: The network that gives scores.
        guide: The program's guide; None if there is none.
        optimisers: Of the critic's weights, then of those of program and guide; the latter only if they learn.
        objectives: Their losses and gradients.
        wiring: What was found out about the program, or is kept beside it.
        step: Steps of the program's player, ().
        batches: Batches taken, ().
        order: The rows in the order of this pass, (rows,); empty without batches.
        streak: Steps in a row whose numbers were not finite, ().
        averaged: Moving averages of the weights of program and guide, or of the critic's alone; () without ``average``.
    """

    critic: nn.Module
    guide: Guide | None
    optimisers: tuple[torch.optim.Optimizer, ...]
    objectives: tuple[Objective, ...]
    wiring: Any
    step: Tensor
    batches: Tensor
    order: Tensor
    streak: Tensor
    averaged: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Duel(Backend[DuelState, I]):
    """Trains a critic, and weights of a program and its guide by what the critic says. For the settings see subclasses."""

    follows_data: ClassVar[bool] = True

    critic: nn.Module
    steps: int = 2000
    critic_steps: int = 1
    learning_rate: float | None = _RATE
    critic_learning_rate: float | None = None
    betas: tuple[float, float] = (0.5, 0.9)
    batch_size: int | None = None
    zero_penalty: float = 0.0
    average: float | PowerAverage | None = None
    autocast: torch.dtype | None = None
    compile: bool = False

    @property
    @abc.abstractmethod
    def game(self) -> Game:
        """What the critic plays for."""

    @abc.abstractmethod
    def _critic_loss(
        self, program: Program, guide: Guide | None, wiring: Any, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What the critic lowers; its value and penalties, (2,)."""

    @abc.abstractmethod
    def _generator_loss(
        self, program: Program, guide: Guide | None, wiring: Any, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What the weights of program and guide lower; two numbers to report, (2,)."""

    @abc.abstractmethod
    def _info(self, state: DuelState, judged: Tensor, moved: Tensor | None) -> I:
        """What a step has seen, from what the two losses report."""

    @abc.abstractmethod
    def _drawer(self, state: DuelState, program: Program, data: list[Tensor] | None) -> tuple[str, list[Tensor]]:
        """Who draws what the critic is given, in words, and such draws."""

    @property
    def _is_playing(self) -> bool:
        """Whether program and guide learn, too."""
        return self.learning_rate is not None

    # ------------------------------------------------------------------------------------------------- beginning
    def _check_settings(self, program: Program) -> None:
        name = type(self).__name__
        if not isinstance(self.critic, nn.Module):
            raise TypeError(f"critic= must be a torch.nn.Module that gives one number a row, but is {self.critic!r}.")
        if not isinstance(self.critic_steps, int) or self.critic_steps < 1:
            raise ValueError(
                f"critic_steps is {self.critic_steps!r}, but must be an integer of at least 1: a critic that is not trained "
                "tells nothing."
            )
        if self.batch_size is not None:
            program.check_rows("batch_size")
        check_settings(self, program, "learning_rate", "critic_learning_rate")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas!r}, but must be two numbers, such as (0.5, 0.9).")
        if not self.zero_penalty >= 0:
            raise ValueError(f"zero_penalty is {self.zero_penalty!r}, but must not be negative.")
        if self.start is not None:
            raise Unsupported(f"{name} starts from the weights that program and critic have: leave start= out.")
        if program.processes.size > 1:
            raise Unsupported(f"{name} runs in one process (inference.distributed.alone).")

    def _begun(self, program: Program, guide: Guide | None, wiring: Any) -> DuelState:
        """The state before the first step.

        Raises:
            Unsupported: If a player has nothing to train.
        """
        critic = self.critic
        trained = {id(w): w for w in program.weights.values() if w.requires_grad and self._is_playing}
        if guide is not None and self._is_playing:
            trained |= {id(w): w for w in guide.weights().values() if w.requires_grad}
        own: list[Tensor] = [weight for weight in critic.parameters() if weight.requires_grad]
        if not own:
            raise Unsupported("The critic has no weights to train.")
        shared = [name for name, weight in critic.named_parameters() if id(weight) in trained]
        if shared:
            raise Unsupported(
                f"The critic's '{shared[0]}' is a weight of {program.name}, too: the two play against each other."
            )
        leaves = [*trained.values()]
        sides = [(own, self.critic_learning_rate or self.learning_rate or _RATE)]
        if self.learning_rate is not None:
            sides.append((leaves, self.learning_rate))
        optimisers = tuple(torch.optim.Adam(side, lr=rate, betas=self.betas, fused=True) for side, rate in sides)
        held = wiring if isinstance(wiring, nn.Module) else None
        make = partial(
            Objective,
            weights=[*leaves, *own],
            owners=[program.owner, program.call, critic, None if guide is None else guide.call, held],
            name=program.name,
            is_watched=self.is_watched,
            is_compiled=self.compile,
            precision=self.autocast,
        )
        owners = [program.owner, None if guide is None or guide.owner is None else guide.owner.module]
        networks = [critic, *(part for owner in owners if isinstance(owner, nn.Module) for part in owner.children())]
        cast = partial(in_networks, networks=networks, device=program.device, dtype=self.autocast)
        losses = (self._critic_loss, self._generator_loss)[: len(sides)]
        objectives = tuple(make(cast(partial(loss, program, guide, wiring))) for loss in losses)
        zero = torch.zeros((), dtype=torch.long)
        followed = leaves if self._is_playing else own
        return DuelState(
            critic=critic,
            guide=guide,
            optimisers=optimisers,
            objectives=objectives,
            wiring=wiring,
            step=zero,
            batches=zero,
            order=torch.empty(0, dtype=torch.long),
            streak=torch.zeros((), dtype=program.dtype, device=program.device),
            averaged=tuple(weight.detach().clone() for weight in followed) if self.average is not None else (),
        )

    def _check_scores(self, given: Sequence[Tensor], what: str) -> None:
        """Looks at what the critic says.

        Args:
            given: Tensors of rows.
            what: What they are.
        """
        shapes = ", ".join(str(tuple(part.shape)) for part in given)
        try:
            scores = self.critic(*given)
        except (RuntimeError, TypeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"The critic does not run on what it is given, tensors of shape {shapes} ({what}): {why}"
            ) from None
        rows = len(given[0])
        if not isinstance(scores, Tensor) or scores.shape not in ((rows,), (rows, 1)):
            came = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"The critic must give one number a row, ({rows},) or ({rows}, 1), but gave {came}.")
        if not scores.isfinite().all():
            raise ValueError("The critic gives scores that are NaN or infinite. Look at its weights.")

    # ------------------------------------------------------------------------------------------------ the scores
    def _scores(self, *given: Tensor) -> Tensor:
        """One number a row, (rows,)."""
        scores: Tensor = self.critic(*given)
        return scores.reshape(len(scores))

    def _told(self, *given: Tensor) -> Tensor:
        """The same of a critic that stays as it is: gradients go through what it is given alone."""
        frozen = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        scores: Tensor = functional_call(self.critic, frozen, given)
        return scores.reshape(-1)

    def _judged(self, real: Sequence[Tensor], drawn: Sequence[Tensor], beside: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the critic lowers; its value and penalties, (2,)."""
        value = self.game.value(self._scores(*real, *beside), self._scores(*drawn, *beside))
        penalty = torch.zeros_like(value)
        if isinstance(self.game, Wasserstein) and self.game.penalty is not None:
            penalty = penalty + self.game.penalty * gradient_penalty(self._scores, real, drawn, beside)
        if self.zero_penalty:
            penalty = penalty + 0.5 * self.zero_penalty * zero_penalty(self._scores, real, beside)
        return penalty - value, torch.stack([value, penalty]).detach()

    # ----------------------------------------------------------------------------------------------------- steps
    def _batch(self, state: DuelState, program: Program) -> tuple[DuelState, list[Tensor] | None]:
        """The data of the next step: passes over all rows, what is left at their end put back."""
        size, rows, taken = self.batch_size, program.rows or 0, int(state.batches)
        state = state._replace(batches=state.batches + 1)
        if size is None or size >= rows:
            return state, None
        order, index = rows_of_step(program, state.order, taken, size)
        return state._replace(order=order), program.minibatch(index)

    def step(self, state: DuelState, program: Program) -> tuple[DuelState, I]:
        is_finite = torch.ones((), dtype=torch.bool, device=program.device)
        for _ in range(self.critic_steps):
            state, data = self._batch(state, program)
            judged = state.objectives[0](data)
            is_finite = is_finite & self._moved(state, 0, judged)
            self._clip()
        moved = None
        if self._is_playing:
            moved = state.objectives[1](data)
            is_finite = is_finite & self._moved(state, 1, moved)
        streak = (state.streak + 1) * (~is_finite).to(state.streak.dtype)
        state = state._replace(step=state.step + 1, streak=streak)
        if state.averaged:
            assert self.average is not None
            follow(state.averaged, self._followed(state), self.average, int(state.step))
        if (int(state.step) % NOT_FINITE == 0 or int(state.step) == self.steps) and streak >= min(NOT_FINITE, self.steps):
            self._give_up(state, program, data)
        return state, self._info(state, judged, moved)

    def _moved(self, state: DuelState, player: int, found: Tensor) -> Tensor:
        """One step of an optimiser, none where the loss or a gradient was not finite; whether they were."""
        optimiser = state.optimisers[player]
        is_finite = found.isfinite().all() & are_finite([w for group in optimiser.param_groups for w in group["params"]])
        optimiser.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # as GradScaler does: no wait for a GPU
        optimiser.step()
        return is_finite

    @torch.no_grad()
    def _clip(self) -> None:
        if isinstance(self.game, Wasserstein) and self.game.clip is not None:
            for weight in filter(lambda weight: weight.requires_grad, self.critic.parameters()):
                weight.clamp_(-self.game.clip, self.game.clip)

    @staticmethod
    def _followed(state: DuelState) -> list[Tensor]:
        """The weights that are averaged: of program and guide, or of the critic alone."""
        return [weight for group in state.optimisers[-1].param_groups for weight in group["params"]]

    def _settled(self, state: DuelState) -> DuelState:
        """The state when training is over: with the averaged weights, if any."""
        if state.averaged:
            put(self._followed(state), state.averaged)
        return state._replace(averaged=())

    def _give_up(self, state: DuelState, program: Program, data: list[Tensor] | None) -> NoReturn:
        """Raises: weights from which no step leads back."""
        with torch.no_grad():
            drawer, drawn = self._drawer(state, program, data)
        is_drawn_well = all(bool(part.isfinite().all()) for part in drawn)
        is_judged_well = is_drawn_well and bool(state.objectives[0].loss(data, False)[0].isfinite())
        advice = ", or an objective with a penalty" if hasattr(self, "objective") else ""
        if is_judged_well:
            who = "Losses are finite, but there are gradients"
            advice += ", or keep values from where functions have no slope, such as a root of 0"
        else:
            who = "The critic gives scores" if is_drawn_well else f"{drawer} draws values"
        owners = (program.owner, self.critic, None if state.guide is None else state.guide.call)
        layer = first_not_finite(owners, lambda: state.objectives[0].loss(data, False))
        where = "" if layer is None else f"; the first layer that does is {layer}"
        raise ValueError(
            f"{who} that have not been finite since step {int(state.step) - int(state.streak)}{where}. Take a smaller "
            f"learning_rate{advice}; a checkpoint holds the last weights that were finite."
        )

    def is_sound(self, state: DuelState, program: Program) -> bool:
        return all(bool(weight.isfinite().all()) for weight in state.objectives[0].weights)

    def shown(self, info: I, program: Program) -> str:
        told = {name: getattr(info, name) for name in info._fields if name != "penalty"}
        return ", ".join(f"{name} {float(number):.4g}" for name, number in told.items() if number is not None)

    # --------------------------------------------------------------------------------------------- written down
    @property
    def _judges(self) -> dict[str, Tensor]:
        """Weights and buffers of the critic."""
        return {f"critic.{name}": leaf.detach() for name, leaf in self.critic.state_dict(keep_vars=True).items()}

    def _leaves(self, state: DuelState) -> dict[str, Tensor]:
        guided = {} if state.guide is None else {f"guide.{name}": leaf for name, leaf in state.guide.leaves.items()}
        kept = dict(state.wiring.named_buffers()) if isinstance(state.wiring, nn.Module) else {}
        return self._judges | guided | {f"wiring.{name}": leaf for name, leaf in kept.items()}

    def saved(self, state: DuelState, program: Program) -> dict[str, Any]:
        return {
            "leaves": self._leaves(state),
            "optimisers": [optimiser.state_dict() for optimiser in state.optimisers],
            "objectives": [objective.calls for objective in state.objectives],
            "numbers": {
                "step": state.step,
                "batches": state.batches,
                "order": state.order,
                "streak": state.streak,
                "averaged": state.averaged,
            },
        }

    def restored(self, saved: dict[str, Any], program: Program) -> DuelState:
        self.critic.to(program.device, program.dtype)
        held = {name: leaf for name, leaf in saved["leaves"].items() if name in self._judges}
        refill(self._judges, held, "The critic")  # init looks at its scores
        state = self.init(program)
        refill(self._leaves(state), saved["leaves"], "The critic")
        for optimiser, held in zip(state.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(held)
        for objective, calls in zip(state.objectives, saved["objectives"], strict=True):
            objective.recall(calls)
        return state._replace(**saved["numbers"])

    def weights(self, state: DuelState, program: Program) -> dict[str, Tensor]:
        critic = {f"critic.{name}": weight.detach().clone() for name, weight in self.critic.named_parameters()}
        seen = {} if state.guide is None else state.guide.seen(program)
        return seen | program.weight_values() | critic
