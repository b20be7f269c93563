"""The vocabulary: what a back-end is, what it is given and what it hands back. Read this first.

A model is two Pyro programs, a back-end is three functions, ``fit`` is the only loop:

    state = backend.init(program)                  a place to start
    state, info = backend.step(state, program)     improve: an optimiser step, a sweep, a warm-up move
    state, draw = backend.sample(state, program)   read out, adapting nothing

A *state* is what the next call needs, an *info* what a reader needs; both are named tuples of tensors with a leading
chain axis. Random numbers come from torch's global generator, which ``fit`` seeds and gives back.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

from inference.structure import Structure

if TYPE_CHECKING:
    from inference.fit import Optimise, Sample
    from inference.plan import Plan
    from inference.posterior import Posterior
    from inference.program import Program

__all__ = [
    "Augmented", "Backend", "Blocked", "Draw", "Fitted", "Guessing", "Guided", "Independent", "Linked", "Movable",
    "Persistent", "Prepared", "Programmed", "Scored", "Started", "Stepped", "Surrogate", "Tempered", "Unnormalised",
    "Unsupported",
]  # fmt: skip

S = TypeVar("S")
I = TypeVar("I", bound=NamedTuple)  # noqa: E741


class Unsupported(ValueError):
    """A program and a back-end that do not go together; the message says why, and what to use instead."""


class Draw(NamedTuple):
    """One reading of every chain: ``values`` maps a site to (chain, *site), constrained; ``stats`` a name to (chain,).

    Where the structure of a program changes, ``values`` has what there is, padded as ``inference.arrays.ragged`` does.
    """

    values: dict[str, Tensor]
    stats: dict[str, Tensor]


@runtime_checkable
class Programmed(Structure, Protocol):
    """A model object: its generative story is the method ``model``."""

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The program: Pyro statements. Data come first."""


@runtime_checkable
class Guided(Structure, Protocol):
    """A model that brings a guess at what was hidden, as a Pyro program of the same signature."""

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """The guide, of the same arguments."""


