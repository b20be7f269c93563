"""Long axes of a recorded graph, projected onto the span of the constants along them.

Data have rows, n = 1, …, N, and much of what a log-density does with them is linear: x_n · β, y_n − μ, a residual divided
by a standard deviation. All of it stays in the span of the columns of the data and the vector of ones. With an orthonormal
basis q_1, …, q_J of that span, v_n = Σ_j c_j q_jn, the same operations are done on the J coefficients, and

    Σ_n v_n = Σ_j c_j (q_j · 1),    Σ_n u_n v_n = Σ_j b_j c_j,    Aᵀ v = (coefficients of A)ᵀ c

Sums of squares over the rows, and the gradients of such sums, then cost J and not N: what X'X and X'y do for a regression,
for any program, and as stable as its QR decomposition: residuals are never a difference of sums of squares.

References:
    G. Golub and C. Van Loan, Matrix Computations (2013), section 5.3: least squares by orthogonal factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from inference.graphs import arguments, changing, constant, operation
from inference.recording import Draft, Meta

__all__ = ["Form", "project"]

_SHORTEST = 64  # axis that is looked at
_GAIN = 4  # times that the axis must be longer than the span of the constants
_WIDEST = 256  # span
_LARGEST = 2**26  # numbers in the constants along the axis
_ROWS, _FEW = 2**13, 2**9  # rows that are compared at once, and that are looked at first

_aten = torch.ops.aten


class Form(NamedTuple):
    """What a tensor is along its long axis: flat + Σ_j linear_j q_j + squares.

    Attributes:
        axis: Which dimension is the long one, counted from the end: -1, -2, …
        flat: What is the same all along; the axis has size 1.
        linear: Coefficients; the axis has size J.
        square: The axis has size J, and the sum over it is that over the rows. Nothing else is known of the rows.
    """

    axis: int
    flat: Any = None
    linear: Any = None
    square: Any = None

    @property
    def degree(self) -> int:
        """0, 1 or 2: as a polynomial of what is long."""
        return 2 if self.square is not None else 1 if self.linear is not None else 0

    def map(self, function: Callable[[Any], Any], axis: int | None = None) -> Form:
        """A linear function of all parts."""
        parts = [None if part is None else function(part) for part in self[1:]]
        return Form(self.axis if axis is None else axis, *parts)


def project(graph: Draft) -> bool:
    """Sums along long axes by coefficients, in place, wherever that is possible; whether it was anywhere."""
    lengths: dict[int, None] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            lengths |= dict.fromkeys(size for size in constant(graph, node).shape if size >= _SHORTEST)
    return any([_Projection(graph, length).run() for length in lengths])


class _Projection:
    """One length of axes."""

    def __init__(self, graph: Draft, length: int) -> None:
        self.graph, self.length = graph, length
        self.unsteady = changing(graph)
        self.forms: dict[fx.Node, Form] = {}
        self.vectors: dict[Any, fx.Node] = {}
        self.first = next(node for node in graph.graph.nodes if node.op != "placeholder")
        self.tables: dict[fx.Node, Tensor] = {}
        self.is_done = False

    def run(self) -> bool:
        if not self._has_basis():
            return False
        for node in list(self.graph.graph.nodes):
            if node.op == "get_attr":
                value = constant(self.graph, node)
                node.meta["val"] = Meta(value.shape, value.dtype, value.device)
                self._enter(node)
            elif node.op == "call_function" and node not in self.unsteady and _is_real(node.meta.get("val")):
                with self.graph.graph.inserting_after(node):
                    self.place = node
                    form = self._form(node)
                if form is not None:
                    self.forms[node] = form
        self.graph.graph.eliminate_dead_code()
        return self.is_done

    # -------------------------------------------------------------------------------------------- the constants
    def _has_basis(self) -> bool:
        """Finds the span of the constants; whether it is small."""
        tables = []
        for node in self.graph.graph.nodes:
            if node.op != "get_attr" or node in self.unsteady or not any(map(_is_followed, node.users)):
                continue
            value = constant(self.graph, node)
            if (
                not value.is_floating_point()
                or not value.numel()
                or list(value.shape).count(self.length) != 1
                or not bool(value.isfinite().all())
            ):
                continue
            axis = value.shape.index(self.length)
            for dim in range(value.dim()):
                first = value.narrow(dim, 0, 1)
                if dim != axis and bool((value == first).all()):
                    value = first
            self.tables[node] = value
            if not bool((value == value.narrow(axis, 0, 1)).all()):
                tables.append(value.movedim(axis, 0).reshape(self.length, -1))
        most = min(_WIDEST, self.length // _GAIN)
        if not tables or sum(table.shape[1] for table in tables) > _LARGEST // self.length:
            return False
        for every in (-(-self.length // _FEW), 1):  # columns that differ in a few rows differ
            kept = _first_of_each([table[::every] for table in tables])
            if 1 + sum(map(len, kept)) > most:
                return False
        columns = torch.cat([table[:, places].double() for table, places in zip(tables, kept, strict=True)], 1)
        self.basis = torch.linalg.qr(torch.cat([torch.ones_like(columns[:, :1]), columns], 1)).Q  # (N, J)
        self.ones = self.basis.sum(0)
        return True

    def _enter(self, node: fx.Node) -> None:
        """The form of a constant."""
        table = self.tables.get(node)
        if table is None:
            return
        value, axis = constant(self.graph, node), table.shape.index(self.length) - table.dim()
        with self.graph.graph.inserting_after(node):
            if bool((table == table.narrow(axis, 0, 1)).all()):
                self.forms[node] = Form(axis, flat=self._constant(table.narrow(axis, 0, 1)))
                return
            coefficients = torch.tensordot(table.double(), self.basis, ([axis], [0])).movedim(-1, axis)
            sizes = [*value.shape]
            sizes[axis] = self.basis.shape[1]
            self.forms[node] = Form(axis, linear=self._constant(coefficients.to(value.dtype).expand(sizes)))

    def _constant(self, value: Tensor) -> fx.Node:
        name = f"_projected_{self.length}_{len(self.graph._buffers)}"
        self.graph.register_buffer(name, value.contiguous(), persistent=False)
        node = self.graph.graph.get_attr(name)
        node.meta["val"] = Meta(value.shape, value.dtype, value.device)
        return node

    def _vector(self, values: Tensor, form: Form, like: fx.Node) -> fx.Node:
        """Numbers along an axis, as a constant that multiplies others."""
        key = form.axis, _meta(like).dtype, values.shape
        if key not in self.vectors:
            with self.graph.graph.inserting_before(self.first):
                made = values.to(_meta(like).dtype).reshape(-1, *(1,) * (-form.axis - 1))
                self.vectors[key] = self._constant(made)
        return self.vectors[key]

    # ------------------------------------------------------------------------------------------- new operations
    def _do(self, operation: Any, *args: Any) -> fx.Node:
        """A new operation, after the node that is looked at."""
        with self.graph.graph.inserting_after(self.place):
            node = self.graph.graph.call_function(operation, args)
        example = fx.map_arg(args, lambda n: torch.empty(n.meta["val"].shape, dtype=n.meta["val"].dtype, device="meta"))
        result = operation(*example)
        device = next(n.meta["val"].device for n in node.all_input_nodes)
        node.meta["val"] = Meta(result.shape, result.dtype, device)
        self.place = node
        return node

    def _full(self, part: fx.Node, shape: Sequence[int], axis: int) -> fx.Node:
        """A part with all dimensions, for a value of this shape."""
        sizes, own = [*shape], _meta(part).shape
        sizes[axis] = own[axis] if -axis <= len(own) else 1
        return part if [*_meta(part).shape] == sizes else self._do(_aten.expand.default, part, sizes)

    def _lifted(self, form: Form) -> Form:
        """The same with what is flat among what is linear."""
        if form.flat is None:
            return form
        one = self._vector(self.ones, form, form.flat)
        rising = self._do(_aten.mul.Tensor, form.flat, one)
        return form._replace(flat=None, linear=self._plus(form.linear, rising))

    def _plus(self, left: Any, right: Any) -> Any:
        if left is None or right is None:
            return right if left is None else left
        return self._do(_aten.add.Tensor, left, right)

    # ------------------------------------------------------------------------------------ what an operation does
    def _form(self, node: fx.Node) -> Form | None:
        known = [source for source in node.all_input_nodes if source in self.forms]
        if not known and node.target is not _aten.expand.default:
            return None
        if node.kwargs:
            return None
        shape, target, args = _meta(node).shape, operation(node), arguments(node)
        if target in _SUMS:
            return self._sum(node, args)
        if target in _PRODUCTS:
            return self._product(node, *args)
        if target is _aten.expand.default:
            return self._expand(node, args[0], shape)
        if target in _MOVES:
            return self._move(node, args)
        return self._pointwise(node, target, args)

    def _operand(self, value: Any, axis: int) -> Form | None:
        """An operand of an element by element operation, along this axis of the result."""
        if not isinstance(value, fx.Node):
            return Form(axis, flat=value)
        if value in self.forms:
            form = self.forms[value]
            return form if form.axis == axis else None
        shape = _meta(value).shape
        return Form(axis, flat=value) if -axis > len(shape) or shape[axis] == 1 else None

    def _pointwise(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> Form | None:
        if torch.Tag.pointwise not in getattr(target, "tags", ()):
            return None
        axes = {self.forms[source].axis for source in node.all_input_nodes if source in self.forms}
        if len(axes) > 1:
            return None
        (axis,) = axes
        if -axis > len(_meta(node).shape) or _meta(node).shape[axis] != self.length:
            return None
        operands = [self._operand(value, axis) for value in args]
        if any(form is None for form in operands):
            return None
        forms: list[Form] = operands  # type: ignore[assignment]
        if all(form.degree == 0 for form in forms):
            flats = [form.flat for form in forms]
            flat = self._do(target, *flats)
            lead = len(_meta(node).shape) - len(_meta(flat).shape)
            return Form(axis, flat=flat) if lead >= 0 and -axis <= len(_meta(flat).shape) else None
        if target in (_aten.add.Tensor, _aten.sub.Tensor) and len(forms) == 2:
            left, right = forms
            if target is _aten.sub.Tensor:
                right = right.map(lambda part: -part if not isinstance(part, fx.Node) else self._do(_aten.neg.default, part))
            return self._added(left, right)
        if target in (_aten.mul.Tensor, _aten.mul.Scalar):
            return self._multiplied(*forms)
        if target in (_aten.div.Tensor, _aten.div.Scalar) and len(forms) == 2 and forms[1].degree == 0:
            return forms[0].map(lambda part: self._do(_aten.div.Tensor, part, forms[1].flat))
        if target is _aten.neg.default:
            return forms[0].map(lambda part: self._do(_aten.neg.default, part))
        if target is _aten.pow.Tensor_Scalar and args[1] == 1:
            return forms[0]
        if target is _aten.pow.Tensor_Scalar and args[1] == 2:
            return self._multiplied(forms[0], forms[0])
        return None

    def _added(self, left: Form, right: Form) -> Form | None:
        parts = []
        for one, other in zip(left[1:], right[1:], strict=True):
            if isinstance(one, fx.Node) or one is None:
                parts.append(self._plus(one, other))
            else:
                parts.append(one if other is None else self._plus(other, one))
        flat = parts[0]
        if flat is not None and not isinstance(flat, fx.Node):  # a number beside what is not flat
            like = parts[1] if parts[1] is not None else parts[2]
            meta = _meta(like)
            with self.graph.graph.inserting_before(self.first):
                parts[0] = self._constant(torch.full((1,) * -left.axis, float(flat), dtype=meta.dtype, device=meta.device))
        return Form(left.axis, *parts)

    def _multiplied(self, left: Form, right: Form) -> Form | None:
        if left.degree + right.degree > 2:
            return None
        if left.degree == 0:
            left, right = right, left
        if right.degree == 0:
            return left.map(lambda part: self._do(_aten.mul.Tensor, part, right.flat))
        same = left is right
        left = self._lifted(left)
        right = left if same else self._lifted(right)
        return Form(left.axis, square=self._do(_aten.mul.Tensor, left.linear, right.linear))

    def _sum(self, node: fx.Node, args: tuple[Any, ...]) -> Form | None:
        source = args[0]
        form, shape = self.forms[source], _meta(source).shape
        dims = [*range(len(shape))] if len(args) < 2 or not args[1] else [dim % len(shape) for dim in args[1]]
        keeps = len(args) > 2 and bool(args[2])
        own = len(shape) + form.axis
        if own not in dims:
            axis = form.axis if keeps else form.axis + sum(dim > own for dim in dims)
            return form.map(
                lambda part: self._do(_aten.sum.dim_IntList, self._full(part, shape, form.axis), dims, keeps), axis
            )
        total = None
        if form.linear is not None:
            one = self._vector(self.ones, form, form.linear)
            form = form._replace(linear=None, square=self._plus(form.square, self._do(_aten.mul.Tensor, form.linear, one)))
        for part, times in ((form.flat, self.length), (form.square, 1)):
            if part is not None:
                found = self._do(_aten.sum.dim_IntList, self._full(part, shape, form.axis), dims, keeps)
                total = self._plus(total, found if times == 1 else self._do(_aten.mul.Tensor, found, float(times)))
        assert isinstance(total, fx.Node)
        self._replace(node, total)
        return None

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        assert _meta(by)[:2] == _meta(node)[:2], (_meta(by), _meta(node))
        node.replace_all_uses_with(by)
        self.is_done = True

    def _product(self, node: fx.Node, left: fx.Node, right: fx.Node) -> Form | None:
        """A matrix product, along the axis or beside it."""
        one, other = self.forms.get(left), self.forms.get(right)
        lengths = [*_meta(left).shape].count(self.length) + [*_meta(right).shape].count(self.length)
        if one is not None and one.axis == -1 and other is not None and other.axis == -2:
            if one.degree > 1 or other.degree > 1:
                return None
            parts = [
                self._full(self._lifted(form).linear, _meta(source).shape, form.axis)
                for form, source in ((one, left), (other, right))
            ]
            self._replace(node, self._do(operation(node), *parts))
            return None
        if lengths != 1:
            return None
        if one is not None and one.axis == -2:
            full = one.map(lambda part: self._full(part, _meta(left).shape, -2))
            return full.map(lambda part: self._do(operation(node), part, right))
        if other is not None and other.axis == -1:
            full = other.map(lambda part: self._full(part, _meta(right).shape, -1))
            return full.map(lambda part: self._do(operation(node), left, part))
        return None

    def _expand(self, node: fx.Node, source: fx.Node, shape: Sequence[int]) -> Form | None:
        form = self.forms.get(source)
        if form is not None:
            return form.map(lambda part: self._full(part, shape, form.axis)) if shape[form.axis] == self.length else None
        old = [1] * (len(shape) - len(_meta(source).shape)) + [*_meta(source).shape]
        grown = [i for i, (a, b) in enumerate(zip(old, shape, strict=True)) if a != b and b == self.length]
        if len(grown) != 1:
            return None
        sizes = [*shape]
        sizes[grown[0]] = 1
        same = [*_meta(source).shape] == sizes
        return Form(grown[0] - len(shape), flat=source if same else self._do(_aten.expand.default, source, sizes))

    def _move(self, node: fx.Node, args: tuple[Any, ...]) -> Form | None:
        """What gives the same numbers in other places: views of all kinds."""
        source, shape, new = args[0], _meta(args[0]).shape, _meta(node).shape
        form = self.forms[source]
        own = len(shape) + form.axis
        target = operation(node)
        if target in (_aten.permute.default, _aten.transpose.int, _aten.t.default):
            order = [*range(len(shape))]
            if target is _aten.permute.default:
                order = [dim % len(shape) for dim in args[1]]
            else:
                first, second = (args[1] % len(shape), args[2] % len(shape)) if len(args) > 1 else (0, len(shape) - 1)
                order[first], order[second] = order[second], order[first]
            axis = order.index(own) - len(new)
            return form.map(lambda part: self._do(_aten.permute.default, self._full(part, shape, form.axis), order), axis)
        places = [i for i, size in enumerate(new) if size == self.length and math.prod(new[:i]) == math.prod(shape[:own])]
        if len(places) != 1 or math.prod(new) != math.prod(shape):
            return None
        axis = places[0] - len(new)

        def seen(part: fx.Node) -> fx.Node:
            full = self._full(part, shape, form.axis)
            sizes = [*new]
            sizes[axis] = _meta(full).shape[form.axis]
            return full if [*_meta(full).shape] == sizes else self._do(_aten.reshape.default, full, sizes)

        return form.map(seen, axis)


_SUMS, _PRODUCTS = {_aten.sum.dim_IntList, _aten.sum.default}, {_aten.mm.default, _aten.bmm.default}
_MOVES = {
    _aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.view.default, _aten._unsafe_view.default,
    _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default, _aten.reshape.default,
}  # fmt: skip


def _is_followed(node: fx.Node) -> bool:
    """Whether an operation may have a form, so that what it is done to is worth a basis."""
    if node.op != "call_function":
        return False
    target = operation(node)
    is_linear = target in _MOVES or target in _SUMS or target in _PRODUCTS or target is _aten.expand.default
    return is_linear or torch.Tag.pointwise in getattr(target, "tags", ())


def _first_of_each(tables: Sequence[Tensor]) -> list[Tensor]:
    """The columns of some tables, (row, column), of each table those that no column before them is equal to.

    Columns are told apart by sums of their mixed bits with weights that are random but always the same, modulo 2⁶⁴.
    """
    weights = torch.randint(2**62, (len(tables[0]), 1), generator=torch.Generator().manual_seed(0)) * 2 + 1
    sums = []
    for table in tables:
        own = weights.to(table.device)
        parts = zip(table.split(_ROWS), own.split(_ROWS), strict=True)
        sums.append(torch.stack([(_mixed(part) * weight).sum(0) for part, weight in parts]).sum(0).cpu())
    first = np.unique(torch.cat(sums).numpy(), return_index=True)[1]
    found, offset = [], 0
    for table in tables:
        places = np.sort(first[(first >= offset) & (first < offset + table.shape[1])]) - offset
        found.append(torch.from_numpy(places).to(table.device))
        offset += table.shape[1]
    return found


def _mixed(numbers: Tensor) -> Tensor:
    """Integers that each depend on all bits of a number, its sign among them, as in Vigna's splitmix64."""
    bits = numbers.double().contiguous().view(torch.int64)
    bits = (bits ^ (bits >> 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31)


def _meta(node: fx.Node) -> Meta:
    found: Meta = node.meta["val"]
    return found


def _is_real(meta: Meta | None) -> bool:
    return meta is not None and meta.dtype.is_floating_point
