"""Stochastic variational inference: a guide is fitted to the posterior by stochastic gradients.

References:
    M. Hoffman et al., Stochastic variational inference (2013).
    D. Kingma and J. Ba, Adam: a method for stochastic optimization (2015).
    A. Kucukelbir et al., Automatic differentiation variational inference (2017): the automatic guide.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoGuide,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from inference.bounds import ELBO, Bound, Particles
from inference.contract import Backend, Draw, Guessing, Tempered, Unsupported
from inference.density import Density, Unconstrained
from inference.distributed import check_shards
from inference.enumeration import log_normalizer
from inference.fit import Optimise
from inference.guides import Guide, batched, is_drawn, log_prob, mapped
from inference.handlers import Arithmetic, isolated, on_device, quiet, refill
from inference.networks import first_not_finite
from inference.objective import Objective
from inference.particles import Weigher
from inference.program import Program
from inference.start import ascended, given_values, starting_values
from inference.training import (
    NOT_FINITE,
    PowerAverage,
    adam,
    at_once,
    check_settings,
    descend,
    falling,
    follow,
    in_networks,
    put,
    rows_of_step,
)

__all__ = ["SVI", "Beta", "SVIInfo", "SVIState"]

_STARTS = 8  # of an automatic guide
_CERTIFIED = 4  # settings at which the sum over finite sites is held against the joint
_ROWS = 4096  # that a guide draws at a time, where it is trained on batches


class Beta(nn.Module):
    """The weight of the divergence at the present step, as a buffer: graphs that are recorded take it as an input."""

    def __init__(self, value: Callable[[int], float], like: Tensor) -> None:
        super().__init__()
        self.value = value
        self.now: Tensor
        self.register_buffer("now", like.new_tensor(value(0)))


class SVIState(NamedTuple):
    """The guide and its optimiser; torch trains both in place.

    Attributes:
        guide: The guide, callable with the arguments of the program.
        optimiser: Adam over the weights of guide and program.
        scheduler: Learning-rate schedule.
        step: Number of steps taken, (), on the CPU.
        skipped: Steps whose bound was not finite, ().
        objective: The loss and its gradients.
        order: The rows in the order of this pass, of which every step takes the next few, (rows,); empty without batches.
        streak: Steps in a row whose bound was not finite, ().
        weigher: What makes and weighs the particles.
        beta: The weight of the divergence; None is 1.
        averaged: Moving averages of the weights, in the order of the optimiser; () without ``average``.
        best: The weights of the best validation bound, in that order; () before the first one.
        validation: That bound, in nats a row, ().
        waited: Evaluations since, ().
    """

    guide: Guide
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    step: Tensor
    skipped: Tensor
    objective: Objective
    order: Tensor
    streak: Tensor
    weigher: Weigher
    beta: Beta | None
    averaged: tuple[Tensor, ...]
    best: tuple[Tensor, ...]
    validation: Tensor
    waited: Tensor


class SVIInfo(NamedTuple):
    """What a step has seen, in nats for all rows; each ().

    Attributes:
        loss: Minus the bound.
        rate: Divergence of the guide from the prior, E_q[log q(z) − log p(z)]; None where it is not told apart.
        distortion: −E_q log p(x | z).
        validation: The bound at the validation data, in nats a row; NaN where it was not looked at.
        waited: Looks at the validation data since the best one.
        rows: How many rows a step sees, of all processes; a number, None for a program without rows.
    """

    loss: Tensor
    rate: Tensor | None = None
    distortion: Tensor | None = None
    validation: Tensor | None = None
    waited: Tensor | None = None
    rows: int | None = None


class _Evaluated(torch.autograd.Function):
    """log p of every particle through the staged graph, which brings its own gradient."""

    @staticmethod
    def forward(ctx: Any, staged: Any, names: tuple[str, ...], *values: Tensor) -> Tensor:
        gradients, log_p = staged(dict(zip(names, values, strict=True)))
        ctx.save_for_backward(*(gradients[name] for name in names))
        return log_p

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(upstream.reshape(-1, *(1,) * (g.dim() - 1)) * g for g in ctx.saved_tensors)


@dataclass(frozen=True, kw_only=True)
class SVI(Backend[SVIState, SVIInfo]):
    """Stochastic variational inference of any program; finite discrete sites that the guide lacks are summed out.

    Batches are passes over the shuffled rows. A step is recorded once and then replayed without Pyro (see
    ``inference.objective``). Data stay where they are: a tensor on a GPU is cut there, ``numpy.memmap`` is read row by row
    (give it the floating type of the weights, or ``transform``).

    Where a program with weights is trained on batches, draws of what its rows hide come without their ``lp``, which would
    take a pass of its networks over all rows each; and if none would be kept, none are taken.

    Args:
        steps: Steps of the optimiser.
        learning_rate: Its learning rate, positive.
        bound: The objective.
        guide: A Pyro guide, or a class of Pyro's automatic guides; None takes the model's own, else ``AutoNormal``. A
            program that hides nothing needs none: its weights go to the maximum of the likelihood.
        batch_size: Rows per step; None takes all.
        draws: Draws from the fitted guide.
        transform: Applied to the first tensor of every batch: ``torch.bernoulli`` binarises anew at every visit.
        optimiser: Makes the optimiser of a list of weights; None takes Adam. ``learning_rate`` is then its affair.
        scheduler: Makes a schedule of the optimiser, one of ``torch.optim.lr_scheduler``, stepped after every step; None
            keeps the rate for the first half of the steps, then lets it fall along a cosine to a hundredth.
        clip_norm: Largest norm of the gradient, which is scaled down to it; None leaves it.
        average: Decay of an exponential moving average of the weights, such as 0.999, or a ``PowerAverage``; it then takes
            their place. None keeps the last ones.
        validation: A tensor or tuple of arguments, rows that are not trained on; their bound a row is in
            ``history["validation"]``.
        validate_every: Steps from one look at them to the next; None looks once a pass.
        patience: Looks without a better bound after which training stops; the best weights are then taken. None trains on.
        autocast: Type of the arithmetic of networks, such as ``torch.bfloat16``; densities stay in the type of the weights.
        compile: Whether the recorded step is compiled by ``torch.compile``; pays on a GPU.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def coin(flips):
        ...     fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        ...     with pyro.plate("flip", len(flips)):
        ...         pyro.sample("heads", dist.Bernoulli(fairness), obs=flips)
        >>> SVI(seed=0, steps=500, progress=False).fit(coin, torch.ones(8)).draws["fairness"].shape
        torch.Size([1, 1000])
    """

    kind: ClassVar[str] = "variational"
    follows_data: ClassVar[bool] = True

    steps: int = 2000
    learning_rate: float = 1e-2
    bound: Bound = field(default_factory=ELBO)
    guide: Callable[..., Any] | None = None
    batch_size: int | None = None
    draws: int = 1000
    transform: Callable[[Tensor], Tensor] | None = None
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    clip_norm: float | None = None
    average: float | PowerAverage | None = None
    validation: Any = None
    validate_every: int | None = None
    patience: int | None = None
    autocast: torch.dtype | None = None
    compile: bool = False

    @property
    def schedule(self) -> Optimise:
        return Optimise(self.steps, self.draws, stop=self._has_waited if self.patience is not None else None)

    @property
    def view(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "transform": self.transform, "takes_surrogates": True}

    def _has_waited(self, info: SVIInfo) -> bool:
        assert self.patience is not None
        return info.waited is not None and int(info.waited) >= self.patience

    def _check_settings(self, program: Program) -> None:
        if self.batch_size is not None:
            program.check_rows("batch_size")
        check_settings(self, program, "learning_rate", "clip_norm", "validate_every", "patience")
        if self.validation is None and (self.patience is not None or self.validate_every is not None):
            raise ValueError("patience and validate_every need validation=, rows that are not trained on.")

    def init(self, program: Program) -> SVIState:
        self._check_settings(program)
        check_shards(program, batch_size=self.batch_size)
        guide = self._guide(program)
        trace = guide.trace(program, data=program.glimpse)
        program.processes.equalise([*guide.leaves.values(), *program.leaves.values()])
        guide.check(trace, program)
        enumerated = [name for name in program.finite if name not in trace.nodes]
        if enumerated:
            with isolated(0, program.device):  # looking changes nothing
                density = Density(program, rung="vmapped")
                density.certify(enumerated, starting_values(program, _CERTIFIED, most=1), "Use Gibbs().")
        if self._has_rows(guide, program, trace):
            program.processes.part_ways()
        program.fitted = guide
        trained = {id(w): w for w in (*guide.weights().values(), *program.weights.values()) if w.requires_grad}
        if not trained:
            raise Unsupported(f"Neither the guide nor {program.name} has weights to train.")
        leaves = list(trained.values())
        optimiser = adam(leaves, self.learning_rate) if self.optimiser is None else self.optimiser(leaves)
        scheduler = (self.scheduler or partial(falling, steps=self.steps))(optimiser)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise Unsupported("ReduceLROnPlateau waits for a number, but a scheduler is stepped without. Use patience=.")
        zero = torch.zeros((), dtype=program.dtype, device=program.device)
        weigher = Weigher(guide, program, trace)
        beta = self._beta(program, zero)
        coupled = weigher.couples() if self.bound.order != 1.0 or weigher.has_scores else None
        self._check_bound(program, weigher, beta, coupled)
        self._check_surrogates(program, guide, weigher)
        _ = self.bound.draws == 1 or weigher.is_wide  # found out now, and not while a graph is recorded
        is_whole = self._is_plain(beta) and (coupled is not None or not (program.weights and weigher.has_rows))
        path = self.bound.path and guide.has_path(trace, program) and (self.bound.order == 1.0 or not weigher.has_scores)
        loss = partial(self._whole_loss, guide, program, path) if is_whole else partial(self._loss, weigher, beta, path)
        objective = Objective(
            in_networks(loss, self._networks(program, guide), program.device, self.autocast),
            [*trained.values()],
            [program.owner, program.call, guide.call, getattr(guide.call, "__self__", None), beta],
            name=program.name,
            is_watched=self.is_watched,
            is_compiled=self.compile,
            precision=self.autocast,
        )
        weights = tuple(weight.detach().clone() for weight in objective.weights) if self.average is not None else ()
        worst = zero - math.inf
        return SVIState(
            guide=guide,
            optimiser=optimiser,
            scheduler=scheduler,
            step=torch.zeros((), dtype=torch.long),
            skipped=zero,
            objective=objective,
            order=torch.empty(0),
            streak=zero,
            weigher=weigher,
            beta=beta,
            averaged=weights,
            best=(),
            validation=worst,
            waited=zero,
        )

    def _beta(self, program: Program, zero: Tensor) -> Beta | None:
        """The weight of the divergence: that of the bound, else of the model."""
        chosen = self.bound.beta
        if chosen is None:
            told = program.owner.beta if isinstance(program.owner, Tempered) else 1.0
            chosen = told if isinstance(told, (int, float)) else 1.0  # a weight of that name is something else
        if not callable(chosen):
            if chosen == 1.0:
                return None
            value = float(chosen)
            return Beta(lambda step: value, zero)
        return Beta(chosen, zero)

    def _is_plain(self, beta: Beta | None) -> bool:
        """Whether the bound asks for nothing but log p and log q of all rows together."""
        return beta is None and self.bound.order == 1.0 and not self.bound.floor

    def _check_bound(self, program: Program, weigher: Weigher, beta: Beta | None, coupled: str | None) -> None:
        name = type(self.bound).__name__
        if self.bound.floor:
            weigher.check_floor()
        if self.bound.order != 1.0 and self.batch_size is not None and not weigher.has_rows:
            raise Unsupported(
                f"{name} weighs draws row by row, but the guide draws nothing in a plate over the rows of {program.name}, "
                "and all rows together cannot be weighed from a part of them. Leave batch_size out, or use ELBO()."
            )
        if coupled is not None and not self._is_plain(beta):
            raise Unsupported(f"{name} weighs the draws of every element by themselves, but {coupled}. Use ELBO().")

    def _check_surrogates(self, program: Program, guide: Guide, weigher: Weigher) -> None:
        if not program.surrogates:
            return
        reasons = {
            "of another bound than ELBO() weighs particles by its value": self.bound.order != 1.0 or bool(self.bound.floor),
            "of draws without a path (no rsample) is weighed by its value": weigher.has_scores,
            "sums finite sites out by its value": bool(weigher.enumerated),
            "of AutoLaplaceApproximation needs its curvature": isinstance(guide.call, AutoLaplaceApproximation),
            "is not what validation= can compare": self.validation is not None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise Unsupported(
                    f"Site '{program.surrogates[0]}' of {program.name} has a gradient, but no log-density, and the gradient "
                    f"{reason}. Use SVI(bound=ELBO()) with a guide whose draws have gradients, such as AutoNormal."
                )

    def _networks(self, program: Program, guide: Guide) -> list[nn.Module]:
        owners = [program.owner, None if guide.owner is None else guide.owner.module]
        return [network for owner in owners if isinstance(owner, nn.Module) for network in owner.children()]

    def _has_rows(self, guide: Guide, program: Program, trace: poutine.Trace) -> bool:
        """Whether the guide draws sites of single rows; of the rows that a process sees, it can only draw those.

        Raises:
            Unsupported: If it draws all of them always.
        """
        plates = set(program.row_plates)
        local = [n for n, site in program.latents.items() if n in trace.nodes and plates & {p.name for p in site.plates}]
        if not local or program.shard is None:
            return bool(local)
        cut, whole = guide.trace(program, data=program.shard), guide.trace(program)  # the first may be as long as a batch
        for name in local:
            if cut.nodes[name]["value"].shape == whole.nodes[name]["value"].shape:
                raise Unsupported(
                    f"The guide has '{name}' for all {program.rows} rows, whichever it is given, so that several processes "
                    "cannot split them. Give a guide that computes it from the rows, or fit in one process "
                    "(inference.distributed.alone)."
                )
        return True

    def _guide(self, program: Program) -> Guide:
        chosen = self.guide if self.guide is not None else program.guide
        automatic = isinstance(chosen, type) and issubclass(chosen, AutoGuide)
        if self.start is not None and not automatic and chosen is not None:
            if self.guide is not None or not isinstance(program.owner, Guessing):
                raise Unsupported(
                    "start= sets where an automatic guide starts, or the guide of a model with a method guess(values, ...); "
                    "another guide starts where it says. Leave out start=, or take guide=AutoNormal."
                )
            values = given_values(program, self.start, 1)
            args, kwargs = program.arguments()
            program.owner.guess({name: value[0] for name, value in values.items()}, *args, **kwargs)
        if chosen is None and not program.latents:
            return Guide(_nothing)
        if chosen is None or automatic:
            if not program.continuous:
                raise Unsupported(f"{program.name} has no continuous site for an automatic guide. Use Gibbs().")
            endless = [n for n in program.latents if n not in program.continuous and n not in program.finite]
            if endless:
                family = program.latents[endless[0]].family
                raise Unsupported(
                    f"An automatic guide sums discrete sites out, but '{endless[0]}' ({family}) has infinitely many values. "
                    "Use Gibbs(), or a guide of your own."
                )
            values = self._best_start(program)
            initial = init_to_value(values=values)
            visible = poutine.block(program.handled({}), hide=[*program.finite])
            with quiet(), on_device(program.device), Arithmetic():
                guide = (chosen or AutoNormal)(visible, init_loc_fn=initial)
                args, kwargs = program.arguments()
                guide(*args, **kwargs)  # an automatic guide makes its weights at its first call
            return Guide(guide)
        if inspect.isclass(chosen):
            raise TypeError(f"guide= must be a Pyro guide or a class of automatic guides, but is {chosen!r}.")
        if isinstance(chosen, nn.Module):
            _keep_own_weights(chosen)
        return Guide(chosen)

    def _laplace(self, guide: AutoLaplaceApproximation, program: Program) -> Guide:
        """The normal with the curvature at the mode, finite sites summed out (Pyro's own would draw them)."""
        coordinates = Unconstrained(program, list(guide._unconstrained_shapes))
        loc = guide.loc.detach()

        def log_density(position: Tensor) -> Tensor:
            values = coordinates.values(position)
            return log_normalizer(program, values, program.finite) + coordinates.log_jacobian(position)

        # a run that goes on makes it anew
        with isolated(0, program.device), quiet(), on_device(program.device), Arithmetic():
            information = -jacrev(grad(log_density))(loc)
            factor, failed = torch.linalg.cholesky_ex(0.5 * (information + information.mT))
            if int(failed):
                raise ValueError(
                    f"AutoLaplaceApproximation found no maximum of {program.name}: the curvature there is not that of one. "
                    "Raise steps=, or take AutoMultivariateNormal."
                )
            covariance = torch.cholesky_inverse(factor)
            normal = AutoMultivariateNormal(guide.model)
            args, kwargs = program.arguments()
            normal(*args, **kwargs)
            root = torch.linalg.cholesky(covariance)
            normal.loc, normal.scale = nn.Parameter(loc.clone()), root.diagonal()
            normal.scale_tril = root / root.diagonal()[:, None]
        return Guide(normal)

    def _best_start(self, program: Program) -> dict[str, Tensor]:
        """The given start, or the best of a few."""
        if program.surrogates:  # which is best cannot be told
            return {name: value[0] for name, value in starting_values(program, 1, self.start, most=1).items()}
        values = starting_values(program, _STARTS, self.start, is_split=True)
        if self.start is None:
            values = ascended(program, values, is_split=True)
        continuous = {name: values[name] for name in program.continuous}
        log_density = program.density.marginal(program.finite)(continuous)
        best = log_density.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).argmax()
        return {name: value[best] for name, value in values.items()}

    def step(self, state: SVIState, program: Program) -> tuple[SVIState, SVIInfo]:
        if state.beta is not None:
            state.beta.now.fill_(state.beta.value(int(state.step)))
        order, data = self._batch(state, program)
        objective = state.objective
        found = program.processes.average(objective(data), objective.weights, objective.buffers)
        loss, rate, distortion = found.unbind() if found.dim() else (found, None, None)
        if not int(state.step) and not loss.isfinite():
            raise ValueError(f"The bound of {program.name} is {-float(loss)} at the start. Give start=, or check the data.")
        is_skipped = (~descend(state.optimiser, objective.weights, loss, self.clip_norm)).to(loss.dtype)
        state.scheduler.step()
        state = state._replace(
            step=state.step + 1,
            skipped=state.skipped + is_skipped,
            streak=(state.streak + 1) * is_skipped,
            order=order,
        )
        if state.averaged:
            assert self.average is not None
            follow(state.averaged, state.objective.weights, self.average, int(state.step))
        if int(state.step) % NOT_FINITE == 0 and state.streak >= NOT_FINITE:
            self._give_up(state, program, data)
        if program.surrogates:  # a loss that would mean nothing
            loss = loss * math.nan
        rows = None if program.rows is None else min(self.batch_size or program.rows, program.rows)
        if self.validation is None:
            return state, SVIInfo(loss, rate, distortion, rows=rows)
        state, seen = self._validated(state, program)
        return state, SVIInfo(loss, rate, distortion, seen, state.waited, rows)

    def _give_up(self, state: SVIState, program: Program, data: list[Tensor] | None) -> NoReturn:
        """Raises: weights from which no step leads back."""
        layer = first_not_finite((program.owner, state.guide.call), lambda: state.objective.loss(data, False))
        raise ValueError(
            f"The bound of {program.name} has not been finite since step {int(state.step) - int(state.streak)}"
            f"{'' if layer is None else f'; the first layer that gives NaN or infinity is {layer}'}. Take a smaller "
            "learning_rate or clip_norm=1.0; a checkpoint holds the last weights that were finite."
        )

    def is_sound(self, state: SVIState, program: Program) -> bool:
        return all(bool(weight.isfinite().all()) for weight in state.objective.weights)

    # ------------------------------------------------------------------------------------------- validation
    def _validated(self, state: SVIState, program: Program) -> tuple[SVIState, Tensor]:
        """Looks at the validation data where it is time; NaN where it is not."""
        rows = program.rows or 1
        every = self.validate_every or max(1, rows // min(self.batch_size or rows, rows))
        if int(state.step) % every:
            return state, state.validation.new_tensor(math.nan)
        mine = put(state.objective.weights, state.averaged) if state.averaged else []
        try:
            bound = self._validation_bound(state, program)
            if not bound > state.validation:
                return state._replace(waited=state.waited + 1), bound
            best = tuple(weight.detach().clone() for weight in state.objective.weights) if self.patience is not None else ()
            return state._replace(best=best, validation=bound, waited=torch.zeros_like(state.waited)), bound
        finally:
            if mine:
                put(state.objective.weights, mine)

    @torch.no_grad()
    def _validation_bound(self, state: SVIState, program: Program) -> Tensor:
        """The bound at the validation data, in nats a row; with the same random numbers each time."""
        given = self.validation if isinstance(self.validation, tuple) else (self.validation,)
        args, _ = program.cast(given, {})
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(
                "validation= must be a tensor or a tuple of the program's arguments, the first of them a tensor."
            )
        if not state.weigher.has_rows:
            raise Unsupported(f"validation= needs latent sites that the guide draws for every row of {program.name}.")
        rows, total = len(args[0]), torch.zeros((), dtype=torch.float64, device=program.device)
        with isolated(self.seed or 0, program.device):
            for index in torch.arange(rows, device=program.device).split(self.batch_size or rows):
                cut = [a[index] if a.dim() and len(a) == rows else a for a in args if isinstance(a, Tensor)]
                data = program.fed(cut)
                draws = state.weigher.draw(self.bound.draws, data)
                particles, _ = state.weigher.weigh(draws, data, 1.0, False)
                inside = self.bound.combined(self.bound.log_weights(particles, None))
                total += (particles.scale * inside).sum() / max(1, inside.numel() // max(1, particles.joint[0].numel()))
        return (total / rows).to(program.dtype)

    def history(self, records: dict[str, Tensor], state: SVIState) -> dict[str, Tensor]:
        if "validation" not in records:
            return records
        seen = records["validation"]
        kept = {name: values for name, values in records.items() if name != "waited"}
        return kept | {"validation": seen[~seen.isnan()]}

    def shown(self, info: SVIInfo, program: Program) -> str:
        """The bound, rate and distortion in nats a row, where rows have latent values of their own."""
        if info.rate is None or info.distortion is None:
            return f"loss {float(info.loss):.4g}"
        rows = program.rows or 1
        parts = {"bound": -info.loss, "rate": info.rate, "distortion": info.distortion}
        shown = ", ".join(f"{name} {float(value) / rows:.4g}" for name, value in parts.items())
        return f"{shown} a row"

    def _batch(self, state: SVIState, program: Program) -> tuple[Tensor, list[Tensor] | None]:
        """The order of the rows, and the data of the next step: passes over all rows, what is left at their end put back."""
        if self.batch_size is None or program.rows is None or self.batch_size >= program.rows:
            whole = [*program.data] if program.shard is None and program.transform is not None else program.shard
            return state.order, whole
        order, rows = rows_of_step(program, state.order, int(state.step), self.batch_size)
        return order, program.minibatch(program.processes.share(rows))

    def _scale(self, program: Program) -> float:
        """Rows in all by rows in a batch, of which every process sees its share."""
        rows = program.rows or 1
        return program.processes.size * rows / min(self.batch_size or rows, rows)

    def _loss(
        self, weigher: Weigher, beta: Beta | None, path: bool, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What to differentiate, and minus the bound, rate and distortion, (3,).

        Args:
            weigher: What makes and weighs particles.
            beta: The weight of the divergence.
            path: Whether the score of the guide is left out of the gradient.
            data: The tensors of a batch; None takes all.
            is_recorded: Whether this run is recorded as a graph, which should be that of the program alone.
        """
        program, bound = weigher.program, self.bound
        scale = 1.0 if data is None else self._scale(program)
        data = None if data is None else program.fed(data)
        draws = weigher.draw(bound.draws, data, scale)
        particles, ways = weigher.weigh(draws, data, scale, path, bool(bound.floor))
        now = None if beta is None else beta.now
        surrogate, value = bound.objective(particles, now)
        if bound.order != 1.0 and bound.draws > 1:
            loadings = bound.loadings(bound.log_weights(particles, now))
            for way in ways:
                way.tensor.register_hook(partial(torch.mul, way.spread(loadings, weigher.plates)))
        return -surrogate, torch.stack([-value, *_rate_and_distortion(particles)])

    def _whole_loss(
        self, guide: Guide, program: Program, path: bool, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What to differentiate, and minus the bound, where all of the program has one weight."""
        scale = 1.0 if data is None else self._scale(program)
        data = None if data is None else program.fed(data)
        traces = [guide.trace(program, data=data, scale=scale) for _ in range(self.bound.draws)]
        values = [{name: trace.nodes[name]["value"] for name in program.latents if name in trace.nodes} for trace in traces]
        log_p = self._log_p(program, values, data, scale, is_recorded)
        has_score = any(is_drawn(node) and not node["fn"].has_rsample for node in traces[0].nodes.values())
        score = torch.stack([_score(trace) for trace in traces]) if has_score else None
        log_q = torch.stack([self._log_q(guide, program, path, trace, data, scale) for trace in traces])
        zero = torch.zeros_like(log_p[0])
        particles = Particles(log_p, log_q, zero, zero, torch.ones_like(zero), score, zero)
        surrogate, bound = self.bound.objective(particles)
        return -surrogate, -bound

    def _log_p(
        self, program: Program, values: list[dict[str, Tensor]], data: list[Tensor] | None, scale: float, is_recorded: bool
    ) -> Tensor:
        """log p(data, values) of each particle, finite sites that the guide lacks summed out, (particle,)."""
        enumerated = tuple(name for name in program.finite if name not in values[0])
        names = tuple(values[0])
        is_shared = data is None and not program.weights and all(value.is_floating_point() for value in values[0].values())
        if is_shared and not is_recorded:
            staged = program.density.slopes(names, enumerated)
            stacked = [torch.stack([value[name] for value in values]) for name in names]
            return _Evaluated.apply(staged, names, *stacked)
        scales = dict.fromkeys(program.row_plates, scale) if data is not None else None
        if is_shared and len(values) > 1:
            every = {name: torch.stack([value[name] for value in values]) for name in names}
            return vmap(lambda value: log_normalizer(program, value, enumerated))(every)
        return torch.stack([log_normalizer(program, value, enumerated, data, scales) for value in values])

    def _log_q(
        self, guide: Guide, program: Program, path: bool, trace: poutine.Trace, data: list[Tensor] | None, scale: float
    ) -> Tensor:
        if path:
            sites = {name: node["value"] for name, node in trace.nodes.items() if is_drawn(node)}
            trace = guide.trace(program, sites, data, scale, is_frozen=True)
        return log_prob(trace)

    def sample(self, state: SVIState, program: Program) -> tuple[SVIState, Draw]:
        state, draw = self.readings(state, program, 1)
        return state, Draw({n: v[:, 0] for n, v in draw.values.items()}, {n: v[:, 0] for n, v in draw.stats.items()})

    def most_readings(self, program: Program) -> int:
        return at_once(program)

    @torch.no_grad()
    def readings(self, state: SVIState, program: Program, count: int) -> tuple[SVIState, Draw]:
        state = self._settled(state)
        if isinstance(state.guide.call, AutoLaplaceApproximation):
            state = state._replace(guide=self._laplace(state.guide.call, program))
            program.fitted = state.guide
        if not self._is_read_in_parts(state, program):
            program.arguments()  # what is transformed once is so before many draws are made at once
        values, log_q = batched(partial(self._drawn, state, program), count)
        enumerated = tuple(name for name in program.finite if name not in values)
        if not program.latents:  # nothing is hidden
            lp = log_normalizer(program, {}, ()).expand(count)
            return state, Draw({}, {"lp": lp[None], "log_q": log_q[None]})
        is_amortised = bool(program.weights) and state.weigher.has_rows and self.batch_size is not None
        if program.surrogates:
            return state, Draw({n: values[n].detach()[None] for n in program.latents}, {"log_q": log_q[None]})
        if is_amortised and not enumerated:  # a pass of the decoder over all rows for every draw would tell little
            return state, Draw({n: values[n].detach()[None] for n in program.latents}, {"log_q": log_q[None]})
        if program.weights:
            lp = mapped(lambda value: log_normalizer(program, value, enumerated), values)
        else:
            lp = program.density.marginal(enumerated)(values)
        if enumerated:
            values |= program.density.draw(enumerated)(values, program.density.uniforms(enumerated, count))[0]
        return state, Draw({n: values[n].detach()[None] for n in program.latents}, {"lp": lp[None], "log_q": log_q[None]})

    def _settled(self, state: SVIState) -> SVIState:
        """The state when training is over: with the best or the averaged weights, if any."""
        chosen = state.best or state.averaged
        if chosen:
            put(state.objective.weights, chosen)
        return state._replace(best=(), averaged=())

    def _is_read_in_parts(self, state: SVIState, program: Program) -> bool:
        return self.batch_size is not None and state.weigher.has_rows and (program.rows or 0) > _ROWS

    def _drawn(self, state: SVIState, program: Program) -> tuple[dict[str, Tensor], Tensor]:
        """One draw of the guide at all rows, a part of them at a time where they are seen in batches, and log q."""
        if not self._is_read_in_parts(state, program):
            trace = state.guide.trace(program)
            return {n: trace.nodes[n]["value"] for n in program.latents if n in trace.nodes}, log_prob(trace)
        assert program.rows is not None
        weigher, parts, log_q = state.weigher, list[dict[str, Tensor]](), torch.zeros((), dtype=program.dtype)
        shared: dict[str, Tensor] = {}
        for first in range(0, program.rows, _ROWS):
            trace = state.guide.trace(program, shared, program.between(first, first + _ROWS))
            own = {n: node["value"] for n, node in trace.nodes.items() if is_drawn(node) and n not in weigher.local}
            terms = [
                node["log_prob_sum"] for n, node in trace.nodes.items() if node["type"] == "sample" and n in weigher.local
            ]
            if not shared and own:
                terms += [trace.nodes[n]["log_prob_sum"] for n in own]
            shared = own
            log_q = log_q + torch.stack(terms).sum()
            parts.append({n: trace.nodes[n]["value"] for n in program.latents if n in trace.nodes})
        found = {}
        for name in parts[0]:
            site = program.latents[name]
            dims = [site.event_dim - dim for plate, dim in weigher.frames[name].items() if plate in program.row_plates]
            found[name] = torch.cat([part[name] for part in parts], -dims[0]) if dims else parts[0][name]
        return found, log_q

    def values(self, state: SVIState, program: Program) -> dict[str, Tensor]:
        return self.sample(state, program)[1].values

    def saved(self, state: SVIState, program: Program) -> dict[str, Any]:
        return {
            "guide": state.guide.leaves,
            "optimiser": state.optimiser.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "objective": state.objective.calls,
            "numbers": {
                "step": state.step,
                "skipped": state.skipped,
                "order": state.order,
                "streak": state.streak,
                "averaged": state.averaged,
                "best": state.best,
                "validation": state.validation,
                "waited": state.waited,
            },
        }

    def restored(self, saved: dict[str, Any], program: Program) -> SVIState:
        """The guide is code: it is made as it was made before, and given the weights."""
        state = self.init(program)
        if isinstance(state.guide.call, AutoLaplaceApproximation) and "scale_tril_unconstrained" in saved["guide"]:
            refill({"loc": state.guide.leaves["loc"]}, saved["guide"], "The guide")
            state = state._replace(guide=self._laplace(state.guide.call, program))  # draws had been read
            program.fitted = state.guide
        refill(state.guide.leaves, saved["guide"], "The guide")
        state.optimiser.load_state_dict(saved["optimiser"])
        state.scheduler.load_state_dict(saved["scheduler"])
        state.objective.recall(saved["objective"])
        return state._replace(**saved["numbers"])

    def weights(self, state: SVIState, program: Program) -> dict[str, Tensor]:
        return state.guide.seen(program) | program.weight_values()


def _rate_and_distortion(particles: Particles) -> tuple[Tensor, Tensor]:
    """E_q[log q(z) − log p(z)] and −E_q log p(x | z) over all rows, each ()."""
    assert particles.prior is not None and particles.shared_prior is not None
    rate = (particles.scale * (particles.log_q - particles.prior).mean(0)).sum()
    distortion = (particles.scale * (particles.prior - particles.joint).mean(0)).sum()
    rate = rate + particles.shared_log_q - particles.shared_prior
    distortion = distortion + particles.shared_prior - particles.shared_joint
    return rate.detach(), distortion.detach()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The guide of a program that hides nothing: the bound is its likelihood."""


def _keep_own_weights(module: nn.Module) -> None:
    """Lets a module of Pyro that was made outside a run hold its weights itself, as those that are made inside do."""
    for part in module.modules():
        context = getattr(part, "_pyro_context", None)
        if context is not None and not hasattr(context, "param_state"):
            context.param_state = {"params": {}, "constraints": {}}


def _score(trace: poutine.Trace) -> Tensor:
    """Log-probability of the sites that are not reparameterised, whose gradient needs the score function."""
    terms = [node["log_prob_sum"] for node in trace.nodes.values() if is_drawn(node) and not node["fn"].has_rsample]
    return torch.stack(terms).sum()
