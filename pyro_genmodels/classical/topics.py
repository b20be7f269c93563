"""Topic models: every document blends a few topics, and every topic is a distribution over words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.contract import Fitted
from pyro_genmodels.bags import BagOfWords, Layout, SparseDirichlet, folded, folded_in, layout
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.classical.averages import Averages

__all__ = ["LDA"]

_CHUNK = 2**18  # numbers of a table (cell, topic) that is made at once: it should stay in the cache


class LDA(GenerativeModel):
    """Latent Dirichlet allocation.

        φ_k ~ Dirichlet(β),  θ_d ~ Dirichlet(α),  z_di ~ Categorical(θ_d),  w_di ~ Categorical(φ_{z_di})

    Documents are sparse counts; ``pyro_genmodels.bags.documents`` makes them from a scipy.sparse matrix. The topics z of the
    tokens are summed out: a cell of n equal tokens has the log-probability n log Σ_k θ_dk φ_kw. Given θ and φ its tokens
    are shared out among the topics as a multinomial of n; so the model's own move for ``Gibbs`` draws them, and then θ and φ
    from their conditionals, which are Dirichlet.

    Topics are exchangeable: compare posteriors through label-free functions, or relabel first. With α or β below 1 the
    density has no maximum, as it is infinite where a share is 0. ``EM`` of a collapsed model therefore finds means instead,
    by averages of z given the averages of all other tokens (CVB0), which is the fastest way to good topics. Otherwise
    ``EM(maximise=("shares", "topics"))`` should be given a model with α + 1 and β + 1, whose maximum stands for the mean
    under α and β. Other back-ends search less well: give ``Gibbs(start=...)`` and ``SVI(start=...)`` what EM has found.

    Sites: ``topics`` (K, V), ``shares`` (documents, K), ``x`` (documents, cells, 2). Plates: ``components``, ``documents``.

    Args:
        components: Number of topics K, at least 1.
        words: Size of the vocabulary V; None takes the largest word of the first data seen.
        share_concentration: α, one positive number, or one for each topic (K,).
        topic_concentration: β, one positive number, or one for each word (V,).
        length: Tokens of a document that is drawn from the prior.
        is_collapsed: Whether parameters are integrated out: the model's own move for ``Gibbs`` then also draws z token by
            token without θ, which mixes faster and takes twice as long, and ``EM`` averages z without θ and φ.

    References:
        D. Blei, A. Ng and M. Jordan, Latent Dirichlet allocation (2003).
        A. Asuncion et al., On smoothing and inference for topic models (2009): how α, β and their maxima compare.
        M. Magnusson et al., Sparse partially collapsed MCMC for parallel inference in topic models (2018).

    Example:
        >>> from inference import EM
        >>> from pyro_genmodels.bags import documents
        >>> x = documents(([0, 0, 1, 1, 2], [0, 1, 2, 3, 0], [4, 2, 3, 3, 5]))  # document, word, count
        >>> model = LDA(2, is_collapsed=True)
        >>> posterior = EM(steps=20, seed=0, progress=False).fit(model, x)
        >>> sorted(map(sorted, model.topics(posterior, 2, ["ape", "bear", "sun", "moon"])))
        [['ape', 'bear'], ['moon', 'sun']]
    """

    def __init__(
        self,
        components: int,
        words: int | None = None,
        share_concentration: float | Tensor = 0.1,
        topic_concentration: float | Tensor = 0.01,
        length: int = 100,
        is_collapsed: bool = False,
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"LDA needs at least 1 topic, but components is {components}.")
        if length < 1:
            raise ValueError(f"LDA draws documents of at least 1 token, but length is {length}.")
        self.components, self.words, self.length, self.is_collapsed = components, words, length, is_collapsed
        self._has_words = words is not None
        self.share_concentration: Tensor
        self.topic_concentration: Tensor
        for name, value, size in (
            ("share_concentration", share_concentration, components),
            ("topic_concentration", topic_concentration, words),
        ):
            tensor = torch.as_tensor(value, dtype=torch.get_default_dtype())
            if not bool((tensor > 0).all()) or not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} must be positive, but is {value}.")
            if tensor.dim() and (tensor.dim() > 1 or (size is not None and len(tensor) != size)):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but must be one number or {size} of them.")
            self.register_buffer(name, tensor)
        if self.topic_concentration.dim():
            self.words, self._has_words = len(self.topic_concentration), True
        self.guesses = nn.ParameterDict()
        if self.words is not None:
            self._guess(self.words)

    def _guess(self, words: int, tokens: float = 0.0) -> None:
        """The guide's topics, near what they are before any document is seen."""
        generator, like = torch.Generator().manual_seed(0), self.topic_concentration
        noise = -torch.rand(self.components, words, generator=generator).log().to(like)
        start = self.topic_concentration.expand(words) + noise * max(tokens / (self.components * words), 0.1)
        self.guesses = nn.ParameterDict({"topics": start.log()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = prefix + "guesses.topics"
        if key in state_dict and (self.words is None or "topics" not in self.guesses):
            self.words = state_dict[key].shape[-1]
            self._guess(self.words)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ----------------------------------------------------------------------------------------- data
    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Takes the size of the vocabulary from the data, unless ``words`` was given, and checks them.

        Args:
            x: All documents, (documents, cells, 2).
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If x is no table of counts, has no token, or words outside the vocabulary.
        """
        if x is None:
            return
        if not self._has_words:
            self.words = None
        self._check(x)
        if not bool(x[..., 1].any()):
            raise ValueError("x has no token: all counts are 0.")
        if not self._has_words:
            self.words = int(x[..., 0].max()) + 1
        assert self.words is not None
        self._guess(self.words, float(x[..., 1].sum()))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != 2:
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
            raise ValueError(
                f"x must be documents as cells of word and count, (documents, cells, 2), but has {came}. Make it by "
                "pyro_genmodels.bags.documents(matrix)."
            )
        if x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(f"x holds {str(x.dtype).removeprefix('torch.')}, but words and counts must be integers.")
        bad = (x < 0).nonzero()
        if len(bad):
            document, cell, column = bad[0].tolist()
            raise ValueError(f"The {('word', 'count')[column]} in cell {cell} of document {document} is negative.")
        most = int(x[..., 0].max()) if x.numel() else -1
        if self.words is not None and most >= self.words:
            raise ValueError(
                f"x has the word {most}, but this LDA knows the words 0 to {self.words - 1} only. Leave out words that were "
                "not there in training, or give words= for a larger vocabulary."
            )

    # -------------------------------------------------------------------------------------- program
    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        lengths = self._lengths(x, size)
        alpha, beta = self._concentrations()
        with pyro.plate("components", self.components):
            topics = pyro.sample("topics", SparseDirichlet(beta))
        with pyro.plate("documents", len(lengths)):
            shares = pyro.sample("shares", SparseDirichlet(alpha))
            cells = None if x is None else x.shape[-2]
            return pyro.sample("x", BagOfWords(shares, topics, lengths, cells), obs=x)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Mean-field guess: φ_k ~ Dirichlet(λ_k), whose λ is learnt, and θ_d ~ Dirichlet(γ_d).

        γ_d is where it is best for λ (``bags.folded_in``), so that the guide knows batches and new documents as well.

        References:
            M. Hoffman, D. Blei and F. Bach, Online learning for latent Dirichlet allocation (2010).
        """
        lengths = self._lengths(x, size)
        alpha = self._concentrations()[0]
        guess = self.guesses["topics"].exp()
        with pyro.plate("components", self.components):
            pyro.sample("topics", dist.Dirichlet(guess))
        weights = (guess.digamma() - guess.sum(-1, keepdim=True).digamma()).exp()
        with pyro.plate("documents", len(lengths)):
            gamma = alpha.expand(len(lengths), -1) if x is None else folded_in(x, weights, alpha)
            pyro.sample("shares", dist.Dirichlet(gamma))

    @torch.no_grad()
    def guess(self, values: Mapping[str, Tensor], x: Tensor, size: int | None = None) -> None:
        """Puts the guide where ``SVI(start=...)`` says: λ_k = β + φ_k · (expected tokens of topic k).

        The bound of mean field has many maxima, those near topics at random far below those near good topics; so let ``EM``
        of a collapsed model look for them.

        Args:
            values: ``topics``, (K, V), and ``shares``, (documents, K); without the latter topics are equally common.
            x: Documents, (documents, cells, 2).
            size: Not used.
        """
        if "topics" not in values:
            return
        lengths = self._lengths(x, size).to(values["topics"])
        shares = values.get("shares", lengths.new_full((len(lengths), self.components), 1.0 / self.components))
        tokens = lengths @ shares.to(lengths)
        beta = self._concentrations()[1].to(lengths)
        self.guesses["topics"].copy_((beta + tokens[:, None] * values["topics"]).log())

    def _lengths(self, x: Tensor | None, size: int | None) -> Tensor:
        """Tokens of each document, (documents,)."""
        if x is not None:
            if self.words is None:
                self.prepare(x)
            return x[..., 1].sum(-1)
        if self.words is None:
            raise ValueError("This LDA has seen no data: give words=, to draw from it.")
        if size is None:
            raise ValueError("LDA.model needs documents x, or the number of documents to draw, size.")
        return torch.full((size,), self.length, device=self.share_concentration.device)

    def _concentrations(self) -> tuple[Tensor, Tensor]:
        """α (K,) and β (V,)."""
        assert self.words is not None
        return self.share_concentration.expand(self.components), self.topic_concentration.expand(self.words)

    def start(self, x: Tensor, seed: int | None = None) -> dict[str, Tensor]:
        """Values for a back-end to start from, near equal shares and topics that are all the words of the corpus.

        Args:
            x: Documents, (documents, cells, 2).
            seed: Of the differences between topics, without which none would ever part; None draws others at every call.

        Returns:
            Site to value.
        """
        self.prepare(x)
        assert self.words is not None
        generator, like = None if seed is None else torch.Generator().manual_seed(seed), self.share_concentration
        sizes = {"topics": (self.components, self.words), "shares": (len(x), self.components)}
        values = {name: -torch.rand(size, generator=generator).log().to(like) for name, size in sizes.items()}
        return {name: value / value.sum(-1, keepdim=True) for name, value in values.items()}

    # --------------------------------------------------------------------------- the model's own move
    def blocks(
        self, x: Tensor | None = None, size: int | None = None
    ) -> dict[tuple[str, ...], Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], Callable[[], Tensor]]]]:
        """A Gibbs step for shares and topics: z given both, then both given z; see ``inference.contract.Blocked``."""
        if x is None:
            return {}
        tokens = _Tokens(x, self.components)

        def propose(position: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
            moves = [self._move(tokens, *pair) for pair in zip(position["shares"], position["topics"], strict=True)]
            shares, topics, ratios = zip(*moves, strict=True)
            proposed = {"shares": torch.stack(shares), "topics": torch.stack(topics)}
            return proposed, lambda: torch.stack([ratio() for ratio in ratios])

        return {("shares", "topics"): propose}

    def _move(self, tokens: _Tokens, shares: Tensor, topics: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """New shares and topics of one chain, and log q(there) − log q(back).

        The way back draws the same z in the opposite order: a wrong distribution of z, of the shares or of the topics shows.
        """
        alpha, beta = self._concentrations()
        z, log_forth = tokens.allocated(shares, topics)
        log_swept = log_forth.new_zeros(())
        before = after = tokens.by_document(z).to(shares)
        if self.is_collapsed:
            z, after, log_swept = tokens.swept(z, before.clone(), topics, alpha)
        counts = tokens.by_word(z).to(topics)
        conditional = SparseDirichlet(alpha + after), SparseDirichlet(beta + counts)
        new_shares, new_topics = (family.log_sample() for family in conditional)
        log_topics = topics.log()

        def log_q_ratio() -> Tensor:
            log_back = tokens.log_allocation(z, new_shares, new_topics)
            back = SparseDirichlet(alpha + before), conditional[1]
            drawn = conditional[0].log_prob(new_shares.exp()).sum() - back[0].log_prob(shares).sum()
            drawn = drawn + ((beta + counts - 1.0) * (new_topics - log_topics)).sum()
            return log_forth + log_swept + drawn - log_back

        return new_shares.exp(), new_topics.exp(), log_q_ratio

    def steps(
        self, x: Tensor | None = None, size: int | None = None
    ) -> dict[tuple[str, ...], Callable[[Mapping[str, Tensor], Any], tuple[dict[str, Tensor], Any]]]:
        """For ``EM``, if the model is collapsed: means by ``averages.Averages``; see ``inference.contract.Stepped``."""
        if x is None or not self.is_collapsed:
            return {}
        averages = Averages(x, *self._concentrations())

        def step(values: Mapping[str, Tensor], memory: Any) -> tuple[dict[str, Tensor], Any]:
            before, count = memory or ((), 0)
            if count:
                found = [averages.swept(r, count - 1) for r in before]
            else:
                found = [averages.started(topics) for topics in values["topics"]]
            shares, topics = zip(*(counts.means() for _, counts in found), strict=True)
            return {"shares": torch.stack(shares), "topics": torch.stack(topics)}, (tuple(r for r, _ in found), count + 1)

        return {("shares", "topics"): step}

    # ---------------------------------------------------------------------------------- what it knows
    @torch.no_grad()
    def transform(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """The shares of documents, which may be new, with topics held at draws whose labels have been matched.

        As ``bags.folded`` fits them, averaged over the draws.

        Args:
            x: Documents, (documents, cells, 2). An empty one has the mean of the prior.
            draws: A Posterior, or site to (…, *site).

        Returns:
            (documents, K), rows sum to 1.
        """
        table = draws if isinstance(draws, Mapping) else draws.matched
        topics = self._topics(table, x)
        return torch.stack([folded(x, phi, self.share_concentration) for phi in topics]).mean(0)

    def _topics(self, table: Mapping[str, Tensor], x: Tensor | None = None) -> Tensor:
        """Topics of all draws, (draw, K, V)."""
        topics = torch.as_tensor(table["topics"])
        topics = topics.reshape(-1, *topics.shape[-2:])
        if topics.shape[1] != self.components:
            raise ValueError(f"These draws are of {topics.shape[1]} topics, but this LDA has {self.components}.")
        if x is not None:
            self._check(x)
            most = int(x[..., 0].max()) if x.numel() else 0
            if most >= topics.shape[-1]:
                raise ValueError(f"x has the word {most}, but these draws are of {topics.shape[-1]} words.")
        return topics

    def topics(
        self, draws: Fitted | Mapping[str, Tensor], number: int = 10, vocabulary: Sequence[str] | None = None
    ) -> list[list[str]]:
        """The most probable words of each topic, the topics with the largest shares first.

        Args:
            draws: A Posterior, whose labels are matched, or site to (…, *site).
            number: Words of each topic.
            vocabulary: What the words are called; None calls them by their numbers.

        Returns:
            A list of words for each topic.

        Raises:
            ValueError: If the vocabulary has another length than the topics.
        """
        table = draws if isinstance(draws, Mapping) else draws.matched
        topics = self._topics(table).mean(0)
        if vocabulary is not None and len(vocabulary) != topics.shape[-1]:
            raise ValueError(f"vocabulary has {len(vocabulary)} words, but these topics are over {topics.shape[-1]}.")
        shares = torch.as_tensor(table["shares"]) if "shares" in table else topics.new_ones(self.components)
        order = shares.reshape(-1, self.components).mean(0).argsort(descending=True)
        best = topics[order].topk(min(number, topics.shape[-1])).indices
        return [[str(vocabulary[i]) if vocabulary is not None else str(i) for i in row] for row in best.tolist()]


class _Tokens:
    """The single tokens of a table of documents: the first of every cell, then the others in the order of the cells.

    Args:
        x: Documents, (documents, cells, 2).
        components: Number of topics.
    """

    def __init__(self, x: Tensor, components: int) -> None:
        self.cells, self.components, self.documents, device = layout(x), components, len(x), x.device
        cells: Layout = self.cells
        every = torch.arange(len(cells.word), device=device)
        self.others = every.repeat_interleave(cells.count - 1)
        self.cell = torch.cat([every, self.others])
        self.document, self.word = cells.document[self.cell], cells.word[self.cell]
        lengths = self.document.bincount(minlength=len(x))
        self.by_length = lengths.argsort(descending=True, stable=True)
        starts = (lengths.cumsum(0) - lengths)[self.by_length]
        active = (lengths[self.by_length] > torch.arange(int(lengths.max()), device=device)[:, None]).sum(1).tolist()
        grouped = self.document.argsort(stable=True)
        self.places = [grouped[starts[:count] + i] for i, count in enumerate(active)]  # i-th tokens, longest documents first
        at_once = max(1, _CHUNK // components)
        bounds = torch.arange(0, len(every) + at_once, at_once, device=device).clamp(max=len(every))
        firsts = torch.searchsorted(self.others, bounds)
        self.chunks = list(zip(itertools.pairwise(bounds.tolist()), itertools.pairwise(firsts.tolist()), strict=True))

    def by_document(self, z: Tensor) -> Tensor:
        """Tokens of each topic in each document, (documents, K)."""
        size = self.documents * self.components
        return torch.bincount(self.document * self.components + z, minlength=size).reshape(-1, self.components)

    def by_word(self, z: Tensor) -> Tensor:
        """Tokens of each word in each topic, (K, V)."""
        size = self.words * self.components
        return torch.bincount(self.word * self.components + z, minlength=size).reshape(-1, self.components).mT

    def allocated(self, shares: Tensor, topics: Tensor) -> tuple[Tensor, Tensor]:
        """z of every token given shares and topics, (token,), and its log-probability.

        The n tokens of a cell are drawn one by one from the same r ∝ θ_d φ_w: a multinomial of n.
        """
        self.words, cells = topics.shape[-1], self.cells
        by_word, count = topics.mT.contiguous(), len(cells.word)
        level = torch.rand(len(self.cell), 1, dtype=shares.dtype, device=shares.device)
        z, chosen = torch.empty_like(self.cell), torch.empty_like(level[:, 0])
        for (first, last), (begin, end) in self.chunks:
            r = by_word.index_select(0, cells.word[first:last])  # far faster than by_word[…]
            r.mul_(shares.index_select(0, cells.document[first:last]))
            height, rows = r.cumsum(-1), self.others[begin:end] - first
            for own, at, p in (
                (slice(first, last), height, r),
                (slice(count + begin, count + end), height.index_select(0, rows), r.index_select(0, rows)),
            ):
                drawn = torch.searchsorted(at, level[own] * at[:, -1:])
                z[own] = drawn.squeeze(-1)
                chosen[own] = p.gather(1, drawn).squeeze(-1) / at[:, -1]
        return z, chosen.log().sum()

    def log_allocation(self, z: Tensor, log_shares: Tensor, log_topics: Tensor) -> Tensor:
        """log q(z) of ``allocated`` at the exponentials of these."""
        p = self.cells.probabilities(log_shares.exp(), log_topics.exp())
        drawn = log_shares.flatten().index_select(0, self.document * self.components + z)
        drawn += log_topics.flatten().index_select(0, z * log_topics.shape[-1] + self.word)
        return (drawn - p.log().index_select(0, self.cell)).sum()

    def swept(self, z: Tensor, counts: Tensor, topics: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every z given all others of its document and the topics, with the shares integrated out; all documents at once.

        Args:
            z: (token,).
            counts: (documents, K); changed.
            topics: (K, V).
            alpha: (K,).

        Returns:
            z, the counts, and log q(there) − log q(back).
        """
        by_word, z = topics.mT.contiguous(), z.clone()
        counts = counts[self.by_length]
        flat, ratio = counts.view(-1), topics.new_zeros(())
        base = torch.arange(len(counts), device=z.device) * self.components
        level = torch.rand(len(z), 1, dtype=topics.dtype, device=z.device)
        ones = topics.new_ones(len(counts))
        for places in self.places:
            size, old = len(places), z.index_select(0, places)
            flat.index_add_(0, base[:size] + old, ones[:size], alpha=-1)
            r = (counts[:size] + alpha).mul_(by_word.index_select(0, self.word.index_select(0, places)))
            height = r.cumsum(-1)
            new = torch.searchsorted(height, level.index_select(0, places) * height[:, -1:]).squeeze(-1)
            flat.index_add_(0, base[:size] + new, ones[:size])
            pair = r.gather(1, torch.stack([new, old], 1)).log()
            ratio = ratio + (pair[:, 0] - pair[:, 1]).sum()
            z.index_copy_(0, places, new)
        restored = torch.empty_like(counts)
        restored[self.by_length] = counts
        return z, restored, ratio
