"""Steps of adversarial training beside the same steps written by hand in PyTorch.

    python examples/benchmarks/gan_step.py

Networks (16-256-256-64 and 64-256-256-1), batches of 128, fused Adam and the losses are alike; runs alternate in one
process, and the first 200 steps of each, in which ours records its graphs, are not counted. A plain step by hand lets the
critic's weights take gradients while the generator is trained, as most such loops do; a careful one switches them off, as
ours does. Ratios are ours by theirs, the median of pairs of runs: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics

import torch
from clock import Clock
from rows import Rows

from inference import Adversarial, NonSaturating, Wasserstein
from inference.games import Game, gradient_penalty
from pyro_genmodels import GAN
from pyro_genmodels.implicit import Critic

X = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
SKIPPED, ROWS, RATE, BETAS = 200, 128, 2e-4, (0.5, 0.9)


def players() -> tuple[GAN, Critic]:
    torch.manual_seed(0)
    return GAN((64,), 16, hidden=(256, 256)), Critic((64,), hidden=(256, 256))


def ours(game: Game, critic_steps: int, steps: int) -> float:
    model, critic = players()
    clock = Clock(SKIPPED, steps)
    settings = {"objective": game, "critic_steps": critic_steps, "steps": steps, "batch_size": ROWS, "learning_rate": RATE}
    Adversarial(critic=critic, betas=BETAS, seed=0, progress=False, callbacks=(clock,), **settings).fit(model, X)
    return clock.rate


def by_hand(game: Game, critic_steps: int, steps: int, is_careful: bool) -> float:
    model, critic = players()
    network, clock = model.generator.network, Clock(SKIPPED, steps)
    players_of = [torch.optim.Adam(net.parameters(), lr=RATE, betas=BETAS, fused=True) for net in (network, critic)]
    for _ in range(steps):
        for _ in range(critic_steps):
            real = X[torch.randint(len(X), (ROWS,))]
            with torch.no_grad():
                drawn = network(torch.randn(ROWS, 16))
            loss = -game.value(critic(real), critic(drawn))
            if isinstance(game, Wasserstein) and game.penalty is not None:
                loss = loss + game.penalty * gradient_penalty(critic, [real], [drawn])
            players_of[1].zero_grad()
            loss.backward()
            players_of[1].step()
        critic.requires_grad_(not is_careful)
        loss = game.loss(critic(network(torch.randn(ROWS, 16))))
        players_of[0].zero_grad()
        loss.backward()
        players_of[0].step()
        critic.requires_grad_(True)
        clock()
    return clock.rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python examples/benchmarks/gan_step.py --runs {given.runs} --steps {given.steps}")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{datetime.date.today()}, {versions}, {os.cpu_count()} cores, shared")
    rows = Rows()
    print("\nsteps of the generator a second     ours  plain  careful   by plain   by careful   (asked for: 0.97)")
    for name, game, critic_steps in (("non-saturating", NonSaturating(), 1), ("WGAN-GP, 5 critic steps", Wasserstein(), 5)):
        steps = given.steps if critic_steps == 1 else SKIPPED + (given.steps - SKIPPED) // 4
        setting = (game, critic_steps, steps)
        runs = [(ours(*setting), by_hand(*setting, False), by_hand(*setting, True)) for _ in range(given.runs)]
        rates = [statistics.median(column) for column in zip(*runs, strict=True)]
        ratios = [statistics.median(run[0] / run[i] for run in runs) for i in (1, 2)]
        print(f"{name:32} {rates[0]:7.1f} {rates[1]:6.1f} {rates[2]:8.1f} {ratios[0]:10.2f} {ratios[1]:12.2f}", flush=True)
        for peer, ratio, rate in (("by hand", ratios[0], rates[1]), ("by hand, careful", ratios[1], rates[2])):
            rows.add("steps of a generator a second", f"GAN, {name}", ratio * rate, theirs=rate, peer=peer,
                     is_less_better=False, target=0.97)  # fmt: skip
    rows.show()


if __name__ == "__main__":
    main()
