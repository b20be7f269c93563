"""A Pyro program, looked at once: its sites, supports, plates and rows, and its log-joint as a pure function."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import inference.transforms  # noqa: F401  (registers bijections)
from inference.contract import (
    Augmented,
    Blocked,
    Guided,
    Prepared,
    Programmed,
    Stepped,
    Surrogate,
    Unsupported,
)
from inference.dependence import dependence, is_read
from inference.distributed import ALONE, Processes
from inference.handlers import (
    Arithmetic,
    Gradients,
    Substitute,
    Table,
    Weights,
    base,
    isolated,
    on_device,
    quiet,
    reproducible,
    under,
)
from inference.rows import Known
from inference.screening import check_data, check_randomness, check_structure, check_supports
from inference.sites import (
    Plate,
    Shape,
    Site,
    batch_shape_of,
    evaluate,
    frames_of,
    is_statement,
    kin,
    kind_of,
    largest,
    latent_values,
    moving,
    resized,
    site_of,
)
from inference.stacking import Stack, log_probs
from inference.whole import is_alike, leaves_observed, widen

if TYPE_CHECKING:
    from inference.density import Density
    from inference.guides import Guide

__all__ = ["Program"]

T = TypeVar("T")

_LOOKS = 8  # a site that appears half the time is missed with probability 2⁻⁷;
_MORE_LOOKS = 32  # where sites may come and go, so that rare ones are known before the first step
_CHUNK = 4096  # rows that are checked at a time, where a run sees batches; all that is looked at of
_MANY_ROWS = 16_384  # that many or more
_AT_ONCE = 2**20  # numbers that chains hold together where no graph saves memory
_MANY, _FEWER_LOOKS = 200, 3  # programs of many statements are looked at less often


def _tensor(leaf: Any) -> Any:
    """A numpy array as a tensor, in its memory or on its disk: nothing is written to data."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(leaf)


