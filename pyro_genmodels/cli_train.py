"""The command line for networks: ``genmodels train | sample | evaluate``.

What ``train`` writes into its folder:

settings.json    what the run was asked for, which ``--resume`` holds its own command line against
log.jsonl        a line every few steps (see ``inference.JSONLines``)
run/             the checkpoint that ``--resume`` goes on from
model/           the trained model, json and safetensors
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import ELBO, IWELBO, SVI, JSONLines, MultiplyIWELBO, Renyi, checkpoint
from pyro_genmodels import plots, trained
from pyro_genmodels.autoencoders.latent import LatentModel
from pyro_genmodels.autoencoders.priors import VampPrior
from pyro_genmodels.comparison import check_writable, is_interrupted
from pyro_genmodels.datasets import Pictures, pictures
from pyro_genmodels.datasets.pictures import PICTURES
from pyro_genmodels.metrics import codes, density
from pyro_genmodels.page import write_whole
from pyro_genmodels.trained import LIKELIHOODS, MODELS, PRIORS, Recipe

__all__ = ["BOUNDS", "add"]

BOUNDS: dict[str, Callable[..., Any]] = {"elbo": ELBO, "iwae": IWELBO, "miwae": MultiplyIWELBO, "renyi": Renyi}
_SETTINGS, _RUN, _MODEL, _LOG = "settings.json", "run", "model", "log.jsonl"
_INTERRUPTED = 130
_FEATURES = {"vae": 20, "iwae": 50}
_EACH = 100  # draws of a row for rate, distortion and active units, at most


def add(commands: Any, count: Callable[[str], int], whole: Callable[[str], int]) -> None:
    """Adds the commands to a parser.

    Args:
        commands: What ``add_subparsers`` gave.
        count: Reads an integer of at least 1.
        whole: Reads an integer of at least 0.
    """
    command = commands.add_parser("train", help="an autoencoder on pictures: weights, log and checkpoint in a folder")
    command.set_defaults(command=_train)
    command.add_argument("model", metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    command.add_argument("--data", required=True, metavar="NAME|FILE", help=f"one of {', '.join(PICTURES)}, or FILE.npz")
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new folder for what comes of it")
    command.add_argument("--resume", action="store_true", help="go on with the run in FOLDER, which the same command began")
    command.add_argument("--bound", default="elbo", metavar="NAME", help=f"one of {', '.join(BOUNDS)} (elbo)")
    command.add_argument("--particles", type=count, metavar="K", help="draws of the guide a step (elbo 1, else 5 or 8)")
    command.add_argument("--features", type=count, metavar="D", help="numbers in the code (vae 20, iwae 50)")
    command.add_argument("--layers", type=count, default=1, metavar="L", help="of iwae: 1 or 2 layers of hidden numbers (1)")
    command.add_argument("--prior", default="normal", metavar="NAME", help=f"one of {', '.join(PRIORS)} (normal)")
    command.add_argument(
        "--likelihood", default="bernoulli", metavar="NAME", help=f"one of {', '.join(LIKELIHOODS)} (bernoulli)"
    )
    command.add_argument("--beta", type=float, default=1.0, metavar="B", help="weight of the divergence in the bound (1)")
    command.add_argument("--epochs", type=count, default=10, metavar="N", help="passes over the data (10)")
    command.add_argument("--batch", type=count, default=128, metavar="N", help="rows a step (128)")
    command.add_argument("--rate", type=float, default=1e-3, metavar="R", help="learning rate (0.001)")
    _add_run(command, count, whole)

    command = commands.add_parser("sample", help="new pictures from a trained model")
    command.set_defaults(command=_sample)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="what train --out wrote")
    command.add_argument("--size", type=count, default=64, metavar="N", help="how many (64)")
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="a .png of a grid, or .npz with the array x"
    )
    command.add_argument("--drawn", action="store_true", help="pixels drawn from the likelihood, in place of their means")
    _add_run(command, count, whole)

    command = commands.add_parser("evaluate", help="log-likelihood, rate, distortion and active units of a trained model")
    command.set_defaults(command=_evaluate)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="what train --out wrote")
    command.add_argument("--data", metavar="NAME|FILE", help="its x_test, else all of it; by default that of the training")
    command.add_argument("--samples", type=count, default=1000, metavar="S", help="importance samples of a row (1000)")
    command.add_argument("--rows", type=count, metavar="N", help="only the first N rows")
    _add_run(command, count, whole)


def _add_run(command: argparse.ArgumentParser, count: Callable[[str], int], whole: Callable[[str], int]) -> None:
    command.add_argument("--seed", type=whole, default=0, metavar="S", help="seed of everything that is random (0)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    threads = torch.get_num_threads()
    command.add_argument("--threads", type=count, default=threads, metavar="N", help=f"threads of one operation ({threads})")


def _train(args: argparse.Namespace) -> int:
    if args.bound not in BOUNDS:
        raise ValueError(f"There is no bound '{args.bound}'; there are {', '.join(BOUNDS)}.")
    if args.model not in MODELS:
        raise ValueError(f"There is no model '{args.model}' to train; there are {', '.join(MODELS)}.")
    given = {} if args.particles is None else {"particles": args.particles}
    data = pictures(args.data)
    recipe = Recipe(
        model=args.model,
        shape=data.shape,
        features=args.features or _FEATURES[args.model],
        layers=args.layers,
        prior=args.prior,
        likelihood=args.likelihood,
        beta=args.beta,
    )
    settings = {
        name: getattr(args, name)
        for name in ("model", "data", "bound", "particles", "layers", "prior", "likelihood", "beta", "epochs")
    } | {"features": recipe.features, "batch": args.batch, "rate": args.rate, "seed": args.seed, "threads": args.threads}
    if args.batch > len(data.train):
        raise ValueError(f"--batch is {args.batch}, but {args.data} has {len(data.train)} rows to train on.")
    torch.manual_seed(args.seed)
    model = recipe.build()
    model.decoder.likelihood.check(data.train)
    _start_prior(model, data)
    every = len(data.train) // args.batch
    backend = SVI(
        steps=every * args.epochs,
        learning_rate=args.rate,
        bound=BOUNDS[args.bound](**given),
        batch_size=args.batch,
        transform=torch.bernoulli if recipe.is_binary else None,
        draws=1,
        keep=(),
        seed=args.seed,
        progress=not args.quiet,
        checkpoint=args.out / _RUN,
        checkpoint_every=every,
        callbacks=(JSONLines(args.out / _LOG),),
    )
    begun = _begin(args.out, settings, args.resume)
    started = time.perf_counter()
    try:
        if begun:
            posterior = backend.resume(args.out / _RUN, model, data.train)
        else:
            posterior = backend.fit(model, data.train)
    except ValueError:
        if not begun and not (args.out / _RUN).exists():  # refused before the first step
            (args.out / _SETTINGS).unlink()
            args.out.rmdir()
        raise
    loss = posterior.history["loss"] / len(data.train)
    facts = {**settings, "steps": len(loss), "rows": len(data.train), "is_done": not is_interrupted(posterior)}
    trained.save(args.out / _MODEL, recipe, model, facts)
    print(f"{recipe} on {len(data.train)} rows of {args.data}, {args.bound}, seed {args.seed}")
    print(f"{len(loss)} steps of {args.batch} rows, {time.perf_counter() - started:.1f} s")
    for epoch in range(math.ceil(len(loss) / every)):
        print(f"  pass {epoch + 1:4}   bound {-float(loss[every * epoch : every * (epoch + 1)].mean()):12.4f} nats a row")
    print("\nFindings", *(posterior.info["findings"] or ["none"]), sep="\n  ")
    print(f"\nSaved in {args.out}")
    if is_interrupted(posterior):
        print("genmodels: Stopped by Ctrl-C; --resume goes on from the last whole pass.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _start_prior(model: LatentModel, data: Pictures) -> None:
    prior = getattr(model, "prior", None)
    if isinstance(prior, VampPrior):
        prior.start_from(data.train)


def _begin(folder: Path, settings: Mapping[str, Any], is_resumed: bool) -> bool:
    """Makes the folder of a new run, or looks at that of one that is to be gone on with; whether there is a checkpoint."""
    file = folder / _SETTINGS
    if not is_resumed:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            ours = file.is_file()
            advice = "--resume goes on with the run in it, or choose" if ours else "Choose"
            raise FileExistsError(f"'{folder}' exists and is not empty. {advice} a new folder.")
        check_writable(folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return False
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise FileNotFoundError(f"'{folder}' holds no run to go on with: it has no {_SETTINGS}. Leave --resume out.")
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"The run in '{folder}' has {name} {before.get(name)}, but this command says {settings.get(name)}. A run "
                f"goes on with the settings that it began with: see {file}."
            )
    return checkpoint.is_of_run(folder / _RUN)


def _load(folder: Path) -> tuple[Recipe, LatentModel, dict[str, Any]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'. Give one that train --out wrote.")
    if not (folder / _MODEL).exists() and (folder / _SETTINGS).is_file():
        raise ValueError(f"The run in '{folder}' has not ended: go on with it by the same train command and --resume.")
    if not (folder / _MODEL).exists():
        raise FileNotFoundError(f"'{folder}' holds no trained model. Give a folder that train --out wrote.")
    return trained.load(folder / _MODEL)


def _sample(args: argparse.Namespace) -> int:
    recipe, model, _ = _load(args.folder)
    kind = args.out.suffix.lower()
    if kind not in (".png", ".npz"):
        raise ValueError(f"--out is '{args.out}', but must end in .png, for a grid of pictures, or .npz, for numbers.")
    if kind == ".png" and not recipe.is_pictured:
        raise ValueError(f"Rows of shape {recipe.shape} are no pictures: give --out FILE.npz.")
    check_writable(args.out.resolve().parent)
    x = trained.sample(model, args.size, args.seed, args.drawn)
    if kind == ".npz":
        write_whole(args.out, lambda path: np.savez_compressed(path, x=x.numpy()))
    else:
        grid = plots.images(trained.grid(x))
        write_whole(args.out, lambda path: grid.savefig(path, dpi=150))
    print(f"{args.size} rows of {recipe} in {args.out}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    recipe, model, facts = _load(args.folder)
    name = args.data or facts["data"]
    data = pictures(name)
    if data.shape != recipe.shape:
        raise ValueError(f"{name} has rows of shape {data.shape}, but the model in '{args.folder}' has {recipe.shape}.")
    part = "train" if data.test is None else "test"
    x = (data.train if data.test is None else data.test)[: args.rows]
    if recipe.is_binary:
        x = torch.bernoulli(x, generator=torch.Generator().manual_seed(args.seed))
    found = density.log_evidence(model, x, samples=args.samples, seed=args.seed, progress=not args.quiet)
    parts = density.rate_distortion(model, x, samples=min(args.samples, _EACH), seed=args.seed)
    print(f"{recipe} after {facts['steps']} steps, on {len(x)} rows of {name} ({part})")
    if not facts["is_done"]:
        print("Its training was stopped by Ctrl-C.")
    print(f"\n{f'NLL, {args.samples} importance samples':34}{-found.mean:12.4f} ± {_se(found.log_p):.4f} nats a row")
    print(f"{'  k-hat above 0.7':34}{int((found.pareto_k > 0.7).sum()):7} of {len(x)} rows")
    for label, values in (("rate", parts.rate), ("distortion", parts.distortion), ("minus ELBO", -parts.elbo)):
        print(f"{label:34}{float(values.mean()):12.4f} ± {_se(values):.4f}")
    if len(x) > 1:
        units = codes.active_units(model, x, samples=max(2, min(args.samples, _EACH)), seed=args.seed)
        print(f"{'active units':34}{units.active:7} of {units.units}")
    print("\n± is the standard error of a mean over rows, of which these are some.")
    print("\nFindings", *(found.findings or ["none"]), sep="\n  ")
    return 0


def _se(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
