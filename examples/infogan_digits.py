"""InfoGAN on handwritten digits of 8x8 pixels: a category that nobody named turns out to be the digit, mostly.

    python examples/infogan_digits.py

A category of ten and noise make a picture; a recogniser guesses the category from it, and both are trained to make that
easy, beside the game against a critic. Labels only judge: each category is matched with a digit, one to one. The category
enters the generator louder than the noise, so that it changes pictures most. Draws are compared with held-out digits in
features that come with the package; so are training digits, whose distance is the floor (the others are of other writers).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from inference import Adversarial, NonSaturating
from pyro_genmodels import InfoGAN, datasets, plots
from pyro_genmodels.implicit import Critic
from pyro_genmodels.metrics import clustering, images
from pyro_genmodels.nets import MLP

FEATURES, LOUD, BLUR = 8, 6.0, 0.1


class Drawer(MLP):
    """Grey levels from noise and a category, one-hot."""

    def forward(self, *given: Tensor) -> Tensor:
        return super().forward(given[0], LOUD * given[1]).sigmoid()


class Blurred(nn.Sequential):
    """A network that sees pictures with noise while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + BLUR * torch.randn_like(x) if self.training else x)


def trained(x: Tensor, steps: int = 2000, seed: int = 0) -> tuple[InfoGAN, float]:
    """The model, and the bound on the information in its category at the end."""
    torch.manual_seed(seed)
    recogniser, critic = Blurred(MLP(64, 10, (128,), nn.LeakyReLU)), Blurred(Critic((8, 8), hidden=(256, 256)))
    model = InfoGAN((8, 8), FEATURES, network=Drawer(FEATURES + 10, 64, (128, 128)), recogniser=recogniser)
    options = {"zero_penalty": 3.0, "information": 0.3, "batch_size": 128, "learning_rate": 1e-3, "average": 0.99}
    fit = Adversarial(critic=critic, objective=NonSaturating(), steps=steps, seed=seed, progress=False, **options)
    information = fit.fit(model, x).history["information"][-50:].mean()
    return model.eval(), float(information)


def main(smoke: bool = False, folder: str = "runs/infogan_digits") -> None:
    """Trains, prints a table and saves ``digits.png``, draws by category, and ``walks.png``, from noise to its opposite."""
    data, labels, network = datasets.pictures("digits"), datasets.load("digits")["y"], images.feature_network("digits")
    x, new, y, truth = data.train, data.test, *labels.split([len(data.train), len(data.test)])
    model, information = trained(x, 20 if smoke else 2000)
    found, told = (model.categories_of(rows).argmax(-1) for rows in (x, new))
    print(f"information in the category {information:.3f} nats, of log 10 = {torch.tensor(10.0).log():.3f}")
    print(f"it is the digit: {clustering.accuracy(y, found):.3f}, of others {clustering.accuracy(truth, told):.3f}")
    print(f"\n{f'to {len(new)} held-out digits':24}      FID      KID precision   recall coverage")
    for name, rows in {"training digits": x, "draws": model.sample(len(x)), "noise": torch.rand_like(x)}.items():
        held = images.manifolds(new, rows, network)
        numbers = images.frechet_distance(rows, new, network), images.kernel_distance(rows, new, network)
        print(f"{name:24}" + "".join(f"{n:9.3f}" for n in (*numbers, held.precision, held.recall, held.coverage)))

    ends, drawn, walks = torch.randn(2, FEATURES), {}, {}
    angles = torch.linspace(0.0, torch.pi, 12)[:, None]  # an arc: as far from the middle as noise is
    for category, one in enumerate(torch.eye(10).unsqueeze(1).expand(10, 12, 10)):
        digits = y[found == category].bincount(minlength=10)
        name = f"category {category}:\n{digits.max() / digits.sum().clamp(min=1):.0%} are {digits.argmax()}"
        noises = torch.randn(12, FEATURES), angles.cos() * ends[0] + angles.sin() * ends[1]
        drawn[name], walks[name] = (model.generator.push(noise, one).detach() for noise in noises)
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images(drawn).savefig(Path(folder) / "digits.png", dpi=150)
    plots.images(walks).savefig(Path(folder) / "walks.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'digits.png'} and walks.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
