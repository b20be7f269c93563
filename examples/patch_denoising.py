"""Noise leaves a picture by Bayes' rule: a mixture learns clean patches, and E[clean | noisy] has a closed form.

    PYRO_GENMODELS_DATA=FOLDER python examples/patch_denoising.py [--full]

Patches of 8 x 8 pixels of BSDS300, other pictures for the test; noise of 25 grey levels. The mean of a patch is left out of
the mixture, as by Zoran and Weiss, whose prior has 200 components: --full takes as many, and all patches, in mini-batches.
One component is Wiener's filter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.signal
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import EM
from pyro_genmodels import GMM

NOISE = 25.0 / 255.0
# the cosine transform less its constant: an orthonormal basis of patches of mean zero, (64, 63), in which noise stays white
BASIS = torch.from_numpy(scipy.fft.dctn(np.eye(64).reshape(64, 8, 8), axes=(1, 2), norm="ortho").reshape(64, 64)[:, 1:])


def filtered(y: Tensor, one: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Every patch alone through a filter of images, mirrored at its edges."""
    wide = np.pad(y.numpy().reshape(-1, 8, 8), ((0, 0), (2, 2), (2, 2)), mode="symmetric")
    return torch.from_numpy(np.stack([one(patch)[2:-2, 2:-2] for patch in wide])).reshape(y.shape)


def main(smoke: bool = False, folder: str = "runs/patch_denoising", full: bool = False) -> None:
    """Fits, prints a table and saves ``patches.png`` in a folder; few patches and components if ``smoke``."""
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "bsds300_patches.npz") as file:
        train, test = (torch.from_numpy(file[part].reshape(-1, 64) / 255.0) for part in ("train", "test"))
    count, components = (500, 2) if smoke else (60000, 200) if full else (10000, 30)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]
    x, clean = train[order] @ BASIS, test[:: 200 if smoke else 4]
    y = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=clean.dtype)

    found = {
        "noisy": y,
        "median of 3 x 3": filtered(y, lambda patch: scipy.ndimage.median_filter(patch, 3)),
        "local Wiener, scipy": filtered(y, lambda patch: scipy.signal.wiener(patch, 5, NOISE**2)),
    }
    for number in (1, components):
        model, _ = GMM(number), torch.manual_seed(0)
        steps = {"steps": 60, "batch_size": 5000} if full and number > 1 else {"steps": 15}
        backend = EM(**steps, start=model.start(x), tolerance=1e-3, standard_errors=False, seed=0, progress=False)
        name = "one Gaussian (Wiener)" if number == 1 else f"GMM of {number} components"
        found[name] = y.mean(1, keepdim=True) + model.denoise(y @ BASIS, NOISE, backend.fit(model, x)) @ BASIS.mT
    print(f"{'PSNR in dB':24}{len(clean):8} patches   half with contrast   ({len(x)} patches for training)")
    parts = (contrast := clean.std(1)) >= 0.0, contrast >= contrast.median()
    for name, one in found.items():
        levels = [-10.0 * float((one - clean)[part].square().mean().log10()) for part in parts]
        print(f"{name:24}" + "".join(f"{level:16.2f}" for level in levels))

    shown = contrast.argsort()[torch.linspace(0.3, 0.99, 12).mul(len(clean) - 1).long()]
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    for axis, (name, one) in zip(figure.subplots(len(found) + 1, 1), [("clean", clean), *found.items()]):
        row = np.pad(one[shown].numpy().reshape(-1, 8, 8), ((0, 0), (0, 0), (1, 1)), constant_values=1.0)
        axis.imshow(np.concatenate(list(row), 1), cmap="gray", vmin=0.0, vmax=1.0)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[], frame_on=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "patches.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'patches.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main(full="--full" in sys.argv)
