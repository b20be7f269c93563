"""Classes that nobody saw: finite sites, alone, in plates, and across them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.special
import torch
from torch import Tensor

from exact import (
    Moments,
    array,
    assignments,
    averaged,
    beta,
    conjugate_normal,
    dirichlet,
    gamma,
    grid,
    log_dirichlet,
    moments,
    summit,
)  # fmt: skip

Draws = Mapping[str, np.ndarray]

# ---------------------------------------------------------------------------------------- naive Bayes
WORDS = array([1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0])
CLASSES = torch.tensor([0, 0, 1, 1, 0, 0, 0])
IS_LABELLED = torch.tensor([True, True, True, True, False, False, False])


def naive_bayes(words: Tensor, classes: Tensor, is_labelled: Tensor) -> None:
    """Yes-or-no features that are independent within a class; some rows have no label."""
    share = pyro.sample("share", dist.Dirichlet(words.new_ones(2)))
    with pyro.plate("classes", 2, dim=-2), pyro.plate("features", words.shape[1], dim=-1):
        rate = pyro.sample("rate", dist.Beta(words.new_tensor(1.5), 1.5))
    with pyro.plate("rows", len(words)):
        label = pyro.sample("label", dist.Categorical(share), obs=classes, obs_mask=is_labelled)
        pyro.sample("words", dist.Bernoulli(rate[label]).to_event(1), obs=words)


def naive_bayes_moments() -> dict[str, Moments]:
    """By enumeration of the missing labels; shares and rates are conjugate given them."""
    missing = assignments(2, int((~IS_LABELLED).sum()))
    label = np.broadcast_to(CLASSES.numpy(), (len(missing), len(CLASSES))).copy()
    label[:, ~IS_LABELLED.numpy()] = missing
    member = (label[:, :, None] == np.arange(2)).astype(float)
    yes, no = (np.einsum("mnk,nf->mkf", member, part) for part in (WORDS.numpy(), 1 - WORDS.numpy()))
    numbers, a, b = 1.0 + member.sum(1), 1.5 + yes, 1.5 + no
    log_weights = log_dirichlet(numbers) + scipy.special.betaln(a, b).sum((1, 2))
    share, rate = dirichlet(numbers), beta(a, b)
    return {
        "share": averaged(log_weights, share.mean, share.sd**2),
        "rate": averaged(log_weights, rate.mean, rate.sd**2),
        "missing": averaged(log_weights, missing.astype(float)),
    }


def naive_bayes_quantities(draws: Draws) -> dict[str, np.ndarray]:
    return {"share": draws["share"], "rate": draws["rate"], "missing": draws["label"][..., ~IS_LABELLED.numpy()]}


def naive_bayes_mode() -> dict[str, Any]:
    """Of p(share, rate | words, labels), the missing labels summed out row by row."""

    def parts(point: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([point[0], -point[0]]), point[1:].reshape(2, -1)

    def log_density(point: Tensor) -> Tensor:
        logits, rates = parts(point)
        log_share = torch.nn.functional.logsigmoid(logits)
        on, off = torch.nn.functional.logsigmoid(rates), torch.nn.functional.logsigmoid(-rates)
        rows = log_share + WORDS @ on.T + (1 - WORDS) @ off.T
        labelled = rows[IS_LABELLED].gather(1, CLASSES[IS_LABELLED, None]).sum()
        return labelled + rows[~IS_LABELLED].logsumexp(1).sum() + 0.5 * (on + off).sum()

    logits, rates = parts(summit(log_density, [0.0] * 7))
    return {"share": logits.sigmoid(), "rate": rates.sigmoid()}


# ----------------------------------------------------------------------------------------- annotators
ANSWERS = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]])
TRUST = array([4.0, 2.0], [1.5, 3.0])


def annotators(answers: Tensor) -> None:
    """Every item has one class, and every annotator a way to get each class wrong (A. Dawid and A. Skene, 1979)."""
    trust = TRUST.to(answers.device)
    judges = pyro.plate("judges", answers.shape[1], dim=-1)
    share = pyro.sample("share", dist.Dirichlet(trust.new_ones(2)))
    with pyro.plate("classes", 2, dim=-2), judges:
        answer = pyro.sample("answer", dist.Dirichlet(trust[:, None]))
    with pyro.plate("items", len(answers), dim=-2):
        label = pyro.sample("label", dist.Categorical(share))
        with judges:
            judge = torch.arange(answers.shape[1], device=answers.device)
            pyro.sample("answers", dist.Categorical(answer[label, judge]), obs=answers)


def annotators_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁶ labellings; shares and answers are conjugate given one."""
    label = assignments(2, len(ANSWERS))
    member = (label[:, :, None] == np.arange(2)).astype(float)
    given = (ANSWERS.numpy()[:, :, None] == np.arange(2)).astype(float)
    counts = TRUST.numpy()[:, None] + np.einsum("mik,ija->mkja", member, given)
    numbers = 1.0 + member.sum(1)
    log_weights = log_dirichlet(numbers) + log_dirichlet(counts).sum((1, 2))
    share, answer = dirichlet(numbers), dirichlet(counts)
    return {
        "share": averaged(log_weights, share.mean, share.sd**2),
        "answer": averaged(log_weights, answer.mean, answer.sd**2),
        "label": averaged(log_weights, label[:, :, None].astype(float)),
    }


