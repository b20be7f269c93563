"""Label switching: components of a mixture may trade names between draws without a change of the density.

Sites of a program with exchangeable labels are named by its *symmetry*, a map from site to the axis of one value that
runs over the labels (``weights`` (K,): 0; ``means`` (K, D): 0), to both axes of a matrix whose rows and columns are labels
(``transitions`` (K, K): (0, 1)), or to None where the values themselves are labels (``z`` (N,)). Means, R-hat and traces of
such sites say nothing until the labels are matched, or left out of sight.

    match         to a pivot: the features of components, or the values that they share
    ecr           to the allocations that the draws themselves agree on, found by iteration
    stephens      the same with allocation probabilities, which tell more than allocations
    invariant     what does not change: sites sorted along the labels
    co_clustering what does not change: how often two rows share a label
    partition     what does not change: one clustering that stands for all draws
    occupied      what does not change: how many labels are in use

Where a program has several groups of labels that are exchangeable each on its own, every group has its own symmetry.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["co_clustering", "ecr", "invariant", "match", "occupied", "partition", "stephens"]

Axis = int | tuple[int, int] | None  # of the labels; two where they name rows and columns; None where values are labels
Symmetry = Mapping[str, Axis]


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
    return matched | _renamed(draws, named, order)


def ecr(draws: Mapping[str, Tensor], symmetry: Symmetry, rounds: int = 100) -> dict[str, Tensor]:
    """Renames the labels of every draw so that rows have the labels that they have in most of the renamed draws.

    Iterates between the pivot, the most frequent label of each row, and for each draw the permutation under which most of
    its rows agree with it, until no label changes. The first pivot is the first draw.

    Args:
        draws: Site to (chain, draw, *site).
        symmetry: Site to the axis of its labels, or None where its values are labels; there must be one of the latter.
        rounds: Most iterations.

    Returns:
        The draws, with the labels of sites in ``symmetry`` renamed.

    Raises:
        ValueError: If no site has labels for values.

    References:
        P. Papastamoulis and G. Iliopoulos, An artificial allocations based solution to the label switching problem in
        Bayesian analysis of mixtures of distributions (2010): equivalence classes representatives.
        C. Rodríguez and S. Walker, Label switching in Bayesian mixture models: deterministic relabeling strategies (2014).
    """
    named = {site: axis for site, axis in symmetry.items() if site in draws and draws[site].numel()}
    sites = [site for site, axis in named.items() if axis is None]
    if not sites:
        raise ValueError("ecr needs the draws of a site whose values are labels. Use match, or stephens.")
    labels = _count_labels(draws, named, {})
    pivot = {site: draws[site][0, 0] for site in sites}
    last = None
    for _ in range(rounds):
        order = _assign(-_agreement(draws, sites, pivot, labels))
        if last is not None and torch.equal(order, last):
            break
        last, moved = order, _renamed(draws, dict.fromkeys(sites), order)
        pivot = {site: moved[site].flatten(0, 1).long().mode(0).values for site in sites}
    return {**draws, **_renamed(draws, named, order)}


def stephens(draws: Mapping[str, Tensor], symmetry: Symmetry, probabilities: Tensor, rounds: int = 100) -> dict[str, Tensor]:
    """Renames the labels of every draw so that its allocation probabilities lie closest to their mean over the draws.

    With p_ik(s) the probability that row i of draw s has label k, iterates between q = the mean of the renamed p and the
    permutations that minimise Σ_i KL(p_i(s) ‖ q_i), until no label changes.

    Args:
        draws: Site to (chain, draw, *site).
        symmetry: Site to the axis of its labels, or None where its values are labels.
        probabilities: (chain, draw, row, label), such as ``GMM.predict_proba`` gives for one draw.
        rounds: Most iterations.

    Returns:
        The draws, with the labels of sites in ``symmetry`` renamed.

    Raises:
        ValueError: If the probabilities do not suit the draws.

    References:
        M. Stephens, Dealing with label switching in mixture models (2000), algorithm 2.
    """
    named = {site: axis for site, axis in symmetry.items() if site in draws and draws[site].numel()}
    shape, labels = next(iter(draws.values())).shape[:2], _count_labels(draws, named, {})
    sizes = {axis is None: draws[site].shape for site, axis in named.items()}
    if probabilities.dim() != 4 or probabilities.shape[:2] != shape or (False in sizes and probabilities.shape[3] != labels):
        raise ValueError(
            f"probabilities have the shape {tuple(probabilities.shape)}, but must be (chain, draw, row, label) for draws of "
            f"shape {tuple(shape)} with {labels} labels."
        )
    p = probabilities.double()
    tiny = torch.finfo(p.dtype).tiny
    entropy = torch.xlogy(p, p.clamp(min=tiny)).sum(2)  # (chain, draw, label)
    order = torch.arange(p.shape[3]).expand(*shape, -1)
    for _ in range(rounds):
        index = order.unsqueeze(2).expand(p.shape)
        q = p.gather(3, index).mean((0, 1)).clamp(min=tiny).log()  # (row, label)
        found = _assign(entropy.unsqueeze(2) - torch.einsum("csik,ij->csjk", p, q))
        if torch.equal(found, order):
            break
        order = found
    return {**draws, **_renamed(draws, named, order)}


def co_clustering(labels: Tensor) -> Tensor:
    """How often two rows have the same label, (row, row): whatever the labels are called.

    Args:
        labels: Draws of labels, (chain, draw, row).
    """
    flat = labels.flatten(0, 1)
    total = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64)
    for label in flat.unique():
        member = (flat == label).double()
        total += member.mT @ member
    return total / len(flat)


def _renamed(draws: Mapping[str, Tensor], named: Symmetry, order: Tensor) -> dict[str, Tensor]:
    """The sites of a symmetry under permutations (chain, draw, label): new label k is old label order[k]."""
    renamed, rank = {}, order.argsort(-1)
    for site, axis in named.items():
        values = draws[site]
        if axis is None:
            flat = values.flatten(2).long()
            renamed[site] = rank.gather(2, flat).to(values.dtype).reshape(values.shape)
        else:
            for each in _axes(axis):
                front = _labels_first(values, each)
                index = order.reshape(*order.shape, *[1] * (front.dim() - 3)).expand(front.shape)
                values = front.gather(2, index).movedim(2, each).contiguous()
            renamed[site] = values
    return renamed


def invariant(draws: Mapping[str, Tensor], symmetry: Symmetry) -> dict[str, Tensor]:
    """The draws as quantities that do not change when labels are renamed.

    Args:
        draws: Site to (chain, draw, *site).
        symmetry: Site to the axis of its labels, or None where its values are labels.

    Returns:
        The same, where a site with a label axis is sorted along it (every other axis for itself), of a matrix of labels the
        diagonal is, and sites whose values are labels are left out.
    """
    quantities = {}
    for site, values in draws.items():
        if site not in symmetry:
            quantities[site] = values
        elif (axis := symmetry[site]) is not None:
            quantities[site] = _features(values, axis).sort(2).values.movedim(2, _axes(axis)[0])
    return quantities


def _axes(axis: int | tuple[int, int]) -> tuple[int, ...]:
    """The axes of a value (*site), seen from draws (chain, draw, *site)."""
    return tuple(each if each < 0 else each + 2 for each in ((axis,) if isinstance(axis, int) else axis))


def _features(values: Tensor, axis: int | tuple[int, int]) -> Tensor:
    """What draws say of each label alone, (chain, draw, labels, *rest of the site): of a matrix of labels the diagonal."""
    axes = _axes(axis)
    return values.movedim(axes[0], 2) if len(axes) == 1 else values.diagonal(dim1=axes[0], dim2=axes[1]).movedim(-1, 2)


def _labels_first(values: Tensor, axis: int) -> Tensor:
    """(chain, draw, labels, *rest of the site)."""
    return values.movedim(axis, 2)


def _groups(draws: Mapping[str, Tensor], symmetry: Symmetry) -> list[dict[str, Axis]]:
    """The sites by their number of labels: labels of two plates of different size are permuted on their own."""
    counts = {site: draws[site].shape[_axes(axis)[0]] for site, axis in symmetry.items() if axis is not None}
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
    counts = {draws[site].shape[_axes(axis)[0]] for site, axis in symmetry.items() if axis is not None}
    values = [site for site, axis in symmetry.items() if axis is None]
    highest = [int(tensors[site].max()) + 1 for tensors in (draws, pivot) for site in values if site in tensors]
    if counts and highest and max(highest) > max(counts):
        raise ValueError(f"{values} hold {max(highest)} labels, but the other sites have {max(counts)}.")
    return max([*counts, *highest])


def _distance(
    draws: Mapping[str, Tensor], axes: Mapping[str, int | tuple[int, int]], pivot: Mapping[str, Tensor], labels: int
) -> Tensor:
    """Squared distance of each pivot component from each component of a draw, (chain, draw, pivot's, draw's)."""
    total = torch.zeros(())
    for site, axis in axes.items():
        values = _features(draws[site].double(), axis)
        values = values.reshape(*values.shape[:3], -1)
        goal = _features(pivot[site].double()[None, None], axis).reshape(labels, -1)
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


def occupied(labels: Tensor) -> Tensor:
    """How many labels some row has, (chain, draw): for a mixture that may leave components unused, its size.

    Args:
        labels: Draws of labels, (chain, draw, row).
    """
    ordered = labels.sort(-1).values
    return 1 + (ordered.diff(dim=-1) != 0).sum(-1)


def partition(labels: Tensor, loss: str = "variation of information", sweeps: int = 50) -> Tensor:
    """One partition of the rows in place of many: the one of least expected loss, whatever the labels are called.

    Binder's loss counts the pairs of rows that two partitions treat differently; its expectation needs the co-clustering
    matrix alone. The variation of information VI(c, c') = H(c | c') + H(c' | c) tends to fewer small clusters. The search
    begins at the best of the draws (a hundred at most) and of cuts of a tree over the rows (average linkage of 1 −
    co-clustering), and then moves single rows, to new clusters too, as long as that lowers the loss.

    Args:
        labels: Draws of labels, (chain, draw, row).
        loss: "binder" or "variation of information".
        sweeps: Most passes over the rows.

    Returns:
        Labels (row,), 0 for the first row's cluster, 1 for the next one met, and so on.

    References:
        D. Binder, Bayesian cluster analysis (1978).
        M. Meilă, Comparing clusterings: an information based distance (2007).
        S. Wade and Z. Ghahramani, Bayesian cluster analysis: point estimation and credible balls (2018).
        D. Dahl, D. Johnson and P. Müller, Search algorithms and loss functions for Bayesian clustering (2022).
    """
    if loss not in ("binder", "variation of information"):
        raise ValueError(f"loss is '{loss}', but must be 'binder' or 'variation of information'.")
    if labels.dim() != 3:
        raise ValueError(f"labels have the shape {tuple(labels.shape)}, but must be (chain, draw, row).")
    draws = labels.flatten(0, 1).long()
    draws = torch.stack([row.unique(return_inverse=True)[1] for row in draws])
    expected = _Binder(co_clustering(labels)) if loss == "binder" else _Variation(draws)
    choices = [*draws[:: max(1, len(draws) // 100)], *_cuts(co_clustering(labels), int(draws.max()) + 2)]
    best = _canonical(min(choices, key=expected))
    lowest = expected(best)
    for _ in range(sweeps):
        has_moved = False
        for row in range(len(best)):
            for k in range(int(best.max()) + 2):
                moved = best.clone()
                moved[row] = k
                found = expected(moved) if k != best[row] else lowest
                if found < lowest - 1e-12:
                    best, lowest, has_moved = _canonical(moved), found, True
                    break
        if not has_moved:
            break
    return best


def _canonical(labels: Tensor) -> Tensor:
    """The same partition, its labels numbered as they are met."""
    names: dict[int, int] = {}
    return torch.tensor([names.setdefault(int(label), len(names)) for label in labels])


def _cuts(together: Tensor, most: int) -> list[Tensor]:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(together) < 2:
        return []
    distance = (1.0 - together).clamp(min=0.0)
    tree = linkage(squareform(distance.fill_diagonal_(0.0).numpy(), checks=False), "average")
    return [torch.from_numpy(fcluster(tree, k, "maxclust").astype(np.int64)) - 1 for k in range(1, most + 1)]


class _Binder:
    """Expected share of the pairs of rows that a partition treats differently from a draw."""

    def __init__(self, together: Tensor) -> None:
        self.together = together

    def __call__(self, labels: Tensor) -> float:
        same = (labels[:, None] == labels).double()
        return float((same * (1.0 - self.together) + (1.0 - same) * self.together).mean())


class _Variation:
    """Expected variation of information between a partition and a draw, in nats."""

    def __init__(self, draws: Tensor) -> None:
        self.draws, self.most = draws, int(draws.max()) + 1
        counts = torch.zeros(len(draws), self.most, dtype=torch.float64)
        counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
        self.entropy = float(_entropies(counts, draws.shape[1]).mean())

    def __call__(self, labels: Tensor) -> float:
        rows, own = len(labels), int(labels.max()) + 1
        pairs = self.draws * own + labels
        counts = torch.zeros(len(pairs), self.most * own, dtype=torch.float64)
        counts.scatter_add_(1, pairs, torch.ones_like(pairs, dtype=torch.float64))
        joint = float(_entropies(counts, rows).mean())
        alone = float(_entropies(torch.bincount(labels).double()[None], rows))
        return 2.0 * joint - alone - self.entropy


def _entropies(counts: Tensor, rows: int) -> Tensor:
    shares = counts / rows
    return -torch.xlogy(shares, shares).sum(1)
