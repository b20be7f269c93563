"""Score models of pictures on a GPU: pictures a second by ways of training, quality over steps, samplers by calls.

    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/pictures_diffusion.py --device cuda
    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/pictures_diffusion.py --no-speed --data mnist --width 16 --blocks 1
        --batch 64 --learning-rate 2e-3 --scale 0.8 --draws 1000 --seen 200               an hour of one core
    python examples/benchmarks/pictures_diffusion.py --smoke          whether it runs, on a processor

Speed: the steps of ``Denoising`` on a U-Net for pictures of 3 x 32 x 32 (width 128, 1, 2 and 2 times that, attention at 8 x
8), batches of 256, in float32 and in bfloat16, with channels first and last, as recorded graphs and compiled ones. By hand
is the same step written in PyTorch, in float32. The first 29 steps, in which graphs are recorded and checked, are not
counted. Operations are those of the network, forward and backward, as torch's counter counts them; the peak is that of a
product of matrices of 8192 on the same card in the same run, in the same type; tf32 rounds the factors of
float32 to 10 bits.

Quality: the model of ``examples/train_unet.py``, of ``--width`` and ``--blocks``, in bfloat16 on a GPU, in stages that each
go on from the averaged weights of the one before with a rate that falls anew. Fréchet distances are between draws and the
test pictures, in the features that come with the package by the name of the data set; their floor is that of as many
training pictures. Bits per dimension are by the probability flow, of test pictures with noise of one grey level. Then the
last model, drawn from by some samplers at several numbers of calls of the network.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from clock import Clock, settle
from rows import Rows
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from inference import Denoising, PowerAverage, SimpleLoss, noising
from pyro_genmodels import ScoreModel, datasets, nets
from pyro_genmodels.diffusion import EDM, Network, likelihood
from pyro_genmodels.metrics import images

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits_diffusion import CALLS, SAMPLERS, by, by_calls
from train_unet import continuous

SKIPPED = 29  # steps, in which graphs are recorded and checked
WAYS = {  # type of the products, whether channels are last, whether it is compiled
    "float32": ("float32", False, False),
    "tf32, channels last": ("tf32", True, False),
    "bfloat16": ("bfloat16", False, False),
    "bfloat16, channels last": ("bfloat16", True, False),
    "bfloat16, channels last, compiled": ("bfloat16", True, True),
}
LEVELS = 256


def noise() -> SimpleLoss:
    return SimpleLoss(noising.EDMError(), noising.LogNormal(-1.5, 1.5))


def built(shape: tuple[int, ...], width: int, device: torch.device, is_last: bool = True, blocks: int = 2) -> ScoreModel:
    torch.manual_seed(0)
    layout = torch.channels_last if is_last else torch.contiguous_format
    network = nets.UNet(shape, width=width, multiples=(1, 2, 2), blocks=blocks).to(device, memory_format=layout)
    return ScoreModel(Network(network, EDM(), "preconditioned"), shape, steps=16, probes=1)


# ------------------------------------------------------------------------------------------------------------- speed
def allow(kind: str) -> torch.dtype | None:
    """Whether products of float32 may round to 10 bits; the type of autocast."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    return torch.bfloat16 if kind == "bfloat16" else None


def peak(kind: str, device: torch.device) -> float:
    """Operations a second of a product of matrices."""
    size, count = (8192, 10) if device.type == "cuda" else (512, 10)
    one, other = (torch.randn(size, size, device=device).to(allow(kind) or torch.float32) for _ in range(2))
    for _ in range(3):
        one @ other
    settle(device)
    begun = time.perf_counter()
    for _ in range(count):
        one @ other
    settle(device)
    return 2.0 * size**3 * count / (time.perf_counter() - begun)


def operations(shape: tuple[int, ...], width: int, device: torch.device) -> float:
    """Of one picture, forward and backward."""
    network = built(shape, width, device).denoiser.network
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, *shape, device=device), torch.zeros(1, device=device)).sum().backward()
    return float(counter.get_total_flops())


