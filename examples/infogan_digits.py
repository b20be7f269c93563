"""InfoGAN on handwritten digits of 8x8 pixels: a category that nobody named is the digit, mostly, and numbers its shape.

    python examples/infogan_digits.py

A category of ten, two numbers and noise make a picture; a recogniser guesses all but the noise, and both are trained to make
that easy, beside the game against a critic. Labels only judge: categories are matched with digits. The category is loudest,
to change pictures most; the recogniser is never sure of the numbers, or pictures would be made to tell them.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from inference import Adversarial, NonSaturating
from pyro_genmodels import InfoGAN, datasets, plots
from pyro_genmodels.implicit import Critic
from pyro_genmodels.metrics import clustering, images
from pyro_genmodels.nets import MLP

FEATURES, CODES, BLUR, LOUD = 8, 2, 0.1, torch.tensor([6.0] * 10 + [1.0] * 2)


class Drawer(MLP):
    """Grey levels from noise, and from category and numbers."""

    def forward(self, *given: Tensor) -> Tensor:
        return super().forward(given[0], LOUD * given[1]).sigmoid()


class Blurred(nn.Sequential):
    """A critic that sees pictures with noise while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + BLUR * torch.randn_like(x) if self.training else x)


def trained(x: Tensor, steps: int = 2000, seed: int = 0) -> tuple[InfoGAN, float]:
    """The model, and the bound on the information in category and numbers at the end."""
    torch.manual_seed(seed)
    reader, critic = MLP(64, 10 + 2 * CODES, (128,), nn.LeakyReLU), Blurred(Critic((8, 8), hidden=(256, 256)))
    parts = {"network": Drawer(FEATURES + 10 + CODES, 64, (128, 128)), "recogniser": reader}
    model = InfoGAN((8, 8), FEATURES, codes=CODES, least_scale=1.0, **parts)
    options = {"zero_penalty": 3.0, "information": 0.3, "batch_size": 128, "learning_rate": 1e-3, "average": 0.99}
    fit = Adversarial(critic=critic, objective=NonSaturating(), steps=steps, seed=seed, progress=False, **options)
    information = fit.fit(model, x).history["information"][-50:].mean()
    return model.eval(), float(information)


def main(smoke: bool = False, folder: str = "runs/infogan_digits") -> None:
    """Trains, prints a table and saves ``digits.png``, draws by category, and ``numbers.png``, each from −1 to 1 in turn."""
    data, labels, network = datasets.pictures("digits"), datasets.load("digits")["y"], images.feature_network("digits")
    x, new, y, truth = data.train, data.test, *labels.split([len(data.train), len(data.test)])
    model, information = trained(x, 20 if smoke else 2000)
    found, told = (model.categories_of(rows).argmax(-1) for rows in (x, new))
    print(f"information in category and numbers: at least {information:.3f} nats, by a reader that is never sure")
    print(f"the category is the digit: {clustering.accuracy(y, found):.3f}, new {clustering.accuracy(truth, told):.3f}")
    print(f"\n{f'to {len(new)} held-out digits':24}      FID      KID precision   recall coverage")
    for name, rows in {"training digits": x, "draws": model.sample(len(x))}.items():
        held = images.manifolds(new, rows, network)
        apart = images.frechet_distance(rows, new, network), images.kernel_distance(rows, new, network)
        print(f"{name:24}" + "".join(f"{n:9.3f}" for n in (*apart, held.precision, held.recall, held.coverage)))
    drawn, walks, noise = {}, {}, torch.randn(FEATURES)
    numbers = torch.eye(CODES)[:, None] * torch.linspace(-1.0, 1.0, 7)[:, None]
    for category, one in enumerate(torch.eye(10)):
        digits = y[found == category].bincount(minlength=10)
        name = f"category {category}:\n{digits.max() / digits.sum().clamp(min=1):.0%} are {digits.argmax()}"
        codes = torch.cat([one.expand(CODES, 7, 10), numbers], -1).flatten(0, 1)
        drawn[name] = model.generator.push(torch.randn(len(codes), FEATURES), codes[3].expand_as(codes))
        walks[name] = model.generator.push(noise.expand(len(codes), -1), codes)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, pictures in {"digits": drawn, "numbers": walks}.items():
        plots.images(pictures).savefig(Path(folder) / f"{name}.png", dpi=150)
    print(f"\nSaved digits.png and numbers.png to {folder}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
