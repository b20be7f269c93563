"""Schedulers of diffusers, certified on a mixture whose flow is known, beside ours at the same levels of noise.

    pip install diffusers; python examples/benchmarks/conformance.py

Each scheduler is given the levels of our grid as its own training steps (``conformance.from_diffusers``), so that what is
seen is its solver and nothing else. Orders are those between 32 and 64 steps, as its tables are in float32: below errors of
1e-6 they say nothing.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from rows import Rows

from pyro_genmodels.diffusion import samplers
from pyro_genmodels.diffusion.conformance import certify, from_diffusers, paths

OFFSET = {"clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading"}
MULTISTEP = {"final_sigmas_type": "sigma_min", "timestep_spacing": "linspace", "lower_order_final": False}


def made(family: Any, timesteps: bool = False, **options: Any) -> Callable[[np.ndarray, int], Any]:
    def make(betas: np.ndarray, steps: int) -> Any:
        scheduler = family(num_train_timesteps=len(betas), trained_betas=betas.tolist(), **options)
        if timesteps:
            scheduler.set_timesteps(timesteps=list(range(steps, 0, -1)))
        else:
            scheduler.set_timesteps(steps)
        return scheduler

    return make


FLOWS: dict[str, Any] = {
    "DDIM": (made(diffusers.DDIMScheduler, set_alpha_to_one=False, **OFFSET), samplers.ddim),
    "EulerDiscrete": (made(diffusers.EulerDiscreteScheduler, True, final_sigmas_type="sigma_min"), samplers.euler),
    "DPMSolverMultistep, 1": (made(diffusers.DPMSolverMultistepScheduler, solver_order=1, **MULTISTEP), samplers.ddim),
    "DPMSolverMultistep, 2": (
        made(diffusers.DPMSolverMultistepScheduler, solver_order=2, **MULTISTEP), samplers.dpm_solver_pp_2m,
    ),
    "DPMSolverMultistep, 3": (
        made(diffusers.DPMSolverMultistepScheduler, solver_order=3, **MULTISTEP), samplers.dpm_solver_pp_3m,
    ),
    "UniPCMultistep, 2": (
        made(diffusers.UniPCMultistepScheduler, solver_order=2, **MULTISTEP), functools.partial(samplers.unipc, order=2),
    ),
    "UniPCMultistep, 3": (
        made(diffusers.UniPCMultistepScheduler, solver_order=3, **MULTISTEP), functools.partial(samplers.unipc, order=3),
    ),
}  # fmt: skip
RANDOM: dict[str, Any] = {
    "DPMSolverMultistep, SDE": (
        made(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", **MULTISTEP),
        samplers.dpm_solver_pp_2m_sde,
    ),
}


def main(smoke: bool = False) -> None:
    torch.set_num_threads(1)
    print("python examples/benchmarks/conformance.py")
    print(f"{datetime.date.today()}, 2 cores, shared; one thread")
    names = ("torch", "pyro-ppl", "diffusers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"Python {platform.python_version()}, {versions}")
    rows = Rows()
    case, steps = paths(32 if smoke else 256), 8 if smoke else 32
    print(
        f"\n{'errors of paths at':20}{f'diffusers: {steps}, {2 * steps} steps':>36}{f'ours: {steps}, {2 * steps} steps':>36}"
    )
    for name, (make, ours) in FLOWS.items():
        row = ""
        for sampler in (from_diffusers(make), ours):
            try:
                found = certify(sampler, steps=steps, case=case)
            except ValueError as error:
                row += f"  {str(error)[:60]}"
                continue
            who = "diffusers" if sampler is not ours else "ours"
            rows.add(
                f"observed order of a sampler of {who}", f"{name}, exact Gaussian mixture", found.order, is_less_better=False
            )
            row += f"{'order':>8}{found.order:6.2f}{found.errors[0]:11.1e}{found.errors[1]:11.1e}"
        print(f"{name:22}{row}")
    print(f"\n{'bias of Gaussian data':26}")
    for name, (make, ours) in RANDOM.items():
        row = ""
        for sampler in (from_diffusers(make, noise="variance_noise"), ours):
            found = certify(sampler, True, steps=steps, case=case, has_bound=False)
            row += f"{'order':>8}{found.weak_order:6.2f}{found.bias[0]:11.1e}{found.bias[1]:11.1e}"
        print(f"{name:22}{row}")
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    main(parser.parse_args().smoke)
