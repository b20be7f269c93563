"""Neural networks inside a program: the type of their arithmetic, and where their numbers are lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["autocast", "first_not_finite"]


@contextlib.contextmanager
def autocast(networks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Runs networks in a smaller floating type; what they return has the type of their weights.

    Args:
        networks: The networks. Densities, outside them, are not touched.
        device: Where they run.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    patched = []
    for network in networks:
        own = next((weight.dtype for weight in network.parameters()), torch.get_default_dtype())
        patched.append((network, network.__dict__.get("forward")))
        network.forward = _cast(network.forward, device, dtype, own)
    try:
        yield
    finally:
        for network, before in patched:
            if before is None:
                del network.forward
            else:
                network.forward = before


def _cast(forward: Callable[..., Any], device: torch.device, dtype: torch.dtype, own: torch.dtype) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            found = forward(*args, **kwargs)
        return tree_map(lambda leaf: leaf.to(own) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, found)

    return run


def first_not_finite(owners: Iterable[Any], run: Callable[[], Any]) -> str | None:
    """The first layer whose output is NaN or infinite in a run, in words; None if there is none.

    Args:
        owners: Modules whose layers are looked at, methods of modules, and anything else, which is passed over.
        run: The run.
    """
    found: list[str] = []
    hooks = []
    parts = [part for owner in owners for part in (owner, getattr(owner, "__self__", None))]
    for owner in {id(part): part for part in parts}.values():
        for name, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
            if any(True for _ in module.children()):
                continue

            def look(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
                if not all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point()):
                    found.append(f"'{name}' ({type(module).__name__})")

            hooks.append(module.register_forward_hook(look))
    try:
        with contextlib.suppress(Exception):  # which layer it was is told only if the run tells
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
