"""Programs whose structure changes from run to run: Metropolis-Hastings over whole traces, one site at a time.

A *trace* is what one run of a program has drawn: its latent sites, whichever there are, with their values and densities.
Of a trace x with n(x) latent sites one is chosen at random and drawn anew from its prior, and the program is run again. What
comes before that site is as it was. What comes after keeps its value if the site is still there, has the same shape, and
allows the value; else it is drawn from its prior as well. With F the sites of the new trace x' that were drawn and D those
of the old one that were not kept (the chosen one is in both), x' is accepted with probability min(1, α),

    log α = log p(x', data) − log p(x, data) + Σ_D log q(x_d) − Σ_F log q(x'_f) + log n(x) − log n(x'),

q being the distributions of the sites as they are drawn from. Where nothing is scaled, q is p, and only sites that were
kept, observations and factors remain. The last two terms are the chances to choose the site, there and back.

The way back must make the same move: a site that was not kept may not be kept there either. Where the supports of a site in
x and x' overlap it might be, so that a drawn value that x would have allowed refuses the move. Values are kept only between
distributions whose densities are with respect to one measure: never from a count to a real number, never at a ``Delta``.

Now and then all sites are drawn anew instead, so that no trace is out of reach; there log n(x) − log n(x') has no place.

References:
    D. Wingate, A. Stuhlmüller and N. Goodman, Lightweight implementations of probabilistic programming languages via
        transformational compilation (2011).
    P. Green, Reversible jump Markov chain Monte Carlo computation and Bayesian model determination (1995).
    C. Hur, A. Nori, S. Rajamani and S. Samuel, A provably correct sampler for probabilistic programs (2015).
    O. Kiselyov, Problems of the lightweight implementation of probabilistic programming (2016).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.arrays import corner, ragged
from inference.contract import Backend, Draw, Unnormalised, Unsupported
from inference.fit import Sample
from inference.handlers import base, isolated, quiet, reproducible
from inference.plan import Plan, Update
from inference.posterior import Posterior
from inference.program import Program
from inference.sites import is_statement, kind_of
from inference.until import Until

if TYPE_CHECKING:
    from inference.predictive import Anew

__all__ = ["Choice", "SingleSiteKernel", "Trace", "TraceInfo", "TraceSampler", "TraceState", "log_likelihood", "predictive"]

_CANDIDATES, _LEAST, _MOST = 256, 4, 64  # runs of the prior to start from: in all, and at least and most for each chain


class Choice(NamedTuple):
    """What a run has drawn at one latent site.

    Attributes:
        value: Its value.
        distribution: What it was drawn from.
        log_q: Log-density of the value under it, a number; the program's own log-density may be scaled.
    """

    value: Tensor
    distribution: Any
    log_q: float


class Trace(NamedTuple):
    """One run of a program.

    Attributes:
        choices: Latent site to choice, in the order of the run.
        computed: Value of each ``pyro.deterministic`` statement.
        log_joint: log p(choices, data), factors included.
    """

    choices: dict[str, Choice]
    computed: dict[str, Tensor]
    log_joint: float

    @property
    def values(self) -> dict[str, Tensor]:
        """Site to value, those that are computed included."""
        return {name: choice.value for name, choice in self.choices.items()} | self.computed

    def log_q(self, names: Collection[str]) -> float:
        """Log-density of those of its choices, as they were drawn."""
        return sum(self.choices[name].log_q for name in names)


class TraceInfo(NamedTuple):
    """Numbers of one step: the log-joint, and the probability of acceptance. The back-end's have a chain axis."""

    lp: Tensor
    acceptance_rate: Tensor


def _measure(distribution: Any) -> str:
    """What a density is with respect to; the empty text never agrees with anything, not with itself either."""
    inner, support = base(distribution), distribution.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if isinstance(inner, Delta):
        return ""
    if distribution.support.is_discrete:
        return type(inner).__name__  # whose values also have one type
    return type(support).__name__ if support.event_dim else "length"


def _keeps(choice: Choice, distribution: Any) -> bool:
    """Whether a value is kept at a site that now has this distribution."""
    measure = _measure(distribution)
    if not measure or measure != _measure(choice.distribution) or choice.value.shape != distribution.shape():
        return False
    return bool(distribution.support.check(choice.value).all())


class _Kept(Messenger):
    """Gives sites the values of an old run, where they are kept, and notes which; those in ``drawn`` are drawn."""

    def __init__(self, choices: Mapping[str, Choice], drawn: Collection[str]) -> None:
        super().__init__()
        self.choices, self.drawn = choices, frozenset(drawn)
        self.names: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"] or name in self.drawn or name not in self.choices:
            return
        if _keeps(self.choices[name], msg["fn"]):
            msg["value"], msg["done"] = self.choices[name].value, True
            self.names.append(name)