def ours(x: Tensor, rows: int, width: int, steps: int, way: tuple[str, bool, bool]) -> float:
    kind, is_last, is_compiled = way
    model, clock = built(tuple(x.shape[1:]), width, x.device, is_last), Clock(SKIPPED, SKIPPED + steps, x.device)
    fit = Denoising(loss=noise(), steps=SKIPPED + steps, batch_size=rows, average=0.999, autocast=allow(kind),
                    compile=is_compiled, learning_rate=2e-4, seed=0, progress=False, callbacks=(clock,))  # fmt: skip
    fit.fit(model, x.contiguous(memory_format=torch.channels_last) if is_last else x)
    return rows * clock.rate


def by_hand(x: Tensor, rows: int, width: int, steps: int) -> float:
    allow("float32")
    model, clock = built(tuple(x.shape[1:]), width, x.device, False), Clock(SKIPPED, SKIPPED + steps, x.device)
    network, shape = model.denoiser.network, (-1, 1, 1, 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-4, fused=True)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for _ in range(SKIPPED + steps):
        batch = x[torch.randint(len(x), (rows,), device=x.device)]
        sigma = (1.5 * torch.randn(rows, device=x.device) - 1.5).exp().reshape(shape)
        scale = (sigma.square() + 1.0).rsqrt()
        noisy = batch + sigma * torch.randn_like(batch)
        found = scale.square() * noisy + sigma * scale * network(scale * noisy, 0.25 * sigma.log().reshape(-1))
        loss = ((found - batch) / (sigma * scale)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update_parameters(network)
        clock()
    return rows * clock.rate


def speed(given: argparse.Namespace, device: torch.device, table: Rows) -> None:
    shape, rows, width, steps = ((3, 8, 8), 4, 8, 2) if given.smoke else ((3, 32, 32), 256, 128, 14)
    x, count = torch.randn(8 * rows, *shape, device=device), operations(shape, width, device)
    name = f"U-Net of width {width}, {'x'.join(map(str, shape))}, batch {rows}"
    peaks = {kind: peak(kind, device) for kind in ("float32", "tf32", "bfloat16")}
    print(f"\n{name}: {count / 1e9:.1f} GFLOP a picture, forward and backward")
    print("products of matrices: " + ", ".join(f"{kind} {rate / 1e12:.1f}" for kind, rate in peaks.items()) + " TFLOP/s")
    print(f"{'training':36}{'pictures/s':>12}{'/ by hand':>12}{'of peak':>10}")
    theirs = by_hand(x, rows, width, steps)
    print(f"{'by hand, float32':36}{theirs:12.0f}{1.0:12.2f}{theirs * count / peaks['float32']:10.2f}", flush=True)
    for way, settings in WAYS.items():
        if settings[2] and device.type == "cpu":
            continue  # minutes of a compiler
        rate = ours(x, rows, width, steps, settings)
        share = rate * count / peaks[settings[0]]
        print(f"{way:36}{rate:12.0f}{rate / theirs:12.2f}{share:10.2f}", flush=True)
        table.add("pictures a second of training", f"{name}, {way}", rate, theirs=theirs, peer="by hand, float32",
                  is_less_better=False, target=1.0 / 1.03 if way == "float32" else None)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- quality
def drawn(model: ScoreModel, sampler: Callable[..., Tensor], steps: int, count: int) -> Tensor:
    """Draws, rounded to the grey levels that data have, (count, *shape) from 0 to 1 on the CPU."""
    parts = []
    with torch.autocast(model.grid.device.type, torch.bfloat16, enabled=model.grid.is_cuda):
        for first in range(0, count, 1000):
            z = by(model, sampler, steps, min(1000, count - first))
            parts.append(((z.float() + 1.0) * (0.5 * LEVELS)).floor().clamp(0, LEVELS - 1).cpu() / (LEVELS - 1))
    return torch.cat(parts)


@torch.no_grad()
def bits(model: ScoreModel, x: Tensor) -> Tensor:
    found = torch.cat([model().log_prob(part) for part in x.split(250)])
    return likelihood.bits_per_dimension(found, x[0].numel(), LEVELS)


def quality(name: str, given: argparse.Namespace, device: torch.device, table: Rows) -> None:
    pictures = datasets.pictures(name)
    x, test = (((LEVELS - 1) * part).round().to(torch.uint8) for part in (pictures.train, pictures.test))
    x, test = (part.reshape(len(part), -1, *part.shape[-2:]) for part in (x, test))
    if given.smoke:
        x, test = x[:64], test[:40]
    allow("tf32")
    network, shape = images.feature_network(name), tuple(x.shape[1:])
    rows, stages = (8, (3, 6)) if given.smoke else (given.batch, tuple(int(s * given.scale) for s in (500, 1500, 3000)))
    draws = min(given.draws, len(x), len(test))
    seen = test.float() / (LEVELS - 1)

    def apart(those: Tensor) -> float:
        return images.frechet_distance(those.reshape(-1, *network.shape), seen.reshape(-1, *network.shape), network)

    torch.manual_seed(1)
    at = torch.randperm(len(test))[: given.seen]
    new, floor = continuous(test[at], LEVELS).to(device), apart(x[:draws].float() / (LEVELS - 1))
    model, done, before = built(shape, 8 if given.smoke else given.width, device, blocks=given.blocks), 0, 0.0
    print(f"\n{name}: {len(x)} pictures of {'x'.join(map(str, shape))} to train on, {len(test)} others, {draws} draws")
    print(f"features '{network.name}': {network.about}")
    print(f"{'steps of ' + str(rows):>14}{'seconds':>10}{'FID':>9}{'bits':>9}{'± se':>7}   (training's FID {floor:.3f})")
    x = x.to(device)
    for steps in stages:
        begun = time.perf_counter()
        fit = Denoising(loss=noise(), steps=steps, batch_size=rows, average=PowerAverage(0.1), clip_norm=1.0, seed=done,
                        learning_rate=given.learning_rate, autocast=torch.bfloat16 if device.type == "cuda" else None,
                        progress=False, transform=lambda grey: continuous(grey, LEVELS))  # fmt: skip
        fit.fit(model, x)
        settle(device)
        done, before = done + steps, before + time.perf_counter() - begun
        torch.manual_seed(2)
        distance, found = apart(drawn(model, SAMPLERS["heun"][0], 12, draws)), bits(model, new)
        se = float(found.std()) / len(found) ** 0.5
        print(f"{done:14}{before:10.0f}{distance:9.3f}{float(found.mean()):9.3f}{se:7.3f}", flush=True)
    setting = f"{name}, {done} steps of {rows}"
    table.add("Fréchet distance to test pictures", setting, distance, theirs=floor, peer="training pictures")
    table.add("bits per dimension of test pictures", setting, float(found.mean()))
    print(f"{'FID at calls':>24}" + "".join(f"{calls:>9}" for calls in CALLS))
    for title, distances in by_calls(lambda sampler, steps: apart(drawn(model, sampler, steps, draws))):
        print(f"{title:>24}" + "".join(f"{number:9.3f}" for number in distances), flush=True)
        table.add("Fréchet distance at 10 calls", f"{name}, {title}", distances[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", nargs="*", default=["mnist", "fashion_mnist", "cifar10"], metavar="NAME")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--seen", type=int, default=500, help="test pictures whose bits are measured")
    parser.add_argument("--width", type=int, default=64, help="of the U-Net that quality is measured of")
    parser.add_argument("--blocks", type=int, default=2, help="of it, at each resolution")
    parser.add_argument("--batch", type=int, default=256, help="pictures in a step, where quality is measured")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="where quality is measured")
    parser.add_argument("--no-speed", action="store_true", help="quality alone")
    parser.add_argument("--smoke", action="store_true", help="a few steps of small networks")
    given = parser.parse_args()
    device, table = torch.device(given.device), Rows()
    print(" ".join(["python examples/benchmarks/pictures_diffusion.py", *sys.argv[1:]]))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    print(f"{datetime.date.today()}, {where}, torch {torch.__version__}, Python {platform.python_version()}")
    if not given.no_speed:
        speed(given, device, table)
    for name in given.data:
        quality(name, given, device, table)
    table.show()


if __name__ == "__main__":
    main()