def annotators_mode() -> dict[str, Any]:
    """Of p(share, answer | answers), the labels summed out; six answers and a share, as logits."""
    given = (ANSWERS[:, :, None] == torch.arange(2)).double()

    def parts(point: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.nn.functional.logsigmoid(torch.stack([point, -point], -1))
        return both[0], both[1:].reshape(2, 3, 2)

    def log_density(point: Tensor) -> Tensor:
        share, answer = parts(point)
        items = share + torch.einsum("kja,ija->ik", answer, given)
        return items.logsumexp(1).sum() + ((TRUST[:, None] - 1) * answer).sum()

    share, answer = parts(summit(log_density, [0.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]))
    return {"share": share.exp(), "answer": answer.exp()}


# --------------------------------------------------------------------------------------------- topics
TEXTS = torch.tensor([[0, 0, 1, 4], [1, 0, 1, 0], [2, 3, 2, 2], [3, 4, 2, 3]])


def topics(texts: Tensor) -> None:
    """Latent Dirichlet allocation of four documents of four words (D. Blei et al., 2003)."""
    ones = torch.ones(5, dtype=torch.float64, device=texts.device)
    with pyro.plate("topics", 2):
        topic = pyro.sample("topic", dist.Dirichlet(1.5 * ones))
    with pyro.plate("documents", len(texts), dim=-2):
        share = pyro.sample("share", dist.Dirichlet(1.5 * ones[:2]))
        with pyro.plate("positions", texts.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(share))
            pyro.sample("word", dist.Categorical(topic[z]), obs=texts)


def topics_moments() -> dict[str, Moments]:
    """By enumeration of all 2¹⁶ assignments; the words that a document blends, and which of its words go together."""
    documents, positions = TEXTS.shape
    z = assignments(2, documents * positions).reshape(-1, documents, positions)
    member = (z[..., None] == np.arange(2)).astype(float)
    words = (TEXTS.numpy()[..., None] == np.arange(5)).astype(float)
    numbers = 1.5 + member.sum(2)
    counts = 1.5 + np.einsum("mdpk,dpv->mkv", member, words)
    log_weights = log_dirichlet(numbers).sum(1) + log_dirichlet(counts).sum(1)
    share, topic = dirichlet(numbers), dirichlet(counts)
    # Σ_kl E[s_k s_l] E[t_kv t_lv], where two topics are independent and two shares of two are not
    pair = share.mean.prod(-1) - share.sd[..., 0] ** 2
    blend = np.einsum("mdk,mkv->mdv", share.mean, topic.mean)
    second = np.einsum("mdk,mkv->mdv", share.mean**2 + share.sd**2, topic.mean**2 + topic.sd**2)
    second += 2.0 * pair[..., None] * topic.mean.prod(1)[:, None]
    return {
        "blend": averaged(log_weights, blend, second - blend**2),
        "together": averaged(log_weights, (z[:, :, 1:] == z[:, :, :1]).astype(float)),
    }


def topics_quantities(draws: Draws) -> dict[str, np.ndarray]:
    blend = np.einsum("cidk,cikv->cidv", draws["share"][..., 0, :], draws["topic"])
    return {"blend": blend, "together": (draws["z"][..., 1:] == draws["z"][..., :1]).astype(float)}


# ---------------------------------------------------------------------------------------- block model
NODES = 6
TIES = torch.triu_indices(NODES, NODES, 1).T
IS_TIED = array(1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 0)


def block_model(ties: Tensor, is_tied: Tensor) -> None:
    """Stochastic block model: two groups of people, who have more or fewer ties to their own (P. Holland et al., 1983)."""
    share = pyro.sample("share", dist.Beta(is_tied.new_tensor(2.0), 2.0))
    within = pyro.sample("within", dist.Beta(is_tied.new_tensor(2.0), 1.0))
    between = pyro.sample("between", dist.Beta(is_tied.new_tensor(1.0), 2.0))
    with pyro.plate("people", NODES):
        group = pyro.sample("group", dist.Bernoulli(share))
    with pyro.plate("ties", len(ties)):
        same = group[ties[:, 0]] == group[ties[:, 1]]
        pyro.sample("is_tied", dist.Bernoulli(torch.where(same, within, between)), obs=is_tied)


def _block_model() -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """All groupings, their log-weights, and the parameters of within and between given each."""
    group = assignments(2, NODES)
    ties, is_tied = TIES.numpy(), IS_TIED.numpy()
    same = group[:, ties[:, 0]] == group[:, ties[:, 1]]
    a, b = 2.0 + (same * is_tied).sum(1), 1.0 + (same * (1 - is_tied)).sum(1)
    c, d = 1.0 + (~same * is_tied).sum(1), 2.0 + (~same * (1 - is_tied)).sum(1)
    ones = group.sum(1)
    share = scipy.special.betaln(2.0 + ones, 2.0 + NODES - ones)
    return group, share + scipy.special.betaln(a, b) + scipy.special.betaln(c, d), (a, b, c, d)


def block_model_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁶ groupings; who is with the first, since the groups have no names."""
    group, log_weights, (a, b, c, d) = _block_model()
    within, between = beta(a, b), beta(c, d)
    return {
        "within": averaged(log_weights, within.mean, within.sd**2),
        "between": averaged(log_weights, between.mean, between.sd**2),
        "together": averaged(log_weights, (group[:, 1:] == group[:, :1]).astype(float)),
    }


def block_model_quantities(draws: Draws) -> dict[str, np.ndarray]:
    group = draws["group"]
    return {"within": draws["within"], "between": draws["between"], "together": 1.0 * (group[..., 1:] == group[..., :1])}


# ---------------------------------------------------------------------------------- Dirichlet process
SPOTS = array(-1.4, -1.1, 0.2, 0.6, 1.7)
ATOMS, SCATTER = 4, 2.0


def stick_breaking(spots: Tensor) -> None:
    """Dirichlet-process mixture, truncated at four atoms (H. Ishwaran and L. James, 2001)."""
    with pyro.plate("sticks", ATOMS - 1):
        stick = pyro.sample("stick", dist.Beta(spots.new_tensor(1.0), 1.5))
    with pyro.plate("atoms", ATOMS):
        location = pyro.sample("location", dist.Normal(spots.new_tensor(0.0), SCATTER))
    left = torch.cat([spots.new_ones(1), (1.0 - stick).cumprod(-1)], -1)
    weights = left * torch.cat([stick, spots.new_ones(1)], -1)
    with pyro.plate("rows", len(spots)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("spots", dist.Normal(location[z], 0.6), obs=spots)


def stick_breaking_moments() -> dict[str, Moments]:
    """By enumeration of all 4⁵ assignments; what a row's own atom is, since atoms change places."""
    z = assignments(ATOMS, len(SPOTS))
    member = z[:, :, None] == np.arange(ATOMS)
    numbers, sums = member.sum(1), (member * SPOTS.numpy()[:, None]).sum(1)
    location, variance, log_evidence = conjugate_normal(0.0, SCATTER**2, numbers, sums, 0.36)
    later = numbers[:, ::-1].cumsum(1)[:, ::-1]
    a, b = 1.0 + numbers[:, :-1], 1.5 + later[:, 1:]
    log_weights = scipy.special.betaln(a, b).sum(1) + log_evidence.sum(1)
    stick, ones = beta(a, b), np.ones((len(z), 1))
    squares = stick.mean**2 + stick.sd**2
    left, left_square = (
        np.concatenate([ones, part.cumprod(1)], 1) for part in (1 - stick.mean, 1 - 2 * stick.mean + squares)
    )
    weight = left * np.concatenate([stick.mean, ones], 1)
    weight_square = left_square * np.concatenate([squares, ones], 1)
    own = {
        name: np.take_along_axis(part, z, 1)
        for name, part in {"m": location, "v": variance, "w": weight, "s": weight_square}.items()
    }  # fmt: skip
    return {
        "own_location": averaged(log_weights, own["m"], own["v"]),
        "own_weight": averaged(log_weights, own["w"], own["s"] - own["w"] ** 2),
        "together": averaged(log_weights, (z[:, 1:] == z[:, :1]).astype(float)),
    }


def stick_breaking_quantities(draws: Draws) -> dict[str, np.ndarray]:
    z, stick = draws["z"], draws["stick"]
    ones = np.ones((*stick.shape[:2], 1))
    weights = np.concatenate([ones, (1 - stick).cumprod(-1)], -1) * np.concatenate([stick, ones], -1)
    return {
        "own_location": np.take_along_axis(draws["location"], z, -1),
        "own_weight": np.take_along_axis(weights, z, -1),
        "together": (z[..., 1:] == z[..., :1]).astype(float),
    }


# ------------------------------------------------------------------------------------- too many zeros
CATCHES = array(0, 3, 0, 0, 2, 0, 5, 1, 0, 4)


def zero_inflated(catches: Tensor) -> None:
    """Counts of which some are zero for another reason, the reason summed out by hand."""
    gate = pyro.sample("gate", dist.Beta(catches.new_tensor(2.0), 3.0))
    rate = pyro.sample("rate", dist.Gamma(catches.new_tensor(2.0), 0.5))
    with pyro.plate("rows", len(catches)):
        pyro.sample("catches", dist.ZeroInflatedPoisson(rate, gate=gate), obs=catches)


def zero_inflated_labels(catches: Tensor) -> None:
    """The same counts, with the reason as a site of its own."""
    gate = pyro.sample("gate", dist.Beta(catches.new_tensor(2.0), 3.0))
    rate = pyro.sample("rate", dist.Gamma(catches.new_tensor(2.0), 0.5))
    with pyro.plate("rows", len(catches)):
        is_empty = pyro.sample("is_empty", dist.Bernoulli(gate))
        pyro.sample("catches", dist.Poisson(torch.where(is_empty > 0.5, 1e-12, rate)), obs=catches)


def zero_inflated_moments() -> dict[str, Moments]:
    """By quadrature over the logarithm of the rate and the logit of the gate, with dgate = gate (1 − gate) dlogit."""
    logit, log_rate = grid((-12.0, 10.0, 401), (-4.0, 4.0, 401)).numpy().T
    gate, rate = scipy.special.expit(logit), np.exp(log_rate)
    zeros, others = int((CATCHES == 0).sum()), CATCHES[CATCHES > 0].numpy()
    log_weights = 2.0 * np.log(gate) + 3.0 * np.log1p(-gate) + 2.0 * log_rate - 0.5 * rate
    log_weights = log_weights + zeros * np.log(gate + (1 - gate) * np.exp(-rate))
    log_weights = log_weights + len(others) * (np.log1p(-gate) - rate) + others.sum() * log_rate
    return moments(log_weights, {"gate": gate, "rate": rate})


def zero_inflated_labels_moments() -> dict[str, Moments]:
    """By the number of zeros that are of the other kind; gate and rate are conjugate given it."""
    zeros, n, total = int((CATCHES == 0).sum()), len(CATCHES), float(CATCHES.sum())
    empty = np.arange(zeros + 1)
    a, b = 2.0 + empty, 3.0 + n - empty
    c, d = 2.0 + total, 0.5 + n - empty
    log_weights = np.log(scipy.special.comb(zeros, empty)) + scipy.special.betaln(a, b) - c * np.log(d)
    gate, rate = beta(a, b), gamma(c, d)
    share = averaged(log_weights, empty / zeros, empty / zeros * (1 - empty / zeros))
    return {
        "gate": averaged(log_weights, gate.mean, gate.sd**2),
        "rate": averaged(log_weights, rate.mean, rate.sd**2),
        "is_empty": Moments(np.full(zeros, share.mean), np.full(zeros, share.sd)),
    }


def zero_inflated_labels_quantities(draws: Draws) -> dict[str, np.ndarray]:
    return {"gate": draws["gate"], "rate": draws["rate"], "is_empty": draws["is_empty"][..., (CATCHES == 0).numpy()]}


def zero_inflated_mode() -> dict[str, Any]:
    zeros, others = int((CATCHES == 0).sum()), CATCHES[CATCHES > 0]

    def log_density(point: Tensor) -> Tensor:
        gate, rate = point[0].sigmoid(), point[1].exp()
        prior = gate.log() + 2.0 * (-gate).log1p() + point[1] - 0.5 * rate
        empty = zeros * (gate + (1 - gate) * (-rate).exp()).log()
        return prior + empty + len(others) * ((-gate).log1p() - rate) + others.sum() * point[1]

    point = summit(log_density, [0.0, 1.0])
    return {"gate": point[0].sigmoid(), "rate": point[1].exp()}