class _Replayed(Messenger):
    """Gives latent sites the values that they had in an old run."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and not msg["is_observed"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _read(trace: poutine.Trace) -> Trace:
    """What a run has drawn.

    Raises:
        Unsupported: If a site is masked, or its prior improper.
    """
    choices: dict[str, Choice] = {}
    computed: dict[str, Tensor] = {}
    log_joint = 0.0
    for name, node in trace.nodes.items():
        if not is_statement(node):
            continue
        kind = kind_of(node)
        if kind == "deterministic":
            computed[name] = node["value"].detach()
            continue
        log_joint += float(node["log_prob_sum"])
        if kind == "latent":
            _check(name, node)
            choices[name] = Choice(node["value"].detach(), node["fn"], float(node["unscaled_log_prob"].sum()))
    return Trace(choices, computed, log_joint)


def _check(name: str, node: Mapping[str, Any]) -> None:
    if isinstance(base(node["fn"]), (ImproperUniform, Unnormalised)):
        flaw = "improper" if isinstance(base(node["fn"]), ImproperUniform) else "known without its constant"
        raise Unsupported(f"Prior() draws from the prior, but that of '{name}' is {flaw}. Give it another one.")
    fn, is_masked = node["fn"], node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all())
    while hasattr(fn, "base_dist") and fn is not base(fn):
        is_masked = is_masked or type(fn).__name__ == "MaskedDistribution"
        fn = fn.base_dist
    if is_masked:
        raise Unsupported(f"Prior() draws from the prior, but '{name}' is masked, which leaves it none. Do not mask it.")


@dataclass(frozen=True)
class SingleSiteKernel:
    """Draws one latent site of a trace from its prior, and runs the program again around it.

    Args:
        redrawn: Probability of drawing all sites instead, in [0, 1].
    """

    redrawn: float = 0.1

    @torch.no_grad()
    def init(self, program: Program, handler: Messenger | None = None) -> Trace:
        """A trace drawn from the prior, but for what a handler gives."""
        return _read(program.trace({}, handler=handler))

    @torch.no_grad()
    def step(self, trace: Trace, program: Program) -> tuple[Trace, TraceInfo]:
        """One move; see the module."""
        names = [*trace.choices]
        is_single = bool(torch.rand(()) >= self.redrawn)
        chosen = [names[int(torch.randint(len(names), ()))]] if is_single else names
        kept = _Kept(trace.choices, chosen)
        other = _read(program.trace({}, handler=kept))
        dropped = [name for name in trace.choices if name not in kept.names]
        drawn = [name for name in other.choices if name not in kept.names]
        log_ratio = other.log_joint - trace.log_joint
        log_ratio += trace.log_q(dropped) - other.log_q(drawn)
        if is_single:
            log_ratio += math.log(len(trace.choices)) - math.log(len(other.choices))
        twice = [name for name in drawn if name in trace.choices and name not in chosen]
        if any(_keeps(other.choices[name], trace.choices[name].distribution) for name in twice):
            log_ratio = -math.inf  # the way back would keep it
        rate = math.exp(min(0.0, log_ratio)) if log_ratio > -math.inf else 0.0
        trace = other if bool(torch.rand(()) < rate) else trace
        return trace, TraceInfo(torch.tensor(trace.log_joint), torch.tensor(rate))


class TraceState(NamedTuple):
    """A trace for each chain, the sites that were seen so far, and what was achieved since warm-up."""

    traces: tuple[Trace, ...]
    sites: tuple[str, ...]
    acceptance: Tensor
    reads: int


@dataclass(frozen=True, kw_only=True)
class TraceSampler(Backend[TraceState, TraceInfo]):
    """What ``MetropolisHastings(proposal=Prior())`` does on programs whose structure changes; a step moves one site.

    Chains are run one after the other, since each has a structure of its own. ``lp`` is the log-joint of a trace at its
    constrained values; traces of other structure have densities of other dimension. Draws are padded with NaN.

    Args:
        chains: Number of chains.
        draws: Draws kept of each chain.
        warmup: Steps before the first draw; they adapt nothing.
        thin: Steps per draw; about as many as a trace has sites make a sweep.
        until: When to stop before all draws are taken, such as ``Until(rhat=1.01, ess=400)``.
    """

    chains: int = 4
    draws: int = 1000
    warmup: int = 1000
    thin: int = 1
    until: Until | None = None

    @property
    def schedule(self) -> Sample:
        return Sample(self.chains, self.warmup, self.draws, self.thin, until=self.until)

    def init(self, program: Program) -> TraceState:
        """Chains start in draws of the prior, chosen by their likelihoods among a few."""
        starts = [_Given(values, program) for values in _starts(self.start, self.chains, program)]
        share = min(max(_LEAST, _CANDIDATES // self.chains), _MOST)
        kernel, candidates, log_weights = SingleSiteKernel(), [], []
        for start in (start for start in starts for _ in range(share)):
            trace = kernel.init(program, start)
            candidates.append(trace)
            log_weights.append(trace.log_joint - trace.log_q([name for name in trace.choices if name not in start.used]))
        used = {name for start in starts for name in start.ever_used}
        unused = [name for name in self.start if name not in used] if isinstance(self.start, Mapping) else []
        if unused:
            raise ValueError(
                f"start= gives '{unused[0]}' a value for which no run of {program.name} had a use: there is no such latent "
                "site, or it has another shape or support."
            )
        weights = torch.tensor(log_weights).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        if not bool((weights > -torch.inf).any()):
            raise ValueError(
                f"{program.name} has no finite log-density at any of {len(candidates)} starting points. Check that the data "
                "lie in the support of their distributions, or give start=."
            )
        rows = weights.reshape(self.chains, share)
        is_lost = (rows.amax(1) == -torch.inf).tolist()
        best = int(weights.argmax())
        traces = [
            candidates[best if is_lost[i] else i * share + int(row.softmax(0).multinomial(1))] for i, row in enumerate(rows)
        ]
        return TraceState(tuple(traces), _seen(program.latents, traces), torch.zeros(()), 0)

    def step(self, state: TraceState, program: Program) -> tuple[TraceState, TraceInfo]:
        moves = [SingleSiteKernel().step(trace, program) for trace in state.traces]
        traces = tuple(trace for trace, _ in moves)
        info = TraceInfo(*(torch.stack(values) for values in zip(*(info for _, info in moves), strict=True)))
        return state._replace(traces=traces, sites=_seen(state.sites, traces)), info

    def sample(self, state: TraceState, program: Program) -> tuple[TraceState, Draw]:
        rates = []
        for _ in range(self.thin):
            state, info = self.step(state, program)
            rates.append(info.acceptance_rate)
        rate = torch.stack(rates).mean(0)
        state = state._replace(acceptance=state.acceptance + rate.mean(), reads=state.reads + 1)
        return state, Draw(self.values(state, program), {"lp": info.lp, "acceptance_rate": rate})

    def saved(self, state: TraceState, program: Program) -> TraceState:
        bare = [
            trace._replace(choices={name: choice._replace(distribution=None) for name, choice in trace.choices.items()})
            for trace in state.traces
        ]
        return state._replace(traces=tuple(bare))

    @torch.no_grad()
    def restored(self, saved: TraceState, program: Program) -> TraceState:
        """Distributions are code: the program is run once at the values of each trace."""
        traces = []
        for trace in saved.traces:
            found = _read(program.trace({}, handler=_Replayed(trace.values))).choices
            if [*found] != [*trace.choices]:
                raise ValueError(
                    f"{program.name} has other sites than before at the values of the run. Give it its own model."
                )
            choices = {name: c._replace(distribution=found[name].distribution) for name, c in trace.choices.items()}
            traces.append(trace._replace(choices=choices))
        return saved._replace(traces=tuple(traces))

    def values(self, state: TraceState, program: Program) -> dict[str, Tensor]:
        return ragged([trace.values for trace in state.traces])

    def plan(self, state: TraceState, program: Program) -> Plan:
        rate = float(state.acceptance) / state.reads if state.reads else float("nan")
        return Plan((Update(state.sites, "Prior", rate, note="one site a step, since the structure changes"),))


def _seen(sites: Collection[str], traces: Collection[Trace]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*sites, *(name for trace in traces for name in trace.choices)]))


def _starts(start: Any, chains: int, program: Program) -> list[dict[str, Tensor]]:
    """What the caller says of the start, for each chain; see ``inference.start.given_values``."""
    if start is None:
        return [{} for _ in range(chains)]
    if isinstance(start, Posterior):
        last = {name: draws[:, -1] for name, draws in start.draws.items()}
        return [{name: value[i % len(value)] for name, value in last.items()} for i in range(chains)]
    if not isinstance(start, Mapping):
        raise TypeError(f"start= must map sites to values, or be a Posterior, but it is {type(start).__name__}.")
    given: list[dict[str, Tensor]] = [{} for _ in range(chains)]
    for name, value in start.items():
        value = torch.as_tensor(value)
        site = program.latents.get(name)
        has_axis = site is not None and value.dim() == len(site.shape) + 1 and len(value) == chains
        for i, values in enumerate(given):
            values[name] = value[i] if has_axis else value
    return given


class _Given(Messenger):
    """Gives latent sites the values of one draw, padded as ``ragged`` pads them, where these fit; others are drawn.

    Attributes:
        used: Names of the sites that were given a value in the last run; ``ever_used``: in any.
    """

    def __init__(self, values: Mapping[str, Tensor], program: Program, anew: Collection[str] = ()) -> None:
        super().__init__()
        self.values, self.program, self.anew = values, program, frozenset(anew)
        self.used: set[str] = set()
        self.ever_used: set[str] = set()

    def __enter__(self) -> Any:
        self.used = set()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"] or name not in self.values or not is_statement(msg):
            return
        if any(frame.name in self.anew for frame in msg["cond_indep_stack"]):
            return
        value = self._fitted(self.values[name], msg["fn"])
        if value is not None:
            msg["value"], msg["done"] = value, True
            self.used.add(name)
            self.ever_used.add(name)

    def _fitted(self, value: Tensor, distribution: Any) -> Tensor | None:
        shape = distribution.shape()
        if value.dim() < len(shape) or any(size > there for size, there in zip(shape[::-1], value.shape[::-1])):
            return None
        value = corner(value, shape).to(self.program.device)
        if value.isnan().any():
            return None
        if distribution.support.is_discrete:
            value = value.to(distribution.sample().dtype)  # padding has made it floating
        elif value.is_floating_point():
            value = value.to(self.program.dtype)
        return value if bool(distribution.support.check(value).all()) else None


def _draws(draws: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The draws one by one, chain after chain."""
    chains, count = next(iter(draws.values())).shape[:2]
    return [{name: values[c, i] for name, values in draws.items()} for c in range(chains) for i in range(count)]


