"""The command line: ``genmodels list | fit | compare | diagnose``; ``train | sample | evaluate`` are in ``cli_train``, and
``report | gallery`` in ``cli_report``.

Tables go to stdout, all else to stderr.

Exit status: 0, or 1 if an example of the gallery failed, or 2 for input that cannot be used (one sentence on stderr), or 130
after Ctrl-C, when what there is so far has been printed and saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from inference import Backend, Posterior, arviz, checkpoint
from pyro_genmodels import cli_report, cli_train, datasets, report, tables
from pyro_genmodels.comparison import (
    METHODS,
    MODELS,
    Entry,
    Folder,
    check_writable,
    compare,
    is_interrupted,
    labelled,
    present,
    sentence,
    summary,
)

__all__ = ["main"]

_BAD_INPUT, _INTERRUPTED = 2, 130
_COMMANDS = "list | fit | compare | diagnose | report | gallery | train | sample | evaluate"
_SHOWN = 50  # elements of a site in a summary
_MODEL_OPTIONS = ("components", "covariance", "columns", "factors", "states", "emission", "cost", "kernel")
_RUN_OPTIONS = ("steps", "draws", "warmup", "chains")
_LEGEND = """
mean ± Monte-Carlo standard error. Wall time is all of a fit: start, compilation, warm-up, draws.
R-hat and ESS are the worst over quantities that do not change when components are renamed."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of everything."""

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_INPUT, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        Exit status.
    """
    args = _parser().parse_args(argv)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(getattr(args, "threads", threads))
        return args.command(args)
    except (ValueError, OSError) as error:
        _say(f"genmodels: {sentence(error)}")
        return _BAD_INPUT
    except KeyboardInterrupt as stop:
        _say(f"genmodels: {stop}" if str(stop) else "genmodels: Stopped by Ctrl-C.")
        return _INTERRUPTED
    finally:
        torch.set_num_threads(threads)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="genmodels", description="Generative models as Pyro programs, and ways to know what they hide.")
    commands = parser.add_subparsers(required=True, metavar=_COMMANDS)

    command = commands.add_parser("list", help="models, data sets and back-ends, and what works with what")
    command.set_defaults(command=_list)

    command = commands.add_parser("fit", help="one model, one back-end: plan, summary, findings")
    command.set_defaults(command=_fit)
    _add_model(command)
    command.add_argument("--method", required=True, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    command.add_argument("--steps", type=_count, metavar="N", help="steps of svi and em")
    command.add_argument("--draws", type=_count, metavar="N", help="draws that are kept (of each chain)")
    command.add_argument("--warmup", type=_whole, metavar="N", help="steps of each chain before the first draw")
    command.add_argument("--chains", type=_count, metavar="N", help="chains, all advanced at once")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="save the posterior there: Posterior.load(FOLDER)")

    command = commands.add_parser("compare", help="one model, several back-ends: one table, pictures, a netCDF file each")
    command.set_defaults(command=_compare)
    _add_model(command)
    command.add_argument("--method", metavar="A,B,C", help="back-ends, by default all that run the model")
    command.add_argument(
        "--held-out", type=float, metavar="SHARE", help="share of the rows that no back-end sees (0.1); 0: none"
    )
    command.add_argument("--out", type=Path, metavar="FOLDER", help="save table.csv, pictures and netCDF files there")

    command = commands.add_parser("diagnose", help="a saved posterior: plan, summary, findings in words")
    command.set_defaults(command=_diagnose)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="what fit --out or Posterior.save wrote")
    cli_report.add(commands, _count)
    cli_train.add(commands, _count, _whole)

    command = commands.add_parser("docs", help="the API reference, as pages of HTML; needs the extra docs")
    command.set_defaults(command=_docs)
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pages go")
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    command.add_argument("--data", required=True, metavar="NAME|FILE", help="a data set of the list, or FILE.csv, FILE.npz")
    command.add_argument(
        "--labels", metavar="COLUMN", help="the column that is to be predicted, of models that learn from it"
    )
    command.add_argument("--components", type=_count, metavar="K", help="components of a mixture, topics of lda (2)")
    command.add_argument("--covariance", metavar="KIND", help="of gmm: full, tied, diagonal or spherical (full)")
    command.add_argument(
        "--columns", metavar="KINDS", help="of mixture, naive_bayes: the kind of all columns, or A,B,C of each"
    )
    command.add_argument("--factors", type=_count, metavar="Q", help="factors of ppca and factors (1)")
    command.add_argument("--states", type=_count, metavar="K", help="states of hmm (2)")
    command.add_argument("--emission", metavar="KIND", help="of hmm: normal, diagonal, categorical or poisson (normal)")
    command.add_argument("--cost", type=float, metavar="C", help="cost of a point on the wrong side, of margin (1)")
    command.add_argument("--kernel", metavar="KIND", help="of margin: linear or rbf (linear)")
    command.add_argument("--seed", type=_whole, default=0, metavar="S", help="seed of everything that is random (0)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    # Small programs run slower on more threads, and the number of threads may change the last digits.
    command.add_argument("--threads", type=_count, default=1, metavar="N", help="threads of one tensor operation (1)")


def _whole(text: str, least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"'{text}' is no integer of at least {least}.")
    return value


def _count(text: str) -> int:
    return _whole(text, 1)


def _list(args: argparse.Namespace) -> int:
    print("Models".ljust(52) + "".join(name.ljust(7) for name in METHODS))
    for name, entry in MODELS.items():
        cells = "".join(("yes" if method in entry.methods else "-").ljust(7) for method in METHODS)
        print(f"  {name:13}{entry.description:37}{cells}".rstrip())
    print("\nBack-ends, as fit and compare run them")
    for name, backend in METHODS.items():
        print(f"  {name:10}{_settings(backend)}")
    print("\nData sets")
    for name in datasets.names():
        data = datasets.load(name)
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in data.arrays.items())
        models = "" if "x" not in data.arrays else " --labels y." if "y" in data.arrays else " No labels."
        print(f"  {name:15}{data.description}. {shapes}.{models}")
    return 0


def _settings(backend: Backend[Any, Any]) -> str:
    """A back-end as Python would make it, with what differs from the defaults."""
    changed = [
        f"{field.name}={getattr(backend, field.name)!r}"
        for field in dataclasses.fields(backend)
        if field.default is not dataclasses.MISSING and getattr(backend, field.name) != field.default
    ]
    return f"{type(backend).__name__}({', '.join(changed)})"


def _fit(args: argparse.Namespace) -> int:
    entry, given = _entry(args), _options(args)
    x, y, columns = tables.read(args.model, args.data, args.labels)
    options, backend = _counted(given, y), _backend(_method(args.method, entry), args)
    if args.out is not None:
        checkpoint.check(args.out)
        check_writable(args.out.resolve().parent)
    model = entry.build(**options)
    posterior = backend.fit(model, *entry.arguments(model, x, y))
    named = labelled(posterior, entry, columns)
    seconds = posterior.info["sampling_time"]
    print(f"{_title(args, options)}: {type(backend).__name__}, {len(x)} rows, {seconds:.1f} s\n")
    if posterior.plan is not None:
        print(f"{posterior.plan}\n")
    print(summary(named, present(entry.judged, named)).to_string())
    print("\nFindings", *(posterior.diagnose() or ["none"]), sep="\n  ")
    if args.out is not None:
        settings = {"model": args.model, "options": options, "data": args.data, "labels": args.labels}
        dataclasses.replace(named, info={**named.info, "command": settings}).save(args.out)
        print(f"\nSaved in {args.out}")
    if is_interrupted(posterior):
        _say("genmodels: Stopped by Ctrl-C; the above is what there is so far" + (", and it is saved." if args.out else "."))
        return _INTERRUPTED
    return 0


def _diagnose(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise ValueError(f"There is no folder '{args.folder}'. Give one that fit --out or Posterior.save wrote.")
    posterior = Posterior.load(args.folder)
    info, (chains, draws) = posterior.info, posterior.shape
    print(f"{info.get('backend', 'Draws')} on {info.get('model', 'a program')}, {chains} x {draws} draws\n")
    if posterior.plan is not None:
        print(f"{posterior.plan}\n")
    shown = [site for site, values in posterior.draws.items() if values[0, 0].numel() <= _SHOWN]
    if shown:
        print(summary(posterior, shown).to_string())
    if long := [site for site in posterior.draws if site not in shown]:
        print(f"\nNot shown, with more than {_SHOWN} elements: {', '.join(long)}")
    print("\nFindings", *(posterior.diagnose() or ["none"]), sep="\n  ")
    return 0


def _docs(args: argparse.Namespace) -> int:
    from pyro_genmodels import reference

    try:
        print(f"Built: {reference.build(args.out)}")
    except (ImportError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return 0


def _compare(args: argparse.Namespace) -> int:
    entry, given = _entry(args), _options(args)
    x, y, columns = tables.read(args.model, args.data, args.labels)
    options = _counted(given, y)
    if entry.score is None and args.held_out:
        raise ValueError(f"{args.model} does not score rows one by one: leave --held-out out.")
    held_out = 0.1 if args.held_out is None else args.held_out
    names = args.method.split(",") if args.method else entry.methods
    backends = {name: _backend(_method(name, entry), args) for name in names}
    settings = {"model": args.model, "options": options, "data": args.data, "held_out": held_out, "seed": args.seed}
    settings |= {"labels": args.labels, "results": {}}
    settings["methods"] = {name: _settings(backend) for name, backend in backends.items()}
    folder = None if args.out is None else Folder(args.out, settings)

    def save(name: str, posterior: Posterior) -> None:
        if folder is not None:
            settings["results"][name] = report.record(posterior)
            folder.write(f"{name}.nc", lambda path: arviz.write(posterior.to_arviz(), path))

    found = compare(entry, options, x, columns, backends, y=y, held_out=held_out, seed=args.seed, after=save)
    if not found.posteriors:
        raise KeyboardInterrupt(f"Stopped by Ctrl-C during {found.interrupted}: there is nothing to show yet.")
    print(f"{_title(args, options)}: {len(found.x)} rows fitted, {len(found.test)} held out, seed {args.seed}\n")
    print(found.table(), _LEGEND, sep="\n")
    print("\nFindings", *found.findings(), sep="\n  ")
    if lines := found.agreement():
        print("\nAgreement", *lines, sep="\n  ")
    if folder is not None:
        folder.write("table.csv", found.write_table)
        for name, figure in found.figures():
            folder.write(name, figure.savefig)
        print(f"\nSaved in {args.out}: {', '.join(folder.files) or 'nothing'}")
        for problem in folder.problems:
            _say(f"genmodels: {problem}")
    if found.interrupted is not None:
        saved = ", and it is saved" if folder is not None else ""
        _say(f"genmodels: Stopped by Ctrl-C during {found.interrupted}; the above is what there is so far{saved}.")
        return _INTERRUPTED
    return _BAD_INPUT if folder is not None and folder.problems else 0


def _entry(args: argparse.Namespace) -> Entry:
    if args.model not in MODELS:
        raise ValueError(f"There is no model '{args.model}'; there are {', '.join(MODELS)}.")
    return MODELS[args.model]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the model is built with: those given, else the defaults of its entry."""
    given = {name: getattr(args, name) for name in _MODEL_OPTIONS if getattr(args, name) is not None}
    defaults = MODELS[args.model].options
    if unknown := sorted(given.keys() - defaults.keys()):
        known = [f"--{name}" for name in defaults if name != "classes"]
        raise ValueError(f"{args.model} has no option --{unknown[0]}; it has {', '.join(known) or 'none'}.")
    return {**defaults, **given}