class Program:
    """A Pyro program with its arguments, looked at once.

    Args:
        model: A Pyro callable, or a model object with the method ``model``. A module without weights in its density is
            copied, so that its buffers can be cast; one with weights is used as it is.
        args: Its arguments; numpy arrays become tensors.
        kwargs: Its keyword arguments.
        dtype: Floating type to run in; None follows the weights, else is float64.
        device: Where to run; None follows the data.
        follow: Whether dtype None follows the data instead of being float64, as stochastic gradients do.
        evaluations: How many evaluations of the density the run asks for; decides the rung (see ``inference.staging``).
        is_fixed: Whether to refuse a program whose structure changes from run to run.
        batch_size: Rows that are seen at a time; None sees all. Only as many are looked at, but for a check of the data.
        transform: Applied to the first tensor of every batch, such as ``torch.bernoulli``; may draw.
        is_simulated: Whether it is known through draws of its observed sites alone: no density is looked at, and its weights
            are those that the draws depend on.
        takes_surrogates: Whether gradients of the density are enough; see ``inference.contract.Surrogate``.
        is_run: Whether it is run at all. One that is not has no sites; its weights are all of its module's, its rows those
            of its first tensor: for losses of the module itself, where a draw or a density would be dear.

    Attributes:
        latents: Name to site, in the order of the program.
        observed: Name to value of the sites that are data.
        factors: Names of ``pyro.factor`` statements.
        surrogates: Names of sites of which only the gradient is known; where there are any, so it is of the density.
        deterministic: Names of ``pyro.deterministic`` statements.
        weights: Trainable leaves that the density depends on.
        nesting: Batch dimensions that plates or batch shapes take up.
        breadth: Numbers that the largest parameter of a statement has, of all the rows that were looked at.
        rows: Size of dimension 0 of the first tensor argument, or None.
        part: How many of them have shown the structure, as many as a batch has, or few of very many; None if all did.
        fitted: The guide that a variational fit has trained, or None; it is code, so no save keeps it.
        has_rows: Whether a log-probability of many normal rows was a matrix product; see ``inference.rows``.
        groups: How many groups of consecutive chains there are that do not learn from one another; see ``replicate``.
        processes: Those that run it together; see ``inference.distributed``.
        is_changing: Whether sites, shapes or supports change from run to run, or may do so because Python reads a latent
            value; False where that is refused. ``latents`` and its like then hold what a
            few runs have shown, each site in its largest shape, and there is no ``density``: see ``inference.traces``.

    Raises:
        Unsupported: If the structure changes from run to run, hidden randomness is found, or nothing is latent.
        ValueError: If the data are empty, not finite or of the wrong type.
    """

    def __init__(
        self,
        model: Callable[..., Any] | Programmed,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        follow: bool = False,
        evaluations: int = 0,
        is_fixed: bool = True,
        batch_size: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        is_simulated: bool = False,
        takes_surrogates: bool = False,
        is_run: bool = True,
    ) -> None:
        if not callable(model) and not isinstance(model, Programmed):
            raise TypeError(f"A program is a function, or an object with a method model, but this is {model!r}.")
        owner = model if isinstance(model, (nn.Module, Programmed)) else getattr(model, "__self__", None)
        leaves, self._structure = tree_flatten((tuple(args), dict(kwargs or {})))
        leaves = [_tensor(leaf) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.rows = tensors[0].shape[0] if tensors and tensors[0].dim() else None
        if self.rows == 0:
            raise ValueError("The data are empty: the first argument has no rows.")
        self.transform = transform
        self.transformed: list[Tensor] | None = None
        self._leaves, self._evaluations = leaves, evaluations
        if isinstance(owner, Prepared):
            if transform is not None and tensors:
                try:
                    with isolated(0, tensors[0].device):
                        self.transformed = self.fed(tensors)
                except RuntimeError as error:
                    raise ValueError(f"transform= does not take these data: {str(error).splitlines()[0]}") from error
            prepared_args, prepared_kwargs = self.arguments(self.transformed or tensors)
            owner.prepare(*prepared_args, **prepared_kwargs)
        parameters = list(owner.parameters()) if isinstance(owner, nn.Module) else []
        floating = [leaf for leaf in tensors if leaf.is_floating_point()]
        default = torch.get_default_dtype() if follow else torch.float64
        self.dtype: torch.dtype = dtype or (floating[0].dtype if follow and floating else default)
        self.device = torch.device(device) if device else (tensors or parameters or [torch.empty(0)])[0].device
        self.is_fixed, self.is_changing = is_fixed, False
        self.is_simulated, self.is_run, self._takes_surrogates = is_simulated, is_run, takes_surrogates
        self.fitted: Guide | None = None
        self._replicated: dict[str, Tensor] = {}
        self.groups = 1
        self.processes: Processes = ALONE
        self._table = Table()
        self._writes = False  # whether the program writes into tensors of its own
        self.has_rows = False
        self.name = type(owner).__name__ if owner is not None else getattr(model, "__name__", type(model).__name__)
        self._bind(model, owner)
        self.nesting, self.data = 0, [tensor.detach() for tensor in tensors]
        is_batched = self.rows is not None and batch_size is not None and batch_size < self.rows
        is_plain = is_fixed and is_run and not is_simulated and transform is None
        is_large = self.rows is not None and self.rows >= _MANY_ROWS and is_plain
        self.part: int | None = batch_size if is_batched else _CHUNK if is_large and batch_size is None else None
        if isinstance(owner, nn.Module) and any(leaf.device != self.device for leaf in (*parameters, *owner.buffers())):
            if not parameters and not follow:  # its owner keeps it where it is
                owner = self._copied(model, owner)
            owner.to(self.device)
        used = self._seen(is_batched, lambda: self.used_weights(owner))
        if used and dtype is None:
            self.dtype = next(iter(used.values())).dtype
        elif isinstance(owner, nn.Module) and not used and not follow:
            self._copied(model, owner).to(self.dtype)
        self.data = [self._cast(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        if self.transformed is not None:
            self.transformed = [self._cast(self.transformed[0]), *self.data[1:]]
        self.weights: dict[str, Tensor] = {}
        self._seen(is_batched, self._look_for_weights)
        if is_batched:
            assert self.part is not None
            widen(self, self.part)
        elif self.part is not None and not is_alike(self):
            self.part = None
            self._at_a_glance(None, self._look_for_weights)

    def _bind(self, model: Any, owner: Any) -> None:
        self.owner = owner
        self.call = model.model if isinstance(model, Programmed) else model
        self.guide = model.guide if isinstance(model, Guided) else None

    def _copied(self, model: Any, owner: nn.Module) -> nn.Module:
        """A copy of the owner, which takes its place."""
        copied = copy.deepcopy(owner)
        self._bind(copied if isinstance(model, (nn.Module, Programmed)) else getattr(copied, model.__name__), copied)
        return copied

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype if tensor.is_floating_point() else None)

    def fed(self, data: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a batch as the program sees them: the first one transformed.

        Raises:
            ValueError: If ``transform`` gives other rows than it was given, or no tensor.
        """
        if self.transform is None or not data:
            return [*data]
        made = self.transform(data[0])
        if not isinstance(made, Tensor) or made.shape[:1] != data[0].shape[:1]:
            came = f"a tensor of shape {tuple(made.shape)}" if isinstance(made, Tensor) else repr(type(made).__name__)
            raise ValueError(
                f"transform= must give a tensor of as many rows as it is given, {len(data[0])}, but gave {came}."
            )
        is_cast = made.is_floating_point() and hasattr(self, "dtype")
        return [made.to(self.dtype) if is_cast else made, *data[1:]]

    @property
    def _shown(self) -> list[Tensor]:
        """All the data as the program sees them outside of batches: transformed once, always alike."""
        if self.transform is None:
            return self.data
        if self.transformed is None:
            with isolated(0, self.device):
                self.transformed = self.fed(self.data)
        return self.transformed

    def between(self, first: int, last: int) -> list[Tensor]:
        """The program's tensors as it sees them outside of batches, from row ``first`` to before row ``last``."""
        seen = self.transformed or self.data
        cut = [leaf[first:last] if leaf.dim() and leaf.shape[0] == self.rows else leaf for leaf in seen]
        return cut if self.transformed is not None else self.fed(cut)

    def parts(self) -> Iterator[tuple[int, list[Tensor] | None]]:
        """All the data, about as many rows at a time as were looked at, and where they begin; None if all were."""
        if self.part is None or self.rows is None:
            yield 0, None
            return
        size = max(self.part, _CHUNK)
        for first in range(0, self.rows, size):
            yield first, self.between(first, first + size)

    def _seen(self, is_batched: bool, look: Callable[[], T]) -> T:
        """What ``look`` finds in a part of the rows, or in all where the program has not asked for batches and needs all."""
        if not is_batched and self.part is not None:
            try:
                return self._at_a_glance(self.part, look)
            except Exception:  # whatever a program raises that was written for all rows, and what is said better of all
                self.part = None
        return self._at_a_glance(self.part, look)

    def _at_a_glance(self, part: int | None, look: Callable[[], T]) -> T:
        """What ``look`` finds in the first ``part`` rows, None for all, as a batch shows them."""
        whole, rows, transform = self.data, self.rows, self.transform
        if part is not None:
            self.data = self.minibatch(torch.arange(part))
        self.data, self.rows, self.transform = self.fed(self.data), part or rows, None
        self._known = Known(self.data)
        try:
            return look()
        except (RuntimeError, IndexError, TypeError) as error:
            if part is None:
                raise
            raise ValueError(
                f"{self.name} does not run with {part} of its {rows} rows ({str(error).splitlines()[0]}). Write it for any "
                "number of rows, such as pyro.plate('rows', len(x)), or leave batch_size out."
            ) from error
        finally:
            self.glimpse = self.data
            self.data, self.rows, self.transform = whole, rows, transform
            self._known = Known(self.data)

    def _look_for_weights(self) -> None:
        self._look()
        self.weights = self.used_weights(self.owner)
        _ = self.row_plates, self.knows_rows, self.row_loops  # found with the rows that are seen

    def arguments(self, data: list[Tensor] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The program's arguments, with its tensors replaced by ``data`` if given."""
        tensors = iter(self._shown if data is None else data)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._structure)

    def cast(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """New arguments for the program, in its dtype and on its device."""
        leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
        leaves = [_tensor(leaf) for leaf in leaves]
        return tree_unflatten([self._cast(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def handled(self, values: Mapping[str, Tensor], resampled: Collection[str] = ()) -> Callable[..., Any]:
        """The program at given values, its weights kept out of Pyro's store; see ``trace``."""
        handled = under(Substitute(values, resampled), self.call)
        return under(Weights(self._table), under(Gradients(), handled) if self._takes_surrogates else handled)

    def trace(
        self,
        values: Mapping[str, Tensor],
        *,
        data: list[Tensor] | None = None,
        arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
        resampled: Collection[str] = (),
        evaluated: bool = True,
        handler: Callable[[Any], Any] | None = None,
    ) -> poutine.Trace:
        """Runs the program once on constrained ``values``; sites not named are drawn.

        Args:
            values: Site to value; that of an observed site replaces its data.
            data: Tensors in place of those among the arguments.
            arguments: Positional and keyword arguments in place of those of the program.
            resampled: Observed sites that are drawn instead.
            evaluated: Whether log-probabilities are computed.
            handler: A Pyro handler that may give values to the sites that ``values`` leaves open.
        """
        args, kwargs = self.arguments(data) if arguments is None else arguments
        handled = self.handled(values, resampled)
        with quiet(), on_device(self.device), self._arithmetic(values):
            trace = poutine.trace(handled if handler is None else handler(handled)).get_trace(*args, **kwargs)
            if evaluated and not resampled:
                evaluate(trace, self.name)
        return trace

    def simulated(self, data: list[Tensor] | None = None) -> dict[str, Tensor]:
        """One draw of all sites, latent and observed, of which the observed ones are drawn anew; gradients go through."""
        trace = self.trace({}, data=data, resampled=self.observed_sites, evaluated=False)
        return {name: trace.nodes[name]["value"] for name in (*self.latents, *self.observed_sites)}

    def log_probs(
        self, values: Mapping[str, Tensor], data: list[Tensor] | None = None, is_wide: bool = False
    ) -> tuple[Mapping[str, Mapping[str, Any]], list[Stack]]:
        """Runs the program on constrained ``values``; its statements, and their log-probabilities in stacks.

        Args:
            values: Site to value. Finite sites may have all their values at once, in dimensions left of all plates.
            data: Tensors in place of those among the arguments.
            is_wide: Whether to refuse tensors that would not fit into memory.
        """
        args, kwargs = self.arguments(data)
        with quiet(), on_device(self.device), self._arithmetic(values, is_wide) as arithmetic:
            try:
                nodes = poutine.trace(self.handled(values)).get_trace(*args, **kwargs).nodes
                self._writes = self._writes or arithmetic.has_written
                stacks = log_probs(nodes, arithmetic.origin, self._known)
                self.has_rows = self.has_rows or any(stack.is_product for stack in stacks)
                return nodes, stacks
            except Unsupported as refusal:  # without the table of shapes that Pyro adds
                raise Unsupported(str(refusal).split("\nTrace Shapes")[0]) from None

    def _arithmetic(self, values: Mapping[str, Tensor], is_wide: bool = False) -> Arithmetic:
        """The arithmetic of one run; a program that was seen to write gets tensors that have the axes of the values."""
        zero = None
        if self._writes and values:
            zero = torch.stack([torch.zeros_like(value, dtype=self.dtype).sum() for value in values.values()]).sum()
        return Arithmetic(self.widest if is_wide else None, zero)

    def log_joint(self, values: Mapping[str, Tensor], data: list[Tensor] | None = None) -> Tensor:
        """log p(values, data), a scalar, at constrained values of all latent sites."""
        _, stacks = self.log_probs(values, data)
        return torch.stack([stack.total.to(self.dtype) for stack in stacks]).sum()

    def replicate(self, observed: Mapping[str, Tensor], groups: int = 1) -> Program:
        """The same program, but with data of their own for each chain, or for a few chains each.

        The data travel among the values of the chains (``chain_data``), so that one graph serves all of them.

        Args:
            observed: Observed site to its values, (replicate, *site); consecutive chains share a replicate. A site that is
                not named keeps its data.
            groups: Into how many groups of consecutive chains a sampler divides what it learns from the chains.
        """
        unknown = [name for name in observed if name not in self.observed_sites]
        if unknown:
            sites = ", ".join(self.observed_sites)
            raise ValueError(f"'{unknown[0]}' is no observed site of {self.name}; those are {sites}.")
        other = copy.copy(self)
        if groups != self.groups:
            other.__dict__.pop("density", None)  # blocks ask its program how many groups there are
        other._replicated, other.groups = dict(observed), groups
        return other

    def thinned(self, index: Tensor, dtype: torch.dtype) -> Program:
        """The same program in another type, with only the rows ``index`` of its data; its prior is what it was.

        Raises:
            Exception: Whatever the program raises that was written for just these rows.
        """
        other = copy.copy(self)
        if isinstance(self.owner, nn.Module) and dtype != self.dtype:
            other.owner = copy.deepcopy(self.owner).to(dtype)
            other.call = other.owner if self.call is self.owner else getattr(other.owner, self.call.__name__)
        other.dtype = dtype
        other.data = [other._cast(leaf) for leaf in self.minibatch(index)]
        tensors = iter(other.data)
        other._leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        other._known, other.rows, other.part, other.transformed = Known(other.data), len(index), None, None
        other._look()
        return other

    def chain_data(self, chains: int) -> dict[str, Tensor]:
        """The data that a number of chains have of their own, site to (chain, *site); empty if they share all data."""
        if not self._replicated:
            return {}
        replicates = len(next(iter(self._replicated.values())))
        if chains == replicates:
            return dict(self._replicated)
        rows = torch.arange(chains, device=self.device) * replicates // chains
        return {name: value[rows] for name, value in self._replicated.items()}

    @property
    def is_long(self) -> bool:
        """Whether it has so many statements that a run of it is dear."""
        return len(self.batch_shapes) >= _MANY

    def at_once(self, count: int) -> int:
        """How many of so many chains are to be looked at together, where no graph saves memory."""
        return min(count, max(1, _AT_ONCE // self.breadth))

    @property
    def widest(self) -> int:
        """Entries that one table of an enumeration may have for one chain."""
        return max(2**20, 64 * max((leaf.numel() for leaf in self.data), default=1))

    def deterministics(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the ``pyro.deterministic`` statements at constrained values of all latent sites."""
        trace = self.trace(values)
        return {name: trace.nodes[name]["value"] for name in self.deterministic}

    def sample_prior(self) -> dict[str, Tensor]:
        """One draw of all latent sites; flat ones start anywhere on (-2, 2), unconstrained."""
        return self.drawn({})

    def drawn(self, values: Mapping[str, Tensor], data: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Values of all latent sites: those given, and a draw from the prior of the others given those."""
        trace = self.trace(values, data=data, evaluated=False)
        return {name: trace.nodes[name]["value"].detach() for name in self.latents}

    def _look(self) -> None:
        for name, value in vars(Program).items():
            if isinstance(value, cached_property):  # of another look
                self.__dict__.pop(name, None)
        with isolated(0, self.device), reproducible(self.dtype, self.device):
            self.nesting = 0
            traces = [self.trace({}, evaluated=False)] if self.is_run else []
            if traces:
                looks = _FEWER_LOOKS if len(traces[0].nodes) >= _MANY else _LOOKS if self.is_fixed else _MORE_LOOKS
                traces += [self.trace({}, evaluated=False) for _ in range(looks - 1)]
                check_structure(self, traces)
            nodes = largest(traces)
            self.take_down(nodes, traces)
            check_supports(self, traces)
            supports = {n: [t.nodes[n]["fn"].support for t in traces if n in t.nodes] for n in self.observed_sites}
            self.moving = {name: moving(found) for name, found in supports.items()}
            check_data(self, traces, self.observed)
            self.leaf_of = leaves_observed(self, traces)
            check_randomness(self, [latent_values(trace, self.latents) for trace in traces])
            if not self.is_fixed and not self.is_changing:
                self.is_changing = is_read(self, traces[0])
            self._resized = resized(traces) if self.is_changing else set()
            statements = [name for name in nodes if name not in self.deterministic]
            is_followed = self.finite and not self.is_changing and not self.is_simulated
            self.dependence = dependence(self, traces[0]) if is_followed else dict.fromkeys(statements, frozenset[str]())
            for name in [name for name, site in self.latents.items() if site.is_linked]:
                self.latents[name] = replace(self.latents[name], plates=self._along(name, nodes))

    def take_down(self, nodes: Mapping[str, Mapping[str, Any]], traces: list[poutine.Trace]) -> None:
        """Notes what sites there are, and of what shape, from the nodes of a program's statements."""
        kinds = {name: kind_of(node) for name, node in nodes.items()}
        sites = {name: site_of(name, node) for name, node in nodes.items() if kinds[name] in ("latent", "observed")}
        for name, site in sites.items():  # choices that follow another latent, such as a binomial of a latent total
            if site.choices is not None:
                others = [site_of(name, trace.nodes[name]).choices for trace in traces if name in trace.nodes]
                if any(choices is None or not torch.equal(choices, site.choices) for choices in others):
                    sites[name] = replace(site, choices=None)
        self.latents = {name: site for name, site in sites.items() if kinds[name] == "latent"}
        self.observed_sites = {name: site for name, site in sites.items() if kinds[name] == "observed"}
        self.observed = {name: nodes[name]["value"].detach() for name in self.observed_sites}
        self.augmented = tuple(name for name in self.observed_sites if isinstance(nodes[name]["fn"], Augmented))
        self.surrogates = tuple(name for name in sites if isinstance(base(nodes[name]["fn"]), Surrogate))
        if self.surrogates and not self._takes_surrogates:
            raise Unsupported(
                f"Site '{self.surrogates[0]}' of {self.name} has a score, ∇ log p, but no log-density, as needed "
                "here. Take SVI() with a guide whose draws have gradients, such as AutoNormal, or "
                "MetropolisHastings(proposal=Unadjusted(step)), which follow gradients alone; or another prior: that of "
                "a flow has a density, and under TransformReparam suits HMC."
            )
        self.factors = tuple(name for name, kind in kinds.items() if kind == "factor")
        self.deterministic = {name: nodes[name]["value"].shape for name, kind in kinds.items() if kind == "deterministic"}
        self.batch_shapes = {name: batch_shape_of(node) for name, node in nodes.items()}
        self.frames = {name: frames_of(node) for name, node in nodes.items()}
        self.nesting = max(map(len, self.batch_shapes.values()), default=0)
        parts = [part for node in nodes.values() for part in vars(base(node["fn"])).values() if isinstance(part, Tensor)]
        self.breadth = max((part.numel() for part in parts), default=1)

    def _along(self, site: str, nodes: Mapping[str, Mapping[str, Any]]) -> tuple[Plate, ...]:
        """The plate of the statements that depend on a sequence of states, along which its elements lie; () if none is."""
        size = self.latents[site].shape[-1]
        depending = [nodes[name] for name, sites in self.dependence.items() if site in sites and name != site]
        frames = {frame for node in depending for frame in node["cond_indep_stack"] if frame.vectorized and frame.dim == -1}
        found = sorted({frame.name for frame in frames if frame.size == size})
        if len(found) > 1:
            raise Unsupported(
                f"The elements of '{site}' are used in the plates {', '.join(found)}, but a sequence of states lies along "
                "one plate. Use the same pyro.plate object."
            )
        return tuple(Plate(name, -1, size) for name in found)

    def changes(self, sentence: str) -> None:
        """Refuses a program whose structure changes from run to run, in words, or notes that it does."""
        if self.is_fixed:
            raise Unsupported(sentence)
        self.is_changing = True

    @property
    def named_arguments(self) -> list[tuple[str, Any]]:
        """The arguments, by the names of the program's parameters."""
        args, kwargs = self.arguments(self.data)
        names = [p.name for p in inspect.signature(self.call).parameters.values()]
        named = zip(names + [f"argument {i}" for i in range(len(names), len(args))], args, strict=False)
        return [*named, *kwargs.items()]

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors among the arguments, by the names of the program's parameters."""
        return [(label, value) for label, value in self.named_arguments if isinstance(value, Tensor)]

    def used_weights(self, owner: Any) -> dict[str, Tensor]:
        """The trainable tensors that the log-density depends on, or what is drawn of a program known through draws."""
        named: dict[str, Tensor] = dict(owner.named_parameters()) if isinstance(owner, nn.Module) else {}
        named = {name: weight for name, weight in named.items() if weight.requires_grad}
        with isolated(0), reproducible(self.dtype):
            if not self.is_run or (not named and not self._table):
                return named
            trace = self.trace({}, evaluated=not self.is_simulated)
            named |= self._table
            statements = {name: node for name, node in trace.nodes.items() if is_statement(node)}
            if self.is_simulated:
                seen = [name for name, node in statements.items() if kind_of(node) == "observed"]
                drawn = self.trace({}, resampled=seen).nodes if seen else {}
                total = sum(drawn[name]["value"].sum() for name in seen)
            else:
                total = sum(node["log_prob_sum"] for node in statements.values())
        if not isinstance(total, Tensor) or not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return {name: w for (name, w), g in zip(named.items(), gradients, strict=True) if g is not None}

    @property
    def looks(self) -> int:
        """Runs that tell what a program has: one, or a few if it changes from run to run by itself."""
        return _FEWER_LOOKS if self.is_changing else 1

    @cached_property
    def _grown(self) -> Shape | None:
        """What the program has if its first row comes once more at the end; None if it does not run so.

        All tensors of that many rows grow, or else only the first: square data may come with one number for each column.
        """
        if self.rows is None or not self.is_run:
            return None
        index = torch.arange(self.rows + 1, device=self.device) % self.rows
        for data in (self.minibatch(index), [self.data[0][index], *self.data[1:]]):
            try:
                with isolated(1, self.device), reproducible(self.dtype, self.device):
                    return Shape.of([self.trace({}, data=data) for _ in range(self.looks)])
            except Exception:  # whatever a program raises that was written for just these rows
                continue
        return None

    @property
    def sites(self) -> list[Site]:
        """What is latent and what is observed."""
        return [*self.latents.values(), *self.observed_sites.values()]

    @property
    def knows_rows(self) -> bool:
        """Whether it shows what of it belongs to single rows, by a plate of their number or by running with one more."""
        return bool(self.row_plates) or self._grown is not None

    @cached_property
    def row_plates(self) -> tuple[str, ...]:
        """Names of the plates that run over the rows of the data.

        They have as many elements as there are rows, and one more if a row is added. So the columns of square data are none,
        nor are five components of five rows. A program that does not run with one row more is judged by the number alone.
        """
        sized = {plate.name for site in self.sites for plate in site.plates if plate.size == self.rows} - self._resized
        if sized and self._grown is not None:
            sized -= {name for name, sizes in self._grown.plates.items() if self.rows in sizes}
        return tuple(sorted(sized))

    @property
    def is_sequence(self) -> bool:
        """Whether the rows follow one another, as the steps of a sequence of states, so that a part of them is no sample."""
        along = {plate.name for site in self.latents.values() if site.is_linked for plate in site.plates}
        return bool(along & set(self.row_plates))

    def check_rows(self, purpose: str) -> None:
        """Refuses a program whose rows cannot be taken apart.

        Args:
            purpose: What needs that, the subject of a sentence.
        """
        if not self.row_plates:
            raise Unsupported(
                f"{purpose} needs rows, but no plate of {self.name} has the size of its first tensor argument ({self.rows})."
            )
        if self.is_sequence:
            raise Unsupported(
                f"{purpose} needs rows that are independent of one another, but those of {self.name} are steps of a "
                "sequence of states. Take all rows at once, in one process."
            )

    @cached_property
    def row_loops(self) -> tuple[str, ...]:
        """Names of the latent sites of Python loops over the rows, such as z_0, z_1, …: one row more makes more of them."""
        if self._grown is None:
            return ()
        return tuple(sorted(kin(self.latents, self._grown.latents - set(self.latents))))

    def minibatch(self, index: Tensor) -> list[Tensor]:
        """The program's tensors, those that have rows cut down to the rows ``index``."""
        return [leaf[index] if leaf.dim() and leaf.shape[0] == self.rows else leaf for leaf in self.data]

    @cached_property
    def shard(self) -> list[Tensor] | None:
        """The program's tensors, cut down to the rows of this process; None where it has all of them."""
        if self.processes.size == 1 or self.rows is None:
            return None
        return self.minibatch(self.processes.share(torch.arange(self.rows, device=self.device)))

    @cached_property
    def proposals(self) -> dict[tuple[str, ...], Callable[..., Any]]:
        """The moves that the model brings: sites to ``propose``; see ``inference.contract.Blocked``."""
        args, kwargs = self.arguments()
        found = dict(self.owner.blocks(*args, **kwargs)) if isinstance(self.owner, Blocked) else {}
        self._check_named("blocks", found)
        return found

    @cached_property
    def steps(self) -> dict[tuple[str, ...], Callable[..., Any]]:
        """The iterations that the model brings: sites to ``step``; see ``inference.contract.Stepped``."""
        args, kwargs = self.arguments()
        found = dict(self.owner.steps(*args, **kwargs)) if isinstance(self.owner, Stepped) else {}
        self._check_named("steps", found)
        return found

    def _check_named(self, method: str, found: Mapping[tuple[str, ...], Any]) -> None:
        for name in itertools.chain.from_iterable(found):
            if name not in self.latents:
                raise ValueError(
                    f"{method}() of {self.name} names '{name}', but the latent sites are {', '.join(self.latents)}."
                )

    @cached_property
    def density(self) -> Density:
        """The program's densities over a leading chain axis."""
        from inference.density import Density

        return Density(self, self._evaluations)

    def log_likelihood(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``inference.predictive.log_likelihood``."""
        from inference.predictive import log_likelihood

        return log_likelihood(self, draws)

    def predict(
        self,
        draws: Mapping[str, Tensor],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """See ``inference.predictive.posterior_predictive``."""
        from inference.predictive import posterior_predictive

        if not self.is_run:
            if not isinstance(self.owner, Programmed):
                raise Unsupported(f"{self.name} has no method model, a program that draws: there is nothing to predict.")
            own, named = self.arguments(self.data)
            seen = Program(self.owner, own, named, dtype=self.dtype, device=self.device, batch_size=1, is_simulated=True)
            if not seen.observed_sites:
                raise ValueError(
                    f"{self.name} was given no data: give load the data that were fitted, or call its sample()."
                )
            return seen.predict(draws, args, kwargs, seed=seed)
        if self.is_simulated and not args and not kwargs and self.latents.keys() - draws.keys():
            args, kwargs = self._anew()
        return posterior_predictive(self, draws, args, kwargs, seed)

    def _anew(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that ask for as many new rows, of which what is hidden is drawn, too: no data, the rest as it was."""
        own, named = self.arguments(self.data)
        is_given = any(isinstance(value, Tensor) for value in [*own, *named.values()][1:])
        if not is_given and "size" not in inspect.signature(self.call).parameters:
            return (), {}
        if own:
            own = (None, *own[1:])
        else:
            named = {name: None if place == 0 else value for place, (name, value) in enumerate(named.items())}
        return own, named if is_given else {**named, "size": self.rows}

    def prior(self, draws: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See ``inference.predictive.prior_predictive``."""
        from inference.predictive import prior_predictive

        return prior_predictive(self, draws, seed)

    def weight_values(self) -> dict[str, Tensor]:
        """The weights as the program sees them, and what a module with weights saves beside them; detached."""
        found = {name: self._table.seen(name, weight) for name, weight in self.weights.items()}
        if found and isinstance(self.owner, nn.Module):
            kept = self.owner.state_dict()
            found |= {name: buffer for name, buffer in self.owner.named_buffers() if name in kept}
        return {name: leaf.detach().clone() for name, leaf in found.items()}

    def set_weights(self, values: Mapping[str, Tensor]) -> None:
        """Sets the weights to what ``weight_values`` gave; names that the program does not have are left alone."""
        owner = self.owner
        owned = dict(owner.named_parameters()) | dict(owner.named_buffers()) if isinstance(owner, nn.Module) else {}
        with torch.no_grad():
            for name, value in values.items():
                if name in self._table.transforms:
                    self._table[name].copy_(self._table.transforms[name].inv(value))
                elif name in self.weights or name in owned:
                    (self.weights | owned)[name].copy_(value)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What training may change, as torch holds it: the weights and buffers of a module with weights; detached."""
        found = dict(self.weights)
        if self.weights and isinstance(self.owner, nn.Module):
            found |= dict(self.owner.named_parameters()) | dict(self.owner.named_buffers())
        return {name: leaf.detach() for name, leaf in found.items()}

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Tensor arguments that are not themselves observed, by parameter name."""
        seen = list(self.observed.values())
        return {
            label: value
            for label, value in self.tensors
            if not (self.transform is not None and value is self.data[0])
            and not any(value.shape == data.shape and torch.equal(value, data.to(value.dtype)) for data in seen)
        }

    @cached_property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """Names of the dimensions of each latent, observed and deterministic site: its plates, then ``site_dim_i``."""
        named = {}
        for name, site in {**self.latents, **self.observed_sites}.items():
            labels = [f"{name}_dim_{i}" for i in range(len(site.shape))]
            for plate in site.plates:
                labels[len(site.batch_shape) + plate.dim] = plate.name
            named[name] = tuple(labels)
        return named | {n: tuple(f"{n}_dim_{i}" for i in range(len(s))) for n, s in self.deterministic.items()}

    @cached_property
    def coords(self) -> dict[str, np.ndarray]:
        plates = [plate for site in self.sites for plate in site.plates if plate.name not in self._resized]
        return {plate.name: np.arange(plate.size) for plate in plates}

    @cached_property
    def finite(self) -> tuple[str, ...]:
        """Names of the latent sites with finitely many values."""
        return tuple(name for name, site in self.latents.items() if site.choices is not None)

    @cached_property
    def continuous(self) -> tuple[str, ...]:
        """Names of the latent sites with a continuous support."""
        return tuple(name for name, site in self.latents.items() if site.is_continuous)
