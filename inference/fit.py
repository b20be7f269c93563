"""The one loop: improve, then read out. Every back-end runs here, and nowhere else.

Optimise    improve until done, then read out draws          (SVI, EM)
Sample      improve during warm-up, then read out, thinned   (Gibbs, Metropolis-Hastings, HMC)
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from inference.arrays import ragged
from inference.contract import Backend, Independent
from inference.handlers import isolated, quiet, reproducible
from inference.posterior import Posterior
from inference.program import Program
from inference.symmetry import exchangeable

__all__ = ["Optimise", "Sample", "run"]

LARGEST = 2**30  # bytes of draws that are kept without being asked to


class Optimise(NamedTuple):
    """Improve for ``steps`` steps, or until ``stop(info)``; then read out ``draws`` draws of ``chains`` chains."""

    steps: int
    draws: int
    chains: int = 1
    stop: Callable[[Any], bool] | None = None

    @property
    def improvements(self) -> int:
        return self.steps

    @property
    def evaluations(self) -> int:
        return self.steps


class Sample(NamedTuple):
    """``warmup`` adaptive steps, then ``draws`` draws with ``thin`` steps each, of about ``cost`` evaluations a step."""

    chains: int
    warmup: int
    draws: int
    thin: int = 1
    cost: int = 1
    stop: None = None

    @property
    def improvements(self) -> int:
        return self.warmup

    @property
    def evaluations(self) -> int:
        return (self.warmup + self.draws * self.thin) * self.cost


class _Buffer:
    """Draws on the CPU, preallocated at the first one; sites that would not fit are left out."""

    def __init__(self, count: int, keep: Any) -> None:
        self.count, self.keep = count, keep
        self.tensors: dict[str, Tensor] = {}
        self.filled = 0
        self.findings: list[str] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        if not self.tensors:
            kept = self._kept(values)
            self.tensors = {
                name: torch.empty((len(value), self.count, *value.shape[1:]), dtype=value.dtype)
                for name, value in values.items()
                if name in kept
            }
        for name, buffer in self.tensors.items():
            buffer[:, self.filled] = values[name].detach().cpu()
        self.filled += 1

    def extend(self, values: Mapping[str, Tensor]) -> None:
        """Adds many draws, (chain, draw, ...)."""
        self.add({name: value[:, 0] for name, value in values.items()})
        last = self.filled - 1 + next(iter(values.values())).shape[1]
        for name, buffer in self.tensors.items():
            buffer[:, self.filled : last] = values[name][:, 1:].detach().cpu()
        self.filled = last

    def _kept(self, values: Mapping[str, Tensor]) -> list[str]:
        if self.keep is not None:
            return [name for name in values if name in self.keep]
        sizes = {name: value.numel() * value.element_size() * self.count for name, value in values.items()}
        kept = sorted(values, key=lambda name: sizes[name])
        while sum(sizes[name] for name in kept) > LARGEST:
            name = kept.pop()
            self.findings.append(_left_out(name, sizes[name]))
        return kept

    def read(self) -> dict[str, Tensor]:
        return {name: buffer[:, : self.filled] for name, buffer in self.tensors.items()}


class _RaggedBuffer:
    """Draws whose sites and shapes change from one to the next: kept as they come, put together at the end.

    Sites are left out as soon as they would not fit, by the largest shape that they have had so far.
    """

    def __init__(self, count: int, keep: Any) -> None:
        self.count, self.keep = count, keep
        self.rows: list[dict[str, Tensor]] = []
        self.sizes: dict[str, int] = {}
        self.filled = 0
        self.left_out: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        names = [name for name in values if name not in self.left_out and (self.keep is None or name in self.keep)]
        self.rows.append({name: values[name].detach().cpu() for name in names})
        self.filled += 1
        for name in names:
            size = values[name].numel() * values[name].element_size() * self.count
            self.sizes[name] = max(size, self.sizes.get(name, 0))
        while self.keep is None and sum(self.sizes.values()) > LARGEST:
            largest = max(self.sizes, key=self.sizes.__getitem__)
            self.left_out[largest] = self.sizes.pop(largest)
            for row in self.rows:
                row.pop(largest, None)

    @property
    def findings(self) -> list[str]:
        unseen = [name for name in self.keep or () if name not in self.sizes]
        return [_left_out(name, size) for name, size in self.left_out.items()] + [
            f"keep= names '{name}', but no draw has such a site." for name in unseen
        ]

    def read(self) -> dict[str, Tensor]:
        rows = ragged(self.rows[: self.filled])
        return {name: values.transpose(0, 1).contiguous() for name, values in rows.items()}


def _left_out(name: str, size: int) -> str:
    return f"The draws of '{name}' would take {size / 2**30:.1f} GiB and were not kept. keep=[...] decides."


def _check(backend: Backend[Any, Any]) -> None:
    least = {"chains": 1, "draws": 1, "warmup": 0, "thin": 1, "steps": 1, "restarts": 1, "batch_size": 1}
    least |= {"most_steps": 1, "max_depth": 1}
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


def _shown(info: Any) -> str:
    for name in ("acceptance_rate", "loss", "log_joint"):
        if hasattr(info, name):
            return f"{name.replace('_', ' ')} {float(getattr(info, name).mean()):.4g}"
    return ""


def _first_device(args: tuple[Any, ...]) -> torch.device | None:
    return next((arg.device for arg in args if isinstance(arg, Tensor)), None)


def run(backend: Backend[Any, Any], model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Posterior:
    """Runs a back-end on a program; see ``Backend.fit``."""
    _check(backend)
    seed = int.from_bytes(os.urandom(4), "little") if backend.seed is None else int(backend.seed)
    device = torch.device(backend.device) if backend.device else _first_device(args)
    started = time.perf_counter()
    with isolated(seed, device):
        program = Program(
            model,
            args,
            kwargs,
            dtype=backend.dtype,
            device=backend.device,
            follow=backend.follows_data,
            evaluations=backend.schedule.evaluations,
            is_fixed=backend.changing is None,
        )
        sites = (*program.latents, *program.deterministic)
        unknown = [name for name in backend.keep or () if name not in sites]
        if unknown and not program.is_changing:  # whose sites are known when it has run
            raise ValueError(f"keep= names '{unknown[0]}', but the sites are {', '.join(sites)}.")
        with reproducible(program.dtype, program.device), quiet():
            torch.manual_seed(seed)
            return _Run(backend, program, seed, started).posterior()


class _Run:
    """One run: its state, its buffers and what it noticed."""

    def __init__(self, asked: Backend[Any, Any], program: Program, seed: int, started: float) -> None:
        self.asked, self.name = asked, type(asked).__name__
        self.backend = (program.is_changing and asked.changing) or asked
        self.program, self.seed, self.started = program, seed, started
        self.schedule = self.backend.schedule
        self.history: list[dict[str, Tensor]] = []
        self.findings: list[str] = []

    def posterior(self) -> Posterior:
        schedule = self.schedule
        state = self.backend.init(self.program)
        plan = self.backend.plan(state, self.program)
        if self.backend.progress and plan is not None and isinstance(schedule, Sample):
            tqdm.write(str(plan), file=sys.stderr)
        buffer = _RaggedBuffer if self.program.is_changing else _Buffer
        warmup = buffer(schedule.improvements, self.backend.keep)
        draws = buffer(schedule.draws, self.backend.keep)
        stats = _Buffer(schedule.draws, None)
        phase = "warm-up" if isinstance(schedule, Sample) else "steps"
        try:
            state = self._improve(state, warmup, phase)
        except KeyboardInterrupt:
            if isinstance(schedule, Sample):
                raise KeyboardInterrupt(f"{self.name} was stopped in warm-up: there are no draws yet.") from None
            state = self._last
            self.findings.append(f"Stopped by Ctrl-C after {len(self.history)} of {schedule.steps} steps.")
        try:
            state = self._read(state, draws, stats)
        except KeyboardInterrupt:
            if not draws.filled or draws.filled != stats.filled:
                draws.filled = stats.filled = min(draws.filled, stats.filled)
            if not draws.filled:
                raise KeyboardInterrupt(f"{self.name} was stopped: there are no draws yet.") from None
            state = self._last
            self.findings.append(f"Stopped by Ctrl-C after {draws.filled} of {schedule.draws} draws.")
        self.findings += draws.findings
        history = {
            name: torch.stack([record[name] for record in self.history]).cpu()
            for name in (self.history[0] if self.history else {})
        }
        return Posterior(
            draws=draws.read(),
            stats=stats.read(),
            history=self.backend.history(history, state),
            plan=self.backend.plan(state, self.program),
            weights=self.backend.weights(state, self.program),
            info=self._info(),
            dims=self.program.dims,
            coords=self.program.coords,
            observed={name: value.cpu() for name, value in self.program.observed.items()},
            constants={name: value.cpu() for name, value in self.program.constants.items()},
            symmetry=exchangeable(self.program),
            warmup_draws=warmup.read(),
            warmup_stats={},
            program=self.program,
        )

    def _improve(self, state: Any, warmup: _Buffer | _RaggedBuffer, phase: str) -> Any:
        self._last = state
        stop, is_done = self.schedule.stop, False
        with self._bar(self.schedule.improvements, phase) as bar:
            for i in range(self.schedule.improvements):
                state, info = self.backend.step(state, self.program)
                self._last = state
                self._record(info)
                if self.backend.keep_warmup and isinstance(self.schedule, Sample):
                    with isolated(self.seed + 1 + i, self.program.device):  # looking must not change the run
                        warmup.add(self._with_deterministics(self.backend.values(state, self.program)))
                bar.update()
                if i % 20 == 0 and not bar.disable:
                    bar.set_postfix_str(_shown(info), refresh=False)
                is_done = bool(stop and stop(info))
                if is_done or any([callback(i, info) for callback in self.backend.callbacks]):
                    break
        if stop and not is_done:
            self.findings.append(
                f"{self.name} stopped at its limit of {self.schedule.improvements} steps before it had "
                "converged. Raise steps=."
            )
        return state

    def _read(self, state: Any, draws: _Buffer | _RaggedBuffer, stats: _Buffer) -> Any:
        if isinstance(self.backend, Independent) and isinstance(draws, _Buffer):
            return self._read_blocks(self.backend, state, draws, stats)
        with self._bar(self.schedule.draws, "draws") as bar:
            for i in range(self.schedule.draws):
                state, draw = self.backend.sample(state, self.program)
                self._last = state
                draws.add(self._with_deterministics(draw.values))
                stats.add(draw.stats)
                if isinstance(self.schedule, Sample) and "lp" in draw.stats:
                    self.history.append({"lp": draw.stats["lp"].detach().cpu()})
                bar.update()
                if i % 20 == 0 and not bar.disable and "acceptance_rate" in draw.stats:
                    bar.set_postfix_str(f"acceptance rate {float(draw.stats['acceptance_rate'].mean()):.3f}", refresh=False)
                if isinstance(self.schedule, Sample) and any(
                    [callback(self.schedule.warmup + i, draw) for callback in self.backend.callbacks]
                ):
                    break
        return state

    def _read_blocks(self, backend: Independent, state: Any, draws: _Buffer, stats: _Buffer) -> Any:
        with self._bar(self.schedule.draws, "draws") as bar:
            while stats.filled < self.schedule.draws:
                state, block = backend.readings(state, self.program, self.schedule.draws - stats.filled)
                self._last = state
                flat = self._with_deterministics({name: value.flatten(0, 1) for name, value in block.values.items()})
                lead = next(iter(block.stats.values())).shape
                draws.extend({name: value.unflatten(0, lead) for name, value in flat.items()})
                stats.extend(block.stats)
                bar.update(lead[1])
        return state

    def _record(self, info: Any) -> None:
        fields = {name: value.detach() for name, value in info._asdict().items() if isinstance(value, Tensor)}
        if isinstance(self.schedule, Sample):
            fields = {name: value.cpu() for name, value in fields.items() if name == "lp"}
        self.history.append(fields)  # a loss stays where it is: a copy would wait for the GPU at every step

    def _with_deterministics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.program.deterministic or self.program.is_changing:  # which a changing structure brings along
            return values
        data = self.program.chain_data(len(next(iter(values.values()))))
        return {**values, **self.program.density.deterministics({**values, **data})}

    def _bar(self, total: int, what: str) -> tqdm[Any]:
        return tqdm(total=total, desc=f"{self.name} {what}", disable=not self.backend.progress or total < 2, leave=False)

    def _info(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "backend": self.name,
            "kind": self.backend.kind,
            "config": _config(self.asked),
            "model": self.program.name,
            "structure": "changing" if self.program.is_changing else "fixed",
            "seed": self.seed,
            "sampling_time": time.perf_counter() - self.started,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
            "versions": _versions(),
            "warmup": schedule.improvements,
            "draws": schedule.draws,
            "thin": schedule.thin if isinstance(schedule, Sample) else 1,
            "interrupted": any(finding.startswith("Stopped by Ctrl-C") for finding in self.findings),
            "findings": self.findings,
        }


def _config(backend: Backend[Any, Any]) -> dict[str, Any]:
    """The fields of a back-end as JSON can hold them."""
    plain = (str, int, float, bool, type(None))
    values = {field.name: getattr(backend, field.name) for field in dataclasses.fields(backend)}
    return {name: value if isinstance(value, plain) else repr(value) for name, value in values.items() if name != "start"}


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("pyro-genmodels", "torch", "pyro-ppl", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
