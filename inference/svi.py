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
from typing import Any, ClassVar, NamedTuple

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

from inference.bounds import ELBO
from inference.contract import Backend, Draw, Unsupported
from inference.density import Density, Unconstrained
from inference.distributed import check_shards
from inference.enumeration import log_normalizer
from inference.fit import Optimise
from inference.guides import Guide, batched, is_drawn, log_prob, mapped
from inference.handlers import Arithmetic, isolated, quiet, refill
from inference.objective import Objective
from inference.program import Program
from inference.start import ascended, starting_values

__all__ = ["SVI", "SVIInfo", "SVIState"]

_STARTS = 8  # of an automatic guide
_CERTIFIED = 4  # settings at which the sum over finite sites is held against the joint
_LARGEST_BLOCK = 2**22  # numbers of data and latents, at all values of finite sites, of the draws that are made at once


class SVIState(NamedTuple):
    """The guide and its optimiser; torch trains both in place.

    Attributes:
        guide: The guide, callable with the arguments of the program.
        optimiser: Adam over the weights of guide and program.
        scheduler: Learning-rate schedule.
        step: Number of steps taken, ().
        skipped: Steps whose bound was not finite, ().
        objective: The loss and its gradients.
        order: The rows in the order of this pass, of which every step takes the next few, (rows,); empty without batches.
    """

    guide: Guide
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    step: Tensor
    skipped: Tensor
    objective: Objective
    order: Tensor


