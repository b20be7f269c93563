"""A U-Net on pictures: digits of 8 x 8 on a CPU in about a minute, MNIST, Fashion-MNIST or CIFAR-10 on one GPU or several.

    python examples/train_unet.py
    PYRO_GENMODELS_DATA=FOLDER torchrun --nproc-per-node=8 examples/train_unet.py --data cifar10 --full

Bits per dimension (by the flow) and the Fréchet distance (of features or pixels) are to pictures that were not trained on.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch

from inference import Denoising, PowerAverage, SimpleLoss, noising
from pyro_genmodels import ScoreModel, datasets, nets, plots
from pyro_genmodels.diffusion import EDM, Network, likelihood
from pyro_genmodels.metrics import images


def continuous(grey: torch.Tensor, levels: int) -> torch.Tensor:
    """From whole numbers to [−1, 1], with noise of one grey level; half of the pictures in colour are mirrored."""
    is_mirrored = torch.rand(len(grey), 1, 1, 1, device=grey.device) < 0.5 * (grey.shape[1] == 3)
    grey = torch.where(is_mirrored, grey.flip(-1), grey).float()
    return (grey + torch.rand_like(grey)) * (2.0 / levels) - 1.0


def trained(x: torch.Tensor, levels: int, steps: int, rows: int, full: bool = False) -> tuple[ScoreModel, torch.Tensor]:
    """A score model of pictures of whole numbers, (N, channels, height, width), and the loss of each step."""
    torch.manual_seed(0)
    size = {"width": 128, "multiples": (1, 2, 2)} if full else {"width": 16, "multiples": (1, 2), "blocks": 1}
    network = nets.UNet(x.shape[1:], **size).to(x.device, memory_format=torch.channels_last)
    model = ScoreModel(Network(network, EDM(), "preconditioned"), x.shape[1:], steps=16, probes=1)
    fast = {} if x.device.type == "cpu" else {"autocast": torch.bfloat16, "compile": True}
    fast |= {"transform": lambda grey: continuous(grey, levels), "batch_size": rows, "learning_rate": 2e-4 if full else 2e-3}
    loss = SimpleLoss(noising.EDMError(), noising.LogNormal(-1.5, 1.5))
    fit = Denoising(loss=loss, steps=steps, average=PowerAverage(0.1), clip_norm=1.0, seed=0, **fast)
    return model, fit.fit(model, x).history["loss"]


def main(smoke: bool = False, folder: str = "runs/train_unet", data: str = "digits", full: bool = False) -> None:
    """Trains, prints a table and saves ``drawn.png`` in a folder; a few steps if ``smoke``."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    pictures, levels = datasets.pictures(data), 17 if data == "digits" else 256
    both = (part.reshape(len(part), -1, *part.shape[-2:]) for part in (pictures.train, pictures.test))
    x, test = (((levels - 1) * part).round().to(torch.uint8) for part in both)
    (steps, rows), begun = (3, 8) if smoke else (60_000, 512) if full else (600, 64), time.perf_counter()
    model, history = trained(x.to(device), levels, steps, rows, full)
    seconds = time.perf_counter() - begun
    if "WORLD_SIZE" in os.environ:
        torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)):
        return
    real, new = (continuous(part[torch.randperm(len(part))[: 8 if smoke else 300]], levels) for part in (x, test))
    with torch.no_grad():
        log_prob, drawn = model().log_prob(new.to(device)), model.sample(len(new)).clamp(-1.0, 1.0).cpu()
    bits = likelihood.bits_per_dimension(log_prob, new[0].numel(), levels)
    network = images.feature_network(data) if data in images.network_names() else torch.nn.Flatten()
    real, new, drawn = (0.5 + 0.5 * part for part in (real, new, drawn))
    apart, floor = (images.frechet_distance(part.squeeze(1), new.squeeze(1), network) for part in (drawn, real))
    print(f"{data}: {len(x)} pictures, {steps} steps of {rows}, {steps * rows / seconds:.0f} pictures a second")
    print(f"loss                {history[-len(history) // 4 :].mean():8.4f}, at first {history[0]:.4f}")
    print(f"bits per dimension  {bits.mean():8.3f} ± {bits.std() / len(bits) ** 0.5:.3f}, of noise {math.log2(levels):.3f}")
    print(f"Fréchet distance    {apart:8.3f}, of training data {floor:.3f}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images({"data": real[:12], "drawn": drawn[:12], "again": drawn[-12:]}).savefig(Path(folder) / "drawn.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits", help="or mnist, fashion_mnist, cifar10")
    parser.add_argument("--full", action="store_true")
    main(**vars(parser.parse_args()))
