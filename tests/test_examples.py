"""Every example runs, and so does every block of README, whose promises hold."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from parameters import quick
from posteriordb import FOLDER
from pyro_genmodels import cli
from pyro_genmodels.comparison import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The rows of the table of an example that does not compare back-ends.
ROWS = {
    "critic_driven": ("data", "generator", "with its critic", "with its critic, height about 0"),
    "gan_inverse_problem": ("upper half", "blurred"),
    "diffusion_moons": ("moons", "EDM", "DDPM, noise", "flow matching"),
    "train_unet": ("loss", "bits per dimension", "Fréchet distance"),
    "ddpm_as_program": ("Trace_ELBO", "TraceMeanField_ELBO", "plate of 4 links"),
    "diffusion_prior": ("prior", "led", "led, weighed", "exact", "camera inferred"),
    "gan_ring": ("data", "hinge, R1", "non-saturating, R1", "weighed draws", "MetropolisHastings", "HMC"),
    "infogan_digits": ("information", "training digits", "draws"),
    "missing_values": ("SimpleImputer", "KNNImputer", "IterativeImputer", "GMM(1), EM", "GMM(1), Gibbs"),
    "mnist_vae": ("bound", "log p(x)", "active units"),
    "missing_pixels": ("mean", "pseudo-Gibbs", "exact"),
    "parallel_lines": ("sigma 0.0, theta 0.01", "sigma 0.2, theta 1.00"),
    "score_langevin": ("data", "exact score, ladder", "score network, one level", "energy, Langevin", "energy, HMC"),
    "tweedie_denoising": ("noisy", "mixture, exact, clean", "energy network, noisy", "score network, clean"),
    "vade_clusters": ("k-means on pixels", "GMM on codes", "VaDE", "VaDE from random weights"),
    "vae_family": ("VAE", "beta-VAE, 2", "CVAE", "IWAE, 5", "VaDE"),
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ON_DATA = {
    "anomaly_detection": "adbench.npz",
    "clustering": "classical.npz",
    "density_estimation": "uci_regression.npz",
    "mnist_vae": "mnist.npz",
    "patch_denoising": "bsds300_patches.npz",
    "semi_supervised_text": "bow_20news_full.npz",
    "topics": "bow_ap.npz",
    "tweedie_denoising": "bsds300_patches.npz",
}  # example to what it reads


LONG = {"anomaly_detection", "density_estimation", "distributed", "galaxies", "gan_ring", "gmm_five_ways", "infogan_digits",
        "missing_pixels", "missing_values", "mnist_vae", "score_langevin", "semi_supervised_text", "tweedie_denoising",
        "vade_clusters", "vae_family"}  # fmt: skip
SHORT = [path for path in EXAMPLES if path.stem not in LONG]


@pytest.mark.parametrize("path", quick(EXAMPLES, SHORT), ids=lambda path: path.stem)
def test_examples_run(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    if path.stem in ON_DATA:
        if not (FOLDER / ON_DATA[path.stem]).exists():
            pytest.skip(f"There is no {FOLDER / ON_DATA[path.stem]}: set PYRO_GENMODELS_DATA.")
        monkeypatch.setenv("PYRO_GENMODELS_DATA", str(FOLDER))
    load(path).main(smoke=True, folder=str(tmp_path / "runs"))
    printed = capsys.readouterr().out
    imported = re.search(r"from inference import (.*)", path.read_text(encoding="utf-8"))
    named = ("SVI", "EM", "Gibbs", "Metropolis-Hastings", "HMC")
    asked = [name for name in named if imported is not None and name.replace("-", "") in imported[1]]
    for name in ROWS.get(path.stem, () if path.stem in ON_DATA else asked):
        assert re.search(rf"^{re.escape(name)} .*\d", printed, re.MULTILINE)
    pictures = [*(tmp_path / "runs").glob("*.png")]
    assert pictures and all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_fit_one_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_the_code_in_readme_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "README.md", "exec", dont_inherit=True), namespace)
    x, y = namespace["x"], namespace["y"]
    # ordinary least squares: the priors are wide, the posterior sd is 0.07, its Monte-Carlo error below 0.01
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    fitted = re.findall(r"tensor\((-?[\d.]+)", capsys.readouterr().out)
    assert [float(value) for value in fitted] == pytest.approx([float(slope)] * 3, abs=0.03)
    assert all(0.3 < float((chain > 0).double().mean()) < 0.7 for chain in namespace["jumped"].draws["a"])
    posterior, longer = namespace["posterior"], namespace["longer"]
    assert posterior.diagnose() == [] and longer.shape == (4, 1500)
    assert torch.equal(longer.draws["slope"][:, : posterior.shape[1]], posterior.draws["slope"])


def test_readme_names_what_there_is() -> None:
    reading = README.split("in this order:")[1].split("\n\n")[0]
    for path in re.findall(r"`([\w/]+\.py)`", reading):
        assert (ROOT / path).is_file(), path
    for command in re.findall(r"^genmodels (.*?)(?:\s+#.*)?$", README, re.MULTILINE):
        args = cli._parser().parse_args(command.split())
        assert set((getattr(args, "method", None) or "em").split(",")) <= set(METHODS)
