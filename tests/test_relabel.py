"""Matching undoes a renaming of labels, whatever it was; invariant quantities do not see it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import Gibbs, relabel
from parameters import quick

CHAINS, DRAWS, K, D, N = 3, 40, 4, 2, 30
SYMMETRY = {"weights": 0, "means": 0, "scales": -1, "z": None}


def mixture() -> dict[str, Tensor]:
    """Draws of four components that lie far apart, labelled in the same way in every draw."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "weights": torch.softmax(0.1 * normal(CHAINS, DRAWS, K), -1),
        "means": 10.0 * torch.arange(K)[:, None] + normal(CHAINS, DRAWS, K, D),
        "scales": normal(CHAINS, DRAWS, D, K).exp(),
        "z": torch.randint(K, (CHAINS, DRAWS, N), generator=generator),
        "offset": normal(CHAINS, DRAWS),
    }


def renamed(draws: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """New label j is old label order[j], draw by draw: written as a loop, to be read beside the definition."""
    new = {site: values.clone() for site, values in draws.items()}
    for c in range(CHAINS):
        for s in range(DRAWS):
            p = order[c, s]
            new["weights"][c, s] = draws["weights"][c, s][p]
            new["means"][c, s] = draws["means"][c, s][p]
            new["scales"][c, s] = draws["scales"][c, s][:, p]
            new["z"][c, s] = p.argsort()[draws["z"][c, s]]
    return new


def random_order() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(CHAINS, DRAWS, K, generator=generator).argsort(-1)


def test_matching_undoes_any_renaming() -> None:
    draws = mixture()
    pivot = {site: values[1, 2] for site, values in draws.items()}
    matched = relabel.match(renamed(draws, random_order()), SYMMETRY, pivot)
    for site, values in draws.items():
        assert torch.equal(matched[site], values), site


def test_without_a_pivot_the_draw_of_highest_log_joint_keeps_its_labels() -> None:
    draws, order = renamed(mixture(), random_order()), random_order()
    lp = torch.full((CHAINS, DRAWS), -1.0)
    lp[0, 3], lp[2, 7] = torch.nan, 0.0
    matched = relabel.match(draws, SYMMETRY, lp=lp)
    for site, values in draws.items():
        assert torch.equal(matched[site][2, 7], values[2, 7])
    again = relabel.match(renamed(matched, order), SYMMETRY, {site: values[2, 7] for site, values in matched.items()})
    assert all(torch.equal(again[site], matched[site]) for site in draws)


def test_matching_takes_the_assignment_of_least_distance() -> None:
    draws = {"means": torch.tensor([[[0.0, 1.0, 5.0], [4.0, 1.2, 0.4]]], dtype=torch.float64)}
    matched = relabel.match(draws, {"means": 0}, {"means": torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)})
    assert matched["means"][0, 1].tolist() == [0.4, 1.2, 4.0]


def test_components_without_features_are_matched_by_the_values_that_they_share() -> None:
    draws = mixture()
    # The same partition in every draw up to one point that moves, under names that change.
    z = draws["z"][:1, :1].repeat(CHAINS, DRAWS, 1)
    z[:, 1::2, 0] = (z[:, 1::2, 0] + 1) % K
    switched = renamed({**draws, "z": z}, random_order())["z"]
    matched = relabel.match({"z": switched}, {"z": None}, {"z": z[0, 0]})
    assert torch.equal(matched["z"], z)


def test_sites_that_a_pivot_lacks_are_renamed_along() -> None:
    draws = mixture()
    matched = relabel.match(renamed(draws, random_order()), SYMMETRY, {"means": draws["means"][0, 0]})
    assert all(torch.equal(matched[site], values) for site, values in draws.items())


