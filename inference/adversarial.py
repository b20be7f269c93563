"""Adversarial training: the weights of a program are fitted by a critic that tells its draws from data.

Any program will do whose observed sites are drawn with gradients (``rsample``), above all one with an implicit distribution,
which has no density: the critic is to it what a guide is to a program with hidden sites, a device of the back-end.

References:
    I. Goodfellow et al., Generative adversarial nets (2014).
    X. Chen et al., InfoGAN (2016): the bound on the information in codes.
    M. Heusel et al., GANs trained by a two time-scale update rule (2017): a learning rate for each network.
    Y. Yazıcı et al., The unusual effectiveness of averaging in GAN training (2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inference.contract import Backend, Draw, Unsupported
from inference.fit import Optimise
from inference.games import Game, NonSaturating, Wasserstein, gradient_penalty, zero_penalty
from inference.guides import Guide, is_drawn
from inference.handlers import refill
from inference.networks import first_not_finite
from inference.objective import Objective
from inference.program import Program
from inference.training import NOT_FINITE, follow, in_networks, put, rows_of_step

__all__ = ["Adversarial", "AdversarialInfo", "AdversarialState"]

_RATE = 2e-4  # of DCGAN (Radford et al. 2016)


class AdversarialState(NamedTuple):
    """The two players and their optimisers; torch trains all of them in place.

    Attributes:
        critic: The network that tells data from draws.
        guide: What recognises hidden sites in draws; None if nothing does.
        optimisers: Of the critic's weights, then of the program's with those of the guide; the latter only if they learn.
        objectives: Their losses and gradients.
        wiring: Which of the program's tensors are data.
        step: Steps of the generator, ().
        batches: Batches taken, ().
        order: The rows in the order of this pass, (rows,); empty without batches.
        streak: Steps in a row whose numbers were not finite, ().
        averaged: Moving averages of the program's weights, or of the critic's alone; () without ``average``.
    """

    critic: nn.Module
    guide: Guide | None
    optimisers: tuple[torch.optim.Optimizer, ...]
    objectives: tuple[Objective, ...]
    wiring: Wiring
    step: Tensor
    batches: Tensor
    order: Tensor
    streak: Tensor
    averaged: tuple[Tensor, ...]


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
class Adversarial(Backend[AdversarialState, AdversarialInfo]):
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
        average: Decay of an exponential moving average, such as 0.999, of the program's weights, or of the critic's where
            that is trained alone; it takes their place at the end. None keeps the last ones.
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
    follows_data: ClassVar[bool] = True

    critic: nn.Module
    objective: Game = field(default_factory=NonSaturating)
    steps: int = 2000
    critic_steps: int = 1
    learning_rate: float | None = _RATE
    critic_learning_rate: float | None = None
    betas: tuple[float, float] = (0.5, 0.9)
    batch_size: int | None = None
    zero_penalty: float = 0.0
    information: float | None = None
    average: float | None = None
    autocast: torch.dtype | None = None
    compile: bool = False

    @property
    def schedule(self) -> Optimise:
        return Optimise(self.steps, 1)

    @property
    def view(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "is_simulated": True}

    def _check_settings(self, program: Program) -> None:
        if not isinstance(self.critic, nn.Module):
            raise TypeError(f"critic= must be a torch.nn.Module that gives one number a row, but is {self.critic!r}.")
        if not isinstance(self.objective, Game):
            raise TypeError(f"objective= must be one of inference.games, such as Hinge(), but is {self.objective!r}.")
        if not isinstance(self.critic_steps, int) or self.critic_steps < 1:
            raise ValueError(
                f"critic_steps is {self.critic_steps!r}, but must be an integer of at least 1: a critic that is not trained "
                "tells nothing."
            )
        for name in ("learning_rate", "critic_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}, but must be positive.")
        for name in ("zero_penalty", "information"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value!r}, but must not be negative.")
        if self.average is not None and not 0.0 < self.average < 1.0:
            raise ValueError(f"average is {self.average!r}, but a decay lies between 0 and 1, such as 0.999.")
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast is {self.autocast!r}, but must be torch.bfloat16 or torch.float16.")
        if self.start is not None:
            raise Unsupported("Adversarial starts from the weights that program and critic have: leave start= out.")
        if self.batch_size is not None:
            program.check_rows("batch_size")
            if self.batch_size > (program.rows or 0):
                raise ValueError(f"batch_size is {self.batch_size}, but {program.name} has {program.rows} rows.")

    def init(self, program: Program) -> AdversarialState:
        self._check_settings(program)
        if program.processes.size > 1:
            raise Unsupported("Adversarial runs in one process (inference.distributed.alone).")
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
        critic = self.critic.to(program.device, program.dtype)
        guide = self._guide(program, wiring)
        self._check_critic(program, wiring)
        trained = {id(w): w for w in program.weights.values() if w.requires_grad and self._is_playing}
        if guide is not None:
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
        owners = [program.owner, program.call, critic, None if guide is None else guide.call]
        is_watched = any(not getattr(callback, "is_passive", False) for callback in self.callbacks)
        make = partial(
            Objective,
            weights=[*leaves, *own],
            owners=owners,
            name=program.name,
            is_watched=is_watched,
            is_compiled=self.compile,
        )
        generating = partial(self._generator_loss, program, guide, wiring)
        judging = partial(self._critic_loss, program, wiring)
        networks = [self.critic, *(program.owner.children() if isinstance(program.owner, nn.Module) else ())]
        cast = partial(in_networks, networks=networks, device=program.device, dtype=self.autocast)
        objectives = tuple(make(cast(loss)) for loss, _ in zip((judging, generating), sides, strict=False))
        zero = torch.zeros((), dtype=torch.long)
        followed = leaves if self._is_playing else own
        averaged = tuple(weight.detach().clone() for weight in followed) if self.average is not None else ()
        streak = torch.zeros((), dtype=program.dtype, device=program.device)
        return AdversarialState(
            critic, guide, optimisers, objectives, wiring, zero, zero, torch.empty(0, dtype=torch.long), streak, averaged
        )

    @property
    def _is_playing(self) -> bool:
        """Whether the program learns, too."""
        return self.learning_rate is not None

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

    def _wiring(self, program: Program) -> Wiring:
        """Finds each observed site among the program's tensors."""
        data = program.glimpse
        real = program.trace({}, data=data, evaluated=False).nodes
        sources: list[int | None] = []
        for name in program.observed_sites:
            value = real[name]["value"]
            same = (
                i for i, leaf in enumerate(data) if leaf.shape == value.shape and torch.equal(leaf, value.to(leaf.dtype))
            )
            sources.append(next(same, None))
        rows = len(data[0]) if data and data[0].dim() else None
        beside = (i for i, leaf in enumerate(data) if leaf.dim() and len(leaf) == rows and i not in sources)
        return Wiring(tuple(sources), tuple(beside))

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
            shapes = ", ".join(str(tuple(part.shape)) for part in given)
            try:
                scores = self.critic(*given)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"The critic does not run on what it is given, tensors of shape {shapes} (the data, then the program's "
                    f"other tensors with rows): {str(error).splitlines()[0]}"
                ) from None
            rows = len(real[0])
            if not isinstance(scores, Tensor) or scores.shape not in ((rows,), (rows, 1)):
                came = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
                raise ValueError(f"The critic must give one number a row, ({rows},) or ({rows}, 1), but gave {came}.")
            if not scores.isfinite().all():
                raise ValueError("The critic gives scores of the data that are NaN or infinite. Look at its weights.")

    # ------------------------------------------------------------------------------------------------ the losses
    def _real(self, program: Program, wiring: Wiring, data: list[Tensor]) -> list[Tensor]:
        """The data of the observed sites."""
        if None not in wiring.sources:
            return [data[i] for i in wiring.sources if i is not None]
        nodes = program.trace({}, data=data, evaluated=False).nodes
        return [nodes[name]["value"].detach() for name in program.observed_sites]

    def _scores(self, *given: Tensor) -> Tensor:
        """One number a row, (rows,)."""
        scores: Tensor = self.critic(*given)
        return scores.reshape(len(scores))

    def _critic_loss(
        self, program: Program, wiring: Wiring, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What the critic lowers; its value and penalties, (2,)."""
        data = program.data if data is None else data
        real, beside = self._real(program, wiring, data), [data[i] for i in wiring.beside]
        with torch.no_grad():
            drawn = program.simulated(data)
        draws = [drawn[name] for name in program.observed_sites]
        value = self.objective.value(self._scores(*real, *beside), self._scores(*draws, *beside))
        penalty = torch.zeros_like(value)
        if isinstance(self.objective, Wasserstein) and self.objective.penalty is not None:
            penalty = penalty + self.objective.penalty * gradient_penalty(self._scores, real, draws, beside)
        if self.zero_penalty:
            penalty = penalty + 0.5 * self.zero_penalty * zero_penalty(self._scores, real, beside)
        return penalty - value, torch.stack([value, penalty]).detach()

    def _generator_loss(
        self, program: Program, guide: Guide | None, wiring: Wiring, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What the program's weights lower; the loss and the information, (2,)."""
        data = program.data if data is None else data
        drawn, beside = program.simulated(data), [data[i] for i in wiring.beside]
        draws = [drawn[name] for name in program.observed_sites]
        frozen = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        loss = self.objective.loss(functional_call(self.critic, frozen, (*draws, *beside)).reshape(-1))
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

    # ----------------------------------------------------------------------------------------------------- steps
    def _batch(self, state: AdversarialState, program: Program) -> tuple[AdversarialState, list[Tensor] | None]:
        """The data of the next step: passes over all rows, what is left at their end put back."""
        size, rows, taken = self.batch_size, program.rows or 0, int(state.batches)
        state = state._replace(batches=state.batches + 1)
        if size is None or size >= rows:
            return state, None
        order, index = rows_of_step(program, state.order, taken, size)
        return state._replace(order=order), program.minibatch(index)

    def step(self, state: AdversarialState, program: Program) -> tuple[AdversarialState, AdversarialInfo]:
        is_finite = torch.ones((), dtype=torch.bool, device=program.device)
        for _ in range(self.critic_steps):
            state, data = self._batch(state, program)
            found = state.objectives[0](data)
            is_finite = is_finite & self._moved(state, 0, found)
            self._clip()
        value, penalty = found.unbind()
        loss = information = None
        if self._is_playing:
            found = state.objectives[1](data)
            is_finite = is_finite & self._moved(state, 1, found)
            loss, information = found.unbind()
        streak = (state.streak + 1) * (~is_finite).to(state.streak.dtype)
        state = state._replace(step=state.step + 1, streak=streak)
        if state.averaged:
            assert self.average is not None
            follow(state.averaged, self._own(state), self.average, int(state.step))
        if int(state.step) % NOT_FINITE == 0 and streak >= NOT_FINITE:
            self._give_up(state, program, data)
        return state, AdversarialInfo(value, penalty, loss, None if state.guide is None else information)

    def _moved(self, state: AdversarialState, player: int, found: Tensor) -> Tensor:
        """One step of an optimiser, none where the loss was not finite; whether it was."""
        is_finite = found.isfinite().all()
        optimiser = state.optimisers[player]
        optimiser.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # as GradScaler does: no wait for a GPU
        optimiser.step()
        return is_finite

    @torch.no_grad()
    def _clip(self) -> None:
        if isinstance(self.objective, Wasserstein) and self.objective.clip is not None:
            for weight in self.critic.parameters():
                weight.clamp_(-self.objective.clip, self.objective.clip)

    def _own(self, state: AdversarialState) -> list[Tensor]:
        """The weights that are averaged: of program and guide, or of the critic alone."""
        return [weight for group in state.optimisers[-1].param_groups for weight in group["params"]]

    def _give_up(self, state: AdversarialState, program: Program, data: list[Tensor] | None) -> NoReturn:
        """Raises: weights from which no step leads back."""
        with torch.no_grad():
            drawn = program.simulated(program.data if data is None else data)
            is_drawn_well = all(bool(drawn[name].isfinite().all()) for name in program.observed_sites)
        who = "The critic gives scores" if is_drawn_well else f"{program.name} draws values"
        layer = first_not_finite(program, Guide(self.critic), lambda: state.objectives[0].loss(data, False))
        where = "" if layer is None else f"; the first layer that does is {layer}"
        raise ValueError(
            f"{who} that have not been finite since step {int(state.step) - int(state.streak)}{where}. Take a smaller "
            "learning_rate, or an objective with a penalty; a checkpoint holds the last weights that were finite."
        )

    def is_sound(self, state: AdversarialState, program: Program) -> bool:
        return all(bool(weight.isfinite().all()) for weight in state.objectives[0].weights)

    def shown(self, info: AdversarialInfo, program: Program) -> str:
        told = {"value": info.value, "loss": info.loss, "information": info.information}
        return ", ".join(f"{name} {float(number):.4g}" for name, number in told.items() if number is not None)

    # ------------------------------------------------------------------------------------------------ reading out
    @torch.no_grad()
    def sample(self, state: AdversarialState, program: Program) -> tuple[AdversarialState, Draw]:
        """The value of the game at the last weights, of one batch."""
        if state.averaged:
            put(self._own(state), state.averaged)
            state = state._replace(averaged=())
        state, data = self._batch(state, program)
        data = program.data if data is None else data
        real, beside = self._real(program, state.wiring, data), [data[i] for i in state.wiring.beside]
        drawn = program.simulated(data)
        draws = [drawn[name] for name in program.observed_sites]
        value = self.objective.value(self._scores(*real, *beside), self._scores(*draws, *beside))
        return state, Draw({}, {"value": value[None]})

    def values(self, state: AdversarialState, program: Program) -> dict[str, Tensor]:
        return {}

    @property
    def _judges(self) -> dict[str, Tensor]:
        """Weights and buffers of the critic."""
        return {f"critic.{name}": leaf.detach() for name, leaf in self.critic.state_dict(keep_vars=True).items()}

    def _leaves(self, state: AdversarialState) -> dict[str, Tensor]:
        return self._judges | ({} if state.guide is None else {f"guide.{n}": leaf for n, leaf in state.guide.leaves.items()})

    def saved(self, state: AdversarialState, program: Program) -> dict[str, Any]:
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

    def restored(self, saved: dict[str, Any], program: Program) -> AdversarialState:
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

    def weights(self, state: AdversarialState, program: Program) -> dict[str, Tensor]:
        critic = {f"critic.{name}": weight.detach().clone() for name, weight in self.critic.named_parameters()}
        seen: dict[str, Tensor] = {}
        if state.guide is not None:
            is_own = state.guide.owner is not None and state.guide.owner.module is program.owner
            table = state.guide.table
            seen = {
                ("" if is_own else "guide.") + n: table.seen(n, w).detach().clone() for n, w in state.guide.weights().items()
            }
        return seen | program.weight_values() | critic
