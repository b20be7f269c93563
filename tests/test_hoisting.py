"""What a graph computes of inputs that seldom change is kept, and computed anew when they do."""

import pytest
import torch
from torch import Tensor

from inference.hoisting import Prelude, hoist
from inference.recording import record
from inference.staging import Random, Staged


def _whole(function, inputs, steady):
    """The function in two parts, and how many operations each of them has."""
    before, body = hoist(record(function, inputs), steady)
    assert before is not None
    prelude = Prelude(before, steady)
    sizes = [sum(node.op == "call_function" for node in graph.graph.nodes) for graph in (before, body)]
    return prelude.around(body.forward), prelude, sizes


def test_two_parts_are_the_whole():
    """exp(s) · A is computed once, x · that at every call."""
    matrix = torch.randn(3, 3)

    def function(x, s):
        return {"y": x @ (s.exp() @ matrix) + 1.0, "s": s}

    x, s = torch.randn(4, 3), torch.randn(3, 3)
    run, prelude, (before, after) = _whole(function, [x, s], [1])
    assert (before, after) == (2, 2)
    kept = prelude([x, s])
    for _ in range(3):
        x = torch.randn(4, 3)
        found = run(x, s)
        assert torch.equal(found["y"], function(x, s)["y"]) and found["s"] is s
        assert all(one is other for one, other in zip(prelude([x, s]), kept, strict=True))


def test_another_tensor_is_seen():
    run, _, _ = _whole(lambda x, s: x + s.exp(), [torch.zeros(2), torch.zeros(2)], [1])
    for value in (0.0, 1.0, 0.0):
        x, s = torch.randn(2), torch.full((2,), value)
        assert torch.equal(run(x, s), x + s.exp())


def test_a_write_is_seen():
    """The same tensor with other numbers in it."""
    x, s = torch.randn(2), torch.zeros(2)
    run, _, _ = _whole(lambda x, s: x + s.exp(), [x, s], [1])
    assert torch.equal(run(x, s), x + 1.0)
    s.fill_(1.0)
    assert torch.equal(run(x, s), x + s.exp())


def test_each_of_several_steady_inputs_is_watched():
    def function(x, s, t):
        return x * (s.sin() + t.cos())

    x, s, t = torch.randn(2), torch.randn(2), torch.randn(2)
    run, _, _ = _whole(function, [x, s, t], [1, 2])
    for one, two in ((s, t), (s, torch.randn(2)), (torch.randn(2), t)):
        assert torch.equal(run(x, one, two), function(x, one, two))


def test_random_numbers_and_written_memory_stay_in_the_body():
    def function(x, s):
        memory = torch.zeros_like(s)
        memory.add_(s)
        return x + memory.exp() + torch.randn_like(s)

    x, s = torch.randn(2), torch.randn(2)
    graph = record(function, [x, s])
    before, body = hoist(graph, [1])
    targets = "" if before is None else before.code
    assert "randn" not in targets and "add_" not in targets
    run = graph.forward if before is None else Prelude(before, [1]).around(body.forward)
    torch.manual_seed(0)
    first, second = run(x, s), run(x, s)
    torch.manual_seed(0)
    assert torch.equal(first, function(x, s)) and torch.equal(second, function(x, s))


@pytest.mark.parametrize("steady", [[], [0]])
def test_nothing_to_take_out(steady):
    graph = record(lambda x, s: (x + s) * x, [torch.randn(2), torch.randn(2)])
    before, body = hoist(graph, steady)
    assert before is None and body is graph


def test_what_is_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr("inference.hoisting._MOST_KEPT", 3)
    before, _ = hoist(record(lambda x, s: x + s.exp(), [torch.randn(4), torch.randn(4)]), [1])
    assert before is None


def _staged(function, **rest):
    return Staged(function, (True, True), rung="staged", **rest)


def test_steady_arguments_change_no_value():
    """Σ_n log s_n of a chain's others, while its position moves and when they move too."""

    def function(x: Tensor, others: dict[str, Tensor]):
        return x * others["s"].log().sum() - torch.lgamma(x.exp()) * others["n"]

    plain, kept = _staged(function), _staged(function, steady=(False, True))
    others = {"s": torch.rand(5, 7, dtype=torch.float64), "n": torch.rand(5, dtype=torch.float64)}
    for i in range(8):
        x = torch.randn(5, dtype=torch.float64)
        if i == 5:
            others = {**others, "s": torch.rand(5, 7, dtype=torch.float64)}
        assert torch.equal(kept(x, others), plain(x, others))
    assert kept.rung == "staged" and any(v.prelude is not None for v in kept._variants.values())


def test_a_random_function_draws_the_same():
    def function(x, s):
        return x + s.exp() * torch.randn_like(x), s

    kept = Random(function, torch.device("cpu"), rung="staged", steady=(False, True))
    x, s = torch.randn(3), torch.randn(3)
    for seed in range(6):
        torch.manual_seed(seed)
        found, same = kept(x, s)
        torch.manual_seed(seed)
        assert torch.equal(found, function(x, s)[0])
    assert same is s
    assert any(v.prelude is not None for v in kept._variants.values())