@runtime_checkable
class Guessing(Guided, Protocol):
    """A model whose guide can be put near given values, such as another back-end has found: ``SVI(start=...)``."""

    def guess(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Sets the weights of the guide, in place, from site to value and the arguments of the program.

        Sites that are not among the values stay where the guide has them.
        """


@runtime_checkable
class Blocked(Structure, Protocol):
    """A model that brings moves of its own for ``Gibbs``, for structure that its log-joint does not show.

    ``blocks``, of the signature of ``model``, maps a tuple of sites to ``propose(position)``. A position maps every latent
    site to (chain, *site). What comes back are new values of these sites, and log q(there) − log q(back), (chain,), or a
    function that computes it, as it is asked for only where a certificate is taken.

    Variables that the move makes for itself, such as assignments, it must draw anew each time: others may have moved since.
    They belong to both ways. A move from the conditional has log p(there) − log p(back) as its ratio and is always accepted;
    that is its certificate, and a move without it is not taken. The model runs without it, too.
    """

    def blocks(
        self, *args: Any, **kwargs: Any
    ) -> Mapping[tuple[str, ...], Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], Tensor | Callable[[], Tensor]]]]:
        """Sites to the move that proposes new values of them."""


@runtime_checkable
class Stepped(Structure, Protocol):
    """A model that brings a fixed-point iteration of its own for ``EM``, for structure that its log-joint does not show.

    ``steps``, of the signature of ``model``, maps a tuple of continuous sites to ``step(values, memory)``. Values map every
    maximised site to (restart, *site); ``memory`` is None at first, and then what the last call gave: tensors and numbers,
    or tuples of them, which are not changed. What comes back are new values of these sites, and the memory.

    It need not raise the log-joint, as where the values are means under an approximate posterior: ``EM`` takes its word for
    what is better, says so in the plan, and has no standard errors. The model runs without it, too.
    """

    def steps(
        self, *args: Any, **kwargs: Any
    ) -> Mapping[tuple[str, ...], Callable[[Mapping[str, Tensor], Any], tuple[dict[str, Tensor], Any]]]:
        """Sites to the step that improves them."""


@runtime_checkable
class Movable(Structure, Protocol):
    """A sampler whose chains can be put at other values, under other data of theirs, with all that warm-up has taught it."""

    def moved(self, state: Any, values: Mapping[str, Tensor], program: Program) -> Any:
        """The state with every chain at these values, site to (chain, *site), and what it has adapted."""


@runtime_checkable
class Independent(Structure, Protocol):
    """A back-end whose readings are independent of one another, so that it can make many at once."""

    def most_readings(self, program: Program) -> int:
        """How many readings may be made at once, at least 1; the same in every run of the program."""

    def readings(self, state: Any, program: Program, count: int) -> tuple[Any, Draw]:
        """``count`` readings: ``values`` (chain, draw, *site) and ``stats`` (chain, draw).

        What is kept of the state must not show in later readings: a run that goes on inside a block makes it again.
        """


@runtime_checkable
class Prepared(Structure, Protocol):
    """A model whose prior is scaled to the data: every fit calls ``prepare`` once, with all the data, before it looks."""

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Scales the prior to the data, which are the arguments of the program."""


@runtime_checkable
class Tempered(Structure, Protocol):
    """A model to be trained with ``beta`` times the divergence of its guide from its prior, as a beta-VAE is.

    The program is what it is: β is no part of its density, and so of no sampler's target and of no evaluation.
    """

    beta: float


@runtime_checkable
class Started(Structure, Protocol):
    """A model that knows where a fit may start: site to value, another one at every call.

    EM takes the best of several, and so does each chain of a sampler.
    """

    def start(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Site to a value, or to one for each chain, from the arguments of the program."""


@runtime_checkable
class Augmented(Structure, Protocol):
    """A distribution p(x) = ∫ p(x, h) dh that hides something inside: missing entries of a row, the component of a mixture.

    Its log-density is that of x. EM fills h in, at the parameters of the E-step: what it then maximises may have closed
    forms where ``log_prob`` has none, and raises ``log_prob`` at least as much.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of observations, what is hidden inside them summed out."""

    def summary(self, value: Tensor, weights: Tensor) -> Any:
        """What is expected of x and h at these parameters: tensors in tuples or dicts, best of all sums over the rows.

        Args:
            value: x, (…, *event).
            weights: How much each entry of ``log_prob(value)`` counts, in its shape.
        """

    def expected_log_prob(self, value: Tensor, summary: Any) -> Tensor:
        """Σ_n w_n E log p(x_n, h_n) at other parameters, up to a constant; a scalar.

        Args:
            value: x.
            summary: What ``summary`` found at the parameters of the E-step.
        """


@runtime_checkable
class Linked(Structure, Protocol):
    """A distribution over sequences of finitely many states, (T,), each of which depends on the one before it alone.

    Such a site is summed out and drawn as one: forward filtering and backward sampling, in logarithmic depth. A statement
    may depend on it element by element, in a plate of the same length.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of whole chains, (*batch)."""

    def links(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the first state (K,), and of each state after the one before it, (T − 1, K, K)."""


@runtime_checkable
class Scored(Structure, Protocol):
    """A distribution that knows its score ∇ log p(x), whether or not it knows log p."""

    def score(self, value: Tensor) -> Tensor:
        """∇ log p, of the shape of ``value``, with gradients to ``value`` and to the weights."""


@runtime_checkable
class Unnormalised(Structure, Protocol):
    """A distribution whose ``log_prob`` is log p(x) + c, where nobody knows c, which may change with the parameters.

    It is enough for the moves of MCMC as long as the parameters stay, and not for a bound or an evidence, nor for the
    likelihood of parameters: those back-ends refuse it that do not say ``takes_unnormalised``, and all of them where its
    parameters depend on what is hidden. Its draws may be approximate, so that nothing that relies on exact draws of a prior
    takes it.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) + c, of the batch shape."""

    def rough_draw(self) -> Tensor:
        """One value, (*batch, *event), anywhere near where the mass is, at little cost: where a chain may start."""


@runtime_checkable
class Persistent(Structure, Protocol):
    """A module that keeps draws of itself, for a chain that goes on from one step of training to the next.

    Attributes:
        particles: (chain, …), a buffer: where the chains are.
        log_step: (), a buffer: log of the size ε of their moves, in their own standard deviations.
    """

    particles: Tensor
    log_step: Tensor


@runtime_checkable
class Surrogate(Structure, Protocol):
    """A distribution of which ∇ log p is known and log p is not, such as one by a score network: it refuses ``log_prob``.

    A back-end that needs gradients alone asks for ``gradients``, and reports no value that comes of it; any other is refused
    before its first step.
    """

    def gradients(self) -> Any:
        """The same distribution with a ``log_prob`` whose gradient in x is ∇ log p, and whose value means nothing."""


@runtime_checkable
class Fitted(Structure, Protocol):
    """What a model needs of a Posterior: its draws, site to (chain, draw, *site), as they are and with labels matched."""

    @property
    def draws(self) -> Mapping[str, Tensor]:
        """Site to (chain, draw, *site)."""

    @property
    def matched(self) -> Mapping[str, Tensor]:
        """As ``draws``, with exchangeable labels matched."""


@dataclass(frozen=True, kw_only=True)
class Backend(abc.ABC, Generic[S, I]):
    """A way to know what a program hides. Subclasses add their hyper-parameters and write ``init``, ``step``, ``sample``.

    Args:
        seed: Seed of the run; None takes a fresh one and records it in ``posterior.info``. The caller's generators
            (torch, numpy, ``random``) are left as they were.
        progress: Whether to show a progress bar (and, for samplers with a plan, the plan).
        device: Where to run; None follows the data.
        dtype: Floating type of the run; None is float64 for samplers and EM, unless the program has weights, whose
            type then rules.
        keep: Names of the sites whose draws are kept; None keeps all that fit into 1 GiB together.
        keep_warmup: Whether a sampler's warm-up draws are kept too.
        start: Where to start: site to constrained value, with or without a leading chain axis, or a Posterior.
        callbacks: Functions of ``(step, info)``, called after every step; one that returns True ends the phase.
        checkpoint: Folder in which the run is written down while it goes on, so that ``resume`` can go on with it if it is
            killed; made new, or that of the run that is resumed. None writes nothing.
        checkpoint_every: Steps (of warm-up, of an optimiser, or draws) from one checkpoint to the next; there is also one
            before the first step and one at the end.
    """

    kind: ClassVar[str] = "samples"
    follows_data: ClassVar[bool] = False

    seed: int | None = None
    progress: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    keep: Collection[str] | None = None
    keep_warmup: bool = False
    start: Mapping[str, Any] | Posterior | None = None
    callbacks: tuple[Callable[[int, Any], bool | None], ...] = field(default=())
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 100

    @property
    @abc.abstractmethod
    def schedule(self) -> Optimise | Sample:
        """How many times to improve, and how many times to read out."""

    @property
    def changing(self) -> Backend[Any, Any] | None:
        """Who runs in this one's place a program whose sites, shapes or supports change from run to run; None refuses it."""
        return None

    @property
    def is_watched(self) -> bool:
        """Whether a callback may write into what a run works with, so that recorded steps are looked at again after it."""
        return any(not getattr(callback, "is_passive", False) for callback in self.callbacks)

    @property
    def takes_unnormalised(self) -> bool:
        """Whether it can do without the constant of a log-density; see ``Unnormalised``."""
        return False

    @property
    def view(self) -> dict[str, Any]:
        """``batch_size`` and ``transform`` of ``Program``, where it does not see all data, as they are."""
        return {}

    @abc.abstractmethod
    def init(self, program: Program) -> S:
        """A place to start, for every chain.

        Raises:
            Unsupported: If this back-end cannot run the program.
        """

    @abc.abstractmethod
    def step(self, state: S, program: Program) -> tuple[S, I]:
        """One improvement of every chain."""

    @abc.abstractmethod
    def sample(self, state: S, program: Program) -> tuple[S, Draw]:
        """One reading of every chain; nothing adapts here."""

    @abc.abstractmethod
    def values(self, state: S, program: Program) -> dict[str, Tensor]:
        """Where the chains are: site to (chain, *site), constrained."""

    def plan(self, state: S, program: Program) -> Plan | None:
        """Which site is updated how, as far as the state knows."""
        return None

    def history(self, records: dict[str, Tensor], state: S) -> dict[str, Tensor]:
        """What is kept of the infos of all steps, name to (step, …)."""
        return records

    def is_sound(self, state: S, program: Program) -> bool:
        """Whether a state is worth a checkpoint: one that is not would take the place of the last good one."""
        return True

    def shown(self, info: I, program: Program) -> str:
        """What the progress bar says of a step."""
        for name in ("acceptance_rate", "loss", "log_joint"):
            if hasattr(info, name):
                return f"{name.replace('_', ' ')} {float(getattr(info, name).mean()):.4g}"
        return ""

    def weights(self, state: S, program: Program) -> dict[str, Tensor]:
        """The weights that the run trained or held fixed."""
        return program.weight_values()

    def saved(self, state: S, program: Program) -> Any:
        """What a checkpoint holds of a state: all of it, but for code that ``restored`` can make anew."""
        return state

    def restored(self, saved: Any, program: Program) -> S:
        """The state of which ``saved`` is what a checkpoint holds; random numbers may be drawn, they are set afterwards."""
        state: S = saved
        return state

    @final
    def fit(self, model: Callable[..., Any] | Programmed, *args: Any, **kwargs: Any) -> Posterior:
        """Infers what ``model`` hides. Everything after ``model`` goes to the program.

        If ``torch.distributed`` has a process group, its processes run it together: all of them call this with the same
        model, settings and all the data, and all get the same, whole Posterior. Samplers split chains, EM and SVI rows; see
        ``inference.distributed``, whose ``alone`` leaves the group out of it.

        Args:
            model: A Pyro program, or a model object with the method ``model``.
            *args: The program's arguments. Floating tensors are cast to the dtype of the run.
            **kwargs: The program's keyword arguments.

        Returns:
            The posterior. Ctrl-C returns what there is so far, with a finding that says so.

        Raises:
            Unsupported: Before the first step, if this back-end cannot run the program.
            ValueError: Before the first step, if the data do not suit the program, or the processes differ in what they are
                given.
            ConnectionError: If another process has ended.
        """
        from inference.fit import run

        return run(self, model, args, kwargs)

    @final
    def resume(
        self, source: str | os.PathLike[str] | Posterior, model: Callable[..., Any] | Programmed, *args: Any, **kwargs: Any
    ) -> Posterior:
        """Goes on with a run as if it had never stopped: what comes out is what it would have been, bit for bit.

        A run that has ended goes on if there are to be more ``draws`` than it was asked for. All other settings, the data,
        the program, the versions of the libraries and the number of threads must be those that it began with; ``progress``,
        ``callbacks``, ``checkpoint``, ``checkpoint_every`` and ``until`` may change. After Ctrl-C a posterior goes on from
        where it was stopped, with random numbers of its own; a checkpoint goes on from the last one as if undisturbed.

        Args:
            source: A checkpoint folder; or a posterior, or the folder that one was saved in, whose end is gone on from.
            model: The program that was fitted; the weights of the run are put into it.
            *args: The same data.
            **kwargs: The program's keyword arguments.

        Returns:
            The posterior of the whole run.

        Raises:
            FileNotFoundError: If there is no checkpoint in the folder.
            ValueError: Before the first step, if the checkpoint is damaged, or is of another run; the message says in what
                they differ.
        """
        from inference.fit import run
        from inference.posterior import Posterior

        if not isinstance(source, (str, os.PathLike, Posterior)):
            raise TypeError(f"resume takes a checkpoint folder or a Posterior, but was given {source!r}.")
        return run(self, model, args, kwargs, source)
