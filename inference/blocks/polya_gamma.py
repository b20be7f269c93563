"""Real sites with a logistic likelihood, made Gaussian by Pólya-Gamma variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from inference import polya_gamma
from inference.blocks.block import Block, Current, Move, holds, metropolised, where_proper
from inference.blocks.conjugate import Joined, merged
from inference.blocks.gaussian import check_real
from inference.conditionals import Conditional, GaussianConditional, Points
from inference.contract import Unsupported
from inference.density import Density
from inference.messages import Family, Gaussian, candidates
from inference.program import Program

__all__ = ["PolyaGamma"]

LOGISTIC = ("Bernoulli", "Binomial", "NegativeBinomial", "Geometric")


@dataclass(frozen=True)
class PolyaGamma(Block):
    """An exact draw of real sites given Pólya-Gamma variables, drawn in turn.

    A statement with logits ψ contributes exp(y ψ) / (1 + e^ψ)^b, with b = 1 (Bernoulli), n (Binomial) or y + r (negative
    binomial). With ω ~ PG(b, ψ) drawn at the present ψ,

        exp(y ψ) / (1 + e^ψ)^b  =  2^−b E[exp((y − b/2) ψ − ω ψ² / 2)],   ω ~ PG(b, 0),

    the factor is Gaussian in whatever ψ is affine in. The design need not be known: the augmented log-joint
    is differentiated as it stands. The draw is a Metropolis proposal given ω; its log ratio, 0 if the prior is normal and ψ
    affine in the sites, is the certificate.

    Args:
        sites: Names of the sites, which are drawn together; filled in by ``bind``.
        family: Independent or coupled normals; None tries independent ones first.
        statements: Names of the logistic statements; None finds them.

    References:
        N. Polson, J. Scott and J. Windle, Bayesian inference for logistic models using Pólya-Gamma latent variables (2013).
    """

    family: Family | None = None
    statements: tuple[str, ...] | None = None

    @property
    def update(self) -> str:
        return "PolyaGamma"

    @property
    def has_certificate(self) -> bool:
        return True

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        check_real("PolyaGamma", sites, density)
        statements = self.statements or _depending(sites, density, trials)
        if not statements:
            raise Unsupported(
                f"PolyaGamma() needs Bernoulli, binomial or negative binomial statements whose logits depend on "
                f"{', '.join(sites)}, but there is none."
            )
        shape = Joined(density.program, sites).shape
        joint = [Gaussian(shape, (0,))] if len(sites) > 1 else candidates(density.program.latents[sites[0]].support, shape)
        for family in [self.family] if self.family else joint:
            bound = replace(self, sites=tuple(sites), family=family, statements=statements)
            if holds(bound, density, trials):
                return bound
        raise Unsupported(
            f"Given Pólya-Gamma variables for {', '.join(statements)}, the conditional of {', '.join(sites)} is not normal."
        )

    def _conditional(self, points: Points, density: Density, values: dict[str, Tensor], omega: Tensor) -> Conditional:
        assert self.family is not None and self.statements is not None
        program, statements = density.program, self.statements

        def augmented(values: Mapping[str, Tensor], omega: Tensor) -> Tensor:
            return program.log_joint(values) + _correction(*_logistic(program, values, statements), omega)

        at = self.family.at(points)
        staged = density.stage(
            ("augmented gradients", self.sites, statements),
            Joined(program, self.sites).gradients(augmented),
            (True, True, True),
        )
        return self.family.solve(at, staged(at.movedim(0, 1).contiguous(), values, omega).movedim(1, 0))

    def _logistic(self, density: Density, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """b and ψ of the statements, (chain, term) each."""
        statements, program = self.statements or (), density.program
        return density.stage(("logits", statements), lambda v: _logistic(program, v, statements), (True,))(values)

    def is_coupled(self, density: Density, trials: Current) -> Tensor:
        """Which sites share an entry of the joint precision, (site, site)."""
        omega = polya_gamma.draw(*self._logistic(density, trials.values))
        conditional = self._conditional(self.init(density, trials), density, trials.values, omega)
        assert isinstance(conditional, GaussianConditional)
        return Joined(density.program, self.sites).is_coupled(conditional.precision)

    def init(self, density: Density, current: Current) -> Points:
        assert self.family is not None
        value = Joined(density.program, self.sites).join(current.values)
        points = Points(value, 1.0 + value.abs())
        for _ in range(2):
            omega = polya_gamma.draw(*self._logistic(density, current.values))
            points = merged(self._conditional(points, density, current.values, omega), points)
        return points

    def drawn(
        self, state: Points, density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[Points, dict[str, Tensor], Tensor]:
        omega = polya_gamma.draw(*self._logistic(density, values))
        conditional = self._conditional(state, density, values, omega)
        proposed = Joined(density.program, self.sites).split(conditional.sample())
        found = where_proper(conditional.is_proper, proposed, values)
        return merged(conditional, state) if warmup else state, *found

    def step(self, state: Points, density: Density, current: Current, warmup: int) -> tuple[Points, Current, Move]:
        joined = Joined(density.program, self.sites)
        b, logits = self._logistic(density, current.values)
        omega = polya_gamma.draw(b, logits)
        conditional = self._conditional(state, density, current.values, omega)
        proposal = conditional.sample()
        proposed = joined.split(proposal)
        correction = _correction(*self._logistic(density, {**current.values, **proposed}), omega)
        log_q = torch.where(conditional.is_proper, conditional.log_prob(proposal), torch.inf) - correction
        log_q_present = conditional.log_prob(joined.join(current.values)) - _correction(b, logits, omega)
        moved, move = metropolised(current, proposed, log_q, log_q_present, density)
        return merged(conditional, state) if warmup else state, moved, move


def _depending(sites: Sequence[str], density: Density, trials: Current) -> tuple[str, ...]:
    """The logistic statements whose logits change with the sites."""
    program = density.program
    nodes = program.trace({name: value[0] for name, value in trials.values.items()}).nodes
    names = [name for name, node in nodes.items() if node["type"] == "sample" and _is_logistic(node)]
    moved = {**trials.values, **{site: trials.values[site].roll(1, 0) for site in sites}}
    found = []
    for name in names:
        staged = density.stage(("logits", (name,)), lambda v, n=name: _logistic(program, v, (n,)), (True,))
        (b, logits), (b_moved, logits_moved) = staged(trials.values), staged(moved)
        if not torch.equal(b, b_moved):
            raise Unsupported(
                f"PolyaGamma() needs the count of '{name}' to be free of {', '.join(sites)}, but it depends on it."
            )
        if not torch.equal(logits, logits_moved):
            found.append(name)
    return tuple(found)


def _is_logistic(node: Mapping[str, Any]) -> bool:
    return any(type(layer).__name__ in LOGISTIC for layer, _ in _layers(node["fn"], torch.ones(())))


def _layers(distribution: Any, weight: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """A distribution and those it wraps, with the factor of the log-probability of each element."""
    yield distribution, weight
    if type(distribution).__name__ not in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        return
    if type(distribution).__name__ == "Independent":
        weight = weight.reshape(weight.shape + (1,) * distribution.reinterpreted_batch_ndims)
    if type(distribution).__name__ == "MaskedDistribution":
        weight = weight * torch.as_tensor(distribution._mask, dtype=weight.dtype, device=weight.device)
    yield from _layers(distribution.base_dist, weight)


def _logistic(program: Program, values: Mapping[str, Tensor], statements: Sequence[str]) -> tuple[Tensor, Tensor]:
    """b and ψ of all logistic statements, (term,) each; factors of ``scale`` and ``mask`` are in b."""
    nodes = program.trace(values).nodes
    counts, logits = [], []
    for name in statements:
        node = nodes[name]
        weight = torch.as_tensor(node["scale"], dtype=program.dtype, device=program.device)
        if node["mask"] is not None:
            weight = weight * torch.as_tensor(node["mask"], dtype=program.dtype, device=program.device)
        layer, weight = list(_layers(node["fn"], weight))[-1]
        family, y = type(layer).__name__, node["value"].to(program.dtype)
        b = torch.ones_like(y)
        if family == "Binomial":
            b = layer.total_count
        elif family == "NegativeBinomial":
            b = y + layer.total_count
        elif family == "Geometric":
            b = y + 1.0
        b, psi = torch.broadcast_tensors(weight * b, layer.logits)
        b, psi, _ = torch.broadcast_tensors(b, psi, y)
        counts.append(b.reshape(-1).to(program.dtype))
        logits.append(psi.reshape(-1).to(program.dtype))
    return torch.cat(counts), torch.cat(logits)


def _correction(b: Tensor, psi: Tensor, omega: Tensor) -> Tensor:
    """What makes the log-joint that of the augmented model, Σ b log(2 cosh(ψ / 2)) − ω ψ² / 2: (…, term) -> (…)."""
    return (b * torch.logaddexp(0.5 * psi, -0.5 * psi) - 0.5 * omega * psi.square()).sum(-1)
