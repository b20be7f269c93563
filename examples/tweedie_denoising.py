"""Noise leaves a picture without a prior: Tweedie's formula, E[clean | noisy] = noisy + noise² ∇ log p(noisy).

    PYRO_GENMODELS_DATA=FOLDER python examples/tweedie_denoising.py

Patches of 8 x 8 pixels of BSDS300, other pictures for the test; noise of 25 grey levels; the mean of a patch stays as it is.
What is scored is the density of *noisy* patches: that of clean ones with noise added, or, by empirical Bayes, one that was
fitted to noisy patches and never saw a clean one. For a mixture of clean ones the posterior mean has a closed form, too.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import scipy.fft
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import EM, Denoising, SimpleLoss
from inference.noising import EDMError, LogNormal
from inference.score_matching import NoisedLoss, SlicedLoss
from pyro_genmodels import GMM, EnergyModel, ScoreModel, tweedie
from pyro_genmodels.diffusion import EDM, Network, score_of
from pyro_genmodels.nets import PointNetwork

NOISE = 25.0 / 255.0
# the cosine transform less its constant: an orthonormal basis of patches of mean zero, (64, 63), in which noise stays white
BASIS = torch.from_numpy(scipy.fft.dctn(np.eye(64).reshape(64, 8, 8), axes=(1, 2), norm="ortho").reshape(64, 64)[:, 1:])


def noisy(x: Tensor, seed: int) -> Tensor:
    return x + NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def main(smoke: bool = False, folder: str = "runs/tweedie_denoising") -> None:
    """Fits, prints a table and saves ``patches.png`` in a folder."""
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "bsds300_patches.npz") as file:
        train, test = (torch.from_numpy(file[part].reshape(-1, 64) / 255.0) for part in ("train", "test"))
    count, steps = (500, 20) if smoke else (60000, 1600)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]
    x, clean = train[order] @ BASIS, test[:: 200 if smoke else 8]
    y, seen = noisy(clean, 1), noisy(x, 2)  # to be cleaned; all that empirical Bayes sees

    found, rows, means, half = {"noisy": y}, y @ BASIS, {}, NOISE**2 * torch.eye(63, dtype=y.dtype)
    for data, kind, ridge in ((x, "clean", half), (seen, "noisy", 0.0)):
        torch.manual_seed(0)
        normal = dist.MultivariateNormal(data.mean(0), data.T.cov() + ridge)  # of noisy patches, as all that follows
        means["normal: Wiener's filter", kind] = tweedie(rows, score_of(normal.log_prob), NOISE)
        model, few = GMM(2 if smoke else 10), data[:15000]
        backend = EM(steps=10, start=model.start(few), tolerance=1e-3, standard_errors=False, seed=0, progress=False)
        at = {site: value[0, 0] for site, value in backend.fit(model, few).draws.items()}
        parts = dist.MultivariateNormal(at["means"], at["covariances"] + ridge)
        density = dist.MixtureSameFamily(dist.Categorical(at["weights"]), parts)
        means["mixture", kind] = tweedie(rows, score_of(density.log_prob), NOISE)
        if data is x:  # the same thing, without a score
            means["mixture, posterior mean", kind] = model.denoise(rows, NOISE, at)
        loss, extra = (NoisedLoss(NOISE), NOISE) if data is x else (SlicedLoss(), 0.0)
        energy = EnergyModel((63,), hidden=(128, 128), noise=extra)
        Denoising(loss=loss, steps=steps, batch_size=256, average=0.999, seed=0, progress=False).fit(energy, data.float())
        means["energy network", kind] = tweedie(rows, score_of(energy().log_prob), NOISE).double()
    scale, denoiser = x.std(), Network(PointNetwork(63, width=128, blocks=2), EDM(), "preconditioned")
    level = NOISE / scale
    loss = SimpleLoss(weighting=EDMError(), times=LogNormal(float(level.log()), 0.1))
    backend = Denoising(loss=loss, steps=steps, batch_size=256, average=0.999, seed=0, progress=False)
    backend.fit(ScoreModel(denoiser, (63,), is_scaled=False), (x / scale).float())
    means["score network", "clean"] = scale * tweedie(rows / scale, lambda z: denoiser.score(z, level).detach(), level)
    found |= {f"{name:26}{kind}": y.mean(1, keepdim=True) + mean @ BASIS.mT for (name, kind), mean in means.items()}
    print(f"{'':26}{'learnt from':14}PSNR in dB, {len(clean)} patches")
    for name, one in found.items():
        print(f"{name:40}{-10.0 * float((one - clean).square().mean().log10()):10.2f}")

    shown = clean.std(1).argsort()[torch.linspace(0.3, 0.99, 14).mul(len(clean) - 1).long()]
    figure = Figure(figsize=(10.0, 5.6), layout="constrained")
    for axis, (name, one) in zip(figure.subplots(len(found) + 1, 1), [("clean", clean), *found.items()]):
        row = np.pad(one[shown].numpy().reshape(-1, 8, 8), ((0, 0), (0, 0), (1, 1)), constant_values=1.0)
        axis.imshow(np.concatenate(list(row), 1), cmap="gray", vmin=0.0, vmax=1.0)
        axis.set_ylabel(" from ".join(name.rsplit(maxsplit=1)).replace("  ", ""), rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[], frame_on=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "patches.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'patches.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
