"""What a wrong sampler looks like: kernels, messages and caches broken on purpose, and the check that sees each.

A mutant is one piece of source replaced by another. The unbroken code passes the same check, so that it is the breakage
that is seen. A check that draws does so under one seed; its false alarms are those of ``assert_stationary``.
"""

from __future__ import annotations
import __future__ as futures

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

import test_kernels as kernels
import test_traces as traces
from inference import Gibbs, Unsupported, markov
from inference.conditionals import BetaConditional, DirichletConditional, NormalConditional, PowerGammaConditional
from inference.density import Unconstrained
from inference.mcmc import HamiltonianKernel, Moments, RandomWalkKernel
from inference.program import Program
from inference.proposals import LangevinKernel
from inference.trees import TreeKernel
from parameters import quick
from targets import TARGETS, assert_stationary, steps_of
from test_kernels import EXACT, FACTORS, LAW, tensor
from zoo import BY_NAME

Patch = pytest.MonkeyPatch


# ----------------------------------------------------------------------------------------------- checks
def langevin_balances(patch: Patch) -> None:
    kernels.assert_langevin_balances(patch, FACTORS["dense"])


def langevin_is_stationary(patch: Patch) -> None:
    target = TARGETS["banana"]
    assert_stationary(steps_of(LangevinKernel(tensor(0.8), tensor([1.0, 1.5])), target.gradient, 8), target)


def caches_are_fresh(patch: Patch) -> None:
    """What a state says of its position is what the density says of it."""
    target = TARGETS["funnel"]
    torch.manual_seed(0)
    for kernel in (
        LangevinKernel(tensor(0.8), FACTORS["dense"]),
        HamiltonianKernel(tensor(0.4), tensor(1.0), FACTORS["dense"], tensor(1.0)),
        TreeKernel(tensor(0.4), FACTORS["dense"]),
    ):
        state: Any = kernel.init(target.draws(100), target.gradient)
        for _ in range(2):
            state, _ = kernel.step(state, target.gradient)
        gradient, log_density = target.gradient(state.position)
        assert torch.allclose(state.gradient, gradient) and torch.allclose(state.log_density, log_density)


def walk_is_stationary(patch: Patch) -> None:
    target = TARGETS["correlated"]
    assert_stationary(steps_of(RandomWalkKernel(tensor(0.9), tensor([0.5, 1.0, 2.0])), target.log_density, 8), target)


def independence_has_its_matrix(patch: Patch) -> None:
    q = tensor([0.4, 0.1, 0.1, 0.1, 0.3])
    matrix = kernels.independence_matrix(LAW.log(), q.log(), patch)
    assert float((matrix - markov.metropolis(q.expand(5, 5), LAW)).abs().max()) < EXACT


def hamiltonian_is_stationary(patch: Patch) -> None:
    target = TARGETS["banana"]
    kernel = HamiltonianKernel(tensor(0.5), tensor(1.5), tensor([1.0, 1.5]), tensor(1.0))
    assert_stationary(steps_of(kernel, target.gradient, 5), target)


def trajectories_are_reversible(patch: Patch) -> None:
    torch.manual_seed(0)
    kernels.test_a_leapfrog_trajectory_is_reversible("dense", patch)


def trees_are_stationary(patch: Patch) -> None:
    for name, step_size in (("normal", 0.7), ("funnel", 1.2)):
        target = TARGETS[name]
        scale = torch.full((target.width,), 0.8, dtype=torch.float64)
        assert_stationary(steps_of(TreeKernel(tensor(step_size), scale, max_depth=5), target.gradient, 6), target)


def counts_have_their_matrix(patch: Patch) -> None:
    matrix, law = kernels.walk_matrix(0.7, patch)
    assert float(markov.imbalance(matrix, law)) < EXACT


def enumeration_has_its_matrix(patch: Patch) -> None:
    matrix = kernels.enumerate_matrix(("b",), patch)
    assert float((matrix - markov.conditional(kernels._joint(0.7), 1)).abs().max()) < EXACT


