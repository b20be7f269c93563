"""What is public is listed, documented, and documented as it is; importing it costs little and goes one way."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from torch.distributions import Distribution

import inference
import pyro_genmodels

PACKAGES = (inference, pyro_genmodels)
ROOT = Path(inference.__file__).parents[1]
FILES = [path for package in PACKAGES for path in sorted(Path(package.__file__).parent.rglob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
LIBRARY = [name for name in MODULES if not name.endswith("__main__")]
OF_TORCH = {"validate_args", "batch_shape"}  # of a distribution's constructor: of every one of torch, and what expand sets
SECTIONS = r"\n *(?:Args|Attributes|Returns|Yields|Raises|References|Example|Examples|Note|Notes):\n"
DESIGN = {
    "inference": (
        "SVI EM Gibbs MetropolisHastings HMC NUTS Adversarial RandomWalk Independence Langevin Prior ELBO IWELBO Renyi "
        "Enumerate Conjugate Gaussian PolyaGamma EllipticalSlice Hamiltonian Slice AdaptiveWalk PriorDraw Posterior "
        "Unsupported calibration sampling markov relabel"
    ),
    "pyro_genmodels": (
        "GMM Mixture LDA NaiveBayes LinearRegression LogisticRegression MarginClassifier PPCA FactorAnalysis HMM "
        "Autoencoder VAE CVAE VaDE IWAE GAN InfoGAN DDPM ScoreModel EnergyModel tweedie datasets metrics plots"
    ),
}


class Public(NamedTuple):
    """A public name: where it is, and what it is."""

    name: str
    value: Any


def own(module: ModuleType) -> Iterator[Public]:
    """What a module lists and defines itself, and the public parts of its classes."""
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value) or getattr(value, "__module__", None) != module.__name__:
            continue
        yield Public(f"{module.__name__}.{name}", value)
        for part, defined in vars(value).items() if inspect.isclass(value) else ():
            if part.startswith("_") or not (inspect.isroutine(defined) or isinstance(defined, property)):
                continue
            if part in {"count", "index", *getattr(value, "_fields", ())} and issubclass(value, tuple):
                continue
            routine = defined.fget if isinstance(defined, property) else getattr(defined, "__wrapped__", defined)
            if not getattr(routine, "__qualname__", "").startswith(f"{name}."):  # the default of a field that is a function
                continue
            yield Public(f"{module.__name__}.{name}.{part}", getattr(value, part))


@cache
def public() -> dict[str, Any]:
    return {found.name: found.value for name in LIBRARY for found in own(importlib.import_module(name))}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------------ lists
@pytest.mark.parametrize("name", LIBRARY)
def test_a_module_lists_all_that_is_public_in_it(name: str) -> None:
    module, body = importlib.import_module(name), tree(MODULES[name]).body
    assert hasattr(module, "__all__"), f"{name} has no __all__"
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [listed for listed in module.__all__ if not hasattr(module, listed)]
    made = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    unlisted = {found for found in made - {*module.__all__} if not found.startswith("_")}
    assert not {f"{name}.{found}" for found in unlisted}
    assert ast.get_docstring(tree(MODULES[name])), f"{name} does not say what it is"


@pytest.mark.parametrize("name", [name for name in LIBRARY if MODULES[name].name == "__init__.py"])
def test_a_package_shows_nothing_but_what_it_lists_and_its_modules(name: str) -> None:
    package = importlib.import_module(name)
    other = {key for key, value in vars(package).items() if not key.startswith("_") and key not in package.__all__}
    assert {key for key in other if f"{name}.{key}" not in MODULES} == set()


@pytest.mark.parametrize("package", DESIGN)
def test_the_names_of_the_design_are_there(package: str) -> None:
    module = importlib.import_module(package)
    missing = [name for name in DESIGN[package].split() if not hasattr(module, name)]
    submodules = [name for name in missing if f"{package}.{name}" in MODULES]
    assert [name for name in missing if name not in submodules] == []


# ------------------------------------------------------------------------------------------------------------- docstrings
def test_every_public_name_has_a_docstring() -> None:
    """What the contract says of a method need not be said again by a class that keeps to it."""
    contract = {name.split(".")[-1] for name, value in public().items() if of_contract(name) and inspect.getdoc(value)}
    bare = [name for name, value in public().items() if not (inspect.getdoc(value) or "").strip()]
    assert [n for n in bare if (of_contract(n) or n.split(".")[-1] not in contract)] == []


def of_contract(name: str) -> bool:
    """Whether it is a method of the contract, or of another protocol."""
    owner = public().get(name.rpartition(".")[0])
    is_of_class = name.startswith("inference.contract.") and name.count(".") == 3
    return is_of_class or bool(getattr(owner, "_is_protocol", False))


def arguments(documentation: str) -> list[str] | None:
    """Names in the section Args; None where there is none."""
    found = re.search(rf"\n( *)Args:\n(.*?)(?={SECTIONS}|\Z)", f"\n{documentation}\n", re.DOTALL)
    if found is None:
        return None
    indent = len(found[1]) + 4
    return re.findall(rf"^ {{{indent}}}(\*{{0,2}}\w+)(?: \([^)]*\))?:", found[2], re.MULTILINE)


def parameters(value: Any) -> set[str]:
    """Names in the signature, but for those of a dataclass that it shares with one that it is derived from."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    signature = inspect.signature(value)
    names = {stars.get(p.kind, "") + p.name for p in signature.parameters.values() if p.name not in ("self", "cls")}
    bases = [base for base in value.__mro__[1:] if dataclasses.is_dataclass(base)] if inspect.isclass(value) else []
    inherited = {field.name for base in bases for field in dataclasses.fields(base)} - {*inspect.get_annotations(value)}
    return names - inherited - (OF_TORCH if inspect.isclass(value) and issubclass(value, Distribution) else set())


def test_sections_of_arguments_name_those_of_the_signature() -> None:
    wrong = {}
    for name, value in public().items():
        documentation = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
        if isinstance(value, property) or documentation is None or (named := arguments(documentation)) is None:
            continue
        inherited = {*inspect.signature(value).parameters} if inspect.isclass(value) else set()
        if not (expected := parameters(value)) <= {*named} <= expected | inherited or len({*named}) < len(named):
            wrong[name] = f"{named} instead of {sorted(expected)}"
    assert wrong == {}


# ---------------------------------------------------------------------------------------------------------------- imports
def imported(name: str) -> set[str]:
    """Modules of the two packages that are imported when a module is."""
    found, nodes = set(), [*tree(MODULES[name]).body]
    while nodes:
        node = nodes.pop()
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, level=0, names=names) if module:
                found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in names}
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=orelse):
                nodes += orelse
            case ast.If() | ast.Try() | ast.With():
                nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found & MODULES.keys()


def test_imports_form_no_cycle() -> None:
    """A package runs its modules when it is imported; that a module names its own package is no edge."""
    graph = {name: {there for there in imported(name) if not name.startswith(f"{there}.")} for name in MODULES}
    done: set[str] = set()
    while ready := {name for name, needed in graph.items() if name not in done and needed <= done}:
        done |= ready
    assert {name: sorted(graph[name] - done) for name in graph.keys() - done} == {}


def test_imports_go_one_way() -> None:
    assert not [name for name in MODULES if name.startswith("inference") and any("genmodels" in i for i in imported(name))]


@pytest.mark.parametrize("package", ["inference", "pyro_genmodels"])
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    heavy = ("arviz", "matplotlib", "xarray", "sklearn", "scipy.stats", "pandas", "h5netcdf")
    code = f"import sys, {package}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=300)
    assert done.stdout.split() == []
