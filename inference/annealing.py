"""log p(x) of each row between two bounds, by annealing: from the prior to the posterior, and back from an exact draw of it.

References:
    R. Neal, Annealed importance sampling (2001).
    R. Grosse, Z. Ghahramani and R. Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo (2015).
    Y. Wu, Y. Burda, R. Salakhutdinov and R. Grosse, On the quantitative analysis of decoder-based generative models (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from inference.contract import Guided, Programmed, Unsupported
from inference.evidence import Tally, check_count, check_weights
from inference.handlers import isolated, quiet
from inference.mcmc import HamiltonianKernel, HamiltonianState
from inference.rowwise import Rowwise, evaluating, owner

__all__ = ["AnnealedEvidence", "Simulated", "annealed_evidence", "simulated"]

_TARGET = 0.65  # acceptance, as of Wu et al. and of Beskos et al. for trajectories of fixed length
_GAIN = 0.3  # of the step sizes of the pilot run, in logarithms
_PILOTS = 4  # chains of a row in the pilot run
_STEEPNESS = 4.0  # of the sigmoidal schedule of Wu et al.
_FIRST_STEP, _LEAST_STEP, _LARGEST_STEP = 0.25, 1e-5, 2.0
_CHAINS = 2**13  # advanced at once


class AnnealedEvidence(NamedTuple):
    """Bounds on log p(x_n).

    Attributes:
        lower: Its expectation is at most log p(x_n), (row,), float64.
        lower_se: Standard error of it, from the weights of the particles, (row,).
        upper: Its expectation is at least log p(x_n), (row,); NaN without a draw of the posterior.
        upper_se: Of the weights of the particles, (row,). They all start at that one draw, so that what differs from draw to
            draw is not in it.
        acceptance_rate: Mean acceptance of the transitions, forward, (row,).
    """

    lower: Tensor
    lower_se: Tensor
    upper: Tensor
    upper_se: Tensor
    acceptance_rate: Tensor

    @property
    def gap(self) -> float:
        """Mean of upper minus lower over rows, in nats: twice the distance that either may be off on average."""
        return float((self.upper - self.lower).mean())


class Simulated(NamedTuple):
    """Data drawn from a program, and what they hide.

    Attributes:
        x: Data, (row, …).
        latents: Site to value: with x, an exact draw of the posterior of each row.
    """

    x: Tensor
    latents: dict[str, Tensor]


@torch.no_grad()
def simulated(model: Callable[..., Any] | Programmed, size: int, *context: Any, seed: int = 0) -> Simulated:
    """Rows drawn from a program, with what they hide.

    Args:
        model: A program, or an object with the method ``model``, that draws its data if it is given None and ``size``, and
            returns them.
        size: Number of rows.
        *context: What else the program takes.
        seed: Of the draws.

    Raises:
        ValueError: If the program does not return the value of one of its sites.
    """
    check_count("size", size)
    call: Any = model.model if isinstance(model, Programmed) else model
    module = owner(model)
    weight = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    with evaluating(module), isolated(seed, None if weight is None else weight.device), quiet():
        trace = poutine.trace(call).get_trace(None, *context, size=size)
    x = trace.nodes["_RETURN"]["value"]
    latents = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not poutine.util.site_is_subsample(node):
            latents[name] = node["value"]
    own = [name for name, value in latents.items() if value is x]
    if not own:
        raise ValueError(
            "A program must return its data, the value of pyro.sample, to be simulated from: model(None, size=n) returned "
            f"a {type(x).__name__} that is the value of no site."
        )
    return Simulated(latents.pop(own[0]), latents)


class _Path:
    """The densities between two of what rows hide, in unconstrained coordinates.

        log f_β(z) = (1 − β) log f_0(z) + β log p(x, z)

    Args:
        view: The program.
        index: The rows, (row,).
        chains: Chains of each row.
        from_guide: Whether f_0 is the guide instead of the prior.
    """

    def __init__(self, view: Rowwise, index: Tensor, chains: int, from_guide: bool) -> None:
        self.view, self.index, self.chains, self.from_guide = view, index, chains, from_guide
        self.shapes, self.sizes = {}, []
        for name, site in view.sites.items():
            shape = [*site.shape]
            shape[view.axis(name)] = 1
            self.shapes[name] = site.transform.inverse_shape(torch.Size(shape))
            self.sizes.append(self.shapes[name].numel())

    def position(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site to value, as ``Rowwise.draw`` returns them, to (row · chain, D), the chains of a row together."""
        parts = []
        for name, site in self.view.sites.items():
            free = site.transform.inv(values[name])
            free = free.movedim(self.view.axis(name), 0).unflatten(0, (self.chains, len(self.index)))
            parts.append(free.transpose(0, 1).reshape(self.chains * len(self.index), -1))
        return torch.cat(parts, 1)

    def values(self, position: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The inverse, and the logarithm of its Jacobian, (row · chain,)."""
        found, log_jacobian = {}, position.new_zeros(len(position), dtype=torch.float64)
        for (name, site), part in zip(self.view.sites.items(), position.split(self.sizes, 1), strict=True):
            axis, shape = self.view.axis(name), [*self.shapes[name]]
            free = part.reshape(len(position), *shape[:axis], *shape[axis + 1 :])
            value = site.transform(free)
            jacobian = site.transform.log_abs_det_jacobian(free, value)
            log_jacobian = log_jacobian + jacobian.reshape(len(position), -1).double().sum(1)
            chains_first = value.unflatten(0, (len(self.index), self.chains)).transpose(0, 1).flatten(0, 1)
            found[name] = chains_first.movedim(0, axis)
        return found, log_jacobian

    def start(self) -> Tensor:
        """Draws of f_0, (row · chain, D)."""
        if self.from_guide:
            return self.position(self.view.draw(self.index, self.chains)[0])
        return self.position(self.view.draw_prior(self.index, self.chains))

    def ends(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """log f_0 and log p(x, z), with the Jacobian, (row · chain,)."""
        values, log_jacobian = self.values(position)
        terms = self.view.terms(values, self.index, self.chains)
        first = self.view.log_q(values, self.index, self.chains) if self.from_guide else terms.prior
        return first.mT.flatten() + log_jacobian, terms.joint.mT.flatten() + log_jacobian

    def at(self, position: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient and value of log f_β, and log p(x, z) − log f_0."""
        with torch.enable_grad():
            leaf = position.detach().requires_grad_()
            first, last = self.ends(leaf)
            mixed = first + beta * (last - first)
            (gradient,) = torch.autograd.grad(mixed.sum(), leaf)
        return gradient, mixed.detach(), (last - first).detach()

    def density(self, beta: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda position: self.at(position, beta)[:2]


def _schedule(steps: int) -> list[float]:
    """β_0 = 0 … β_T = 1, dense at both ends."""
    s = torch.sigmoid(_STEEPNESS * torch.linspace(-1.0, 1.0, steps + 1, dtype=torch.float64))
    return ((s - s[0]) / (s[-1] - s[0])).tolist()


class _Moves(NamedTuple):
    """Step sizes of all transitions, (step, row), and the number of leapfrog steps."""

    sizes: Tensor
    leapfrog: int

    def move(self, path: _Path, state: HamiltonianState, beta: float, step: int) -> tuple[Tensor, Tensor]:
        """New positions, and the acceptance of each chain."""
        size = self.sizes[step]
        one = state.position.new_ones(state.position.shape[1])
        length = (self.leapfrog - 0.5) * size  # rounded up to the number of steps
        kernel = HamiltonianKernel(size, length, one, one.new_ones(()))
        moved, info = kernel.step(state, path.density(beta))
        return moved.position, info.acceptance_rate


def _forward(path: _Path, betas: list[float], moves: _Moves, is_pilot: bool = False) -> tuple[Tensor, Tensor]:
    """Log weights (chain, row) of annealing from f_0 to p(x, z), and the mean acceptance (row,).

    A pilot run adapts the step sizes, in place, to what each row accepts; the weights of one that adapts estimate nothing.
    """
    position, rows, steps = path.start(), len(path.index), len(betas) - 1
    log_weights = torch.zeros(len(position), dtype=torch.float64, device=position.device)
    total = torch.zeros(rows, dtype=torch.float64, device=position.device)
    for step in range(1, steps + 1):
        gradient, value, slope = path.at(position, betas[step])
        log_weights = log_weights + (betas[step] - betas[step - 1]) * slope
        if step == steps:
            break
        position, rate = moves.move(path, HamiltonianState(position, value, gradient), betas[step], step)
        accepted = rate.unflatten(0, (rows, -1)).mean(1)
        total = total + accepted.double()
        if is_pilot:
            size = moves.sizes[step] * (_GAIN * (accepted - _TARGET)).exp()
            moves.sizes[step + 1] = size.clamp(_LEAST_STEP, _LARGEST_STEP)
    return log_weights.unflatten(0, (rows, -1)).mT, total / max(steps - 1, 1)


def _backward(path: _Path, betas: list[float], moves: _Moves, position: Tensor) -> Tensor:
    """Log weights (chain, row) of annealing from a draw of the posterior to f_0; their mean estimates 1 / p(x)."""
    log_weights = torch.zeros(len(position), dtype=torch.float64, device=position.device)
    for step in range(len(betas) - 1, 0, -1):
        gradient, value, slope = path.at(position, betas[step - 1])
        log_weights = log_weights + (betas[step - 1] - betas[step]) * slope
        if step > 1:
            position, _ = moves.move(path, HamiltonianState(position, value, gradient), betas[step - 1], step - 1)
    return log_weights.unflatten(0, (len(path.index), -1)).mT


@torch.no_grad()
def annealed_evidence(
    model: Callable[..., Any] | Programmed,
    x: Any,
    *context: Any,
    guide: Callable[..., Any] | None = None,
    latents: Mapping[str, Tensor] | None = None,
    steps: int = 500,
    particles: int = 16,
    leapfrog: int = 10,
    from_guide: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> AnnealedEvidence:
    """Bounds on log p(x_n) of each row, by annealed importance sampling with Hamiltonian transitions.

        f_t(z) = f_0(z)^(1 − β_t) p(x, z)^β_t,    w = Π_t f_t(z_{t−1}) / f_{t−1}(z_{t−1}),    E w = p(x)

    All rows and particles move at once. Step sizes follow the acceptance of each row in a pilot run, and are fixed in the
    run that counts: weights of transitions that still adapt are biased. Where x was drawn from the program (``simulated``),
    what it hides is an exact draw of the posterior, and annealing from there to f_0 gives an upper bound. How far they are
    apart says how far off the lower one may be at data of the same kind.

    Args:
        model: A Pyro program with a plate of the rows, or an object with the method ``model``.
        x: Data, of which dimension 0 are the rows.
        *context: What else the program takes.
        guide: The guide, for ``from_guide``; None takes that of the model.
        latents: What x hides, as ``simulated`` returns it, for the upper bound.
        steps: Number of temperatures T.
        particles: Chains of each row.
        leapfrog: Leapfrog steps of a transition.
        from_guide: Whether f_0 is q(z | x) instead of the prior: faster with a good guide, blind to what the guide misses.
        seed: Of the draws.
        progress: Whether to show a bar over rows.

    Raises:
        ValueError: If the data do not fit the program, or a weight is not a number.
        Unsupported: If what is hidden is not continuous and cannot be summed out, belongs to no row, or has no proper prior.
    """
    for name, count in (("steps", steps), ("particles", particles), ("leapfrog", leapfrog)):
        check_count(name, count)
    if from_guide and guide is None and not isinstance(model, Guided):
        raise Unsupported("from_guide=True starts from a guide, but there is none. Give guide=, or start from the prior.")
    view = Rowwise(model, (x, *context), guide, purpose="annealed_evidence", needs_guide=from_guide)
    for name, site in view.sites.items():
        if not site.is_continuous:
            raise Unsupported(
                f"annealed_evidence moves continuous sites, but '{name}' ({site.family}) is discrete"
                + (", and the guide draws it. Leave it out of the guide." if site.choices is not None else ".")
            )
        if site.is_flat and not from_guide:
            raise Unsupported(f"'{name}' has an improper prior, which cannot be drawn from. Take from_guide=True.")
    if not view.sites:
        raise Unsupported("annealed_evidence moves continuous sites, but there are none. log_evidence is exact then.")
    known = None if latents is None else view.checked(latents)
    betas, parts = _schedule(steps), []
    with view.running(seed):
        view.check_data()
        for index in view.blocks(max(1, _CHAINS // particles), progress):
            pilot = _Path(view, index, min(particles, _PILOTS), from_guide)
            first = torch.full((steps + 1, len(index)), _FIRST_STEP, dtype=view.program.dtype, device=index.device)
            moves = _Moves(first, leapfrog)
            _forward(pilot, betas, moves, is_pilot=True)
            path = _Path(view, index, particles, from_guide)
            log_weights, rate = _forward(path, betas, moves)
            lower, lower_se = _mean(log_weights, index, view.name)
            upper, upper_se = torch.full_like(lower, torch.nan), torch.full_like(lower, torch.nan)
            if known is not None:
                own = {name: value.index_select(view.axis(name), index) for name, value in known.items()}
                repeated = {n: torch.cat([value] * particles, view.axis(n)) for n, value in own.items()}
                upper, upper_se = _mean(_backward(path, betas, moves, path.position(repeated)), index, view.name)
                upper = -upper
            parts.append((lower, lower_se, upper, upper_se, rate))
    return AnnealedEvidence(*(torch.cat(column) for column in zip(*parts)))


def _mean(log_weights: Tensor, index: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """log of the mean of weights (particle, row), and its standard error."""
    check_weights(log_weights, index, name)
    tally = Tally(log_weights.shape[1], len(log_weights), log_weights.device)
    tally.add(log_weights)
    found = tally.evidence()
    return found.log_p, found.se if len(log_weights) > 1 else torch.full_like(found.se, math.inf)
