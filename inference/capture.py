"""A recorded step as one launch of a GPU: a CUDA graph of its kernels, which Python would start one by one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Captured"]


class Captured:
    """A function of tensors on a GPU, whose kernels are started together.

    Random numbers go on from the generator of the device, as those of the function would. The results lie in memory that
    the next call writes over.

    Args:
        run: The function: always the same kernels, in the same order. It is called twice before its kernels are taken down,
            so that generators and what it writes to are to be put back afterwards.
        inputs: Tensors like those that it is to be called with.
        held: Tensors that it takes after these, and reads and writes where they are.

    Raises:
        RuntimeError: If the function waits for the GPU, or copies what is not on it.
    """

    def __init__(self, run: Callable[..., Any], inputs: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        self._inputs = [leaf.clone() for leaf in inputs]
        self._run, self._places = run, [leaf.data_ptr() for leaf in held]
        device = next(leaf.device for leaf in (*held, *inputs) if leaf.is_cuda)
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(aside):
                    run(*self._inputs, *held)  # whatever is set up at a first call
                    with _without_waiting():  # a capture that breaks off would leave the generator unusable
                        run(*self._inputs, *held)
            finally:
                torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._found = run(*self._inputs, *held)

    def __call__(self, *given: Tensor) -> Any:
        inputs, held = given[: len(self._inputs)], given[len(self._inputs) :]
        if [leaf.data_ptr() for leaf in held] != self._places:
            return self._run(*given)  # what it holds has moved
        for own, leaf in zip(self._inputs, inputs, strict=True):
            own.copy_(leaf)
        self._graph.replay()
        return self._found


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Raises where the processor would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, says torch
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
