"""Label switching: components of a mixture may trade names between draws without a change of the density.

Sites of a program with exchangeable labels are named by its *symmetry*, a map from site to the axis of one value that
runs over the labels (``weights`` (K,): 0; ``means`` (K, D): 0), or to None where the values themselves are labels
(``z`` (N,)). Means, R-hat and traces of such sites say nothing until the labels are matched, or left out of sight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["invariant", "match"]

Symmetry = Mapping[str, int | None]


def match(
    draws: Mapping[str, Tensor],
    symmetry: Symmetry,
    pivot: Mapping[str, Tensor] | None = None,
    lp: Tensor | None = None,
) -> dict[str, Tensor]:
    """Renames the labels of every draw so that its components lie closest to those of a pivot.

    With the features f_k of component k (its values in all sites with a label axis, each divided by its standard
    deviation within components), draw s takes the permutation that minimises Σ_k |f_{π(k)}(s) - f_k(pivot)|², an
    assignment problem. Where no site has a label axis, components are matched by the number of values that they share.

    Args:
        draws: Site to (chain, draw, *site).
        symmetry: Site to the axis of its labels, or None where its values are labels. Other sites are handed through.
        pivot: Site to value (*site), such as ``posterior.point()`` of another fit; sites that it lacks are not used.
            None takes the draw with the highest ``lp``, or without ``lp`` the last one of the first chain.
        lp: Log-joint of the draws, (chain, draw).

    Returns:
        The draws, with the labels of sites in ``symmetry`` renamed.

    Raises:
        ValueError: If the sites do not have the same number of labels.

    References:
        M. Stephens, Dealing with label switching in mixture models (2000).
        P. Papastamoulis, label.switching: an R package for dealing with the label switching problem (2016).
    """
    matched = dict(draws)
    named = {site: axis for site, axis in symmetry.items() if site in draws and draws[site].numel()}
    if not named:
        return matched
    if pivot is None:
        chain, draw = (0, -1) if lp is None else divmod(int(lp.nan_to_num(nan=-torch.inf).argmax()), lp.shape[1])
        pivot = {site: draws[site][chain, draw] for site in named}
    groups = _groups(draws, named)
    if len(groups) > 1:
        for group in groups:
            matched |= match({site: draws[site] for site in group}, group, pivot, lp)
        return matched
    used = {site: axis for site, axis in named.items() if site in pivot}
    labels = _count_labels(draws, named, pivot)
    axes = {site: axis for site, axis in used.items() if axis is not None}
    if axes:
        cost = _distance(draws, axes, pivot, labels)
    else:
        cost = -_agreement(draws, [site for site, axis in used.items() if axis is None], pivot, labels)
    order = _assign(cost)
    rank = order.argsort(-1)
    for site, axis in named.items():
        values = draws[site]
        if axis is None:
            flat = values.flatten(2).long()
            matched[site] = rank.gather(2, flat).to(values.dtype).reshape(values.shape)
        else:
            front = _labels_first(values, axis)
            index = order.reshape(*order.shape, *[1] * (front.dim() - 3)).expand(front.shape)
            matched[site] = front.gather(2, index).movedim(2, _axis(axis)).contiguous()
    return matched


def invariant(draws: Mapping[str, Tensor], symmetry: Symmetry) -> dict[str, Tensor]:
    """The draws as quantities that do not change when labels are renamed.

    Args:
        draws: Site to (chain, draw, *site).
        symmetry: Site to the axis of its labels, or None where its values are labels.

    Returns:
        The same, where a site with a label axis is sorted along it (every other axis for itself), and sites whose
        values are labels are left out.
    """
    quantities = {}
    for site, values in draws.items():
        if site not in symmetry:
            quantities[site] = values
        elif (axis := symmetry[site]) is not None:
            quantities[site] = values.sort(_axis(axis)).values
    return quantities


def _axis(axis: int) -> int:
    """The axis of a value (*site), seen from draws (chain, draw, *site)."""
    return axis if axis < 0 else axis + 2


def _labels_first(values: Tensor, axis: int) -> Tensor:
    """(chain, draw, labels, *rest of the site)."""
    return values.movedim(_axis(axis), 2)


def _groups(draws: Mapping[str, Tensor], symmetry: Symmetry) -> list[dict[str, int | None]]:
    """The sites by their number of labels: labels of two plates of different size are permuted on their own."""
    counts = {site: draws[site].shape[_axis(axis)] for site, axis in symmetry.items() if axis is not None}
    sizes = sorted(set(counts.values()))
    values = [site for site, axis in symmetry.items() if axis is None]
    if len(sizes) > 1 and values:
        raise ValueError(
            f"The sites have different numbers of labels ({counts}), so it is not known which of them '{values[0]}' "
            "names. Match the groups one by one, each with its own symmetry."
        )
    if not sizes:
        return [dict(symmetry)]
    return [{site: axis for site, axis in symmetry.items() if counts.get(site, size) == size} for size in sizes]


def _count_labels(draws: Mapping[str, Tensor], symmetry: Symmetry, pivot: Mapping[str, Tensor]) -> int:
    counts = {draws[site].shape[_axis(axis)] for site, axis in symmetry.items() if axis is not None}
    values = [site for site, axis in symmetry.items() if axis is None]
    highest = [int(tensors[site].max()) + 1 for tensors in (draws, pivot) for site in values if site in tensors]
    if counts and highest and max(highest) > max(counts):
        raise ValueError(f"{values} hold {max(highest)} labels, but the other sites have {max(counts)}.")
    return max([*counts, *highest])


def _distance(draws: Mapping[str, Tensor], axes: Mapping[str, int], pivot: Mapping[str, Tensor], labels: int) -> Tensor:
    """Squared distance of each pivot component from each component of a draw, (chain, draw, pivot's, draw's)."""
    total = torch.zeros(())
    for site, axis in axes.items():
        values = _labels_first(draws[site].double(), axis)
        values = values.reshape(*values.shape[:3], -1)
        goal = pivot[site].double().movedim(axis, 0).reshape(labels, -1)
        scale = _spread(values)
        total = total + torch.cdist(goal / scale, values / scale, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total


def _spread(values: Tensor) -> Tensor:
    """Standard deviation of each feature within a component, (feature,), from values (chain, draw, labels, feature).

    Labels are not known yet, so it is that of the order statistics over the labels: small for a feature that tells the
    components apart, about that of the feature itself for one that does not.
    """
    within = values.sort(2).values.var((0, 1), correction=0).mean(0).sqrt()
    overall = values.std((0, 1, 2), correction=0)
    scale = torch.where(within > 0, within, overall)
    return torch.where(scale > 0, scale, 1.0)


def _agreement(draws: Mapping[str, Tensor], sites: list[str], pivot: Mapping[str, Tensor], labels: int) -> Tensor:
    """How many values each pivot label shares with each label of a draw, (chain, draw, pivot's, draw's)."""
    shape = next(iter(draws.values())).shape[:2]
    total = torch.zeros(*shape, labels * labels, dtype=torch.float64)
    for site in sites:
        pairs = pivot[site].flatten().long() * labels + draws[site].flatten(2).long()
        total.scatter_add_(2, pairs, torch.ones_like(pairs, dtype=total.dtype))
    return total.reshape(*shape, labels, labels)


def _assign(cost: Tensor) -> Tensor:
    """For every draw the component that each pivot component takes, (chain, draw, labels)."""
    from scipy.optimize import linear_sum_assignment

    finite = cost.flatten(0, 1).double().nan_to_num(nan=0.0, posinf=1e300).numpy()
    orders = [linear_sum_assignment(matrix)[1] for matrix in finite]
    return torch.as_tensor(np.stack(orders)).reshape(cost.shape[:-1])