def certified(name: str) -> Callable[[Patch], None]:
    """Every exact update of a program is accepted with certainty, by its own plan, and the cached log-joint is right."""

    def check(patch: Patch) -> None:
        instance = BY_NAME[name]
        program = Program(instance.program, instance.data)
        backend = Gibbs(chains=8, warmup=5, progress=False)
        torch.manual_seed(0)
        state = backend.init(program)
        for _ in range(5):
            state, _ = backend.step(state, program)
        for _ in range(5):
            state, _ = backend.sample(state, program)
        assert {site: update.update for site, update in backend.plan(state, program).items()} == instance.plan
        for update in backend.plan(state, program).updates:
            assert update.certificate is None or update.certificate < 1e-8
        joint = program.density.joint(state.current.values)
        assert torch.allclose(state.current.log_joint, joint, rtol=1e-12, atol=1e-9)

    check.__name__ = f"certified_{name}"
    return check


GAMMA, BETA, DIRICHLET, NORMAL = (
    certified(name) for name in ("gamma_poisson", "beta_binomial", "dirichlet_multinomial", "normal_independent")
)
MIXED = certified("gamma_shape")  # a conjugate site beside one that is moved by HMC


def density_has_its_evidence(patch: Patch) -> None:
    """∫ exp(log-density of the position) is the evidence of a beta-binomial model, by the trapezoidal rule."""
    flips, trials = BY_NAME["beta_binomial"].data[0], 10
    program = kernels._program("beta_binomial")
    coordinates = Unconstrained(program, program.continuous)
    grid = torch.linspace(-12.0, 12.0, 2001, dtype=torch.float64)
    log_density = program.density.unconstrained(coordinates, gradient=False)(grid.unsqueeze(1), {})
    found = torch.trapezoid(log_density.exp(), grid).log()
    a, b = 2.0 + flips.sum(), 3.0 + (trials - flips).sum()

    def log_beta(x: Tensor, y: Tensor) -> Tensor:
        return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)

    choose = torch.lgamma(tensor(trials + 1.0)) - torch.lgamma(flips + 1) - torch.lgamma(trials - flips + 1)
    exact = choose.sum() + log_beta(a, b) - log_beta(tensor(2.0), tensor(3.0))
    assert abs(float(found - exact)) < 1e-9


def prior_is_normalised(patch: Patch) -> None:
    kernels.assert_normalised("prior", "gamma_poisson")


def guide_is_normalised(patch: Patch) -> None:
    kernels.assert_normalised("own", "gamma_poisson")


def student_is_normalised(patch: Patch) -> None:
    grid = torch.linspace(-2000.0, 2000.0, 400_001, dtype=torch.float64)
    found = kernels.StudentReference(tensor([0.3, 0.7]), tensor([[-1.0], [2.0]]), tensor([[[0.5]], [[1.5]]]))
    assert abs(float(torch.trapezoid(found.log_prob(grid.unsqueeze(1)).exp(), grid)) - 1.0) < 1e-5


def draws_have_their_law(patch: Patch) -> None:
    """Draws of conditionals against scipy's distributions (Kolmogorov-Smirnov), a false alarm in 10⁶ runs each.

    A certificate does not see a draw that is not from the density that goes with it.
    """
    torch.manual_seed(0)
    ones = torch.ones(4000, 1, dtype=torch.float64)
    laws = [
        (NormalConditional(1.5 * ones, 4.0 * ones), scipy.stats.norm(1.5, 0.5).cdf),
        (PowerGammaConditional(2.5 * ones, 3.0 * ones, 1.0), scipy.stats.gamma(2.5, scale=1 / 3.0).cdf),
        (PowerGammaConditional(2.5 * ones, 3.0 * ones, -1.0), scipy.stats.invgamma(2.5, scale=3.0).cdf),
        (BetaConditional(2.0 * ones, 5.0 * ones), scipy.stats.beta(2.0, 5.0).cdf),
        (DirichletConditional(ones * tensor([2.0, 1.0, 4.0])), scipy.stats.beta(2.0, 5.0).cdf),
    ]
    for conditional, law in laws:
        assert scipy.stats.kstest(conditional.sample()[:, 0].numpy(), law).pvalue > 1e-6


def moments_are_those_of_numpy(patch: Patch) -> None:
    """Within chains, pooled, and shrunk as the docstring says."""
    torch.manual_seed(0)
    draws = torch.randn(50, 4, 3, dtype=torch.float64) + tensor([[[0.0, 5.0, -3.0]]]) * torch.arange(4.0)[None, :, None]
    moments = Moments.like(draws[0])
    for row in draws:
        moments = moments.update(row)
    centred = (draws - draws.mean(0)).reshape(-1, 3)
    freedom = 49 * 4
    expected = centred.T @ centred / (freedom + 5) + torch.eye(3, dtype=torch.float64) * 1e-3 * 5 / (freedom + 5)
    assert torch.allclose(moments.covariance(), expected, rtol=1e-10, atol=1e-12)


