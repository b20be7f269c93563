"""The one loop: improve, then read out. Every back-end runs here, and nowhere else.

Optimise    improve until done, then read out draws          (SVI, EM)
Sample      improve during warm-up, then read out, thinned   (Gibbs, Metropolis-Hastings, HMC)

Several processes run it together; see ``inference.distributed``.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from inference import codec
from inference.arrays import ragged
from inference.buffers import Buffer, RaggedBuffer
from inference.checkpoint import Journal
from inference.contract import Backend, Independent, Unsupported
from inference.diagnosis import worst
from inference.distributed import Part, Processes, processes
from inference.fingerprint import compare, fingerprint, source, versions
from inference.handlers import isolated, quiet, random_state, refill, reproducible, set_random_state
from inference.past import Past, joined
from inference.plan import Plan, Update
from inference.posterior import End, Posterior
from inference.program import Program
from inference.relabel import Axis
from inference.screening import check_constants
from inference.symmetry import exchangeable
from inference.until import Until

__all__ = ["Optimise", "Sample", "run"]

_FIRST_BLOCK = 32  # draws that are made at once where they are independent
_MEETING = 100  # steps after which processes that need nothing of each other notice that one has ended


class Optimise(NamedTuple):
    """Improve for ``steps`` steps, or until ``stop(info)``; then read out ``draws`` draws of ``chains`` chains."""

    steps: int
    draws: int
    chains: int = 1
    stop: Callable[[Any], bool] | None = None

    @property
    def improvements(self) -> int:
        """How often ``step`` is called before the readings."""
        return self.steps

    @property
    def evaluations(self) -> int:
        """About how often the density is evaluated, on which the effort of making graphs depends."""
        return self.steps


class Sample(NamedTuple):
    """``warmup`` adaptive steps, then ``draws`` draws with ``thin`` steps each, of about ``cost`` evaluations a step.

    Fewer draws are taken where the targets of ``until`` are met before.
    """

    chains: int
    warmup: int
    draws: int
    thin: int = 1
    cost: int = 1
    stop: None = None
    until: Until | None = None

    @property
    def improvements(self) -> int:
        """How often ``step`` is called before the readings."""
        return self.warmup

    @property
    def evaluations(self) -> int:
        """About how often the density is evaluated, on which the effort of making graphs depends."""
        return (self.warmup + self.draws * self.thin) * self.cost


def _check(backend: Backend[Any, Any]) -> None:
    least = {"chains": 1, "draws": 1, "warmup": 0, "thin": 1, "steps": 1, "restarts": 1, "batch_size": 1}
    least |= {"most_steps": 1, "max_depth": 1, "checkpoint_every": 1}
    for field in dataclasses.fields(backend):
        value = getattr(backend, field.name)
        if field.name == "target" and not 0.0 < value < 1.0:
            raise ValueError(f"{type(backend).__name__}(target={value!r}): must lie between 0 and 1.")
        if field.name == "tolerance" and not value >= 0.0:
            raise ValueError(f"{type(backend).__name__}(tolerance={value!r}): must not be negative.")
        if field.name == "batch_size" and value is None:
            continue
        if field.name in least and (not isinstance(value, int) or value < least[field.name]):
            raise ValueError(
                f"{type(backend).__name__}({field.name}={value!r}): must be an integer of at least {least[field.name]}."
            )
    if isinstance(backend.schedule, Sample) and backend.schedule.until is not None:
        if not isinstance(backend.schedule.until, Until):
            raise TypeError(f"until= must be an Until, such as Until(rhat=1.01), but is {backend.schedule.until!r}.")
        backend.schedule.until.check(backend.schedule.chains, backend.schedule.draws)


def _block(read: int, most: int) -> tuple[int, int]:
    """Where the block of draws begins that draw ``read`` is of, and its size: the same however many draws there will be.

    Blocks are as large as all those before together, and at most ``most``.
    """
    first, count = 0, min(_FIRST_BLOCK, most)
    while first + count <= read:
        if count == most:
            return read - (read - first) % most, most
        first, count = first + count, min(first + count, most)
    return first, count


class _Begun(NamedTuple):
    """What was there when a block of draws was begun, of which ``last`` is the end."""

    last: int
    random: Any
    calls: dict[str, Any]


def _first_device(args: tuple[Any, ...]) -> torch.device | None:
    return next((arg.device for arg in args if isinstance(arg, Tensor)), None)


def run(
    backend: Backend[Any, Any],
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    source: str | os.PathLike[str] | Posterior | None = None,
) -> Posterior:
    """Runs a back-end on a program, or goes on with a run; see ``Backend.fit`` and ``Backend.resume``."""
    group = processes()
    with group.together():
        _check(backend)
        if isinstance(backend.schedule, Sample):
            group.check_chains(backend.schedule.chains, type(backend).__name__)
        past = None if source is None else Past.of(source, group)
        journal = _journal(backend, past, group)
    seed = int.from_bytes(os.urandom(4), "little") if backend.seed is None else int(backend.seed)
    if past is not None and backend.seed is None:
        seed = past.facts["seed"]
    seed = group.first(seed)
    device = torch.device(backend.device) if backend.device else _first_device(args)
    started = time.perf_counter()
    with isolated(seed, device):
        with group.together():
            program = Program(
                model,
                args,
                kwargs,
                dtype=backend.dtype,
                device=backend.device,
                follow=backend.follows_data,
                evaluations=backend.schedule.evaluations,
                is_fixed=backend.changing is None,
                **backend.view,
            )
            check_constants(program, type(backend).__name__, backend.takes_unnormalised)
            sites = (*program.latents, *program.deterministic)
            unknown = [name for name in backend.keep or () if name not in sites]
            if unknown and not program.is_changing:  # whose sites are known when it has run
                raise ValueError(f"keep= names '{unknown[0]}', but the sites are {', '.join(sites)}.")
            if not program.latents and not program.is_changing and isinstance(backend.schedule, Sample):
                raise Unsupported(
                    f"{program.name} hides nothing that {type(backend).__name__} could draw. Use SVI(), EM() or, "
                    "for a module without a density, Denoising(), which train its weights."
                )
        if group.size > 1:
            group.check_equal(_given(backend, program, [*args, *kwargs.values()]))
        program.processes = group
        group.equalise([*program.leaves.values()])
        with reproducible(program.dtype, program.device), quiet():
            torch.manual_seed(seed)
            return _Run(backend, program, seed, started, journal).posterior(past)


def _given(backend: Backend[Any, Any], program: Program, arguments: list[Any]) -> dict[str, Any]:
    """What all processes must be given alike, by what it is called in a sentence; json."""
    facts = fingerprint(backend, program, 0)
    named = zip((name for name, _ in program.named_arguments), arguments, strict=True)
    shapes = {n: f"{a.dtype} of shape {tuple(a.shape)}" for n, a in named if isinstance(a, (Tensor, np.ndarray))}
    settings = {**facts["settings"], "seed": backend.seed, "until": repr(getattr(backend, "until", None))}
    settings |= {"checkpoint": backend.checkpoint is not None, "checkpoint_every": backend.checkpoint_every}
    settings["number of callbacks"] = len(backend.callbacks)
    density = facts["density"] if facts["density"] is None else f"{float(facts['density']):.6g}"
    return {
        "the back-end": facts["backend"],
        "the program": facts["program"],
        **{f"the argument '{name}'": text for name, text in shapes.items()},
        **{f"{name}=": value for name, value in settings.items()},
        **{f"the site '{name}'": value for name, value in facts["sites"].items()},
        **{f"the weight '{name}'": value for name, value in facts["weights"].items()},
        "what it computes": facts["statements"],
        **{f"the checksum of the argument '{name}'": value for name, value in facts["data"].items()},
        **{f"the checksum of the data of '{name}'": value for name, value in facts["observed"].items()},
        "its log-density at a draw from the prior": density,
        **{f"the {name}": facts[name] for name in ("device", "dtype", "rung")},
        **{f"the version of {name}": value for name, value in facts["versions"].items()},
    }


class _Nowhere:
    """The checkpoint of a process that writes none."""

    files: ClassVar[dict[str, str]] = {}

    def write(self, *_: Any) -> None: ...


def _journal(backend: Backend[Any, Any], past: Past | None, group: Processes) -> Journal | _Nowhere | None:
    if backend.checkpoint is None:
        return None
    if not group.is_first:
        return _Nowhere()
    source = None if past is None or past.folder is None else Path(past.folder).resolve()
    is_same = source == Path(backend.checkpoint).resolve()
    return Journal(backend.checkpoint, is_continued=is_same)


class _Run:
    """One run: its state, its buffers and what it noticed.

    Attributes:
        improved: Steps of the first phase that are taken; ``is_improved`` if it is over.
        read: Draws that are taken.
        written: Both, the entries of the history and the warm-up draws that the checkpoint has; None before the first one.
    """

    def __init__(
        self, asked: Backend[Any, Any], program: Program, seed: int, started: float, journal: Journal | _Nowhere | None
    ) -> None:
        self.asked, self.name, self.processes = asked, type(asked).__name__, program.processes
        self.backend = (program.is_changing and asked.changing) or asked
        self.program, self.seed, self.started, self.journal = program, seed, started, journal
        self.is_split = isinstance(self.backend.schedule, Sample) and self.processes.size > 1
        if self.is_split:
            self.backend = self._split(self.backend)
        self.schedule = self.backend.schedule
        self.history: list[dict[str, Any]] = []  # of every step, tensors or numbers
        self.kinds: dict[str, torch.dtype] = {}
        self.findings: list[str] = []  # of the run, wherever it is gone on with
        self.notes: list[str] = []  # of this call
        buffer = RaggedBuffer if program.is_changing else Buffer
        parts = self.processes.size if self.is_split else 1
        self.warmup: Buffer | RaggedBuffer = buffer(self.schedule.improvements, self.backend.keep, parts)
        self.draws: Buffer | RaggedBuffer = buffer(self.schedule.draws, self.backend.keep, parts)
        self.stats = Buffer(self.schedule.draws, None)
        self.improved, self.is_improved, self.read, self.seconds = 0, not self.schedule.improvements, 0, 0.0
        self.written: tuple[int, int, int, int] | None = None
        self.unwritten = ""
        self._begun: _Begun | None = None

    def _split(self, backend: Backend[Any, Any]) -> Backend[Any, Any]:
        """The back-end with this process's part of the chains, and of what is said of their start."""
        if "chains" not in {field.name for field in dataclasses.fields(backend)}:
            raise Unsupported(
                f"Several processes split chains, but {self.name} has no setting of that name. Run it in one process "
                "(inference.distributed.alone)."
            )
        chains = backend.schedule.chains
        own, start = self.processes.portion(chains), backend.start
        if isinstance(start, Posterior):
            rows = torch.arange(chains)[own]
            start = dataclasses.replace(start, draws={n: value[rows % len(value)] for n, value in start.draws.items()})
        elif isinstance(start, Mapping):
            sites = self.program.latents
            given = {name: torch.as_tensor(value) for name, value in start.items()}
            has_axis = {n for n, v in given.items() if n in sites and v.shape == (chains, *sites[n].shape)}
            start = {name: value[own] if name in has_axis else value for name, value in given.items()}
        return dataclasses.replace(backend, start=start, **{"chains": own.stop - own.start})

    @property
    def _gathered(self) -> tuple[int, int, int, int]:
        return self.improved, self.read, len(self.history), self.warmup.filled

    @cached_property
    def _links(self) -> dict[str, Any]:
        """What a checkpoint refers to by name."""
        links: dict[str, Any] = {f"weight {name}": weight for name, weight in self.program.weights.items()}
        return links | {"program": self.program, "density": self.program.density}

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.asked, self.program, self.seed)

    @cached_property
    def _symmetry(self) -> dict[str, Axis]:
        return exchangeable(self.program)

    def posterior(self, past: Past | None = None) -> Posterior:
        schedule = self.schedule
        if self.is_split:
            self.processes.part_ways()
        state = self.backend.init(self.program) if past is None else self._revived(past)
        plan = self.backend.plan(state, self.program)
        is_shown = self.backend.progress and self.processes.is_first
        if is_shown and plan is not None and isinstance(schedule, Sample):
            tqdm.write(str(plan), file=sys.stderr)
        self._last = state
        if self.journal is not None and self.written is None:
            self._write(state)
        end = None
        try:
            state = self._improve(state)
        except KeyboardInterrupt:
            if self.processes.size > 1:
                raise KeyboardInterrupt(self._stopped("in one of several processes.")) from None
            if isinstance(schedule, Sample):
                raise KeyboardInterrupt(self._stopped("in warm-up: there are no draws yet.")) from None
            state = self._last
            history = self._stacked(0)
            is_told = self.backend.history(history, state) is history
            end = self._try_end(state, None if is_told else history)  # before draws are read from what is not done yet
            self.notes.append(f"Stopped by Ctrl-C after {len(self.history)} of {schedule.steps} steps.")
        try:
            state = self._read(state, is_done=end is None)
        except KeyboardInterrupt:
            if self.processes.size > 1:
                raise KeyboardInterrupt(self._stopped("in one of several processes.")) from None
            if not self.draws.filled or self.draws.filled != self.stats.filled:
                self.draws.filled = self.stats.filled = min(self.draws.filled, self.stats.filled)
            if not self.draws.filled:
                raise KeyboardInterrupt(self._stopped("there are no draws yet.")) from None
            state, self.read = self._last, self.draws.filled
            self.notes.append(f"Stopped by Ctrl-C after {self.draws.filled} of {schedule.draws} draws.")
        else:
            if self.journal is not None and end is None and self.written != self._gathered:
                self._write(state)
        if self.unwritten:
            self.notes.append(self.unwritten)
        history = self._stacked(0)
        reported = self.backend.history(history, state)
        found = {"draws": self.draws.read(), "stats": self.stats.read(), "warmup": self.warmup.read(), "history": reported}
        whole, plan, info = self._whole(found, self.backend.plan(state, self.program))
        posterior = Posterior(
            draws=whole["draws"],
            stats=whole["stats"],
            history=whole["history"],
            plan=plan,
            weights=self.backend.weights(state, self.program),
            info=info,
            dims=self.program.dims,
            coords=self.program.coords,
            observed={name: value.cpu() for name, value in self.program.observed.items()},
            constants={name: value.cpu() for name, value in self.program.constants.items()},
            symmetry=self._symmetry,
            warmup_draws=whole["warmup"],
            warmup_stats={},
            program=self.program,
        )
        end = end or self._try_end(state, None if reported is history else history)
        posterior._ends.extend([] if end is None else [end])
        return posterior

    # ----------------------------------------------------------------------------------------- several processes
    def _whole(
        self, found: dict[str, dict[str, Tensor]], plan: Plan | None
    ) -> tuple[dict[str, dict[str, Tensor]], Plan | None, dict[str, Any]]:
        """What all processes have found, their plan and the facts of the run."""
        info = self._info()
        if self.processes.size == 1:
            return found, plan, info
        left_out = [*self.draws.left_out, *self.warmup.left_out] if isinstance(self.draws, RaggedBuffer) else []  # type: ignore[union-attr]
        updates = None if plan is None else [update._asdict() for update in plan.updates]
        parts = self._parts(found, [info, updates, left_out])
        lost = {name for part in parts for name in part.facts[2]}
        whole = {}
        for kind in found:
            held = [_under(kind, part.tensors) for part in parts]
            whole[kind] = {n: v for n, v in _side_by_side(held, 1 if kind == "history" else 0).items() if n not in lost}
        info = dict(parts[0].facts[0])
        info["findings"] = [*dict.fromkeys(finding for part in parts for finding in part.facts[0]["findings"])]
        plan, differing = _common([part.facts[1] for part in parts])
        if differing:
            info["findings"].append(
                f"The plan is that of process 0; in process {differing[0]} other blocks took the place of some that failed."
            )
        return whole, plan, info

    def _parts(self, found: dict[str, dict[str, Tensor]], facts: Any) -> list[Part]:
        """What each process has, or what process 0 has where all have the same."""
        is_sent = self.is_split or self.processes.is_first
        tensors = {f"{kind}/{name}": t for kind, held in found.items() for name, t in held.items()} if is_sent else {}
        parts = self.processes.gather(tensors, facts)
        return parts if self.is_split else parts[:1]

    def _stopped(self, where: str) -> str:
        sentence = f"{self.name} was stopped{'' if where.startswith('in') else ':'} {where}"
        return sentence + (f" resume('{self.asked.checkpoint}', ...) goes on with it." if self.journal is not None else "")

    # ----------------------------------------------------------------------------- going on, and writing down
    def _revived(self, past: Past) -> Any:
        """The state of an earlier run, and all that it had gathered."""
        with past.understood(in_words=ValueError):
            compare(past.facts["fingerprint"], self._fingerprint)
        with past.understood():
            return self._filled(past)

    def _filled(self, past: Past) -> Any:
        facts, held = past.facts, dict[str, Any]()
        for end in past.ends:
            encoded = codec.Encoded(end.tree, end.tensors)
            held |= codec.decode(encoded, self._links, self._modules, self.program.device)
        refill(self.program.leaves, held["weights"], self.program.name)
        state = self.backend.restored(held["state"], self.program)
        refill(self.program.leaves, held["weights"], self.program.name)  # making a guide may have run the program
        self.program.density.recall(facts["calls"])
        parts = [*past.gathered]
        self.improved, self.is_improved, self.read = facts["improved"], facts["is_improved"], facts["read"]
        self.findings, self.seconds = [*facts["findings"]], facts["seconds"]
        counts = {"warmup": facts["kept"], "draws": self.read, "stats": self.read}
        for name, count in counts.items():
            getattr(self, name).fill([part[name] for part in parts], count, facts[name])
        for records in [part["history"] for part in parts] if held["history"] is None else [held["history"]]:
            rows = zip(*(values.unbind() for values in records.values()), strict=True)
            self.history += [dict(zip(records, row, strict=True)) for row in rows]
        if self.journal is not None and self.processes.first(bool(self.journal.files)):
            self.written = self._gathered
        set_random_state(held["random"], self.program.device)
        return state

    @property
    def _modules(self) -> tuple[str, ...]:
        return (type(self.backend).__module__,)

    def _end(self, state: Any, history: dict[str, Tensor] | None = None) -> End:
        """What the run needs to go on from here; inside a block of draws, also to make that again."""
        begun = self._begun if self._begun is not None and self.read < self._begun.last else None
        tree = {
            "state": self.backend.saved(state, self.program),
            "weights": self.program.leaves,
            "history": history,
            "random": random_state(self.program.device) if begun is None else begun.random,
        }
        facts = {
            "fingerprint": self._fingerprint,
            "seed": self.seed,
            "improved": self.improved,
            "is_improved": self.is_improved,
            "read": self.read,
            "kept": self.warmup.filled,
            "findings": self.findings,
            "seconds": self.seconds + time.perf_counter() - self.started,
            "warmup": self.warmup.facts,
            "draws": self.draws.facts,
            "stats": self.stats.facts,
            "calls": self.program.density.calls if begun is None else begun.calls,
            "is_split": self.is_split,
        }
        with self.processes.together():
            if not self.is_split and not self.processes.is_first:
                tree = {"random": tree["random"]}
            encoded = codec.encode(tree, self._links, self._modules)
            facts = json.loads(json.dumps(facts))
        parts = self.processes.gather(encoded.tensors, [facts, encoded.tree])
        return joined([End(part.facts[0], part.facts[1], part.tensors) for part in parts])

    def _try_end(self, state: Any, history: dict[str, Tensor] | None = None) -> End | None:
        """None for a state that cannot be written down: whatever stops it may not lose the draws."""
        try:
            return self._end(state, history)
        except ConnectionError:
            raise
        except Exception:
            return None

    def _write(self, state: Any) -> None:
        """Writes a checkpoint. The first one must succeed, a later one that does not may not lose the run."""
        assert self.journal is not None
        improved, read, steps, kept = self.written or (0, 0, 0, 0)
        gathered = {
            "warmup": self.warmup.since(kept),
            "draws": self.draws.since(read),
            "stats": self.stats.since(read),
            "history": self._stacked(steps),
        }
        try:
            end, rows = self._end(state), self._rows(gathered)
            is_new = self._gathered != (improved, read, steps, kept)
            with self.processes.together():
                self.journal.write(
                    self.improved + self.read,
                    end.tensors,
                    rows.tensors if is_new else None,
                    {"facts": end.facts, "tree": end.tree},
                    rows.tree,
                )
        except ConnectionError:
            raise
        except (OSError, ValueError) as error:
            if self.written is None:
                raise
            self.unwritten = (
                f"The checkpoint after step {self.improved + self.read} could not be written, and the run went on without: "
                f"{error} The last one, after step {improved + read}, is whole."
            )
            return
        self.written, self.unwritten = self._gathered, ""

    def _rows(self, gathered: dict[str, Any]) -> codec.Encoded:
        """What all processes have gathered."""
        with self.processes.together():
            rows = codec.encode(gathered if self.is_split or self.processes.is_first else None, {})
        if self.processes.size == 1:
            return rows
        parts = self.processes.gather(rows.tensors, rows.tree)[: None if self.is_split else 1]
        end = joined([End({}, part.facts, part.tensors) for part in parts])
        return codec.Encoded(end.tree, end.tensors)

    def _stacked(self, first: int) -> dict[str, Tensor]:
        """The history from a step on, name to (step, …)."""
        rows = self.history[first:]
        return {name: torch.stack([self._told(name, row[name]) for row in rows]) for name in (rows[0] if rows else {})}

    def _told(self, name: str, value: Any) -> Tensor:
        return value.cpu() if isinstance(value, Tensor) else torch.tensor(value, dtype=self.kinds[name])

    # ------------------------------------------------------------------------------------------- the two phases
    def _improve(self, state: Any) -> Any:
        self._last = state
        stop, total = self.schedule.stop, self.schedule.improvements
        with self._bar(total, "warm-up" if isinstance(self.schedule, Sample) else "steps", self.improved) as bar:
            for i in range(self.improved, total):
                if self.is_improved:
                    break
                state, info = self.backend.step(state, self.program)
                self._last = state
                self._record(info)
                if self.backend.keep_warmup and isinstance(self.schedule, Sample):
                    with isolated(self.seed + 1 + i, self.program.device):  # looking must not change the run
                        self.warmup.add(self._with_deterministics(self.backend.values(state, self.program)))
                self.improved = i + 1
                bar.update()
                if i % 20 == 0 and not bar.disable:
                    bar.set_postfix_str(self.backend.shown(info, self.program) + _speed(bar, info), refresh=False)
                is_done = stop is not None and self.processes.any(bool(stop(info)))
                is_called_off = self._is_called_off(i, info)  # also after the last step
                is_last = is_done or is_called_off or i + 1 == total
                if is_last and stop and not is_done:
                    self.findings.append(
                        f"{self.name} stopped at its limit of {total} steps before it had converged. Raise steps=."
                    )
                self.is_improved = is_last
                self._write_if_due(state)
        return state

    def _read(self, state: Any, is_done: bool = True) -> Any:
        if isinstance(self.backend, Independent) and isinstance(self.draws, Buffer):
            return self._read_blocks(self.backend, state, self.draws, is_done)
        total = self.schedule.draws
        with self._bar(total, "draws", self.read) as bar:
            for i in range(self.read, total):
                if self._is_enough():
                    break
                state, draw = self.backend.sample(state, self.program)
                self._last = state
                self.draws.add(self._with_deterministics(draw.values))
                self.stats.add(draw.stats)
                if isinstance(self.schedule, Sample) and "lp" in draw.stats:
                    self.history.append({"lp": draw.stats["lp"].detach().cpu()})
                self.read = i + 1
                bar.update()
                if i % 20 == 0 and not bar.disable and "acceptance_rate" in draw.stats:
                    bar.set_postfix_str(f"acceptance rate {float(draw.stats['acceptance_rate'].mean()):.3f}", refresh=False)
                is_last = isinstance(self.schedule, Sample) and self._is_called_off(self.schedule.warmup + i, draw)
                if is_done:
                    self._write_if_due(state)
                if is_last:
                    break
            else:
                self._judge()
        return state

    def _read_blocks(self, backend: Independent, state: Any, draws: Buffer, is_done: bool) -> Any:
        """Many draws at once. A run that stopped inside a block makes it again, and goes on where it was."""
        total, most = self.schedule.draws, backend.most_readings(self.program)
        with self._bar(total, "draws", self.read) as bar:
            while self.read < total:
                first, count = _block(self.read, most)
                self._begun = _Begun(first + count, random_state(self.program.device), self.program.density.calls)
                state, block = backend.readings(state, self.program, count)
                flat = self._with_deterministics({name: value.flatten(0, 1) for name, value in block.values.items()})
                lead = next(iter(block.stats.values())).shape
                values = {name: value.unflatten(0, lead) for name, value in flat.items()}
                self._last = state
                while self.read < min(first + count, total):
                    last = min(first + count, total, self._next_due if is_done else total)
                    part = slice(self.read - first, last - first)
                    draws.extend({name: value[:, part] for name, value in values.items()}, last - self.read)
                    self.stats.extend({name: value[:, part] for name, value in block.stats.items()}, last - self.read)
                    bar.update(last - self.read)
                    self.read = last
                    if is_done:
                        self._write_if_due(state)
                if not draws.tensors and not self.backend.keep and self.read < total:
                    return state  # nothing is kept of them
        return state

    @property
    def _next_due(self) -> int:
        """The number of draws after which a checkpoint is to be written next."""
        every = self.asked.checkpoint_every
        return self.schedule.draws if self.journal is None else self.read + every - (self.improved + self.read) % every

    def _write_if_due(self, state: Any) -> None:
        """At a fixed number of steps, whatever the time."""
        if (self.improved + self.read) % _MEETING == 0:
            self.processes.meet()
        is_due = self.journal is not None and (self.improved + self.read) % self.asked.checkpoint_every == 0
        if is_due and self.backend.is_sound(state, self.program):
            self._write(state)

    def _is_called_off(self, step: int, info: Any) -> bool:
        """Whether a callback, of any process, ends the phase."""
        callbacks = self.backend.callbacks
        return bool(callbacks) and self.processes.any(any([callback(step, info) for callback in callbacks]))

    @property
    def _until(self) -> Until | None:
        return self.schedule.until if isinstance(self.schedule, Sample) else None

    def _is_enough(self) -> bool:
        """Whether the run may stop before it has taken all its draws."""
        until = self._until
        if until is None or not self.read:
            return False
        if until.has_targets and self.read % until.every == 0 and until.are_met(*self._worst()):
            return True
        seconds = time.perf_counter() - self.started
        if until.seconds is None or not self.processes.any(seconds >= until.seconds):
            return False
        self.notes.append(
            f"Stopped after {self.read} of {self.schedule.draws} draws, when {seconds:.0f} seconds had passed, as until= "
            "asked: another run may stop elsewhere."
        )
        return True

    def _judge(self) -> None:
        """Says what is missing after the last draw."""
        until = self._until
        if until is None or not until.has_targets:
            return
        rhat, ess = self._worst()
        if not until.are_met(rhat, ess):
            self.notes.append(
                f"until= was not met in {self.read} draws a chain: the largest R-hat is {rhat:.4g}, the smallest effective "
                f"sample size {ess:.0f}. resume(posterior, ...) with more draws goes on."
            )

    def _worst(self) -> tuple[float, float]:
        structure = {"structure": "changing" if self.program.is_changing else "fixed"}
        found = {"draws": self.draws.read(), "stats": self.stats.read()}
        if self.processes.size > 1:
            parts = self._parts(found, None)
            found = {kind: _side_by_side([_under(kind, part.tensors) for part in parts], 0) for kind in found}
        return worst(Posterior(draws=found["draws"], stats=found["stats"], symmetry=self._symmetry, info=structure))

    def _record(self, info: Any) -> None:
        fields = {name: value.detach() for name, value in info._asdict().items() if isinstance(value, Tensor)}
        if isinstance(self.schedule, Sample):
            fields = {name: value.cpu() for name, value in fields.items() if name == "lp"}
        # A loss stays where it is: a copy would wait for the GPU at every step. One that is here becomes a number: thousands
        # of small tensors between the large ones of the steps keep the heap from closing up, and memory grows without end.
        self.kinds |= {name: value.dtype for name, value in fields.items() if name not in self.kinds}
        is_here = {name: value.device.type == "cpu" and not value.dim() for name, value in fields.items()}
        self.history.append({name: value.item() if is_here[name] else value for name, value in fields.items()})

    def _with_deterministics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.program.deterministic or self.program.is_changing:  # which a changing structure brings along
            return values
        data = self.program.chain_data(len(next(iter(values.values()))))
        return {**values, **self.program.density.deterministics({**values, **data})}

    def _bar(self, total: int, what: str, done: int) -> tqdm[Any]:
        is_hidden = not self.backend.progress or not self.processes.is_first or total < 2
        return tqdm(total=total, initial=done, desc=f"{self.name} {what}", disable=is_hidden, leave=False)

    def _info(self) -> dict[str, Any]:
        schedule = self.schedule
        findings = [*self.findings, *self.notes, *self.draws.findings]
        return {
            "backend": self.name,
            "kind": self.backend.kind,
            "config": _config(self.asked),
            "model": self.program.name,
            "source": source(self.program.call),
            "structure": "changing" if self.program.is_changing else "fixed",
            "processes": self.processes.size,
            "seed": self.seed,
            "sampling_time": self.seconds + time.perf_counter() - self.started,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
            "versions": versions(),
            "warmup": schedule.improvements,
            "draws": schedule.draws,
            "thin": schedule.thin if isinstance(schedule, Sample) else 1,
            "interrupted": any(finding.startswith("Stopped by Ctrl-C") for finding in findings),
            "findings": findings,
        }