def test_groups_of_different_size_are_matched_on_their_own() -> None:
    draws = mixture()
    two = torch.stack([draws["offset"], draws["offset"] + 100.0], -1)
    flipped = torch.where(torch.rand(CHAINS, DRAWS, 1, generator=torch.Generator().manual_seed(2)) < 0.5, two, two.flip(-1))
    both = {"means": renamed(draws, random_order())["means"], "two": flipped}
    pivot = {"means": draws["means"][0, 0], "two": two[0, 0]}
    matched = relabel.match(both, {"means": 0, "two": 0}, pivot)
    assert torch.equal(matched["means"], draws["means"]) and torch.equal(matched["two"], two)
    with pytest.raises(ValueError, match="not known which of them 'z' names"):
        relabel.match({**both, "z": draws["z"]}, {"means": 0, "two": 0, "z": None}, pivot)


def test_without_symmetry_nothing_changes() -> None:
    draws = mixture()
    matched = relabel.match(draws, {})
    assert matched.keys() == draws.keys() and all(matched[site] is draws[site] for site in draws)


def test_invariant_quantities_do_not_change_when_labels_are_renamed() -> None:
    draws = mixture()
    before, after = (relabel.invariant(d, SYMMETRY) for d in (draws, renamed(draws, random_order())))
    assert before.keys() == after.keys() == {"weights", "means", "scales", "offset"}
    assert all(torch.equal(before[site], after[site]) for site in before)
    assert (before["means"].numpy() == np.sort(draws["means"].numpy(), 2)).all()
    assert before["scales"].diff(dim=-1).min() >= 0


# ------------------------------------------------------------------------------------------------ without a pivot
def noisy_allocations() -> dict[str, Tensor]:
    """Draws whose rows have one label each, but for one row in ten."""
    draws, generator = mixture(), torch.Generator().manual_seed(3)
    own = torch.randint(K, (N,), generator=generator).expand(CHAINS, DRAWS, N)
    noise = torch.rand(CHAINS, DRAWS, N, generator=generator) < 0.1
    return {**draws, "z": torch.where(noise, torch.randint(K, own.shape, generator=generator), own)}


