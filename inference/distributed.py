"""One run on several processes, by ``torch.distributed``: what they add up, agree on, share out and gather.

A script calls ``torch.distributed.init_process_group()``, then ``fit``, in every process alike, as ``torchrun`` starts them.
Every process is given the same model, settings and *all* data, as if it were alone, which is checked; all of them return the
same, whole Posterior, so that a script may go on to decide by it, or to start from it, without an ``if``.

samplers    Chains are split: process r of R has chains r C / R to (r + 1) C / R − 1, with random numbers of its own. What
            warm-up learns is learnt from the chains of one process; they meet every hundred steps and at the end.
EM          Rows are split: process r has rows r, r + R, … . The log-joint is a mean over processes,

                log p(data, θ) = 1/R Σ_r [ log p(θ) + R Σ_{n of r} log p(x_n | θ) ],

            and so are Q and the gradients at fixed points of which every M-step is made: the messages are added.
SVI         Rows are split in the same way, and the gradients averaged before every step of Adam, which is what
            DistributedDataParallel does to a module; here a step is a recorded graph that returns gradients, which are one
            flat tensor on their way. Weights and buffers begin as those of process 0. Noise is the same in all processes,
            so that the steps are those of one process up to rounding, unless the guide draws sites of single rows: then
            every process has noise of its own.

The rows of a program are known by its plates, as for mini-batches; that the parts add up to the whole is tried out before
the first step. Programs whose rows are not independent given the rest are refused by EM and SVI; samplers run them.

The posterior of a seed does not depend on the number of processes for EM and SVI (up to rounding, and but for such noise);
that of a sampler does. Process 0 alone shows progress and writes checkpoints, which hold the part of every process: a run is
gone on with by as many processes as began it, all of which read the folder. Ctrl-C ends it without a posterior.

References:
    S. Li et al., PyTorch Distributed: experiences on accelerating data parallel training (2020).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from safetensors.torch import load, save
from torch import Tensor

from inference.contract import Unsupported
from inference.handlers import Rescale, isolated

if TYPE_CHECKING:
    from inference.program import Program

__all__ = ["ALONE", "Part", "Processes", "alone", "check_shards", "cut", "processes"]

_TRIALS = 4  # draws from the prior at which the parts must add up to the whole
_FACTS = "\0facts"  # name of the tensor that carries json

_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


class Part(NamedTuple):
    """What one process hands to all: tensors by name, on the CPU, and what json can hold."""

    tensors: dict[str, Tensor]
    facts: Any


class Processes:
    """The processes of a run; where there is one alone, every method gives back what it was given.

    Args:
        rank: Which one this is, from 0.
        size: How many there are.

    Raises:
        ConnectionError: By every method, if another process has ended or does not answer.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that shows progress and writes."""
        return not self.rank

    # ------------------------------------------------------------------------------------------ adding up
    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over processes; the same digits in all of them."""
        return self._reduced(tensor) / self.size if self.size > 1 else tensor

    def average(self, loss: Tensor, weights: Sequence[Tensor], buffers: Callable[[], Sequence[Tensor]]) -> Tensor:
        """Averages a loss, returned, and the gradients of weights, in place; buffers become those of process 0."""
        if self.size == 1:
            return loss
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        parts = [loss.reshape(-1), *(torch.view_as_real(g) if g.is_complex() else g for g in _gradients(weights))]
        for dtype in dict.fromkeys(part.dtype for part in parts):
            same = [part for part in parts if part.dtype == dtype]
            averaged = self.mean(torch.cat([part.flatten() for part in same]))
            for part, value in zip(same, averaged.split([part.numel() for part in same]), strict=True):
                part.copy_(value.view(part.shape))
        self.equalise(buffers())
        return parts[0].reshape(loss.shape)

    # ------------------------------------------------------------------------------------------ agreeing
    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self._reduced(torch.tensor([float(flag)])) > 0) if self.size > 1 else flag

    def meet(self) -> None:
        """Waits for the others."""
        self.any(False)

    def first(self, value: Any) -> Any:
        """What process 0 has, of what json can hold."""
        return self.gather({}, value)[0].facts if self.size > 1 else value

    @torch.no_grad()
    def equalise(self, tensors: Sequence[Tensor]) -> None:
        """Writes what process 0 has into tensors, in place."""
        for tensor in tensors if self.size > 1 else ():
            sent = self._placed(tensor.detach()).contiguous()
            with self._connected():
                torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What stops one process inside stops all of them here; inside, none may wait for another.

        Raises:
            ValueError: With the sentence of another process.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        sentences = [part.facts for part in self.gather({}, None if failure is None else f"{failure}")]
        if failure is not None:
            raise failure
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise ValueError(f"Process {rank} of {self.size} was stopped, and so all are: {sentence}")

    def check_equal(self, described: Mapping[str, Any]) -> None:
        """Refuses a run for which the processes are not given the same.

        Args:
            described: What is given to this one, by what it is called in a sentence.

        Raises:
            ValueError: In all processes, with the first difference.
        """
        if self.size == 1:
            return
        every = [part.facts for part in self.gather({}, dict(described))]
        for rank, other in enumerate(every):
            for name in {**every[0], **other}:
                one, two = every[0].get(name), other.get(name)
                if one != two:
                    raise ValueError(
                        f"Every process must be given the same model, settings and data, but {name} is "
                        f"{_shown(one)} in process 0 and {_shown(two)} in process {rank}. Rows and chains are shared out "
                        "by fit itself: call it everywhere as for one process."
                    )

    # ---------------------------------------------------------------------------------------- sharing out
    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a list of rows."""
        return rows[self.rank :: self.size] if self.size > 1 else rows

    def portion(self, count: int) -> slice:
        """This process's part of so many chains, which ``size`` divides."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def check_chains(self, chains: int, who: str) -> None:
        """Refuses chains that cannot be split.

        Raises:
            ValueError: Before the first step.
        """
        if chains % self.size:
            most = chains - chains % self.size
            choices = f"{most} or {most + self.size}" if most else f"{self.size}"
            raise ValueError(
                f"{who}(chains={chains}): the chains cannot be shared out evenly among {self.size} processes. "
                f"Take {choices} of them."
            )

    def part_ways(self) -> None:
        """From here on every process has random numbers of its own, that follow from those that were the same."""
        if self.size > 1:
            common = self.first(int(torch.randint(2**62, ())))
            state = np.random.SeedSequence([common, self.rank]).generate_state(2, np.uint64)
            torch.manual_seed(int(state[0]) >> 1)
            np.random.seed(int(state[1]) % 2**32)

    # ----------------------------------------------------------------------------------------- gathering
    def gather(self, tensors: Mapping[str, Tensor], facts: Any = None) -> list[Part]:
        """What every process has, in their order; nothing is pickled on the way."""
        if self.size == 1:
            return [Part(dict(tensors), facts)]
        text = json.dumps([facts, [*tensors]]).encode()
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        packed = save({**own, _FACTS: torch.frombuffer(bytearray(text), dtype=torch.uint8)})
        sent = self._placed(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        counts = [torch.zeros(1, dtype=torch.int64, device=sent.device) for _ in range(self.size)]
        with self._connected():
            torch.distributed.all_gather(counts, torch.tensor([len(sent)], device=sent.device))
            lengths = [int(count) for count in counts]
            padded = sent.new_zeros(max(lengths))
            padded[: len(sent)] = sent
            received = [torch.empty_like(padded) for _ in lengths]
            torch.distributed.all_gather(received, padded)
        return [_unpacked(part[:length]) for part, length in zip(received, lengths, strict=True)]

    # ---------------------------------------------------------------------------------------------- below
    def _reduced(self, tensor: Tensor) -> Tensor:
        total = self._placed(tensor.detach()).clone(memory_format=torch.contiguous_format)
        with self._connected():
            torch.distributed.all_reduce(total)
        return total.to(tensor.device)

    def _placed(self, tensor: Tensor) -> Tensor:
        """On a device between whose tensors the group can mediate: nccl moves those of a GPU only, gloo those of the CPU."""
        backends = dict(part.split(":") for part in torch.distributed.get_backend_config().split(","))
        if "cpu" not in backends or backends["cpu"] == "nccl":
            return tensor if tensor.is_cuda else tensor.to("cuda")
        return tensor if backends.get(tensor.device.type, "gloo") == "nccl" else tensor.cpu()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of each transport its own kind, all of them of this one
            reason = str(error).strip().split("\n")[0].split(". This may indicate")[0].removesuffix(".")
            raise ConnectionError(
                f"Another of the {self.size} processes has ended or does not answer ({reason}), and process {self.rank} "
                "cannot go on without it. See what the other one said last, then start all of them again; a run with "
                "checkpoint= is gone on with by resume."
            ) from error


ALONE = Processes()


def processes() -> Processes:
    """Those of the process group of this script; one alone if there is none, or inside of ``alone``."""
    if _is_alone.get() or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ALONE
    size = torch.distributed.get_world_size()
    return Processes(torch.distributed.get_rank(), size) if size > 1 else ALONE


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, fits of this process are its own, whatever the others do.

    Example:
        >>> with alone():
        ...     processes().size
        1
    """
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def check_shards(
    program: Program, local: Sequence[str] = (), common: Sequence[str] = (), batch_size: int | None = None
) -> None:
    """Refuses a program whose rows cannot be split over its processes.

    Args:
        program: The program.
        local: Latent sites that every process would have for its own rows only.
        common: Latent sites that all processes would have alike.
        batch_size: Rows of a step; None for all of them.

    Raises:
        Unsupported: If there are no rows, a site is not of single rows that must be or the other way round, or the parts do
            not add up.
        ValueError: If there are fewer rows than processes.
    """
    group = program.processes
    if group.size == 1:
        return
    if not program.row_plates:
        raise Unsupported(
            f"Several processes split rows, but no plate of {program.name} has the size of its first tensor argument "
            f"({program.rows}). Fit it in one process (inference.distributed.alone), or by a sampler: those split chains."
        )
    program.check_rows("A run on several processes")
    for name in local:
        if not {plate.name for plate in program.latents[name].plates} & set(program.row_plates):
            raise Unsupported(
                f"Several processes split rows, which must be independent given what is maximised, but '{name}' is averaged "
                f"and not in the plate '{program.row_plates[0]}'. Name it in maximise=, or fit in one process "
                "(inference.distributed.alone)."
            )
    for name in common:
        if {plate.name for plate in program.latents[name].plates} & set(program.row_plates):
            raise Unsupported(
                f"Several processes split rows, but '{name}' is maximised and of single rows. Leave it out of maximise=, or "
                "fit in one process (inference.distributed.alone)."
            )
    rows = program.rows or 0
    if (least := min(batch_size or rows, rows)) < group.size:
        what = "rows" if least == rows else "rows of a batch"
        raise ValueError(f"There are {least} {what}, which {group.size} processes cannot share. Start {least} at most.")
    index = group.share(torch.arange(rows, device=program.device))
    wholes, parts = [], []
    with isolated(0, program.device), torch.no_grad():
        for _ in range(_TRIALS):
            values = program.sample_prior()
            wholes.append(_log_joint(program, values, None, 1.0))
            parts.append(_log_joint(program, cut(program, values, index), program.shard, float(group.size)))
    whole, mean = torch.stack(wholes), group.mean(torch.stack(parts))
    tolerance = 1e-8 if whole.dtype == torch.float64 else 1e-3
    wrong = whole.isfinite() & ~((mean - whole).abs() <= tolerance * (1.0 + whole.abs()))
    if bool(wrong.any()):
        one, other = float(mean[wrong][0]), float(whole[wrong][0])
        raise Unsupported(
            f"The rows of {program.name} cannot be split over processes: the parts add up to a log-density of {one:.6g}, "
            f"but the whole has {other:.6g}. Does the program compute something from all rows? Give that as an argument."
        )


def _log_joint(program: Program, values: Mapping[str, Tensor], data: list[Tensor] | None, scale: float) -> Tensor:
    trace = program.trace(values, data=data, handler=Rescale(program.row_plates, scale))
    terms = [node["log_prob_sum"] for node in trace.nodes.values() if node["type"] == "sample"]
    return torch.stack([torch.as_tensor(term, dtype=program.dtype, device=program.device) for term in terms]).sum()


def cut(program: Program, values: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Values of sites, those of single rows cut down to some of them."""
    cut = dict(values)
    for name in values:
        site = program.latents[name]
        for plate in site.plates:
            if plate.name in program.row_plates:
                cut[name] = cut[name].index_select(len(site.batch_shape) + plate.dim, index)
    return cut


def _gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def _unpacked(packed: Tensor) -> Part:
    tensors = load(packed.cpu().numpy().tobytes())
    facts, names = json.loads(tensors.pop(_FACTS).numpy().tobytes())
    return Part({name: tensors[name] for name in names}, facts)


def _shown(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
