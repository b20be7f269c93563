"""A program and its guide, row by row: what each row hides is drawn, with log q of it and log p, for many draws at once.

The rows of a plate are independent, so that log p(x, z) and log q(z | x) are sums over rows; here they are vectors. A row is
repeated along dimension 0, so that a network sees one big batch. The guide runs once for all draws of a row, inside of one
more plate, where that gives the same density; else it is given repeated rows as well.

A ``poutine.scale`` weighs a term of an objective, as β does, and changes nothing of what a program draws: it is taken off.
Modules are in evaluation mode inside (dropout off), and as they were afterwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm import tqdm

from inference.contract import Guided, Programmed, Unsupported
from inference.density import Density
from inference.enumeration import Factor, eliminate, factors, plates_of
from inference.guides import Guide, is_drawn, is_plain
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program
from inference.screening import check_constants
from inference.sites import Site, is_statement
from inference.start import starting_values

__all__ = ["Rowwise", "Terms", "evaluating", "owner"]

_FEW = 5  # rows at which a program is looked at
_CERTIFIED = 3  # draws of each of them
_CHUNK, _CHUNK_ON_GPU = 2**21, 2**26  # numbers of data and latents, at all values of finite sites, evaluated at once
_BLOCK, _UNIT, _UNIT_ON_GPU = 128, 2**14, 2**18  # rows, and draws of rows, that are drawn at once
_PRECISION = {torch.float64: 1e-9, torch.float32: 1e-4}  # of log-densities that should be equal


class Terms(NamedTuple):
    """Log-densities of draws of rows, float64, (draw, row) each: log p(x, z), and log p(z)."""

    joint: Tensor
    prior: Tensor


class _Unscaled(Messenger):
    """Takes ``poutine.scale`` off, that of handlers inside."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 1.0


def owner(call: Any) -> Any:
    """The model object that a program is, or is a method of; None if it is a function."""
    return call if isinstance(call, (nn.Module, Programmed)) else getattr(call, "__self__", None)


@contextlib.contextmanager
def evaluating(*owners: Any) -> Iterator[None]:
    """Those that are modules are in evaluation mode inside, and as they were afterwards, part by part."""
    modules = [module for module in owners if isinstance(module, nn.Module)]
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, is_training in before:
            part.training = is_training


def _unscaled(call: Callable[..., Any]) -> Callable[..., Any]:
    def handled(*args: Any, **kwargs: Any) -> Any:
        with _Unscaled():
            return call(*args, **kwargs)

    return handled


