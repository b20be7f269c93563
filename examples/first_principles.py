"""What maximum likelihood and EM are: counts over rows, the least divergence from the data, and a bound that is lifted.

    python examples/first_principles.py

Every number is held beside its closed form. Programs have priors; ``objective="mle"`` leaves them out.
"""

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

from inference import EM
from pyro_genmodels import GMM, datasets


def multinomial(counts):
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones_like(counts)))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), shares), obs=counts)


def log_joint(x, at):  # log p(x_n, z_n = k) of a mixture, (rows, K)
    return at["weights"].log() + dist.MultivariateNormal(at["means"], at["covariances"]).log_prob(x[:, None])


def parts(joint, q):  # the bound Σ q log(p(x, z) / q) of log p(x), and what it lacks: KL(q ‖ p(z | x))
    return float((q * joint - torch.xlogy(q, q)).sum()), float((torch.xlogy(q, q) - q * joint.log_softmax(-1)).sum())


def main(smoke: bool = False, folder: str = "runs/first_principles") -> None:
    """Fits, prints what it found beside closed forms, and saves ``bound.png``; fewer steps if ``smoke``."""
    years, x = datasets.load("coal")["counts"].long().clamp(max=2).bincount().double(), datasets.load("faithful").x
    mle = {"objective": "mle", "standard_errors": False, "seed": 0, "progress": False}
    shares, at = EM(**mle).fit(multinomial, years).point()["shares"], EM(**mle).fit(GMM(1), x).point()
    counted, rows, covariance = (years / years.sum()).numpy(), int(years.sum()), np.cov(x.numpy().T, bias=True)
    grid = np.array([(i, j, rows - i - j) for i in range(1, rows) for j in range(1, rows - i)]) / rows
    nearest = grid[(counted * np.log(counted / grid)).sum(1).argmin()]
    away = torch.linalg.solve_triangular(torch.linalg.cholesky(at["covariances"][0]), (x - at["means"]).mT, upper=False)
    names = ("no accident", "one accident", "more accidents")
    table = [(f"EM  share of years with {name}", *pair) for name, *pair in zip(names, shares, counted)]
    table += [(f"KL(data ‖ model) on a grid is least at {name}", *pair) for name, *pair in zip(names, nearest, counted)]
    table += [(f"EM  mean {j}", at["means"][0, j], x.numpy().mean(0)[j]) for j in range(2)]
    table += [(f"EM  covariance {i}{j}", at["covariances"][0, i, j], covariance[i, j]) for i, j in ((0, 0), (0, 1), (1, 1))]
    table += [("mean of squared Mahalanobis distances", away.square().sum(0).mean(), 2.0)]

    at = {"weights": torch.full((2,), 0.5).double(), "means": torch.tensor([[3.0, 66.0], [4.0, 76.0]]).double()}
    at["covariances"], path = torch.from_numpy(covariance).expand(2, 2, 2), []
    for _ in range(3 if smoke else 14):
        joint = log_joint(x, at)
        q = joint.softmax(-1)  # E-step: the bound reaches log p(x)
        at = EM(steps=1, start=at, **mle).fit(GMM(2), x).point()  # M-step: it rises, and log p(x) rises more
        path += [parts(joint, q), parts(log_joint(x, at), q)]
    joint, shifts = log_joint(x, at), np.linspace(-8.0, 8.0, 81)
    bounds = np.array([parts(joint, (joint + torch.tensor([shift, 0.0])).softmax(-1)) for shift in shifts])
    sums = [(f"bound + KL(q ‖ posterior), q at {shifts[i]:+.0f}", bounds[i].sum()) for i in (0, 50, 80)]
    table += [(name, found, joint.logsumexp(-1).sum()) for name, found in sums]
    print(f"{'':54}{'found':>14}{'closed form':>14}{'difference':>12}")
    for name, found, closed in table:
        print(f"{name:54}{float(found):14.6f}{float(closed):14.6f}{float(found) - float(closed):12.1e}")

    figure, steps = Figure(figsize=(10.0, 3.8), layout="constrained"), np.arange(len(path)) / 2
    for axis, place, pairs, mark in zip(figure.subplots(1, 2), (shifts, steps), (bounds, np.array(path)), ("-", ".-")):
        axis.fill_between(place, pairs[:, 0], pairs.sum(1), alpha=0.2, label="KL(q ‖ posterior)")
        axis.plot(place, pairs[:, 0], mark, label="bound")
        axis.plot(place, pairs.sum(1), "k" + mark, label="log p(x)")
        axis.legend(frameon=False)
    figure.axes[0].set(xlabel="q: log-odds of the posterior, shifted by", title="bound + KL = log p(x), wherever q is")
    figure.axes[1].set(xlabel="step of EM", title="E-steps raise the bound to log p(x), M-steps lift both")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "bound.png", dpi=150)
    print(f"\nSaved {Path(folder) / 'bound.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