def _speed(bar: tqdm[Any], info: Any) -> str:
    """Rows a second, for a progress bar; "" where a step does not say how many it sees, or none have been timed."""
    rows, rate = getattr(info, "rows", None), bar.format_dict["rate"]
    return f", {rows * rate:.0f} rows/s" if isinstance(rows, int) and rate else ""


def _under(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _side_by_side(parts: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    """Chains of several processes beside each other; sites that are not everywhere, or not in one shape, are padded."""
    if len(parts) == 1:
        return parts[0]
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part.get(name) for part in parts]
        held = [value for value in values if value is not None]
        if len(held) == len(values) and len({value.shape[dim + 1 :] for value in held}) == 1:
            found[name] = torch.cat(held, dim)
            continue
        chains, draws = held[0].shape[:2]
        rows = [{} if v is None else {name: v[i, j]} for v in values for i in range(chains) for j in range(draws)]
        found[name] = ragged(rows)[name].unflatten(0, (-1, draws))
    return found


def _severity(certificate: float) -> float:
    return certificate if certificate == certificate else math.inf


def _common(plans: list[Any]) -> tuple[Plan | None, list[int]]:
    """The plan of process 0, with what its blocks achieved in all processes, and the processes that had other blocks."""
    if plans[0] is None:
        return None, []
    every = [[Update(**{**row, "sites": tuple(row["sites"])}) for row in rows] for rows in plans]
    blocks = [[(update.sites, update.update, update.claim) for update in updates] for updates in every]
    differing = [rank for rank, those in enumerate(blocks) if those != blocks[0]]
    alike = [updates for rank, updates in enumerate(every) if rank not in differing]
    merged = []
    for same in zip(*alike, strict=True):
        certificates = [update.certificate for update in same if update.certificate is not None]
        rate = sum(update.acceptance for update in same) / len(same)
        merged.append(same[0]._replace(acceptance=rate, certificate=max(certificates, key=_severity, default=None)))
    return Plan(tuple(merged)), differing


def _config(backend: Backend[Any, Any]) -> dict[str, Any]:
    """The fields of a back-end as JSON can hold them."""
    plain = (str, int, float, bool, type(None))
    values = {field.name: getattr(backend, field.name) for field in dataclasses.fields(backend)}
    return {name: value if isinstance(value, plain) else repr(value) for name, value in values.items() if name != "start"}
