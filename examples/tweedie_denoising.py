"""Noise leaves a picture without a prior: Tweedie's formula, E[clean | noisy] = noisy + noise² ∇ log p(noisy).

    PYRO_GENMODELS_DATA=FOLDER python examples/tweedie_denoising.py

Patches of 8 x 8 pixels of BSDS300, noise of 25 grey levels, other pictures for the test. What is scored is a density of
noisy patches: that of clean ones with noise added, or, by empirical Bayes, one that was fitted to noisy ones alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import scipy.fft
import torch
from matplotlib.figure import Figure

from inference import EM, Denoising, SimpleLoss
from inference.noising import EDMError, LogNormal
from inference.score_matching import NoisedLoss, SlicedLoss
from pyro_genmodels import GMM, EnergyModel, ScoreModel, tweedie
from pyro_genmodels.diffusion import EDM, Network, score_of
from pyro_genmodels.nets import PointNetwork

NOISE = 25.0 / 255.0
# the cosine transform less its constant: an orthonormal basis of patches of mean zero, (64, 63), in which noise stays white
BASIS = torch.from_numpy(scipy.fft.dctn(np.eye(64).reshape(64, 8, 8), axes=(1, 2), norm="ortho").reshape(64, 64)[:, 1:])


def main(smoke: bool = False, folder: str = "runs/tweedie_denoising") -> None:
    """Fits, prints a table and saves ``patches.png`` in a folder."""
    with np.load(Path(os.environ.get("PYRO_GENMODELS_DATA", "")) / "bsds300_patches.npz") as file:
        train, test = (torch.from_numpy(file[part].reshape(-1, 64) / 255.0) for part in ("train", "test"))
    torch.manual_seed(0)
    x, clean = train[torch.randperm(len(train))[: 500 if smoke else 60000]] @ BASIS, test[:: 200 if smoke else 10]
    seen, y = (part + NOISE * torch.randn_like(part) for part in (x, clean))  # ``seen`` is what empirical Bayes learns from
    how = {"steps": 20 if smoke else 1100, "batch_size": 256, "average": 0.999, "seed": 0, "progress": False}
    rows, found = y @ BASIS, {"noisy": y @ BASIS}
    for data, kind, added in ((x, "clean", NOISE), (seen, "noisy", 0.0)):
        extra = added**2 * torch.eye(63, dtype=y.dtype)
        normal = dist.MultivariateNormal(data.mean(0), data.T.cov() + extra)
        found[f"normal (Wiener), {kind}"] = tweedie(rows, score_of(normal.log_prob), NOISE)
        model, few = GMM(2 if smoke else 10), data[:12000]
        backend = EM(steps=10, start=model.start(few), tolerance=1e-3, standard_errors=False, seed=0, progress=False)
        at = {site: value[0, 0] for site, value in backend.fit(model, few).draws.items()}
        parts = dist.MultivariateNormal(at["means"], at["covariances"] + extra)
        mixture = dist.MixtureSameFamily(dist.Categorical(at["weights"]), parts)
        found[f"mixture, {kind}"] = tweedie(rows, score_of(mixture.log_prob), NOISE)
        if added:  # the same thing, without a score
            found["mixture, exact, clean"] = model.denoise(rows, NOISE, at)
        energy, loss = EnergyModel((63,), hidden=(128, 128), noise=added), NoisedLoss(NOISE) if added else SlicedLoss()
        Denoising(loss=loss, **how).fit(energy, data.float())
        found[f"energy network, {kind}"] = tweedie(rows, score_of(energy().log_prob), NOISE)
    scale, network = x.std(), Network(PointNetwork(63, width=128, blocks=2), EDM(), "preconditioned")
    loss = SimpleLoss(weighting=EDMError(), times=LogNormal(float(torch.log(NOISE / scale)), 0.1))
    Denoising(loss=loss, **how).fit(ScoreModel(network, (63,), is_scaled=False), (x / scale).float())
    score = lambda z: network.score(z / scale, NOISE / scale).detach() / scale  # noqa: E731
    found["score network, clean"] = tweedie(rows, score, NOISE)
    print(f"Scored, and learnt from            PSNR in dB, {len(clean)} patches")
    shown, pictures = clean.std(1).argsort()[torch.linspace(0.3, 0.99, 14).mul(len(clean) - 1).long()], [clean]
    for name, mean in found.items():
        pictures.append(y.mean(1, keepdim=True) + mean.double() @ BASIS.mT)
        print(f"{name:35}{-10.0 * float((pictures[-1] - clean).square().mean().log10()):10.2f}")

    tiles = torch.stack([one[shown].reshape(-1, 8, 8) for one in pictures])
    tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=1.0).permute(0, 2, 1, 3)
    figure = Figure(figsize=(10.0, 5.6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(tiles.reshape(10 * len(pictures), -1).numpy(), cmap="gray", vmin=0.0, vmax=1.0)
    axis.set(xticks=[], yticks=[10 * i + 4.5 for i in range(len(pictures))], yticklabels=["clean", *found], frame_on=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "patches.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