def _unflattened(rows: list[dict[str, Tensor]], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shape = next(iter(draws.values())).shape[:2]
    return {name: values.unflatten(0, shape) for name, values in ragged(rows).items()}


def _require(trace: poutine.Trace, given: _Given, observed: Collection[str], what: str) -> None:
    """Refuses a run that had to draw a latent site."""
    for name, node in trace.nodes.items():
        if is_statement(node) and kind_of(node) == "latent" and name not in given.used and name not in observed:
            if isinstance(base(node["fn"]), Delta):
                continue
            raise ValueError(f"{what} needs the draws of '{name}', which were not kept. keep= decides.")


@torch.no_grad()
def log_likelihood(program: Program, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pointwise log-likelihood: every draw is replayed in its own structure; see ``inference.predictive``.

    Returns:
        Observed site to (chain, draw, *batch), on the CPU; NaN where a draw has no such term.
    """
    rows = []
    with isolated(0, program.device), reproducible(program.dtype, program.device), quiet():
        for values in _draws(draws):
            given = _Given(values, program)
            trace = program.trace({}, handler=given)
            _require(trace, given, (), "The log-likelihood")
            seen = {name: node for name, node in trace.nodes.items() if is_statement(node) and kind_of(node) == "observed"}
            rows.append({name: node["log_prob"].detach().cpu() for name, node in seen.items()})
    return _unflattened(rows, draws)


@torch.no_grad()
def predictive(
    program: Program,
    draws: Mapping[str, Tensor],
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None,
    anew: Anew,
    seed: int,
) -> dict[str, Tensor]:
    """Draws of the observed sites given each draw, replayed one by one; see ``inference.predictive``.

    At new arguments, latents that no longer fit, or that belong to the rows, are drawn anew.

    Returns:
        Observed site to (chain, draw, *observation), on the CPU; NaN where a draw has no such site.
    """
    names = anew.observed
    rows = []
    with isolated(seed, program.device), reproducible(program.dtype, program.device), quiet():
        for values in _draws(draws):
            given = _Given({name: values[name] for name in values if name not in anew.latents}, program, anew.plates)
            trace = program.trace({}, handler=given, arguments=arguments, resampled=names)
            if arguments is None:
                _require(trace, given, names, "A prediction")
            rows.append({name: trace.nodes[name]["value"].detach().cpu() for name in names if name in trace.nodes})
    return _unflattened(rows, draws)
