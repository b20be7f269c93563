"""Handlers and contexts that let an unmodified Pyro program be run on given values, quietly and without a trace.

Nothing here changes a global for longer than a ``with`` block.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Self

import numpy as np
import pyro
import pyro.ops.special
import torch
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, biject_to, transform_to
from torch.nn.functional import logsigmoid, softplus
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes

from inference.contract import Surrogate, Unnormalised, Unsupported

__all__ = [
    "Arithmetic",
    "Drawing",
    "Gradients",
    "Rescale",
    "Substitute",
    "Table",
    "Weights",
    "base",
    "isolated",
    "on_device",
    "quiet",
    "random_state",
    "refill",
    "reproducible",
    "set_random_state",
    "start_flat",
    "under",
]


def base(distribution: Any) -> Any:
    """The distribution inside ``Independent``, ``expand`` and ``mask`` wrappers."""
    while type(distribution).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        distribution = distribution.base_dist
    return distribution


def start_flat(distribution: Any) -> Tensor:
    """A starting value of a distribution that cannot be sampled: uniform on (-2, 2) after unconstraining."""
    transform = biject_to(distribution.support)
    shape = transform.inverse_shape(distribution.shape())
    return transform(torch.empty(shape).uniform_(-2.0, 2.0))


class Substitute(Messenger):
    """Gives sites their values, and starts priors that cannot be drawn from. A program's own marks for enumeration are
    overruled.

    Args:
        values: Site to value; a latent site that is not named is sampled, an observed one keeps its data.
        resampled: Observed sites that are sampled anew (posterior prediction).
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        resampled: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.values, self.resampled = values, frozenset(resampled)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        msg["infer"] = {key: value for key, value in msg["infer"].items() if key != "enumerate"}
        if name in self.resampled:
            if isinstance(msg["value"], Tensor):  # data without a plate may be wider than their distribution
                fn, value = msg["fn"], msg["value"]
                msg["fn"] = fn.expand(torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim]))
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        elif msg["is_observed"]:
            if not isinstance(msg["value"], Tensor):
                came = type(msg["value"]).__name__
                raise TypeError(f"The data of site '{name}' are a {came}, but must be a tensor. Pass torch.as_tensor(...).")
            is_data = not msg["infer"].get("_deterministic")
            if is_data and msg["value"].dtype == torch.bool:
                family = type(base(msg["fn"])).__name__
                raise ValueError(
                    f"Site '{name}' is {family}, which has numbers for values, but its data are bool. Convert them first, "
                    "for example by x.double()."
                )
            if is_data and name in self.values:
                msg["value"] = self.values[name]
        elif name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        elif isinstance(base(msg["fn"]), ImproperUniform):
            msg["value"], msg["done"] = start_flat(msg["fn"]), True
        elif isinstance(base(msg["fn"]), Unnormalised):
            msg["value"], msg["done"] = base(msg["fn"]).rough_draw(), True


class Gradients(Messenger):
    """Lets distributions of which only the gradient is known stand for themselves, by a surrogate."""

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], Surrogate):
            msg["fn"] = msg["fn"].gradients()


class Table(dict[str, Tensor]):
    """Weights of ``pyro.param`` statements: name to unconstrained leaf, and the bijections to what the program sees."""

    def __init__(self) -> None:
        super().__init__()
        self.transforms: dict[str, Any] = {}

    def frozen(self, dtype: torch.dtype | None = None) -> Table:
        """The same weights, without gradients, and in another type if one is given."""
        other = Table()
        other.update({name: leaf.detach().to(dtype) for name, leaf in self.items()})
        other.transforms = self.transforms
        return other

    def seen(self, name: str, leaf: Tensor) -> Tensor:
        """A weight as the program sees it."""
        return self.transforms[name](leaf) if name in self.transforms else leaf


