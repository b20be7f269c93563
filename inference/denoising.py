"""Training of denoisers, scores and energies: a loss of each row, with times and noise drawn inside, is lowered.

The module is never run as a program: what is trained is all of its weights, and what is read of the data is their rows.

References:
    J. Ho, A. Jain, P. Abbeel, Denoising diffusion probabilistic models (2020).
    T. Karras et al., Analyzing and improving the training dynamics of diffusion models (2024): averages of weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from inference.contract import Backend, Draw, Unsupported
from inference.fit import Optimise
from inference.handlers import isolated, refill
from inference.networks import first_not_finite
from inference.noising import SimpleLoss
from inference.objective import Objective
from inference.program import Program
from inference.structure import Structure
from inference.training import (
    NOT_FINITE,
    PowerAverage,
    adam,
    check_settings,
    descend,
    falling,
    follow,
    in_networks,
    put,
    rows_of_step,
)

__all__ = ["Denoising", "DenoisingInfo", "DenoisingState", "RowLoss"]

_CHUNK = 4096  # rows that are checked at a time


@runtime_checkable
class RowLoss(Structure, Protocol):
    """What a module is trained for, a frozen dataclass; ``Denoising`` lowers its mean over the rows.

    Times and noise are drawn inside, by torch's global generator. Fields that are modules are what it remembers: a run has a
    copy of them, whose buffers are written into checkpoints.
    """

    def rows(self, module: Any, x: Tensor, context: Tensor | None) -> Tensor:
        """The loss of each row, (rows,), with gradients in the weights of the module.

        Args:
            module: The model that is trained.
            x: Data, (rows, …).
            context: What the data are conditioned on, (rows, …); None without.
        """


class DenoisingState(NamedTuple):
    """The module's optimiser and averages; torch trains the module in place.

    Attributes:
        loss: The loss, with what it remembers in this run.
        optimiser: Over the weights of the module.
        scheduler: Learning-rate schedule.
        objective: The loss and its gradients.
        step: Number of steps taken, (), on the CPU.
        order: The rows in the order of this pass, (rows,); empty without batches.
        streak: Steps in a row whose loss was not finite, ().
        averaged: Moving averages of the weights; () without ``average``.
    """

    loss: RowLoss
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    objective: Objective
    step: Tensor
    order: Tensor
    streak: Tensor
    averaged: tuple[Tensor, ...]


class DenoisingInfo(NamedTuple):
    """What a step has seen.

    Attributes:
        loss: Mean of the loss over the rows of the batch, ().
        rows: How many rows a step sees, of all processes; a number.
    """

    loss: Tensor
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Denoising(Backend[DenoisingState, DenoisingInfo]):
    """Trains a model by a loss of its rows: denoising, matching scores, lowering energies. The model is trained in place.

    It is fitted to data, and if it is conditional to a context of as many rows: ``fit(model, x)`` or
    ``fit(model, x, context)``. ``posterior.weights`` has the weights, ``posterior.predict()`` draws as many new rows.

    Data stay where they are: a tensor on a GPU is cut there, ``numpy.memmap`` is read row by row. Processes of a group take
    their share of every batch, with noise of their own.

    Args:
        loss: What is lowered, one of ``inference.noising`` or ``inference.score_matching``, or any object with the method
            ``rows(module, x, context)``.
        steps: Steps of the optimiser.
        learning_rate: Its learning rate, positive.
        batch_size: Rows per step; None takes all.
        transform: Applied to the data of every batch: flips, noise that makes grey levels continuous, or bytes to numbers.
        optimiser: Makes the optimiser of a list of weights; None takes Adam. ``learning_rate`` is then its affair.
        scheduler: Makes a schedule of the optimiser, one of ``torch.optim.lr_scheduler``, stepped after every step; None
            keeps the rate for the first half of the steps, then lets it fall along a cosine to a hundredth.
        clip_norm: Largest norm of the gradient, which is scaled down to it; None leaves it.
        average: Decay of an exponential moving average of the weights, such as 0.999, or a ``PowerAverage``; it takes the
            weights' place at the end. None keeps the last ones.
        autocast: Type of the arithmetic of networks, such as ``torch.bfloat16``.
        compile: Whether the recorded step is compiled by ``torch.compile``; pays on a GPU.

    Example:
        >>> from pyro_genmodels.diffusion import EDM, Network, ScoreModel
        >>> from pyro_genmodels.nets import PointNetwork
        >>> model = ScoreModel(Network(PointNetwork(2, width=8), EDM(), "preconditioned"), (2,))
        >>> fit = Denoising(steps=20, seed=0, progress=False).fit(model, torch.randn(64, 2))
        >>> fit.history["loss"].shape
        torch.Size([20])
    """

    kind: ClassVar[str] = "denoising"
    follows_data: ClassVar[bool] = True

    loss: RowLoss = field(default_factory=SimpleLoss)
    steps: int = 2000
    learning_rate: float = 1e-3
    batch_size: int | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    clip_norm: float | None = None
    average: float | PowerAverage | None = None
    autocast: torch.dtype | None = None
    compile: bool = False

    @property
    def schedule(self) -> Optimise:
        return Optimise(self.steps, 1)

    @property
    def view(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "transform": self.transform, "is_run": False}

    # ------------------------------------------------------------------------------------ what is refused before
    def _check_settings(self, program: Program) -> None:
        if not isinstance(self.loss, RowLoss) or isinstance(self.loss, type):
            raise TypeError(
                "loss= must be an object with the method rows(module, x, context), such as SimpleLoss(), but is "
                f"{self.loss!r}."
            )
        check_settings(self, program, "learning_rate", "clip_norm")
        if self.start is not None:
            raise Unsupported("Denoising starts from the weights that the model has: leave start= out.")

    def _check_data(self, program: Program) -> None:
        if not isinstance(program.owner, nn.Module):
            raise Unsupported(
                f"Denoising trains a torch.nn.Module, but {program.name} is a {type(program.call).__name__}. Give a model "
                "such as DDPM or ScoreModel; SVI() trains programs."
            )
        if not 1 <= len(program.data) <= 2 or program.rows is None:
            raise Unsupported(
                f"Denoising takes the data and, for a conditional model, a context, each of as many rows, but "
                f"{program.name} was given {len(program.data)} tensors. Join what belongs to a row, or fit by SVI()."
            )
        if len(program.data) == 2 and program.data[1].shape[:1] != program.data[0].shape[:1]:
            raise ValueError(
                f"Data and context have a row each for every row of the other, but the data have {program.rows} and the "
                f"context has the shape {tuple(program.data[1].shape)}."
            )
        for first in range(0, program.rows, _CHUNK):
            with isolated(0, program.device):
                parts = program.between(first, first + _CHUNK)
            if not parts[0].is_floating_point():
                raise ValueError(
                    f"Denoising adds noise to data, floating-point numbers, but these are {parts[0].dtype}. Give x.float(), "
                    "or transform= that makes numbers of them."
                )
            for name, part in zip(("data", "context"), parts, strict=False):
                bad = (~part.isfinite()).nonzero()
                if len(bad):
                    row, *place = bad[0].tolist()
                    raise ValueError(
                        f"The {name} of {program.name} have values that are missing or infinite, the first at "
                        f"{(row + first, *place)}. Fill them in, or drop those rows."
                    )

    def init(self, program: Program) -> DenoisingState:
        self._check_settings(program)
        self._check_data(program)
        if not program.weights:
            raise Unsupported(f"{program.name} has no weights to train.")
        group = program.processes
        share = min(self.batch_size or (program.rows or 1), program.rows or 1)
        if share < group.size:
            raise ValueError(f"A step of {share} rows cannot be shared out among {group.size} processes. Raise batch_size=.")
        loss = copy.deepcopy(self.loss)
        for memory in _memories(loss).values():
            memory.to(program.device)
        weights = list(program.weights.values())
        objective = Objective(
            in_networks(partial(self._loss, loss, program), [*program.owner.children()], program.device, self.autocast),
            weights,
            [program.owner, program.call, *_memories(loss).values()],
            name=program.name,
            is_watched=self.is_watched,
            is_compiled=self.compile,
            precision=self.autocast,
        )
        self._try(program, copy.deepcopy(loss))
        optimiser = adam(weights, self.learning_rate) if self.optimiser is None else self.optimiser(weights)
        group.part_ways()
        return DenoisingState(
            loss=loss,
            optimiser=optimiser,
            scheduler=(self.scheduler or partial(falling, steps=self.steps))(optimiser),
            objective=objective,
            step=torch.zeros((), dtype=torch.long),
            order=torch.empty(0, dtype=torch.long),
            streak=torch.zeros((), dtype=program.dtype, device=program.device),
            averaged=tuple(weight.detach().clone() for weight in weights) if self.average is not None else (),
        )

    @torch.no_grad()
    def _try(self, program: Program, loss: RowLoss) -> None:
        """Looks at the loss of a few rows, which changes nothing."""
        before = {name: leaf.clone() for name, leaf in program.leaves.items()}
        with isolated(0, program.device), torch.enable_grad():
            data = program.between(0, 2)
            rows = loss.rows(program.owner, *self._given(data))
        refill(program.leaves, before, program.name)  # buffers that a loss writes to
        name = type(loss).__name__
        if not isinstance(rows, Tensor) or rows.shape != data[0].shape[:1]:
            came = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            raise ValueError(f"{name}.rows must give one number a row, {tuple(data[0].shape[:1])}, but gave {came}.")
        if not rows.requires_grad:
            raise Unsupported(f"{name} does not depend on the weights of {program.name}: there is nothing to train.")

    # ------------------------------------------------------------------------------------------------- the loss
    @staticmethod
    def _given(data: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return data[0], data[1] if len(data) > 1 else None

    def _loss(self, loss: RowLoss, program: Program, data: list[Tensor] | None, is_recorded: bool) -> tuple[Tensor, Tensor]:
        """The mean over the rows of all processes, of which this one adds its own."""
        seen = program.fed(program.data if data is None else data)
        total = min(self.batch_size or (program.rows or 1), program.rows or 1) / program.processes.size
        value = loss.rows(program.owner, *self._given(seen)).sum() / total
        return value, value

    def _batch(self, state: DenoisingState, program: Program) -> tuple[Tensor, list[Tensor] | None]:
        """The order of the rows, and the data of the next step: passes over all rows, what is left at their end put back."""
        if self.batch_size is None or self.batch_size >= (program.rows or 0):
            return state.order, program.shard
        order, rows = rows_of_step(program, state.order, int(state.step), self.batch_size)
        return order, program.minibatch(program.processes.share(rows))

    def step(self, state: DenoisingState, program: Program) -> tuple[DenoisingState, DenoisingInfo]:
        order, data = self._batch(state, program)
        objective = state.objective
        loss = program.processes.average(objective(data), objective.weights, objective.buffers)
        if not int(state.step) and not loss.isfinite():
            self._give_up(state, program, data)
        is_skipped = (~descend(state.optimiser, objective.weights, loss, self.clip_norm)).to(loss.dtype)
        state.scheduler.step()
        state = state._replace(step=state.step + 1, order=order, streak=(state.streak + 1) * is_skipped)
        if state.averaged:
            assert self.average is not None
            follow(state.averaged, objective.weights, self.average, int(state.step))
        if int(state.step) % NOT_FINITE == 0 and state.streak >= NOT_FINITE:
            self._give_up(state, program, data)
        assert program.rows is not None
        return state, DenoisingInfo(loss, min(self.batch_size or program.rows, program.rows))

    def _give_up(self, state: DenoisingState, program: Program, data: list[Tensor] | None) -> NoReturn:
        """Raises: weights from which no step leads back."""
        layer = first_not_finite((program.owner,), lambda: state.objective.loss(data, False))
        since = int(state.step) - int(state.streak)
        when = f"has not been finite since step {since}" if int(state.step) else "is not finite at the start"
        remedy = (
            "Take a smaller learning_rate or clip_norm=1.0; a checkpoint holds the last weights that were finite."
            if int(state.step)
            else "Look at the weights and at the scale of the data."
        )
        raise ValueError(
            f"The loss of {program.name} {when}"
            f"{'' if layer is None else f'; the first layer that gives NaN or infinity is {layer}'}. {remedy}"
        )

    def is_sound(self, state: DenoisingState, program: Program) -> bool:
        return all(bool(weight.isfinite().all()) for weight in state.objective.weights)

    # ------------------------------------------------------------------------------------------------ reading out
    @torch.no_grad()
    def sample(self, state: DenoisingState, program: Program) -> tuple[DenoisingState, Draw]:
        """The loss of one batch at the last weights, or at their averages, which take their place."""
        if state.averaged:
            put(state.objective.weights, state.averaged)
            state = state._replace(averaged=())
        order, data = self._batch(state, program)
        with torch.enable_grad():  # losses that differentiate in x
            found, _ = state.objective.loss(data, False)
        loss = program.processes.mean(found.detach())
        return state._replace(order=order), Draw({}, {"loss": loss[None]})

    def values(self, state: DenoisingState, program: Program) -> dict[str, Tensor]:
        return {}

    def saved(self, state: DenoisingState, program: Program) -> dict[str, Any]:
        return {
            "optimiser": state.optimiser.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "objective": state.objective.calls,
            "memories": _leaves(state.loss),
            "numbers": {
                "step": state.step,
                "order": state.order,
                "streak": state.streak,
                "averaged": state.averaged,
            },
        }

    def restored(self, saved: dict[str, Any], program: Program) -> DenoisingState:
        state = self.init(program)
        refill(_leaves(state.loss), saved["memories"], type(self.loss).__name__)
        state.optimiser.load_state_dict(saved["optimiser"])
        state.scheduler.load_state_dict(saved["scheduler"])
        state.objective.recall(saved["objective"])
        return state._replace(**saved["numbers"])


def _memories(loss: Any) -> dict[str, nn.Module]:
    """What a loss remembers: its fields that are modules."""
    fields = dataclasses.fields(loss) if dataclasses.is_dataclass(loss) else ()
    return {f.name: getattr(loss, f.name) for f in fields if isinstance(getattr(loss, f.name), nn.Module)}


def _leaves(loss: Any) -> dict[str, Tensor]:
    """The buffers of what a loss remembers."""
    return {f"{n}.{name}": leaf for n, memory in _memories(loss).items() for name, leaf in memory.named_buffers()}