def steps_reach_their_target(patch: Patch) -> None:
    kernels.test_step_size_and_covariance_are_found(True)


def frozen(name: str) -> Callable[[Patch], None]:
    def check(patch: Patch) -> None:
        kernels.assert_frozen(name)

    check.__name__ = f"frozen_{name}"
    return check


def traces_have_their_matrix(patch: Patch) -> None:
    traces.assert_traces_have_their_matrix(0.1, patch)


def points_stay_points(patch: Patch) -> None:
    traces.assert_points_stay_points()


# ---------------------------------------------------------------------------------------------- mutants
@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in the source of ``where``; ``check`` must then fail."""

    where: str
    old: str
    new: str
    check: Callable[[Patch], None]


MALA, IMH = "inference.proposals:LangevinKernel.step", "inference.proposals:IndependenceKernel.step"
LEAP, WALK = "inference.mcmc:HamiltonianKernel.step", "inference.mcmc:RandomWalkKernel.step"
TREE, BRANCH = "inference.trees:TreeKernel.step", "inference.trees:TreeKernel._grow"
SITE = "inference.traces:SingleSiteKernel.step"
COUNT, METROPOLISED = "inference.blocks.walk:AdaptiveWalk.step", "inference.blocks.block:metropolised"

MUTANTS = {
    "Langevin without its Hastings term": Mutant(MALA, " + log_backward - log_forward", "", langevin_balances),
    "Langevin without its Hastings term, by its draws": Mutant(
        MALA, " + log_backward - log_forward", "", langevin_is_stationary
    ),
    "Langevin with its Hastings term upside down": Mutant(
        MALA, "+ log_backward - log_forward", "- log_backward + log_forward", langevin_balances
    ),
    "Langevin that forgets the way back": Mutant(MALA, "-noise - drift - 0.5", "-noise - drift - 0.0", langevin_balances),
    "Langevin with a stale gradient": Mutant(
        MALA, "torch.where(chosen, gradient, state.gradient)", "state.gradient", caches_are_fresh
    ),
    "Langevin with half a drift": Mutant(MALA, "pushed(drift + noise", "pushed(0.5 * drift + noise", langevin_balances),
    "independence without q": Mutant(
        IMH,
        "(log_weight - (state.log_density - state.log_q))",
        "(log_density - state.log_density)",
        independence_has_its_matrix,
    ),
    "independence with a stale q": Mutant(
        IMH, "torch.where(accepted, log_q, state.log_q)", "state.log_q", independence_has_its_matrix
    ),
    "independence with a stale density": Mutant(
        IMH, "torch.where(accepted, log_density, state.log_density)", "log_density", independence_has_its_matrix
    ),
    "independence that accepts too often": Mutant(IMH, "< log_ratio", "< 0.9 * log_ratio", independence_has_its_matrix),
    "a prior without its Jacobian": Mutant(
        "inference.proposals:PriorReference._log_prior",
        " + self.coordinates.log_jacobian(position)",
        "",
        prior_is_normalised,
    ),
    "a guide without its Jacobian": Mutant(
        "inference.guides:GuideReference.log_prob",
        " + vmap(self.coordinates.log_jacobian)(position)",
        "",
        guide_is_normalised,
    ),
    "a Student distribution with the wrong tail": Mutant(
        "inference.proposals:StudentReference._parts",
        "0.5 * (self.freedom + width) * torch.log1p",
        "0.5 * (self.freedom - width) * torch.log1p",
        student_is_normalised,
    ),
    "a density without its Jacobian": Mutant(
        "inference.density:Unconstrained.log_jacobian",
        "total = total + ",
        "total = total + 0.0 * ",
        density_has_its_evidence,
    ),
    "a trajectory without its first half step": Mutant(
        LEAP,
        "kicked(momentum, gradient, leap.half)",
        "kicked(momentum, gradient, 0.0 * leap.half)",
        trajectories_are_reversible,
    ),
    "a trajectory with a whole last step": Mutant(
        LEAP, "leap.half if i == last else leap.whole", "leap.whole", trajectories_are_reversible
    ),
    "a trajectory that is always accepted": Mutant(
        LEAP, ".log() < -error", ".log() < error.abs()", hamiltonian_is_stationary
    ),
    "a trajectory without its kinetic energy": Mutant(
        LEAP, "new_energy = 0.5 *", "new_energy = 0.0 *", hamiltonian_is_stationary
    ),
    "a trajectory whose state keeps the old gradient": Mutant(
        LEAP, "torch.where(chosen, gradient, state.gradient)", "state.gradient", caches_are_fresh
    ),
    "a tree that returns the edge of its last branch": Mutant(
        TREE, "HamiltonianState(chosen.position,", "HamiltonianState(right.position,", caches_are_fresh
    ),
    "a tree that prefers its last leaf": Mutant(
        BRANCH, "< -error - sum_weight", "< -error - log_weight", trees_are_stationary
    ),
    "a tree that prefers its old half": Mutant(
        TREE, "branch.log_weight - log_weight", "log_weight - branch.log_weight", trees_are_stationary
    ),
    "a tree that keeps a half that turned": Mutant(
        TREE, "taken = grows &", "taken = (depth > level) &", trees_are_stationary
    ),
    "a tree that grows to one side": Mutant(
        TREE, "torch.rand_like(energy) < 0.5", "energy < torch.inf", trees_are_stationary
    ),
    "a tree that never looks within": Mutant(BRANCH, "firsts[-done:]", "firsts[:0]", trees_are_stationary),
    "a tree that weighs no leaf": Mutant(
        BRANCH, "torch.logaddexp(log_weight, -error)", "torch.logaddexp(log_weight, 0.0 * error)", trees_are_stationary
    ),
    "a walk that accepts what it should refuse": Mutant(
        WALK, "log_density - state.log_density", "state.log_density - log_density", walk_is_stationary
    ),
    "a walk whose step looks at where it is": Mutant(
        WALK, "pushed(noise,", "pushed(noise * state.position.abs(),", walk_is_stationary
    ),
    "a walk on counts that is not symmetric": Mutant(
        COUNT, "step.sign() * step.abs().ceil()", "step.ceil()", counts_have_their_matrix
    ),
    "a walk on counts with a stale density": Mutant(
        COUNT, "Current(values, density.joint(values))", "Current(values, current.log_joint)", counts_have_their_matrix
    ),
    "an enumeration that never draws the first value": Mutant(
        "inference.density:Density._drawn",
        "(cumulative < level).sum(-1)",
        "(cumulative < level).sum(-1).clamp(min=1)",
        enumeration_has_its_matrix,
    ),
    "a Gamma message that counts one too few": Mutant(
        "inference.messages:PowerGamma.solve", "(exponent + 1.0) / self.power", "exponent / self.power", GAMMA
    ),
    "a Beta message that counts one too many": Mutant(
        "inference.messages:BetaFamily.solve", "BetaConditional(a + 1.0,", "BetaConditional(a + 2.0,", BETA
    ),
    "a Dirichlet message that counts one too many": Mutant(
        "inference.messages:DirichletFamily.solve", "* at[0] + 1.0", "* at[0] + 2.0", DIRICHLET
    ),
    "a normal message with the wrong sign": Mutant(
        "inference.messages:Normal.solve", "gradients[0] - gradients[1]", "gradients[1] - gradients[0]", NORMAL
    ),
    "a normal message with half of its mean": Mutant(
        "inference.messages:Normal.solve", "middle + 0.5 *", "0.5 * middle + 0.5 *", NORMAL
    ),
    "a normal draw of the wrong width": Mutant(
        "inference.conditionals:NormalConditional.sample", "self._sd() * ", "1.2 * self._sd() * ", draws_have_their_law
    ),
    "a normal density of the wrong width": Mutant(
        "inference.conditionals:NormalConditional.log_kernel", "self.precision * ", "1.1 * self.precision * ", NORMAL
    ),
    "an exact update without q": Mutant(METROPOLISED, " - (log_q - log_q_present)", "", GAMMA),
    "an exact update with a stale log-joint": Mutant(
        METROPOLISED, "torch.where(accepted, log_joint, current.log_joint)", "current.log_joint", NORMAL
    ),
    "an HMC block that leaves the log-joint stale": Mutant(
        "inference.gibbs:Part.__call__",
        "values, known, ratio = {**values, **moved}, None, None",
        "values, ratio = {**values, **moved}, None",
        MIXED,
    ),
    "a covariance that is not centred": Mutant(
        "inference.mcmc:Moments.update", "after = position - mean", "after = position", moments_are_those_of_numpy
    ),
    "a covariance pooled over modes": Mutant(
        "inference.mcmc:Moments.update",
        "mean = self.mean + before / number",
        "mean = (self.mean + before / number).mean(0).expand_as(before)",
        moments_are_those_of_numpy,
    ),
    "step sizes that run from their target": Mutant(
        "inference.adaptation:StepAdaptation.update", "(target - evened", "(evened", steps_reach_their_target
    ),
    "a random walk that learns after warm-up": Mutant(
        "inference.metropolis:RandomWalk.move", "if warmup else", "if True else", frozen("RandomWalk")
    ),
    "Langevin that learns after warm-up": Mutant(
        "inference.metropolis:Langevin.move", "if warmup:\n", "if True:\n", frozen("Langevin")
    ),
    "a trace without its number of sites": Mutant(
        SITE, "math.log(len(trace.choices)) - math.log(len(other.choices))", "0.0", traces_have_their_matrix
    ),
    "a trace with its number of sites upside down": Mutant(
        SITE,
        "math.log(len(trace.choices)) - math.log(len(other.choices))",
        "math.log(len(other.choices)) - math.log(len(trace.choices))",
        traces_have_their_matrix,
    ),
    "a trace redrawn whole that counts its sites": Mutant(SITE, "if is_single:", "if True:", traces_have_their_matrix),
    "a trace that keeps its old log-joint": Mutant(
        SITE, "trace = other if", "trace = other._replace(log_joint=trace.log_joint) if", traces_have_their_matrix
    ),
    "a trace whose kept sites keep their old log-density": Mutant(
        SITE,
        "trace.log_q(dropped) - other.log_q(drawn)",
        "trace.log_q(dropped) - other.log_q(drawn) + trace.log_q(kept.names) - other.log_q(kept.names)",
        traces_have_their_matrix,
    ),
    "a trace that forgets what it drew from": Mutant(
        SITE, "trace.log_q(dropped) - other.log_q(drawn)", "0.0", traces_have_their_matrix
    ),
    "a trace that forgets the way back": Mutant(SITE, "log_ratio = -math.inf", "log_ratio += 0.0", traces_have_their_matrix),
    "a value that goes from a point to a density": Mutant(
        "inference.traces:_measure", 'return ""', 'return "length"', points_stay_points
    ),
    "a value that goes from a count to a density": Mutant(
        "inference.traces:_measure", "return type(inner).__name__", 'return "length"', points_stay_points
    ),
    "NUTS that learns after warm-up": Mutant("inference.nuts:NUTS.move", "if warmup:\n", "if True:\n", frozen("NUTS")),
}

CHECKS = {mutant.check.__name__: mutant.check for mutant in MUTANTS.values()}


@pytest.fixture(autouse=True)
def quickly(inside_a_run: None, monkeypatch: Patch) -> Iterator[None]:
    """Inside a run, and without graphs, which take seconds to make."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "vmapped")
    yield


