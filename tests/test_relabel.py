"""Matching undoes a renaming of labels, whatever it was; invariant quantities do not see it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import relabel

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