def _counted(options: Mapping[str, Any], y: Tensor | None) -> dict[str, Any]:
    """The options with the number of classes, which the labels say."""
    if "classes" not in options or y is None:
        return dict(options)
    return {**options, "classes": max(2, int(y.max()) + 1)}


def _method(name: str, entry: Entry) -> str:
    if name not in METHODS:
        raise ValueError(f"There is no method '{name}'; there are {', '.join(METHODS)}.")
    if name not in entry.methods:
        raise ValueError(f"{name} does not run a {entry.description}; take {', '.join(entry.methods)}.")
    return name


def _backend(name: str, args: argparse.Namespace) -> Backend[Any, Any]:
    """The back-end, with the run options that were given."""
    backend = METHODS[name]
    given: dict[str, Any] = {option: getattr(args, option, None) for option in _RUN_OPTIONS}
    given = {option: value for option, value in given.items() if value is not None}
    known = [field.name for field in dataclasses.fields(backend)]
    if unknown := [option for option in given if option not in known]:
        raise ValueError(f"{name} has no --{unknown[0]}: leave it out.")
    return dataclasses.replace(backend, seed=args.seed, progress=not args.quiet, **given)


def _title(args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    return f"{args.model}({', '.join(f'{name}={value}' for name, value in options.items())}) on {args.data}"


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)
