"""How good topics are: perplexity of held-out documents, coherence and diversity of the most probable words.

All take topics as they are, (…, K, V), whoever found them, and documents as cells (``pyro_genmodels.bags.documents``).

References:
    H. Wallach et al., Evaluation methods for topic models (2009).
    G. Bouma, Normalized (pointwise) mutual information in collocation extraction (2009).
    A. Dieng, F. Ruiz and D. Blei, Topic modeling in embedding spaces (2020): diversity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_genmodels.bags import folded, layout

__all__ = ["coherence", "completion_perplexity", "diversity", "halves", "left_to_right"]


def halves(x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The tokens of every document, each put into one of two halves by a fair coin.

    Args:
        x: Documents, (documents, cells, 2).
        seed: Of the coin.

    Returns:
        Two tables of the shape of x.
    """
    generator = torch.Generator().manual_seed(seed)
    count = x[..., 1].to("cpu", torch.float64)
    first = torch.binomial(count, torch.full_like(count, 0.5), generator=generator).to(x)
    return tuple(torch.stack([x[..., 0], part], -1) for part in (first, x[..., 1] - first))  # type: ignore[return-value]


@torch.no_grad()
def completion_perplexity(topics: Tensor, seen: Tensor, rest: Tensor, concentration: float | Tensor) -> float:
    """exp(−log p(rest | seen) / tokens of the rest): the shares are fitted to ``seen``, and p is averaged over draws.

    Args:
        topics: (…, K, V), one value or many draws.
        seen: Documents from whose tokens the shares are fitted (``bags.folded``), (documents, cells, 2).
        rest: The other tokens of the same documents.
        concentration: Of the prior of the shares, a number or (K,).

    Returns:
        The perplexity, with base e: V if all words are equally likely.
    """
    _check(topics)
    if len(seen) != len(rest):
        raise ValueError(f"seen has {len(seen)} documents, but rest has {len(rest)}: they must be halves of the same.")
    cells = layout(rest)
    draws = topics.reshape(-1, *topics.shape[-2:])
    p = topics.new_zeros(len(cells.word))
    for phi in draws:
        p += cells.probabilities(folded(seen, phi, concentration), phi)
    log_p = (cells.count * (p / len(draws)).double().log()).sum()
    return float(torch.exp(-log_p / cells.count.sum()))


@torch.no_grad()
def left_to_right(topics: Tensor, x: Tensor, concentration: float | Tensor, particles: int = 20, seed: int = 0) -> Tensor:
    """log p(document | topics), the shares integrated out, by the estimator of Wallach et al., without its inner loop.

    The tokens come one after the other in a random order; each particle is an assignment of those before. p(w_i | before) is
    averaged over the particles, which are then drawn anew in proportion to it. The product estimates p without bias, its
    logarithm from below.

    Args:
        topics: (K, V).
        x: Documents, (documents, cells, 2).
        concentration: Of the prior of the shares, a number or (K,).
        particles: Assignments that are carried along.
        seed: Of the draws.

    Returns:
        (documents,).
    """
    _check(topics)
    if topics.dim() != 2:
        raise ValueError(f"left_to_right takes one value of the topics (K, V), but these are {tuple(topics.shape)}.")
    generator = torch.Generator(device=topics.device).manual_seed(seed)
    alpha = torch.as_tensor(concentration).to(topics).expand(len(topics))
    by_word, found = topics.mT.contiguous(), []
    for document in x:
        words = document[:, 0].long().repeat_interleave(document[:, 1])
        words = words[torch.randperm(len(words), generator=generator, device=words.device)]
        counts, log_p = topics.new_zeros(particles, len(topics)), topics.new_zeros(())
        for i, phi in enumerate(by_word[words]):
            joint = (counts + alpha) * phi / (i + alpha.sum())
            weight = joint.sum(-1)
            log_p = log_p + weight.mean().log()
            chosen = torch.multinomial(weight, particles, replacement=True, generator=generator)
            z = torch.multinomial(joint[chosen], 1, generator=generator)
            counts = counts[chosen].scatter_add(-1, z, torch.ones_like(weight).unsqueeze(-1))
        found.append(log_p)
    return torch.stack(found)


def coherence(topics: Tensor, x: Tensor, number: int = 10) -> Tensor:
    """Normalised pointwise mutual information of the most probable words of each topic, averaged over pairs.

        NPMI(v, w) = log(p(v, w) / p(v) p(w)) / −log p(v, w)

    The window is a whole document of the reference ``x``, p the share of its documents that hold the words. Words that never
    meet have −1, words that are in every document together have 1.

    Args:
        topics: (K, V).
        x: The reference, (documents, cells, 2).
        number: Words of each topic.

    Returns:
        (K,), between −1 and 1.
    """
    _check(topics)
    best = topics.topk(min(number, topics.shape[-1])).indices
    words, place = best.unique(return_inverse=True)
    cells = layout(x)
    column = torch.full((max(topics.shape[-1], int(cells.word.max()) + 1),), -1, device=x.device)
    column[words] = torch.arange(len(words), device=x.device)
    column = column[cells.word]
    table = topics.new_zeros(len(x), len(words), dtype=torch.float64)  # of the best words only
    table[cells.document[column >= 0], column[column >= 0]] = 1.0
    both = table.mT @ table / len(x)
    alone = both.diagonal()
    npmi = (both / (alone[:, None] * alone)).log() / -both.log()
    npmi = torch.where(both == 0, -1.0, torch.where(both == 1, 1.0, npmi))
    i, j = torch.triu_indices(best.shape[1], best.shape[1], 1)
    return npmi[place[:, i], place[:, j]].mean(-1)


def diversity(topics: Tensor, number: int = 25) -> float:
    """Share of different words among the most probable of all topics: 1 if no two topics have one in common.

    Args:
        topics: (K, V).
        number: Words of each topic.
    """
    _check(topics)
    best = topics.topk(min(number, topics.shape[-1])).indices
    return len(best.unique()) / best.numel()


def _check(topics: Tensor) -> None:
    total = topics.sum(-1)
    if topics.dim() < 2 or bool((topics < 0).any()) or bool(((total - 1.0).abs() > math.sqrt(1e-6)).any()):
        raise ValueError(f"topics must be distributions over words, (K, V), but have shape {tuple(topics.shape)}.")