def _half(index: Tensor) -> Tensor:
    """Half of the rows, the last first: what belongs to a row goes with it, and what belongs to none shows."""
    return index.flip(0)[: -(-len(index) // 2)]


class Rowwise:
    """A program and its guide at given data.

    Use it inside of ``running()``.

    Args:
        model: A Pyro program, or an object with the method ``model``.
        args: Its arguments, data first; a tensor with as many rows as the data is taken row by row.
        guide: A guide; None takes that of the model, if it has one.
        purpose: What needs rows, the subject of the sentences that refuse.
        needs_guide: Whether the sites that cannot be summed out are to be drawn from a guide.

    Attributes:
        program: The program at a few rows; its ``prepare`` is not called, so that a fitted model stays as it is.
        rows: Number of rows.
        sites: The sites that a draw has a value of.
        summed: Names of the finite sites that are summed out.

    Raises:
        TypeError: If the model is no program, or the guide none.
        ValueError: If the data are empty, do not fit the program, or lie outside its support.
        Unsupported: If a latent site belongs to no row, rows depend on one another, or there is no guide that fits.
    """

    def __init__(
        self,
        model: Callable[..., Any] | Programmed,
        args: Sequence[Any],
        guide: Callable[..., Any] | None = None,
        *,
        purpose: str,
        needs_guide: bool = True,
    ) -> None:
        if not callable(model) and not isinstance(model, Programmed):
            came = type(model).__name__
            raise TypeError(f"A program is a function, or an object with a method model, but this is a {came}.")
        self.purpose, self._model, self._own = purpose, model, owner(model)
        self.name = getattr(model, "__name__", type(model).__name__) if self._own is None else type(self._own).__name__
        given = [torch.as_tensor(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        if not given or not isinstance(given[0], Tensor) or not given[0].dim():
            came = f"a {type(given[0]).__name__}" if given else "missing"
            raise ValueError(f"x must be a tensor with rows along dimension 0, but is {came}.")
        self.rows = len(given[0])
        if not self.rows:
            raise ValueError("The data are empty: x has no rows.")
        if guide is None and isinstance(model, Guided):
            guide = model.guide
        self._call = guide if needs_guide else None
        if isinstance(self._call, type) or not (self._call is None or callable(self._call)):
            raise TypeError(f"guide= must be a fitted Pyro guide, but is {self._call!r}.")
        self._shapes = [tuple(arg.shape) for arg in given if isinstance(arg, Tensor)]
        is_row = [isinstance(arg, Tensor) and arg.dim() > 0 and len(arg) == self.rows for arg in given]
        few = min(self.rows, _FEW)
        with evaluating(self._own, owner(self._call)):
            self.program = self._looked_at([arg[:few] if row else arg for arg, row in zip(given, is_row)])
        self.program.check_rows(purpose)
        check_constants(self.program, purpose)
        self._plates = frozenset(self.program.row_plates)
        pairs = [(arg, row) for arg, row in zip(given, is_row) if isinstance(arg, Tensor)]
        self._data = [self.program._cast(arg) for arg, _ in pairs]
        self._is_row = [row for _, row in pairs]
        self._tiled: tuple[Tensor | None, tuple[int, int], list[Tensor]] = (None, (0, 0), [])
        self._axes = {name: self._axis(site) for name, site in self.program.latents.items()}
        unsummed = [name for name in self.program.latents if name not in self.program.finite]
        self.sites: dict[str, Site] = {name: self.program.latents[name] for name in unsummed}
        if unsummed and needs_guide and self._call is None:
            raise Unsupported(
                f"{purpose} draws '{unsummed[0]}' from a guide, but {self.name} has none. Give guide=, such as the encoder "
                "that was fitted with it, or take annealed_evidence, which needs none."
            )
        self._draws, self._nesting, self._is_plated = 1, self.program.nesting, True
        index = torch.arange(few, device=self.program.device)
        with self.running(0), torch.no_grad():
            if self._call is not None and unsummed:
                self._take_guide(self._call, index)
            self.summed = tuple(name for name in self.program.finite if name not in self.sites)
            self._certify(index)

    # ------------------------------------------------------------------------------ looking
    @contextlib.contextmanager
    def running(self, seed: int) -> Iterator[None]:
        """Random numbers from ``seed``, deterministic algorithms and modules in evaluation mode, all restored."""
        program = self.program
        modes = evaluating(self._own, owner(self._call))
        with modes, isolated(seed, program.device), reproducible(program.dtype, program.device), quiet():
            yield

    @contextlib.contextmanager
    def _naming_shapes(self, who: str) -> Iterator[None]:
        """Says what a network was given that could not take it."""
        try:
            yield
        except Unsupported:
            raise
        except ValueError as error:  # a program's own sentence, without the table of shapes that Pyro adds
            words = str(error).split("\nTrace Shapes")[0]
            few = min(self.rows, _FEW)
            raise ValueError(f"{words} (Seen at the first {few} rows of x, whose shape is {self._shapes[0]}.)") from error
        except (RuntimeError, IndexError) as error:
            words = f"{who} does not run on x of shape {self._shapes[0]}"
            if self._shapes[1:]:
                words += " with context of shape " + ", ".join(map(str, self._shapes[1:]))
            raise ValueError(f"{words}: {str(error).splitlines()[0]}") from error

    def _looked_at(self, args: list[Any]) -> Program:
        weights = list(self._own.parameters()) if isinstance(self._own, nn.Module) else []
        tensors = [*weights, *(arg for arg in args if isinstance(arg, Tensor))]
        floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        program = _unscaled(self._model.model if isinstance(self._model, Programmed) else self._model)
        program.__name__ = self.name
        dtype = floating[0] if floating else torch.get_default_dtype()
        with self._naming_shapes(self.name):
            return Program(program, tuple(args), dtype=dtype, device=tensors[0].device, follow=True)

    def _axis(self, site: Site) -> int:
        for plate in site.plates:
            if plate.name in self._plates:
                return len(site.batch_shape) + plate.dim
        raise Unsupported(
            f"{self.purpose} works row by row, but '{site.name}' of {self.name} is in no plate of the rows. Fix it, by "
            f"poutine.condition(model, data={{'{site.name}': ...}}), for log p(x | {site.name}); the evidence of all data "
            "together is that of inference.calibration.psis."
        )

    def _take_guide(self, call: Callable[..., Any], index: Tensor) -> None:
        """Looks at a guide at a few rows, and finds out how to run it."""
        unscaled = _unscaled(call)

        def plated(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate("_draws", self._draws, dim=-1 - self._nesting):
                return unscaled(*args, **kwargs)

        self._plain, self._wide = Guide(unscaled), Guide(plated)
        program = self.program
        with self._naming_shapes(f"The guide of {self.name}"):
            trace = self._plain.trace(program, data=self._at(index))
        self._plain.check(trace, program)
        nodes = {name: node for name, node in trace.nodes.items() if is_statement(node) and not node["is_observed"]}
        for name, node in nodes.items():
            if name not in program.latents:
                raise Unsupported(
                    f"The guide draws an auxiliary '{name}', so that its density of the sites of {self.name} is not known. "
                    "Use a guide that draws the sites themselves."
                )
            if not is_drawn(node):
                raise Unsupported(f"The guide puts all its mass for '{name}' on one point. Use a guide with a density.")
            if not is_plain(node):
                raise Unsupported(f"The guide masks '{name}', so that its density is not known. Leave that out.")
            came, site = tuple(node["value"].shape), program.latents[name]
            if came != tuple(site.shape):
                raise Unsupported(
                    f"The guide gives '{name}' the shape {came} at {len(index)} rows, but in {self.name} it is "
                    f"{tuple(site.shape)}. A guide must compute it from the rows that it is given."
                )
            dim = self._axes[name] - len(site.batch_shape)
            if node["log_prob"].dim() < -dim or node["log_prob"].shape[dim] != len(index):
                raise Unsupported(f"The guide draws '{name}' for all rows at once: put it into a plate of the rows.")
        self.sites = {name: site for name, site in program.latents.items() if name in nodes}
        self._nesting = max([program.nesting, *(len(node["fn"].batch_shape) for node in nodes.values())])
        self._is_plated = False
        values, _ = self.draw(index, _CERTIFIED)
        flat = self.log_q(values, index, _CERTIFIED)
        self._is_plated = True
        try:
            is_same = self._is_alike(self.log_q(values, index, _CERTIFIED), flat)
        except Exception:  # whatever a guide raises that was written for just these dimensions
            is_same = False
        self._is_plated = is_same
        half, part = _half(index), {}
        for name, value in values.items():
            axis = self._axes[name]
            part[name] = value.unflatten(axis, (_CERTIFIED, -1)).index_select(axis + 1, half).flatten(axis, axis + 1)
        if not self._is_alike(self.log_q(part, half, _CERTIFIED), flat[:, half]):
            raise Unsupported(f"The guide takes rows of {self.name} together: what it says of a row depends on the others.")

    def _is_alike(self, one: Tensor, other: Tensor) -> bool:
        precision = _PRECISION.get(self.program.dtype, 1e-2)
        return one.shape == other.shape and torch.allclose(one, other, rtol=precision, atol=100 * precision, equal_nan=True)

    def _certify(self, index: Tensor) -> None:
        """Holds at a few rows what everything rests on: rows are independent, and the sum over finite sites is right."""
        half, constants = _half(index), []
        for _ in range(2):
            values = {name: value for name, value in self.program.sample_prior().items() if name in self.sites}
            part = {name: value.index_select(self._axes[name], half) for name, value in values.items()}
            whole, constant = self._terms(values, self._at(index))
            constants.append(constant)
            if not self._is_alike(self._terms(part, self._at(half))[0].joint, whole.joint[half]):
                raise Unsupported(
                    f"Rows of {self.name} depend on one another, or an argument that has as many rows as x is no table of "
                    f"them, so that {self.purpose} cannot take them apart."
                )
        if not self._is_alike(*constants):
            raise Unsupported(
                f"A statement of {self.name} outside of the plate of the rows depends on what the rows hide, so that "
                f"{self.purpose} cannot take them apart. Put it into the plate."
            )
        if self.summed:
            values = starting_values(self.program, _CERTIFIED, most=1)
            Density(self.program, rung="vmapped").certify(self.summed, values, "Let the guide draw them.")

    def check_data(self) -> None:
        """Refuses data that lie outside of a support which does not depend on anything hidden.

        Raises:
            ValueError: With the first place.
        """
        for index in torch.arange(self.rows, device=self.program.device).split(self.chunk):
            trace = self.program.trace({}, data=self._at(index), evaluated=False)
            for name, site in self.program.observed_sites.items():
                node = trace.nodes[name]
                if any(isinstance(bound, Tensor) for bound in vars(site.support).values()):
                    continue
                value, mask = node["value"], node["mask"]
                good = node["fn"].support.check(value)
                missing = value.isnan()
                good = good | (missing.flatten(value.dim() - site.event_dim).any(-1) if site.event_dim else missing)
                bad = (~good if not isinstance(mask, Tensor) else ~good & mask).nonzero()
                if len(bad) and mask is not False:
                    raise ValueError(
                        f"Site '{name}' is {site.family}, but data lie outside the support {site.support}; the first rows "
                        f"with such are near row {int(index[0])}."
                    )

    # ------------------------------------------------------------------------------ data
    @property
    def chunk(self) -> int:
        """How many rows a network is given at once, unless it is told."""
        program = self.program
        numbers = [leaf[0].numel() for leaf, row in zip(self._data, self._is_row) if row]
        numbers += [site.shape.numel() // len(self.program.data[0]) for site in program.latents.values()]
        choices = 1
        for name in self.summed:
            table = program.latents[name].choices
            choices *= 1 if table is None else len(table)
        most = _CHUNK_ON_GPU if program.device.type == "cuda" else _CHUNK
        return max(1, most // (choices * (1 + sum(numbers))))

    def blocks(self, rows: int = _BLOCK, progress: bool = False) -> Iterator[Tensor]:
        """Indices of rows that are taken together, with a bar if ``progress``."""
        with tqdm(total=self.rows, desc=f"{self.purpose} of {self.name}", disable=not progress, leave=False) as bar:
            for index in torch.arange(self.rows, device=self.program.device).split(rows):
                yield index
                bar.update(len(index))

    def unit(self, rows: int) -> int:
        """How many draws of this many rows are made at once; it depends on nothing that a caller may choose."""
        return max(1, (_UNIT_ON_GPU if self.program.device.type == "cuda" else _UNIT) // rows)

    def _at(self, index: Tensor) -> list[Tensor]:
        return [leaf[index] if row else leaf for leaf, row in zip(self._data, self._is_row)]

    def _repeated(self, index: Tensor, begin: int, count: int) -> list[Tensor]:
        """The data of draws ``begin`` … ``begin + count`` of rows ``index``, all rows of a draw before the next draw."""
        known, place, data = self._tiled
        if known is not index or place != (begin % len(index), count):
            repeated = torch.arange(begin, begin + count, device=index.device) % len(index)
            data = self._at(index[repeated])
            self._tiled = index, (begin % len(index), count), data
        return data

    # ------------------------------------------------------------------------------ densities
    def axis(self, name: str) -> int:
        """The dimension of a site's value along which the rows lie."""
        return self._axes[name]

    def checked(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of all rows, site to value, in the type of the program.

        Raises:
            ValueError: If one is missing, or has another shape.
        """
        found = {}
        for name, site in self.sites.items():
            shape = [*site.shape]
            shape[self._axes[name]] = self.rows
            if name not in values or [*values[name].shape] != shape:
                came = f"have the shape {tuple(values[name].shape)}" if name in values else "are missing"
                raise ValueError(f"The values of '{name}' {came}, but must be {tuple(shape)}.")
            found[name] = self.program._cast(values[name])
        return found

    def draw_prior(self, index: Tensor, count: int) -> dict[str, Tensor]:
        """Draws of what rows hide from the prior, as ``draw`` returns them."""
        trace = self.program.trace({}, data=self._repeated(index, 0, count * len(index)), evaluated=False)
        return {name: trace.nodes[name]["value"] for name in self.sites}

    def draw(self, index: Tensor, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of what rows hide from the guide.

        Args:
            index: The rows, (row,).
            count: Draws of each.

        Returns:
            Site to value, of which the rows are ``count`` times those of ``index``; and log q, (draw, row), float64.
        """
        return self._guided(index, count, {})

    def log_q(self, values: Mapping[str, Tensor], index: Tensor, count: int) -> Tensor:
        """log q(z | x) of values as ``draw`` returns them, (draw, row), float64."""
        return self._guided(index, count, values)[1]

    def _guided(self, index: Tensor, count: int, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        if not self.sites:
            return {}, torch.zeros((count, len(index)), dtype=torch.float64, device=index.device)
        shapes = {name: [*site.shape] for name, site in self.sites.items()}
        for name, shape in shapes.items():
            shape[self._axes[name]] = len(index)
        if not self._is_plated:
            trace = self._plain.trace(self.program, values, self._repeated(index, 0, count * len(index)))
            drawn = {name: trace.nodes[name]["value"] for name in self.sites}
        else:
            self._draws, wide = count, {}
            for name, value in values.items():
                axis, batch = self._axes[name], len(self.sites[name].batch_shape)
                value = value.unflatten(axis, (count, -1)).movedim(axis, 0)
                wide[name] = value.reshape(count, *(1,) * (self._nesting - batch), *shapes[name])
            trace = self._wide.trace(self.program, wide, self._at(index))
            drawn = {}
            for name, shape in shapes.items():
                value, axis = trace.nodes[name]["value"].reshape(count, *shape), self._axes[name]
                drawn[name] = value.movedim(0, axis).flatten(axis, axis + 1)
        log_q = torch.zeros((), dtype=torch.float64, device=index.device)
        for name in self.sites:
            log_q = log_q + self._rows_of(trace.nodes[name]["log_prob"].double(), name, count)
        return drawn, log_q

    def _rows_of(self, table: Tensor, name: str, count: int) -> Tensor:
        """Log-probabilities of a guide's site, added up to (draw, row)."""
        table = table.movedim(self._axes[name] - len(self.sites[name].batch_shape), -1)
        if not self._is_plated:
            return table.reshape(-1, table.shape[-1]).sum(0).unflatten(0, (count, -1))
        return table.reshape(count, -1, table.shape[-1]).sum(1)

    def terms(self, values: Mapping[str, Tensor], index: Tensor, count: int, chunk: int | None = None) -> Terms:
        """log p(x, z) and log p(z), the finite sites that a draw lacks summed out.

        With finite sites c, log p(z) = log Σ_c p(z, c): the difference of the two is log p(x | z).

        Args:
            values: As ``draw`` returns them.
            index: The rows, (row,).
            count: Draws of each.
            chunk: How many rows a network is given at once; None: see ``chunk``.
        """
        size, parts = count * len(index), []
        step = chunk or self.chunk
        step = step // len(index) * len(index) or step  # all passes see the same data then
        for begin in range(0, size, step):
            length = min(step, size - begin)
            part = {name: value.narrow(self._axes[name], begin, length) for name, value in values.items()}
            parts.append(self._terms(part, self._repeated(index, begin, length))[0])
        return Terms(*(torch.cat(column).unflatten(0, (count, -1)) for column in zip(*parts)))

    def _terms(self, values: Mapping[str, Tensor], data: list[Tensor]) -> tuple[Terms, Tensor]:
        """Terms of rows, (row,), and the log-probability of what belongs to no row."""
        program = copy.copy(self.program)
        program.data = data  # how wide a table may be follows from them
        found = factors(program, values, self.summed)
        joint, constant = self._total(found, data)
        hidden = [factor for factor in found if factor.site in program.latents]
        return Terms(joint, self._total(hidden, data)[0]), constant

    def _total(self, found: list[Factor], data: list[Tensor]) -> tuple[Tensor, Tensor]:
        left, _ = eliminate(found, plates_of(self.program, self.summed), self._plates)
        rows = next(len(leaf) for leaf, row in zip(data, self._is_row) if row)
        total = torch.zeros(rows, dtype=torch.float64, device=data[0].device)
        constant = torch.zeros((), dtype=torch.float64, device=data[0].device)
        for factor in left:
            if factor.dims:
                total = total + factor.table.double().expand(rows)
            else:
                constant = constant + factor.table.double()
        return total, constant