def same_up_to_one_renaming(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether one permutation, the same for all draws, leads from one to the other."""
    order = (left["means"][0, 0, :, None] - right["means"][0, 0, None]).square().sum(-1).argmin(1)
    expected = renamed(right, order.expand(CHAINS, DRAWS, K))
    return all(torch.equal(left[site], expected[site]) for site in expected)


def test_allocations_alone_undo_any_renaming() -> None:
    draws = noisy_allocations()
    found = relabel.ecr(renamed(draws, random_order()), SYMMETRY)
    assert same_up_to_one_renaming(found, draws)
    assert torch.equal(found["offset"], draws["offset"])


def test_allocation_probabilities_undo_any_renaming() -> None:
    draws, order = noisy_allocations(), random_order()
    generator = torch.Generator().manual_seed(4)
    member = torch.nn.functional.one_hot(draws["z"], K).double()
    probabilities = (3.0 * member + torch.rand(member.shape, generator=generator)).softmax(-1)
    switched = probabilities.gather(3, order.unsqueeze(2).expand(probabilities.shape))
    found = relabel.stephens(renamed(draws, order), SYMMETRY, switched)
    assert same_up_to_one_renaming(found, draws)


def test_probabilities_tell_components_apart_that_no_allocation_does() -> None:
    """Every row is most probably of the first component, so that allocations say nothing."""
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]], dtype=torch.float64)
    probabilities = torch.stack([p, p.flip(-1), p, p.flip(-1)])[None]
    weights = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)[None]
    found = relabel.stephens({"weights": weights}, {"weights": 0}, probabilities)["weights"]
    assert bool((found == found[:, :1]).all())


def test_relabelling_says_what_it_needs() -> None:
    draws = mixture()
    with pytest.raises(ValueError, match="ecr needs the draws of a site whose values are labels"):
        relabel.ecr({"means": draws["means"]}, {"means": 0})
    with pytest.raises(ValueError, match=r"must be \(chain, draw, row, label\)"):
        relabel.stephens(draws, SYMMETRY, torch.ones(CHAINS, DRAWS, N, K + 1))


def test_rows_cluster_together_whatever_the_labels_are_called() -> None:
    draws = noisy_allocations()
    found = relabel.co_clustering(renamed(draws, random_order())["z"])
    z = draws["z"].flatten(0, 1)
    expected = (z[:, :, None] == z[:, None, :]).double().mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_a_symmetric_mixture_has_one_mode_once_its_labels_are_matched() -> None:
    """Two normals at ±2, with labels that Gibbs sampling never switches by itself: chains are put under both names."""

    def program(y: Tensor) -> None:
        with pyro.plate("component", 2):
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mean[z.long()], 0.5), obs=y)

    y = torch.tensor([-2.2, -1.9, -2.0, 1.8, 2.1, 2.0], dtype=torch.float64)
    starts = torch.tensor([[-2.0, 2.0], [2.0, -2.0]], dtype=torch.float64)
    backend = Gibbs(chains=2, warmup=10, draws=100, seed=0, progress=False, start={"mean": starts})
    posterior = backend.fit(program, y)
    assert posterior.symmetry == {"mean": 0, "z": None}
    raw = posterior.draws["mean"].mean(1)
    assert bool((raw[0] - raw[1]).abs().min() > 3.0)
    precision = 1 / 9 + 3 / 0.25
    exact = torch.tensor([-6.1, 5.9], dtype=torch.float64) / 0.25 / precision
    for found in (posterior.matched, relabel.ecr(posterior.draws, posterior.symmetry)):
        mean = found["mean"].mean((0, 1)).sort().values
        assert bool(((mean - exact).abs() < 4.5 / (200 * precision) ** 0.5).all())  # a false alarm in 7e4 runs
        assert bool((found["mean"].mean(1)[0] - found["mean"].mean(1)[1]).abs().max() < 0.3)


# ------------------------------------------------------------------------------------------------ one partition
def partitions(rows: int) -> list[list[int]]:
    """All of them, as restricted growth strings."""
    found = [[0]]
    for _ in range(rows - 1):
        found = [[*start, k] for start in found for k in range(max(start) + 2)]
    return found


def binder(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a[:, None] == a) != (b[:, None] == b)).mean())


def variation(a: np.ndarray, b: np.ndarray) -> float:
    """Σ_ij −p_ij (log p_ij / p_i + log p_ij / p_j), in words of the definition."""
    total = 0.0
    for i in set(a):
        for j in set(b):
            p, own, other = ((a == i) & (b == j)).mean(), (a == i).mean(), (b == j).mean()
            total -= p * (np.log(p / own) + np.log(p / other)) if p else 0.0
    return total


@pytest.mark.parametrize(("loss", "distance"), [("binder", binder), ("variation of information", variation)])
@pytest.mark.parametrize("seed", quick(range(2), (0,)))
def test_the_partition_has_the_least_expected_loss_of_all(loss: str, distance: Callable[..., float], seed: int) -> None:
    """Seven rows have 877 partitions."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    is_kept = torch.rand(2, 15, 7, generator=generator) < 0.7
    labels = torch.where(is_kept, truth, torch.randint(4, (2, 15, 7), generator=generator))
    draws = labels.flatten(0, 1).numpy()
    losses = [np.mean([distance(np.array(one), draw) for draw in draws]) for one in partitions(7)]
    found = relabel.partition(labels, loss).numpy()
    assert np.mean([distance(found, draw) for draw in draws]) == pytest.approx(min(losses), abs=1e-12)
    assert list(found) in partitions(7)


def test_a_partition_does_not_depend_on_names() -> None:
    draws = mixture()
    other = renamed(draws, random_order())
    for loss in ("binder", "variation of information"):
        assert torch.equal(relabel.partition(draws["z"], loss), relabel.partition(other["z"], loss))


def test_occupied_counts_the_labels_in_use() -> None:
    labels = torch.tensor([[[0, 0, 3], [1, 2, 0]], [[5, 5, 5], [0, 1, 1]]])
    assert relabel.occupied(labels).tolist() == [[2, 3], [1, 2]]


def test_partitions_refuse_other_losses_and_shapes() -> None:
    with pytest.raises(ValueError, match="'binder' or 'variation of information'"):
        relabel.partition(torch.zeros(1, 2, 3, dtype=torch.long), "0-1")
    with pytest.raises(ValueError, match="chain, draw, row"):
        relabel.partition(torch.zeros(2, 3, dtype=torch.long))