class SVIInfo(NamedTuple):
    """loss (): minus the bound, in nats, for all rows."""

    loss: Tensor


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

    The learning rate is constant for the first half of the steps and then falls along a cosine to a hundredth. Batches are
    passes over the shuffled rows. A step is recorded once and then replayed without Pyro (see ``inference.objective``).

    Args:
        steps: Steps of Adam.
        learning_rate: Its learning rate, positive.
        bound: The objective.
        guide: A Pyro guide, or a class of Pyro's automatic guides; None takes the model's own, else ``AutoNormal``.
        batch_size: Rows per step; None takes all.
        draws: Draws from the fitted guide.

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
    bound: ELBO = field(default_factory=ELBO)
    guide: Callable[..., Any] | None = None
    batch_size: int | None = None
    draws: int = 1000

    @property
    def schedule(self) -> Optimise:
        return Optimise(self.steps, self.draws)

    def init(self, program: Program) -> SVIState:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be positive.")
        if self.batch_size is not None:
            program.check_rows("batch_size")
        check_shards(program, batch_size=self.batch_size)
        guide = self._guide(program)
        trace = guide.trace(program)
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
        optimiser = _adam(list(trained.values()), self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        zero = torch.zeros((), dtype=program.dtype, device=program.device)
        objective = Objective(
            partial(self._loss, guide, program, self.bound.path and guide.has_path(trace, program)),
            [*trained.values()],
            [program.owner, program.call, guide.call, getattr(guide.call, "__self__", None)],
            name=program.name,
            is_watched=bool(self.callbacks),
        )
        return SVIState(guide, optimiser, scheduler, zero, zero, objective, torch.empty(0))

    def _has_rows(self, guide: Guide, program: Program, trace: poutine.Trace) -> bool:
        """Whether the guide draws sites of single rows; of the rows that a process sees, it can only draw those.

        Raises:
            Unsupported: If it draws all of them always.
        """
        plates = set(program.row_plates)
        local = [n for n, site in program.latents.items() if n in trace.nodes and plates & {p.name for p in site.plates}]
        if not local or program.shard is None:
            return bool(local)
        cut = guide.trace(program, data=program.shard)
        for name in local:
            if cut.nodes[name]["value"].shape == trace.nodes[name]["value"].shape:
                raise Unsupported(
                    f"The guide has '{name}' for all {program.rows} rows, whichever it is given, so that several processes "
                    "cannot split them. Give a guide that computes it from the rows, or fit in one process "
                    "(inference.distributed.alone)."
                )
        return True

    def _rate(self, step: int) -> float:
        progress = max(0.0, 2.0 * step / self.steps - 1.0)
        return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    def _guide(self, program: Program) -> Guide:
        chosen = self.guide if self.guide is not None else program.guide
        automatic = isinstance(chosen, type) and issubclass(chosen, AutoGuide)
        if self.start is not None and not automatic and chosen is not None:
            raise Unsupported("start= sets where an automatic guide starts; a guide of your own starts where it says.")
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
            with quiet(), Arithmetic():
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

        with isolated(0, program.device), quiet(), Arithmetic():  # a run that goes on makes it anew
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
        values = starting_values(program, _STARTS, self.start, is_split=True)
        if self.start is None:
            values = ascended(program, values, is_split=True)
        continuous = {name: values[name] for name in program.continuous}
        log_density = program.density.marginal(program.finite)(continuous)
        best = log_density.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).argmax()
        return {name: value[best] for name, value in values.items()}

    def step(self, state: SVIState, program: Program) -> tuple[SVIState, SVIInfo]:
        order, data = self._batch(state, program)
        objective = state.objective
        loss = program.processes.average(objective(data), objective.weights, objective.buffers)
        is_finite = loss.isfinite()
        if not state.scheduler.last_epoch and not is_finite:
            raise ValueError(f"The bound of {program.name} is {-float(loss)} at the start. Give start=, or check the data.")
        is_skipped = (~is_finite).float()
        if state.optimiser.defaults["fused"]:
            state.optimiser.found_inf = is_skipped  # type: ignore[attr-defined]  # as GradScaler does: no wait for a GPU
            state.optimiser.step()
        elif is_finite:
            state.optimiser.step()
        state.scheduler.step()
        return state._replace(step=state.step + 1, skipped=state.skipped + is_skipped, order=order), SVIInfo(loss)

    def _batch(self, state: SVIState, program: Program) -> tuple[Tensor, list[Tensor] | None]:
        """The order of the rows, and the data of the next step: passes over all rows, what is left at their end put back."""
        processes = program.processes
        if self.batch_size is None or program.rows is None or self.batch_size >= program.rows:
            return state.order, program.shard
        first = state.scheduler.last_epoch % (program.rows // self.batch_size) * self.batch_size
        order = state.order if first else torch.randperm(program.rows, device=program.device)
        processes.equalise([] if first else [order])
        return order, program.minibatch(processes.share(order[first : first + self.batch_size]))

    def _scale(self, program: Program) -> float:
        """Rows in all by rows in a batch, of which every process sees its share."""
        rows = program.rows or 1
        return program.processes.size * rows / min(self.batch_size or rows, rows)

    def _loss(
        self, guide: Guide, program: Program, path: bool, data: list[Tensor] | None, is_recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """What to differentiate, and minus the bound.

        Args:
            guide: The guide.
            program: The program.
            path: Whether the score of the guide is left out of the gradient.
            data: The tensors of a batch; None takes all.
            is_recorded: Whether this run is recorded as a graph, which should be that of the program alone.
        """
        scale = 1.0 if data is None else self._scale(program)
        traces = [guide.trace(program, data=data, scale=scale) for _ in range(self.bound.particles)]
        values = [{name: trace.nodes[name]["value"] for name in program.latents if name in trace.nodes} for trace in traces]
        log_p = self._log_p(program, values, data, scale, is_recorded)
        score = torch.stack([_score(trace) for trace in traces])
        log_q = torch.stack([self._log_q(guide, program, path, trace, data, scale) for trace in traces])
        surrogate, bound = self.bound.surrogate(log_p, log_q, score)
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
        sizes = [*(site.shape.numel() for site in program.latents.values()), *(leaf.numel() for leaf in program.data)]
        choices = max((len(site.choices) for site in program.latents.values() if site.choices is not None), default=1)
        return max(1, _LARGEST_BLOCK // (1 + sum(sizes) * choices))

    @torch.no_grad()
    def readings(self, state: SVIState, program: Program, count: int) -> tuple[SVIState, Draw]:
        if isinstance(state.guide.call, AutoLaplaceApproximation):
            state = state._replace(guide=self._laplace(state.guide.call, program))
            program.fitted = state.guide
        guide = state.guide

        def drawn() -> tuple[dict[str, Tensor], Tensor]:
            trace = guide.trace(program)
            return {n: trace.nodes[n]["value"] for n in program.latents if n in trace.nodes}, log_prob(trace)

        values, log_q = batched(drawn, count)
        enumerated = tuple(name for name in program.finite if name not in values)
        if not values:  # nothing is hidden but what is summed out
            lp = log_normalizer(program, {}, enumerated).expand(count)
        elif program.weights:
            lp = mapped(lambda value: log_normalizer(program, value, enumerated), values)
        else:
            lp = program.density.marginal(enumerated)(values)
        if enumerated:
            values |= program.density.draw(enumerated)(values, program.density.uniforms(enumerated, count))[0]
        return state, Draw({n: values[n].detach()[None] for n in program.latents}, {"lp": lp[None], "log_q": log_q[None]})

    def values(self, state: SVIState, program: Program) -> dict[str, Tensor]:
        return self.sample(state, program)[1].values

    def saved(self, state: SVIState, program: Program) -> dict[str, Any]:
        return {
            "guide": state.guide.leaves,
            "optimiser": state.optimiser.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "objective": state.objective.calls,
            "numbers": {"step": state.step, "skipped": state.skipped, "order": state.order},
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
        owner = state.guide.owner
        prefix = "" if owner is not None and owner.module is program.owner else "guide."
        seen = {prefix + n: state.guide.table.seen(n, w).detach().clone() for n, w in state.guide.weights().items()}
        return seen | program.weight_values()


def _adam(weights: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """Adam as one operation for all weights; weights that it does not take, such as complex ones, are done in turn."""
    try:
        return torch.optim.Adam(weights, lr=learning_rate, fused=True)
    except RuntimeError:
        return torch.optim.Adam(weights, lr=learning_rate, fused=False)


def _keep_own_weights(module: nn.Module) -> None:
    """Lets a module of Pyro that was made outside a run hold its weights itself, as those that are made inside do."""
    for part in module.modules():
        context = getattr(part, "_pyro_context", None)
        if context is not None and not hasattr(context, "param_state"):
            context.param_state = {"params": {}, "constraints": {}}


def _score(trace: poutine.Trace) -> Tensor:
    """Log-probability of the sites that are not reparameterised, whose gradient needs the score function."""
    terms = [node["log_prob_sum"] for node in trace.nodes.values() if is_drawn(node) and not node["fn"].has_rsample]
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=log_prob(trace).dtype)
