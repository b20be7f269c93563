"""Sees to it that ``inference`` is the one that comes with this package, and says which it is if not.

The name is a common word: a script inference.py in the folder of a program comes before everything that is installed, and
pip lets distributions overwrite each other's files (PyPI's ``inference`` of Roboflow is one of them) without a word.
"""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

__all__ = ["check"]

_MARK = '__project__ = "pyro-genmodels"'  # a line of inference/__init__.py
_REPAIR = "pip install --force-reinstall --no-deps pyro-genmodels"


def check() -> None:
    """Refuses another ``inference``, before it is imported: nobody knows what it would do.

    Raises:
        ImportError: If there is none, or it is another one; the message says where it is and what to do.
    """
    loaded = sys.modules.get("inference")
    spec = find_spec("inference") if loaded is None else loaded.__spec__
    if spec is None:
        raise ImportError(
            f"The package 'inference', which comes with pyro-genmodels, is not there. Install both: {_REPAIR}."
        )
    if not _is_ours(spec):
        raise ImportError(_sentence(spec), name="inference", path=spec.origin)


def _is_ours(spec: ModuleSpec) -> bool:
    try:
        return spec.origin is not None and _MARK in Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # in an archive, say
        return False


def _sentence(spec: ModuleSpec) -> str:
    where = spec.origin or next(iter(spec.submodule_search_locations or ()), "an unknown place")
    sentence = f"pyro_genmodels comes with a package 'inference', but Python finds another one first: '{where}'. "
    home = Path(__file__).parent.parent
    if Path(where).parent.parent != home:
        return sentence + "Rename it, or start Python where its folder is not on sys.path."
    others = sorted({*metadata.packages_distributions().get("inference", ())} - {"pyro-genmodels"})
    remove = f"pip uninstall {' '.join(others)}" if others else "remove it"
    return sentence + (
        f"It has overwritten ours, as both are installed in '{home}'. Give each an environment of its own; here, {remove}, "
        f"then {_REPAIR}."
    )


check()
