"""A U-Net on pictures: digits of 8 x 8 on a CPU in about a minute, MNIST, Fashion-MNIST or CIFAR-10 on one GPU or several.

    python examples/train_unet.py
    PYRO_GENMODELS_DATA=FOLDER python examples/train_unet.py --data mnist
    PYRO_GENMODELS_DATA=FOLDER torchrun --nproc-per-node=8 examples/train_unet.py --data cifar10 --full

Batches of bytes get noise of one grey level, which makes them continuous. Bits per dimension are those of pictures that were
not trained on, by the probability flow; the Fréchet distance is that of the pixels, beside that of two parts of the data.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from inference import Denoising, PowerAverage, SimpleLoss
from inference.noising import EDMError, LogNormal
from pyro_genmodels import ScoreModel, datasets, plots
from pyro_genmodels.diffusion import EDM, Network
from pyro_genmodels.diffusion.likelihood import bits_per_dimension
from pyro_genmodels.metrics.divergences import frechet
from pyro_genmodels.nets import UNet


def main(smoke: bool = False, folder: str = "runs/train_unet", data: str = "digits", full: bool = False) -> None:
    """Trains, prints a table and saves ``drawn.png`` in a folder; a few steps if ``smoke``."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    pictures, levels = datasets.pictures(data), 17 if data == "digits" else 256
    grey = [((levels - 1) * part).round().to(torch.uint8) for part in (pictures.train, pictures.test)]
    x, test = (part if part.dim() == 4 else part[:, None] for part in grey)

    def continuous(grey: Tensor) -> Tensor:
        """From whole numbers to [−1, 1], with noise of one grey level; of CIFAR, half are mirrored."""
        mirrored = torch.rand(len(grey), 1, 1, 1, device=grey.device) < (0.5 if data == "cifar10" else 0.0)
        grey = torch.where(mirrored, grey.flip(-1), grey).float()
        return (grey + torch.rand_like(grey)) * (2.0 / levels) - 1.0

    torch.manual_seed(0)
    size = {"width": 128, "multiples": (1, 2, 2)} if full else {"width": 16, "multiples": (1, 2), "blocks": 1}
    network = UNet(x.shape[1:], **size).to(device, memory_format=torch.channels_last)
    model = ScoreModel(Network(network, EDM(), "preconditioned"), x.shape[1:], steps=4 if smoke else 16, probes=1)
    steps, rows = (3, 8) if smoke else (60_000, 512) if full else (600, 64)
    fast = {} if device == "cpu" else {"autocast": torch.bfloat16, "compile": True}
    fit = Denoising(loss=SimpleLoss(EDMError(), LogNormal()), steps=steps, batch_size=rows, transform=continuous, **fast,
                    learning_rate=2e-4 if full else 2e-3, average=PowerAverage(0.1), clip_norm=1.0, seed=0)  # fmt: skip
    begun = time.perf_counter()
    history = fit.fit(model, x.to(device)).history["loss"]
    rate = steps * rows / (time.perf_counter() - begun)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)):
        return
    few = 8 if smoke else 100
    new = continuous(test[:few].to(device))
    with torch.no_grad():
        bits = bits_per_dimension(model().log_prob(new), new[0].numel(), levels)
    drawn, real = model.sample(few).clamp(-1.0, 1.0).cpu(), continuous(x[torch.randperm(len(x))]).cpu()
    print(f"{data}: {len(x)} pictures, {steps} steps of {rows}, {rate:.0f} pictures a second")
    print(f"loss                {history[-len(history) // 4 :].mean():8.4f}, at first {history[0]:.4f}")
    print(f"bits per dimension  {bits.mean():8.3f} ± {bits.std() / few**0.5:.3f}, of noise {math.log2(levels):.3f}")
    print(f"Fréchet distance    {frechet(real[:few], drawn):8.3f}, of others {frechet(real[:few], real[-few:]):.3f}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    shown = {"data": real[:12], "drawn": drawn[:12], "drawn again": drawn[-12:]}
    plots.images({name: 0.5 + 0.5 * part for name, part in shown.items()}).savefig(Path(folder) / "drawn.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits", choices=("digits", "mnist", "fashion_mnist", "cifar10"))
    parser.add_argument("--full", action="store_true")
    main(**vars(parser.parse_args()))
