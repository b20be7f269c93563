"""Makes ``references.json``: moments of programs that have no formula, by a long run of Pyro's own NUTS.

    python tests/make_references.py              all of them, minutes each
    python tests/make_references.py cox          one of them

Nothing of ``inference`` runs here but ArviZ's estimates of Monte-Carlo error.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS

from inference import arviz
from programs import hierarchies, processes

CHAINS, WARMUP, DRAWS = 4, 300, 2500
PROGRAMS: dict[str, tuple[Any, tuple[torch.Tensor, ...], Any]] = {
    "cox": (processes.cox_from_white, (processes.DAYS, processes.ACCIDENTS), processes.cox_from_white_quantities),
    "item_response": (hierarchies.item_response, (hierarchies.MARKS,), None),
}


def reference(name: str) -> dict[str, Any]:
    """Means and standard deviations with their Monte-Carlo errors, and what the run was.

    Raises:
        RuntimeError: If the chains disagree, or are too short to be compared with.
    """
    program, data, quantities = PROGRAMS[name]
    chains, diverged = [], 0
    for seed in range(CHAINS):
        pyro.set_rng_seed(seed)
        kernel = NUTS(program, target_accept_prob=0.9, jit_compile=True, ignore_jit_warnings=True)
        run = MCMC(kernel, num_samples=DRAWS, warmup_steps=WARMUP, disable_progbar=True)
        run.run(*data)
        chains.append(run.get_samples())
        diverged += len(run.diagnostics()["divergences"]["chain 0"])
    draws = {site: np.stack([chain[site].numpy() for chain in chains]) for site in chains[0]}
    known = draws if quantities is None else quantities(draws)
    worst = max(float(arviz.rhat(values).max()) for values in known.values())
    fewest = min(float(arviz.ess(values).min()) for values in known.values())
    if worst > 1.005 or fewest < 3000 or diverged > 0.001 * CHAINS * DRAWS:
        raise RuntimeError(f"{name}: R-hat {worst:.4f}, effective size {fewest:.0f}, {diverged} divergences.")
    return {
        "command": f"python tests/make_references.py {name}",
        "by": f"pyro {pyro.__version__} NUTS, {CHAINS} chains of {WARMUP} + {DRAWS}",
        "date": datetime.date.today().isoformat(),
        "rhat": round(worst, 5),
        "ess": round(fewest),
        "divergences": diverged,
        "moments": {
            quantity: {
                "mean": values.mean((0, 1)).tolist(),
                "sd": values.std((0, 1)).tolist(),
                "mean_error": arviz.mcse(values).tolist(),
                "sd_error": arviz.mcse(values, method="sd").tolist(),
            }
            for quantity, values in known.items()
        },
    }


def main(names: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    path = Path(__file__).with_name("references.json")
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in names or PROGRAMS:
        found[name] = reference(name)
        path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
