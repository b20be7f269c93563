"""Sites proposed from a guide, such as the encoder of an autoencoder, and accepted element by element."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move
from inference.contract import Unsupported
from inference.density import Density
from inference.guides import Guide, is_drawn, is_plain, mapped
from inference.handlers import Arithmetic, Drawing, isolated
from inference.posterior import Posterior
from inference.program import Program
from inference.terms import Coordinates, Elements, colour, one_by_one

__all__ = ["Gaps", "GuideDraw", "GuideState"]

_TRIALS = (
    3  # settings at which elements are told apart: all rows are evaluated at each of them for every bit of their number
)


_LED = 0.3  # of warm-up, in which every proposal is taken: chains start where the guide leads them, in each row


class GuideState(NamedTuple):
    """step (): how many steps of warm-up there have been."""

    step: Tensor


class Gaps(NamedTuple):
    """Data some of whose entries are missing.

    Attributes:
        site: The observed site that they are the data of, as they are.
        leaf: Their place among the tensors of the program.
    """

    site: str
    leaf: int


@dataclass(frozen=True)
class GuideDraw(Block):
    """A Metropolis step that proposes sites from a guide q, at the present values of all others.

        z' ~ q(z | data),    ratio  p(z', data) q(z | data) / (p(z, data) q(z' | data))    for each element of the plates

    Rows that are independent are accepted one by one, so that any number of them moves. Where entries of the data are NaN, a
    guide that reads them has seen less than there is to know. They are then drawn first, so that the guide reads a complete
    row; that is pseudo-Gibbs sampling (Rezende et al.) with the ratio that makes it exact (Mattei and Frellsen):

        x_missing ~ p(x_missing | z),    z' ~ q(z | x),    ratio  p(z', x) q(z | x) / (p(z, x) q(z' | x))

    The drawn entries are forgotten after the step: they leave the posterior of z given the known ones as it is.

    A guide that is narrower than the posterior holds a chain for long where it has reached the tails. So each element also
    takes a step of a random walk, z' = z + c (z₁ − z₂) in unconstrained coordinates. z₁ and z₂ are draws of the guide, so
    that the step has its scale; c is uniform up to the best constant for a normal target (Roberts et al.). Entries that are
    missing are integrated out meanwhile. Still, look at the effective sample size of each row.

    Where few proposals are taken, fit the guide again, to the rows at hand, incomplete as they are, with the weights of the
    program held: ``model.decoder.requires_grad_(False)``, then ``SVI(bound=IWELBO(8)).fit(model, x)``. That bound makes it
    as wide as the posterior (Mattei and Frellsen, "Refit"), and ``completes=False`` has it read what it then has read.

    In the first part of warm-up every proposal of the guide is taken, so that chains start where it leads them (Mattei and
    Frellsen). The certificate is the change of the log-joint that the elements' own terms do not explain; acceptance is that
    of the guide's proposals.

    Args:
        sites: Names of the sites, of one batch shape; filled in by ``bind``.
        guide: A Pyro guide, used as it is; or the Posterior of a variational fit, whose guide is taken; None takes the
            model's own guide. It may draw further sites, which are left aside.
        completes: Whether entries that are missing are drawn before the guide reads them; else it reads them as NaN.
        walks: Whether continuous sites also take a step of a random walk.
        elements: Which elements are accepted on their own; None finds out.
        gaps: The data with missing entries; filled in by ``bind``.

    References:
        D. Rezende, S. Mohamed and D. Wierstra, Stochastic backpropagation and approximate inference in deep generative
        models (2014), appendix F.
        P.-A. Mattei and J. Frellsen, Leveraging the exact likelihood of deep latent variable models (2018).
        P.-A. Mattei and J. Frellsen, Refit your encoder when new data comes by (2018).
        G. Roberts, A. Gelman and W. Gilks, Weak convergence and optimal scaling of random walk Metropolis algorithms (1997).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from inference import Gibbs, GuideDraw
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(0.5 * x, 0.8))
        >>> sampler = Gibbs(blocks={"z": GuideDraw(guide)}, draws=50, warmup=10, seed=0, progress=False)
        >>> sampler.fit(model, torch.zeros(100)).plan["z"].update
        'Guide'
    """

    sites: tuple[str, ...] = field(default=(), kw_only=True)
    guide: Callable[..., Any] | Posterior | None = None
    completes: bool = True
    walks: bool = True
    elements: Elements | None = field(default=None, kw_only=True)
    gaps: tuple[Gaps, ...] = field(default=(), kw_only=True)

    @property
    def update(self) -> str:
        return "Guide"

    @property
    def has_certificate(self) -> bool:
        return True

    @property
    def claim(self) -> str:
        return "independent"

    @property
    def is_scan(self) -> bool:
        """Whether all elements move together, so that nothing is taken for independent."""
        return self.elements is not None and self.elements.number == 1

    def scanning(self) -> Self:
        """The same block, all elements together."""
        assert self.elements is not None
        return replace(self, elements=one_by_one(torch.zeros_like(self.elements.of), len(self.elements.owners[0])))

    def saved(self) -> Block:
        return replace(self, guide=None)

    def restored(self, asked: Block) -> Block:
        return replace(self, guide=asked.guide) if isinstance(asked, GuideDraw) else self

    # ------------------------------------------------------------------------------------------ binding
    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        program, bound = density.program, replace(self, sites=tuple(sites))
        shapes = {name: program.latents[name].batch_shape for name in bound.sites}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"'{name}' has {tuple(shape)}" for name, shape in shapes.items())
            raise Unsupported(f"GuideDraw() updates sites of one batch shape, but {listed}. Give each its own block.")
        if program.chain_data(1):
            raise Unsupported(
                f"The guide of {program.name} reads the program's own data, but here each chain has data of its own."
            )
        with isolated(0, program.device), torch.no_grad():
            bound._check_guide(program)
            trials = Current({name: value[:_TRIALS] for name, value in trials.values.items()}, trials.log_joint[:_TRIALS])
            bound = replace(bound, gaps=bound._found_gaps(program, trials) if self.completes else ())
            values = {**trials.values, **bound._completed(density, trials.values)}
            first = {name: value[:1].expand_as(value) for name, value in values.items() if name not in bound.sites}
            mixed = {**first, **{name: values[name] for name in bound.sites}}
            log_q = bound._log_q(density, mixed)
            bound._check_repeats(density, mixed, log_q)
            coordinates = Coordinates(program, bound.sites, is_constrained=True)
            of = coordinates.batch % max(next(iter(shapes.values())).numel(), 1)
            bound = replace(bound, elements=colour(density, coordinates, of, values))
            assert bound.elements is not None
            is_free = len(bound.elements.colours) == 1 and bound._is_separate(density, first, values, log_q)
        return bound if is_free else bound.scanning()

    def _guide(self, program: Program) -> Guide:
        chosen = program.guide if self.guide is None else self.guide
        if chosen is None:
            raise Unsupported(
                f"GuideDraw() needs something to propose from, but {program.name} brings no guide. Give a Pyro guide, or a "
                "fitted Posterior, such as GuideDraw(SVI().fit(...))."
            )
        if isinstance(chosen, Posterior):
            if chosen.program is None or chosen.program.fitted is None:
                raise Unsupported(
                    "GuideDraw() takes the guide of a Posterior of SVI(), but this one has none: another back-end has made "
                    "it, or it was loaded, and a guide is code, which save and load leave out."
                )
            return chosen.program.fitted
        if inspect.isclass(chosen) or not callable(chosen):
            raise TypeError(
                f"GuideDraw(guide={chosen!r}): must be a Pyro guide or a fitted Posterior. A class of automatic guides has "
                "to be fitted first: GuideDraw(SVI(guide=...).fit(...))."
            )
        return Guide(chosen)

    def _run(
        self, program: Program, values: Mapping[str, Tensor], completed: Mapping[str, Tensor]
    ) -> dict[str, Mapping[str, Any]]:
        """Statements of a run of the guide, where the data with missing entries are those that were ``completed``."""
        data = list(program.data)
        for gaps in self.gaps:
            data[gaps.leaf] = completed[gaps.site]
        with Arithmetic():
            trace = self._guide(program).trace(program, values, data, is_frozen=True, dtype=program.dtype)
        return dict(trace.nodes)

    def _check_guide(self, program: Program) -> None:
        trial = replace(self, gaps=())
        nodes = trial._run(program, {}, {})
        for name in self.sites:
            site, node = program.latents[name], nodes.get(name)
            if node is None or node["type"] != "sample":
                raise Unsupported(f"GuideDraw() proposes '{name}' from a guide, but the guide does not sample it.")
            if not is_drawn(node):
                raise Unsupported(
                    f"The guide sets '{name}' to what it computes from other draws, or to one point, so that its density is "
                    "not known. Use a guide that draws the site itself."
                )
            if not is_plain(node):
                raise Unsupported(f"The guide scales or masks '{name}', so that its density is not known. Leave that out.")
            if node["value"].shape != site.shape:
                raise Unsupported(
                    f"The guide gives '{name}' the shape {tuple(node['value'].shape)}, but in {program.name} it is "
                    f"{tuple(site.shape)}."
                )
            if node["log_prob"].shape != site.batch_shape:
                raise Unsupported(
                    f"The guide draws '{name}' in {node['log_prob'].numel()} independent parts, but in {program.name} it "
                    f"has {site.batch_shape.numel()}. Put it into the plates that it is in there."
                )

    def _check_repeats(self, density: Density, values: Mapping[str, Tensor], log_q: Tensor) -> None:
        if not torch.allclose(self._log_q(density, values), log_q, equal_nan=True):
            raise Unsupported(
                f"The guide of {density.program.name} does not give the same density twice: something in it draws beside "
                "pyro.sample, such as dropout. Switch it off with .eval()."
            )

    def _is_separate(self, density: Density, first: dict[str, Tensor], values: dict[str, Tensor], log_q: Tensor) -> bool:
        """Whether the guide's density of an element follows the element alone: elements of two settings are mixed."""
        assert self.elements is not None
        coordinates = Coordinates(density.program, self.sites, is_constrained=True)
        vector = coordinates.vector(values)
        numbers = torch.arange(self.elements.number, device=vector.device)
        for bit in range((self.elements.number - 1).bit_length()):  # any two elements differ in a bit of their numbers
            is_other = (numbers >> bit) % 2 == 1
            mixed = torch.where(is_other[self.elements.of], vector.roll(1, 0), vector)
            found = self._log_q(density, {**first, **coordinates.values(mixed)})
            precision = 1e-9 if found.dtype == torch.float64 else 1e-4
            expected = torch.where(is_other, log_q.roll(1, 0), log_q)
            if not torch.allclose(found, expected, rtol=precision, atol=100 * precision, equal_nan=True):
                return False
        return True

    # ------------------------------------------------------------------------------------ missing entries
    def _found_gaps(self, program: Program, trials: Current) -> tuple[Gaps, ...]:
        """The data that have missing entries; their entries must be independent given all latent sites."""
        found = []
        for i, leaf in enumerate(program.data):
            if not (leaf.is_floating_point() and bool(leaf.isnan().any())):
                continue
            sites = [
                name
                for name, value in program.observed.items()
                if value.shape == leaf.shape and torch.allclose(value.to(leaf.dtype), leaf, equal_nan=True)
            ]
            if len(sites) != 1:
                raise Unsupported(
                    f"Entries of a tensor of {program.name}, of shape {tuple(leaf.shape)}, are missing, but it is not the "
                    "data of one observed site, as they are, so that it is not known how to draw them. "
                    "GuideDraw(completes=False) lets the guide read them as missing."
                )
            found.append(Gaps(sites[0], i))
        for gaps in found:
            self._check_gaps(gaps, program, trials)
        return tuple(found)

    def _check_gaps(self, gaps: Gaps, program: Program, trials: Current) -> None:
        """log p(all entries) = log p(known ones) + log p(missing ones), each by the program with the others missing."""
        leaf, name = program.data[gaps.leaf], gaps.site
        is_missing = leaf.isnan()
        for setting in range(2):
            values = {n: value[setting % len(value)] for n, value in trials.values.items()}
            drawn = program.trace(values, resampled=(name,), evaluated=False).nodes[name]["value"].to(leaf)
            nodes = program.trace(values).nodes[name]
            if not is_plain(nodes):
                raise Unsupported(
                    f"'{name}' is scaled or masked, which changes its density and not the draws of its missing entries. "
                    "Leave that out, or use GuideDraw(completes=False)."
                )
            whole, known, missing = (
                program.trace({**values, name: x}).nodes[name]["log_prob"].double().sum()
                for x in (
                    torch.where(is_missing, drawn, leaf),
                    leaf,
                    torch.where(is_missing, drawn, torch.nan),
                )
            )
            precision = 1e-9 if program.dtype == torch.float64 else 1e-4
            if not bool((whole - known - missing).abs() <= precision * (100.0 + whole.abs())):
                raise Unsupported(
                    f"Entries of '{name}' depend on one another given the latent sites, or those that are missing are not "
                    "integrated out, so that they cannot be drawn on their own. GuideDraw(completes=False) lets the guide "
                    "read them as missing."
                )

    def _completed(self, density: Density, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Data with their missing entries drawn at the values of each chain, observed site to (chain, *site)."""
        if not self.gaps:
            return {}
        program, names = density.program, tuple(gaps.site for gaps in self.gaps)
        latent = {name: values[name] for name in program.latents}

        def drawn(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            nodes = program.trace(values, resampled=names, evaluated=False).nodes
            return {name: nodes[name]["value"] for name in names}

        with Drawing():
            found = mapped(drawn, latent)
        known = {gaps.site: program.data[gaps.leaf] for gaps in self.gaps}
        return {name: torch.where(known[name].isnan(), value.to(known[name]), known[name]) for name, value in found.items()}

    # ------------------------------------------------------------------------------------------ moving
    def _parts(self, nodes: Mapping[str, Mapping[str, Any]], program: Program) -> Tensor:
        """log q of each element, (element,)."""
        return torch.stack([nodes[name]["log_prob"].to(program.dtype).reshape(-1) for name in self.sites]).sum(0)

    def _log_q(self, density: Density, values: Mapping[str, Tensor]) -> Tensor:
        """log q of the values of each chain, (chain, element)."""
        return self._mapped(density, values, is_drawn=False)[1]

    def _mapped(
        self, density: Density, values: Mapping[str, Tensor], is_drawn: bool = True
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Draws of the guide, and log q of the present values and of the draws, (chain, element) both."""
        program, gaps = density.program, tuple(gaps.site for gaps in self.gaps)
        latent = {name: values[name] for name in program.latents}
        completed = {name: values[name] for name in gaps}

        def run(rows: tuple[dict[str, Tensor], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            latent, completed = rows
            others = {name: value for name, value in latent.items() if name not in self.sites}
            nodes = self._run(program, others if is_drawn else latent, completed)
            drawn = {name: nodes[name]["value"].to(latent[name]) for name in self.sites}
            if not is_drawn:
                present = nodes
            elif len(self.sites) == 1:  # its distribution follows what is given alone
                (name,) = self.sites
                present = {name: {"log_prob": nodes[name]["fn"].log_prob(latent[name])}}
            else:
                present = self._run(program, latent, completed)
            return drawn, self._parts(present, program), self._parts(nodes, program)

        with Drawing():
            found: tuple[dict[str, Tensor], Tensor, Tensor] = mapped(run, (latent, completed))
        return found

    def _pair(self, density: Density, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Two draws of the guide, which reads missing entries as they are."""
        program, bare = density.program, replace(self, gaps=())

        def run(others: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            nodes = bare._run(program, others, {})
            one = {name: nodes[name]["value"] for name in self.sites}
            if len(self.sites) == 1:
                return one, {name: nodes[name]["fn"]() for name in self.sites}
            nodes = bare._run(program, others, {})
            return one, {name: nodes[name]["value"] for name in self.sites}

        others = {name: values[name] for name in program.latents if name not in self.sites}
        chains = (
            {} if others else {"": values[self.sites[0]].reshape(len(values[self.sites[0]]), -1)[:, 0]}
        )  # where nothing else has the chains' axis
        with Drawing():
            pair: tuple[dict[str, Tensor], dict[str, Tensor]] = mapped(run, {**others, **chains})
        return pair

    def init(self, density: Density, current: Current) -> GuideState:
        return GuideState(current.log_joint.new_zeros(()))

    @torch.no_grad()
    def step(self, state: GuideState, density: Density, current: Current, warmup: int) -> tuple[GuideState, Current, Move]:
        completed = self._completed(density, current.values)
        values = {**current.values, **completed}
        drawn, present, log_q = self._mapped(density, values)
        is_led = bool(state.step < _LED * warmup)
        moved, rate, unexplained = self._decided(density, values, drawn, log_q - present, is_led)
        if self.walks and all(density.program.latents[name].is_continuous for name in self.sites):
            moved = {name: value for name, value in moved.items() if name not in completed}
            walked, log_q_ratio = self._walked(density, moved)
            moved, _, more = self._decided(density, moved, walked, log_q_ratio)
            unexplained = unexplained + more
        values = {**current.values, **{name: moved[name] for name in self.sites}}
        state = GuideState(state.step + 1) if warmup else state
        return state, Current(values, density.joint(values)), Move(rate, unexplained)

    def _walked(self, density: Density, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Where a step of the random walk would lead, and its log q ratio, (chain, element).

        The step is symmetric in unconstrained coordinates, as the difference of two draws is. They follow what is known of
        the data, and not the entries that were drawn given the present values.
        """
        assert self.elements is not None
        one, other = self._pair(density, values)
        coordinates = Coordinates(density.program, self.sites)
        present = coordinates.vector(values)
        size = torch.rand(len(present), self.elements.number, dtype=present.dtype, device=present.device)
        of = coordinates.batch % self.elements.number
        constant = 2.38 / math.sqrt(2.0 * coordinates.size / self.elements.number)
        step = constant * size[:, of] * (coordinates.vector(one) - coordinates.vector(other))
        walked = coordinates.values(present + step)
        volumes = []
        for point in (present, present + step):
            parts = point.split(coordinates.sizes, -1)
            for name, part in zip(coordinates.sites, parts, strict=True):
                transform, part = coordinates.transforms[name], part.reshape(len(part), *coordinates.shapes[name])
                volume = transform.log_abs_det_jacobian(part, transform(part))
                elements = density.program.latents[name].batch_shape.numel()
                volumes.append(volume.reshape(len(part), elements, -1).sum(-1))
        before, after = (sum(half) for half in (volumes[: len(self.sites)], volumes[len(self.sites) :]))
        return walked, torch.as_tensor(before - after)

    def _decided(
        self,
        density: Density,
        values: dict[str, Tensor],
        proposed: dict[str, Tensor],
        log_q_ratio: Tensor,
        is_led: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Accepts or refuses each element of a proposal.

        Args:
            density: The densities of the program.
            values: Where the chains are, and the completed data.
            proposed: Values of the sites.
            log_q_ratio: log q(proposed | present) − log q(present | proposed), (chain, element).
            is_led: Whether every proposal with a density is taken.

        Returns:
            The values, the mean acceptance rate and what is unexplained, (chain,) both.
        """
        assert self.elements is not None
        elements, (owner,) = self.elements, self.elements.owners
        coordinates = Coordinates(density.program, self.sites, is_constrained=True)
        staged = coordinates.terms(density)
        if self.is_scan:
            log_q_ratio = log_q_ratio.sum(1, keepdim=True)
        others = {name: value for name, value in values.items() if name not in self.sites}
        present, proposal = coordinates.vector(values), coordinates.vector(proposed)
        before, after = staged(present, others), staged(proposal, others)
        gain = elements.own(after, owner) - elements.own(before, owner)
        log_ratio = (gain - log_q_ratio).nan_to_num(nan=-torch.inf)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        accepted = accepted | log_ratio.isfinite() if is_led else accepted
        vector = torch.where(accepted[:, elements.of], proposal, present)
        explained = torch.where(accepted, gain, 0.0).sum(-1)
        unexplained = staged(vector, others).sum(-1) - before.sum(-1) - explained
        return {**values, **coordinates.values(vector)}, log_ratio.clamp(max=0.0).exp().mean(-1), unexplained