def break_(where: str, old: str, new: str, patch: Patch) -> None:
    """Replaces a piece of the source of a function or method."""
    module, path = where.split(":")
    owner: Any = importlib.import_module(module)
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    function = inspect.getattr_static(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"'{old}' is {source.count(old)} times in {where}: the mutant is out of date."
    space = dict(vars(sys.modules[module]))
    code = compile(source.replace(old, new), where, "exec", flags=futures.annotations.compiler_flag)
    made: dict[str, Any] = {}  # apart from the module's names, of which a method may have one
    exec(code, space, made)
    patch.setattr(owner, name, made[name])


# A kernel on traces takes many seconds for its matrix.
LONG = (traces_have_their_matrix, points_stay_points)


@pytest.mark.parametrize("check", quick(CHECKS, [name for name, check in CHECKS.items() if check not in LONG]))
def test_the_unbroken_code_passes(check: str, monkeypatch: Patch) -> None:
    CHECKS[check](monkeypatch)


@pytest.mark.parametrize("mutant", quick(MUTANTS, [name for name, mutant in MUTANTS.items() if mutant.check not in LONG]))
def test_a_mutant_is_caught(mutant: str, monkeypatch: Patch) -> None:
    broken = MUTANTS[mutant]
    break_(broken.where, broken.old, broken.new, monkeypatch)
    if broken.where == METROPOLISED:  # which its users hold by name
        for block in ("conjugate", "enumerate"):
            module = importlib.import_module(f"inference.blocks.{block}")
            monkeypatch.setattr(module, "metropolised", sys.modules["inference.blocks.block"].metropolised)  # type: ignore[attr-defined]
    with pytest.raises((AssertionError, Unsupported)):
        broken.check(monkeypatch)