class Weights(Messenger):
    """Keeps ``pyro.param`` and ``pyro.module`` out of Pyro's global store: the weights live in ``table``.

    Args:
        table: Filled at the first run.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def _pyro_param(self, msg: Any) -> None:
        if getattr(msg["fn"], "__self__", None) is None:
            return  # a weight that a PyroModule holds itself; pyro.param would call a method of the store
        name, *initial = msg["args"]
        constraint = msg["kwargs"].get("constraint", torch.distributions.constraints.real)
        transform = transform_to(constraint)  # as Pyro's store: a weight needs no density, and so no bijection
        if name not in self.table:
            value = initial[0]() if initial and callable(initial[0]) else (initial[0] if initial else None)
            if value is None:
                raise ValueError(f"pyro.param('{name}') has no initial value: give one as its second argument.")
            if isinstance(value, torch.nn.Parameter):
                self.table[name] = value
            else:
                self.table[name] = transform.inv(value.detach()).clone().requires_grad_()
                self.table.transforms[name] = transform
        msg["value"], msg["done"] = self.table.seen(name, self.table[name]), True


class Rescale(Messenger):
    """Scales the sites of the plates that hold the rows, when the program sees a mini-batch of them.

    Args:
        plates: Names of the plates that run over the rows.
        scale: Rows in all by rows in the batch.
    """

    def __init__(self, plates: Collection[str], scale: float) -> None:
        super().__init__()
        self.plates, self.scale = frozenset(plates), scale

    def _pyro_sample(self, msg: Any) -> None:
        if any(frame.name in self.plates for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.scale


class Arithmetic(TorchFunctionMode):
    """Kindnesses to a program inside a run.

    Floating tensors of several types are widened to the widest, so that float32 constants of the program mix with the
    float64 values of the run (torch would let 0-dimensional float64 times float32 be float32). A matrix that has no
    Cholesky factor gives NaN, which is a rejected proposal, instead of an error that ends all chains. ``x[mask] = 0``,
    which ``vmap`` refuses and torch's own Multinomial does, becomes ``masked_fill_``. A scalar finite site may be an index,
    and ``one_hot`` takes finite sites, if it is told how many values they have.
    A program that writes into tensors of its own, ``rate = torch.zeros(n); rate[i] = ...``, gets them with the chains'
    axis, which ``vmap`` would not give to a constant.

    Args:
        widest: Most entries of a tensor; None sets no limit.
        zero: A 0-dimensional zero that has the axes of the chains, for a program that writes; else None.

    Attributes:
        has_written: Whether the program has written one tensor into another.
        expanded: What was expanded by the identity of what it was expanded to, which it keeps alive; see ``origin``.
    """

    def __init__(self, widest: int | None = None, zero: Tensor | None = None) -> None:
        super().__init__()
        self.widest, self.zero = widest, zero
        self.has_written = False
        self.expanded: dict[int, tuple[Tensor, Tensor]] = {}

    def origin(self, tensor: Tensor) -> Tensor:
        """What a tensor was before plates or broadcasting expanded it: a gradient need not be as large as they made it."""
        while id(tensor) in self.expanded:
            tensor = self.expanded[id(tensor)][1]
        return tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.linalg.cholesky, torch.cholesky, torch.Tensor.cholesky) and not kwargs and len(args) == 1:
            factor, failed = torch.linalg.cholesky_ex(args[0])
            return torch.where((failed > 0)[..., None, None], torch.nan, factor)
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            return _picked(*args)
        if name == "squeeze" and not args[0].dim() and args[1:] in ((0,), (-1,)):
            return args[0]  # torch allows it, vmap does not
        if name == "gather" and not kwargs and args[0].dim() == 1 and args[2].dim() != 1:
            return _picked(args[0], args[2])  # an enumerated index has dimensions that the table lacks
        if name == "one_hot" and (classes := args[1] if len(args) > 1 else (kwargs or {}).get("num_classes", -1)) > 0:
            # torch looks whether the labels fit, which vmap refuses
            return (args[0].unsqueeze(-1) == torch.arange(classes, device=args[0].device)).long()
        if name == "__setitem__":
            return self._write(func, *args)
        if name == "binary_cross_entropy_with_logits" and _is_elementwise(kwargs or {}) and args[1].is_floating_point():
            return (1.0 - args[1]) * args[0] - _LogSigmoid.apply(args[0])
        if name == "expand":
            wide = func(*args, **(kwargs or {}))
            self.expanded[id(wide)] = wide, args[0]
            return wide
        if name == "broadcast_tensors":
            wider = func(*args)
            self.expanded |= {id(wide): (wide, arg) for wide, arg in zip(wider, args, strict=True) if wide is not arg}
            return wider
        if name in _WRITES:
            self.has_written = True
        if self.zero is not None and name in _MAKES:
            made = func(*args, **(kwargs or {}))
            return made + self.zero.to(made.dtype) if made.dtype != torch.bool else made | (self.zero != 0)
        if not name.endswith("_") or name.endswith("__"):
            tensors = [leaf for leaf in args if isinstance(leaf, Tensor)]
            for leaf in args:
                if isinstance(leaf, (list, tuple)):
                    tensors += [part for part in leaf if isinstance(part, Tensor)]
            dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
            if len(dtypes) > 1:
                args = _widened(args, max(dtypes, key=lambda dtype: dtype.itemsize))
            if self.widest is not None and len(tensors) > 1:
                _refuse_wide([tensor.shape for tensor in tensors], self.widest)
        return func(*args, **(kwargs or {}))

    def _write(self, func: Callable[..., Any], target: Tensor, index: Any, value: Any) -> None:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > 0
        if not isinstance(value, Tensor):
            target.masked_fill_(index, value) if is_mask else func(target, index, value)
            return
        self.has_written = True
        if value.is_floating_point() and target.is_floating_point():
            value = value.to(target.dtype)
        func(target, index.nonzero(as_tuple=True) if is_mask else index, value)


# What makes a tensor that a program may write to, and what writes one tensor into another.
_MAKES = {
    f"{prefix}{kind}{suffix}"
    for kind in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("", ""), ("", "_like"), ("new_", ""))
} | {"clone", "eye", "tensor", "new_tensor"}
_WRITES = {"copy_", "add_", "sub_", "mul_", "div_", "index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_",
           "masked_scatter_", "__iadd__", "__isub__", "__imul__", "__itruediv__"}  # fmt: skip


class Drawing(TorchFunctionMode):
    """Lets ``vmap(randomness="different")`` draw from torch's distributions: it refuses to fill a tensor in place.

    A fresh draw takes the place of the fill, whose result is all that the distributions use.
    """

    def __enter__(self) -> Self:
        self._function = torch.distributions.dirichlet._Dirichlet
        torch.distributions.dirichlet._Dirichlet = _Dirichlet  # type: ignore[misc, assignment]
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        torch.distributions.dirichlet._Dirichlet = self._function  # type: ignore[misc]
        super().__exit__(*failure)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        fill = _FILLS.get(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {})) if fill is None else fill(*args, **(kwargs or {}))


class _Dirichlet:
    """The draw of ``torch.distributions.Dirichlet``, without the gradient that ``vmap`` cannot see through."""

    @staticmethod
    def apply(concentration: Tensor) -> Tensor:
        return torch._sample_dirichlet(concentration)


_FILLS: dict[str, Callable[..., Tensor]] = {
    "normal_": lambda x, mean=0.0, std=1.0: mean + std * torch.randn_like(x),
    "uniform_": lambda x, low=0.0, high=1.0: low + (high - low) * torch.rand_like(x),
    "exponential_": lambda x, rate=1.0: -torch.rand_like(x).neg().log1p() / rate,
    "cauchy_": lambda x, median=0.0, scale=1.0: median + scale * (math.pi * (torch.rand_like(x) - 0.5)).tan(),
    "clamp_": lambda x, min=None, max=None: x.copy_(x.clamp(min, max)),
}


def _is_whole(index: Any) -> bool:
    return isinstance(index, Tensor) and not index.dim() and not index.is_floating_point() and index.dtype != torch.bool


def _is_one(index: Any) -> bool:
    """Whether an index is one number, expanded."""
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool or index.numel() < 2:
        return False
    return all(stride == 0 or size == 1 for stride, size in zip(index.stride(), index.shape, strict=True))


def _picked(table: Tensor, index: Any) -> Tensor:
    """``table[index]``; a 0-dimensional integer tensor stays a tensor (torch would call ``.item()`` on a wrapped one)."""
    parts = index if isinstance(index, tuple) else (index,)
    if table.is_cuda:
        _check_reach(table, parts)
    whole = [i for i, part in enumerate(parts) if _is_whole(part)]
    if whole and all(isinstance(part, Tensor) for part in parts):
        found = table[tuple(part.unsqueeze(0) if _is_whole(part) else part for part in parts)]
        return found.squeeze(0) if len(whole) == len(parts) else found
    if len(whole) == 1 and all(isinstance(part, slice) for i, part in enumerate(parts) if i not in whole):
        (axis,) = whole
        rest = tuple(part for i, part in enumerate(parts) if i != axis)
        return table.index_select(axis, parts[axis].reshape(1)).squeeze(axis)[rest]
    if len(parts) == 1 and _is_one(parts[0]):
        first = parts[0][(slice(1),) * parts[0].dim()]
        return table[first].expand(*parts[0].shape, *table.shape[1:])
    return table[index]


def _check_reach(table: Tensor, parts: tuple[Any, ...]) -> None:
    """Raises what a processor would: on a GPU, an index out of reach ends all that the process does there."""
    for axis, part in enumerate(parts):
        index = torch.tensor(part) if isinstance(part, list) else part
        if isinstance(index, slice) or (isinstance(index, int) and not isinstance(index, bool)):
            continue
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype in (torch.bool, torch.uint8):
            return  # a mask, or an ellipsis: it cannot be said which axis comes next
        plain, size = index, table.shape[axis]
        while torch._C._functorch.is_functorch_wrapped_tensor(plain):
            plain = torch._C._functorch.get_unwrapped(plain)
        if not plain.numel():
            continue
        with torch._C._DisableFuncTorch(), _disable_current_modes():
            least, most = (int(end) for end in plain.aminmax())
        if not -size <= least <= most < size:
            raise IndexError(f"index {most if most >= size else least} is out of bounds for axis {axis} of size {size}")


def _widened(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(dtype) if argument.is_floating_point() else argument
    if type(argument) in (list, tuple):
        return type(argument)(_widened(part, dtype) for part in argument)
    return argument


def _refuse_wide(shapes: list[torch.Size], widest: int) -> None:
    """Raises before a table is made that would not fit into memory."""
    if math.prod(shape.numel() for shape in shapes) <= widest:  # quick, and most often all there is to see
        return
    try:
        width = math.prod(torch.broadcast_shapes(*shapes))
    except RuntimeError:  # no broadcasting, as in a matrix product
        return
    if width > widest:
        raise Unsupported(
            f"Enumerating the finite sites jointly needs a table of {width:,} entries (at most {widest:,}). "
            "Update these sites one at a time."
        )


def _is_elementwise(kwargs: Mapping[str, Any]) -> bool:
    """Whether a loss is neither weighted nor summed."""
    return kwargs.get("reduction") == "none" and {name for name in kwargs if kwargs[name] is not None} == {"reduction"}


_THRESHOLD = 40.0  # where exp(−x) is nothing beside 1, in double precision


class _LogSigmoid(torch.autograd.Function):
    """log σ(x), with one operation for a slope, σ(−x): where that is all that is wanted, no logarithm is taken.

    torch's loss for Bernoulli variables, below a transform, has two exponentials and a dozen operations for both.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # log_sigmoid has a second result, which vmap of vmap does not take on a GPU
        return -softplus(-x, threshold=_THRESHOLD) if x.is_cuda else logsigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(-x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * torch.sigmoid(-x)


class _SafeLog(torch.autograd.Function):
    """Pyro's logarithm with a gradient of 1 / ε at most, in the form that ``vmap`` takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x.clamp(min=torch.finfo(x.dtype).eps)


def under(handler: contextlib.AbstractContextManager[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under a handler; Pyro's own form of it, ``handler(function)``, refuses arguments named context and fn."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with handler:
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Argument validation off (it is data-dependent control flow, which ``vmap`` refuses), module-local weights on."""
    validates, logarithm = Distribution._validate_args, pyro.ops.special._SafeLog
    try:
        pyro.ops.special._SafeLog = _SafeLog
        with pyro.validation_enabled(False), pyro.settings.context(module_local_params=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
            # torch's Wishart says so at every draw: it tests the support, and means the opposite
            warnings.filterwarnings("ignore", message="Singular sample detected")
            # of functorch, about an operation that it takes chain by chain; a graph is recorded below it
            warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
            Distribution.set_default_validate_args(False)
            yield
    finally:
        pyro.ops.special._SafeLog = logarithm
        Distribution.set_default_validate_args(validates)


class _Factories(TorchFunctionMode):
    """Makes tensors on a device where none is named. Unlike torch's own before 2.11, it may stand inside another."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.factories = device, _device_constructors()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in self.factories and named.get("device") is None:
            named["device"] = self.device
        return func(*args, **named)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes tensors of numbers where the data are, if that is a GPU: a program that says 0.0 does not say where."""
    return _Factories(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def isolated(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seeds torch, numpy and ``random`` inside, and restores the caller's states of all three."""
    states = np.random.get_state(), random.getstate()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


@torch.no_grad()
def refill(leaves: Mapping[str, Tensor], values: Mapping[str, Tensor], owner: str) -> None:
    """Writes values into weights and buffers in place.

    Raises:
        ValueError: If one of them has no value, or one of another shape.
    """
    for name, leaf in leaves.items():
        if name not in values or values[name].shape != leaf.shape:
            raise ValueError(f"{owner} has a weight '{name}' of shape {tuple(leaf.shape)}, which the run did not have.")
        leaf.copy_(values[name])


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of torch, numpy and ``random``, as tensors and numbers; see ``set_random_state``."""
    kind, keys, *place = np.random.get_state()
    version, numbers, spare = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *place),
        "random": (version, torch.tensor(numbers), spare),
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets all generators to what ``random_state`` gave."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    kind, keys, *place = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *place))
    version, numbers, spare = state["random"]
    random.setstate((version, tuple(numbers.tolist()), spare))


@contextlib.contextmanager
def reproducible(dtype: torch.dtype, device: torch.device | None = None) -> Iterator[None]:
    """Default dtype and deterministic algorithms, both restored.

    Without deterministic algorithms gathers on two threads differ from run to run. On a GPU an operation that has no
    deterministic form runs all the same.
    """
    # not use_deterministic_algorithms, which imports torch's compiler: three seconds
    before = torch.get_default_dtype(), torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_dtype(dtype)
    torch.set_deterministic_debug_mode("warn" if on_gpu else "error")
    settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            for words in ("does not have a deterministic implementation", "defaults to a non-deterministic algorithm"):
                warnings.filterwarnings("ignore", message=f".*{words}.*")
            yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_deterministic_debug_mode(before[1])
        settings.fill_uninitialized_memory = fill
