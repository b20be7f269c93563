"""Another package called ``inference`` is not imported, and named, with what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_genmodels

HERE = Path(pyro_genmodels.__file__).parents[1]
SIDE_EFFECT = "open('was_run', 'w').close()\n"


def said(tmp_path: Path, *folders: Path, code: str = "import pyro_genmodels") -> str:
    """The last line on stderr of a Python that looks into these folders, and no others but its own."""
    code = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}; {code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "was_run").exists()
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("form", ["inference.py", "inference/__init__.py", "inference/core.py"])
def test_a_script_or_a_folder_that_comes_first_is_named(tmp_path: Path, form: str) -> None:
    """The last one has no __init__.py, and comes first only where ours is found by other means, as an editable one is."""
    file = tmp_path / "mine" / form
    file.parent.mkdir(parents=True)
    file.write_text(SIDE_EFFECT)
    home = HERE
    if form == "inference/core.py":
        home = overwritten(tmp_path / "home")
        shutil.rmtree(home / "inference")
    where = file if file.name != "core.py" else file.parent
    sentence = said(tmp_path, tmp_path / "mine", home)
    assert sentence.startswith("ImportError: pyro_genmodels comes with a package 'inference', but Python finds another one")
    assert f"first: '{where}'. Rename it, or start Python where its folder is not on sys.path." in sentence


def overwritten(folder: Path, *distributions: str) -> Path:
    """A site-packages in which pip has put another distribution over ours."""
    (folder / "pyro_genmodels").mkdir(parents=True)
    for name in ("__init__.py", "companion.py"):
        shutil.copy(HERE / "pyro_genmodels" / name, folder / "pyro_genmodels")
    (folder / "inference").mkdir()
    (folder / "inference" / "__init__.py").write_text(SIDE_EFFECT)
    shutil.copy(HERE / "inference" / "contract.py", folder / "inference")
    for name in distributions:
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text("inference/__init__.py,,\n")
    return folder


def test_a_distribution_that_has_overwritten_ours_is_named(tmp_path: Path) -> None:
    site = overwritten(tmp_path / "site-packages", "inference", "pyro-genmodels")
    assert (
        f"It has overwritten ours, as both are installed in '{site}'. Give each an environment of its own; here, pip "
        in (sentence := said(tmp_path, site))
    )
    assert sentence.endswith("pip uninstall inference, then pip install --force-reinstall --no-deps pyro-genmodels.")
    nobody = said(tmp_path, overwritten(tmp_path / "other"))
    assert "here, remove it, then pip install" in nobody


def test_one_that_was_imported_before_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "inference.py").write_text("")
    sentence = said(tmp_path, tmp_path / "mine", HERE, code="import inference, pyro_genmodels")
    assert f"'{tmp_path / 'mine' / 'inference.py'}'" in sentence


def test_none_at_all_is_said(tmp_path: Path) -> None:
    site = overwritten(tmp_path / "site-packages")
    shutil.rmtree(site / "inference")
    sentence = said(tmp_path, site)
    assert "The package 'inference', which comes with pyro-genmodels, is not there. Install both: pip install" in sentence
