"""Assignments of tokens to topics, averaged instead of drawn, with shares and topics integrated out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.bags import Layout, layout

__all__ = ["Averages", "Counts"]

_CHUNK = 2**17  # numbers of a table (cell, topic) that is made at once: several of them should stay in the cache
_PASSES = 3  # over all documents in one step, so that what is copied and summed anew for it costs little
_LONGER = 0.8  # by so much, and less in each step by this factor, a move is longer than to where it leads
_FIRST = 6  # rounds in which a document is assigned when it is first seen
_WEIGHT = 0.02  # what the topics at the start are worth, as a share of all tokens


class Counts(NamedTuple):
    """Expected numbers of tokens, with the concentrations added.

    Attributes:
        shares: α + tokens of each topic in each document, (documents, K).
        topics: β + tokens of each word in each topic, (V, K).
        totals: The sum of ``topics`` over words, (K,).
    """

    shares: Tensor
    topics: Tensor
    totals: Tensor

    def means(self) -> tuple[Tensor, Tensor]:
        """The means of shares and topics, (documents, K) and (K, V)."""
        return self.shares / self.shares.sum(-1, keepdim=True), (self.topics / self.totals).mT.contiguous()


class _Part(NamedTuple):
    """Some documents: which they are, which their cells are, and the document (among them), word and count of each cell."""

    documents: slice
    cells: slice
    document: Tensor
    word: Tensor
    number: Tensor


class Averages:
    """Collapsed variational inference of order zero (CVB0): each token's topic is averaged given the averages of the others.

        r_dwk ∝ (α_k + n_dk − r_dwk) (β_w + n_kw − r_dwk) / (Σ_v β_v + n_k − r_dwk),      n = Σ r over the tokens

    The tokens of a cell have the same r. Documents are taken some at a time, and the counts follow at once: those that come
    later see what those before have become, as in incremental EM. Moves go beyond where they lead at first, which leaves the
    fixed points what they are. This approximates the posterior, and is no bound of anything.

    Args:
        x: Documents, (documents, cells, 2).
        alpha: α, (K,).
        beta: β, (V,).

    References:
        A. Asuncion, M. Welling, P. Smyth and Y. W. Teh, On smoothing and inference for topic models (2009).
        R. Neal and G. Hinton, A view of the EM algorithm that justifies incremental, sparse, and other variants (1998).
        R. Salakhutdinov and S. Roweis, Adaptive overrelaxed bound optimization methods (2003).
    """

    def __init__(self, x: Tensor, alpha: Tensor, beta: Tensor) -> None:
        self.cells, self.alpha, self.beta = layout(x), alpha, beta
        self.parts = [*_parts(self.cells, max(1, _CHUNK // len(alpha)), alpha)]

    def counts(self, r: Tensor) -> Counts:
        """The expected counts of r, (cell, K)."""
        shares = self.alpha.repeat(self.cells.documents, 1)
        topics = self.beta[:, None].repeat(1, len(self.alpha))
        for part in self.parts:
            weighted = r[part.cells] * part.number
            shares[part.documents].index_add_(0, part.document, weighted)
            topics.index_add_(0, part.word, weighted)
        return Counts(shares, topics, topics.sum(0))

    def started(self, topics: Tensor) -> tuple[Tensor, Counts]:
        """r, (cell, K), and its counts, of documents that were seen one after the other, from topics worth few tokens.

        Args:
            topics: (K, V). Where they are all the same, they stay so.
        """
        components = len(topics)
        r = topics.new_zeros(len(self.cells.word), components)
        worth = _WEIGHT * self.cells.count.sum() / components
        known = self.beta[:, None] + worth * topics.mT
        counts = Counts(self.alpha.repeat(self.cells.documents, 1), known, known.sum(0))
        for part in self.parts:
            for _ in range(_FIRST):
                self._step(part, r[part.cells], counts, 1.0)
        return r, self.counts(r)

    def swept(self, r: Tensor, step: int) -> tuple[Tensor, Counts]:
        """r, (cell, K), and its counts, after some passes over all documents; they are bold in the first step, 0."""
        r, counts = r.clone(), self.counts(r)
        for part in _PASSES * self.parts:
            self._step(part, r[part.cells], counts, 1.0 + _LONGER ** (step + 1))
        return r, counts

    def _step(self, part: _Part, r: Tensor, counts: Counts, length: float) -> None:
        """Moves the cells of some documents; their r, a part of the whole, and the counts are changed."""
        shares = counts.shares[part.documents]
        new = shares.index_select(0, part.document).sub_(r)
        new.mul_(counts.topics.index_select(0, part.word).sub_(r)).div_(counts.totals - r)
        new.clamp_(min=torch.finfo(r.dtype).tiny)  # counts are rounded
        change = new.div_(new.sum(-1, keepdim=True)).sub_(r)
        if length > 1.01:
            new = change.mul_(length).add_(r).clamp_(min=0.0)
            change = new.div_(new.sum(-1, keepdim=True)).sub_(r)
        r.add_(change)
        change.mul_(part.number)
        shares.index_add_(0, part.document, change)
        counts.topics.index_add_(0, part.word, change)
        counts.totals.add_(change.sum(0))


def _parts(cells: Layout, most: int, like: Tensor) -> Iterator[_Part]:
    """Documents that follow one another and have at most so many cells together, or one alone; none that is empty."""
    starts, first = cells.starts.tolist(), 0
    while first < cells.documents:
        last = first + 1
        while last < cells.documents and starts[last + 1] - starts[first] <= most:
            last += 1
        own = slice(starts[first], starts[last])
        if own.start < own.stop:
            number = cells.count[own].to(like)[:, None]
            yield _Part(slice(first, last), own, cells.document[own] - first, cells.word[own], number)
        first = last
