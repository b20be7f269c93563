"""A graph with fewer and smaller operations gives what the function gave."""

import math

import pytest
import torch
from torch import fx, nn

from inference.graphs import elements, fold, functional, merge, shortened
from inference.machine_code import identity
from inference.recording import constants, draft
from inference.simplifying import simplified

CONSTANT = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(3, 2)
SAME = torch.full((3, 2), 2.5, dtype=torch.float64)


def _names(graph):
    return [node.target._opname for node in graph.graph.nodes if node.op == "call_function"]


def _both(function, inputs):
    """The graph as it was recorded, and simplified; both folded."""
    plain = fold(merge(draft(function, inputs)))
    return plain, fold(merge(simplified(functional(fold(merge(draft(function, inputs)))))))


def _alike(found, expected):
    return torch.allclose(found, expected, rtol=1e-14, atol=0.0, equal_nan=True)


# name -> function of x (3, 2), the operations that are left, or None
CASES = {
    "a repeated argument": (lambda x: torch.lgamma(x[:, :1].expand(3, 2)) + CONSTANT, None),
    "a new dimension": (lambda x: torch.lgamma(x[0].expand(5, 3, 2)).sum(0), None),
    "sum of repetitions": (lambda x: x[:, :1].expand(3, 2).sum(1), None),
    "sum beside repetitions": (lambda x: torch.lgamma(x[:1].expand(3, 2).sum(1)) * CONSTANT[:, 0], None),
    "sum of both, kept": (lambda x: x.unsqueeze(0).expand(4, 3, 2).exp().sum((0, 2), keepdim=True), None),
    "a repeated constant": (lambda x: torch.lgamma(x[:1].expand(3, 2)) * SAME, None),
    "a view of repetitions": (lambda x: torch.lgamma(x[:1].expand(3, 2).reshape(3, 1, 2, 1)), None),
    "minus of a minus": (lambda x: x.exp().neg().neg(), ["exp"]),
    "plus a minus": (lambda x: x + (-(x.exp())), ["exp", "sub"]),
    "a minus plus": (lambda x: -x.exp() + x, ["exp", "sub"]),
    "minus a minus": (lambda x: x - (-x.exp()), ["exp", "add"]),
    "minus of a difference, where a zero has a sign": (lambda x: torch.atan2(-(x - x), -x.exp()), None),
    "two minuses in a product": (lambda x: -(x * -x.exp()), ["exp", "mul"]),
    "two minuses in a ratio": (lambda x: -(-x.exp() / x), ["exp", "div"]),
    "minus times a number": (lambda x: -x.exp() * 3.0, ["exp", "mul"]),
    "square of a minus": (lambda x: (-x).exp() + (-x.exp()).pow(2), ["neg", "exp", "exp", "pow", "add"]),
    "a minus through a sum": (lambda x: x[:, 0] + (-x.exp()).sum(1), None),
    "views of views": (lambda x: x.exp().unsqueeze(0).unsqueeze(3).reshape(6), ["exp", "reshape"]),
    "views back": (lambda x: x.exp().unsqueeze(0).squeeze(0), ["exp"]),
    "a transpose that moves nothing": (lambda x: x.exp().reshape(3, 1, 2).permute(1, 0, 2).reshape(6), ["exp", "reshape"]),
    "a transpose that moves": (lambda x: x.exp().permute(1, 0).reshape(6), None),
    "sum of one term": (lambda x: x.exp().unsqueeze(1).sum(1), ["exp"]),
    "times one": (lambda x: x.exp() * torch.ones(3, 2, dtype=torch.float64), ["exp"]),
    "over one": (lambda x: x.exp() / torch.ones(3, 2, dtype=torch.float64), ["exp"]),
    "one over": (lambda x: torch.ones(3, 2, dtype=torch.float64) / x, None),
    "finite": (lambda x: torch.where((1.0 / x).isfinite(), x, -1.0), None),
    "clamped in place": (lambda x: x.exp().clamp_(min=1.0).pow(1.0), ["exp", "clamp"]),
    "written, then read": (lambda x: (lambda y: (y.mul_(2.0), y + x)[1])(x.exp()), ["exp", "mul", "add"]),
    "read, then written": (lambda x: (lambda y, z: (y.mul_(2.0), y + z)[1])(*(lambda y: (y, y.sin()))(x.exp())), None),
    "a view, then written": (lambda x: (lambda y: (lambda z: (y.mul_(2.0), z + x[0])[1])(y[1]))(x.exp()), None),
}


@pytest.mark.parametrize("name", CASES)
def test_values_stay(name):
    """At ordinary numbers, and at zeros and what is not finite."""
    function, left = CASES[name]
    x = torch.randn(3, 2, dtype=torch.float64).exp()
    plain, graph = _both(function, [x])
    odd = torch.tensor([[0.0, -0.0], [math.inf, -math.inf], [math.nan, 1.5]], dtype=torch.float64)
    for value in (x, torch.randn(3, 2, dtype=torch.float64), odd):
        assert _alike(graph.written()(value), function(value))
    assert len(_names(graph)) <= len(_names(plain)) or elements(graph) < elements(plain)
    if left is not None:
        assert _names(graph) == left


def test_a_layout_that_is_asked_for_stays():
    """``as_strided`` is good for one layout of the memory."""

    def function(x):
        return torch.as_strided(x.exp().unsqueeze(0).unsqueeze(0), (3, 2), (2, 1)) + (-x)

    x = torch.randn(3, 2, dtype=torch.float64)
    plain, graph = _both(function, [x])
    assert _names(graph) == _names(plain) and torch.equal(graph.written()(x), function(x))


def test_what_is_equal_along_a_plate_is_computed_once():
    """Γ of the parameters of N elements costs as much as of one."""

    def function(a):
        wide = a.unsqueeze(1).expand(4, 1000)
        return (torch.lgamma(wide + 1.0) - torch.lgamma(wide)).sum(1)

    a = torch.rand(4, dtype=torch.float64)
    plain, graph = _both(function, [a])
    assert elements(graph) < 100 < elements(plain)
    assert torch.allclose(graph.written()(a), 1000 * a.log(), rtol=1e-12)


_UNARY = [torch.exp, torch.neg, torch.sin, lambda x: x.unsqueeze(0).squeeze(0), lambda x: x.reshape(3, 1, 2).reshape(3, 2),
          lambda x: x[:1].expand(3, 2), lambda x: x[:, 1:].expand(3, 2), lambda x: x.sum(1, keepdim=True).expand(3, 2),
          lambda x: x.sum((0, 1)).expand(3, 2), lambda x: x.t().reshape(3, 2), lambda x: torch.where(x.isfinite(), x, 0.0),
          lambda x: x.square().neg(), lambda x: x * SAME, lambda x: CONSTANT - x, lambda x: x.sin().mul_(-2.0)]  # fmt: skip
_BINARY = [torch.add, torch.sub, torch.mul, torch.atan2, lambda x, y: -x + y, lambda x, y: x * -y, lambda x, y: -(x - y)]


@pytest.mark.parametrize("seed", range(40))
def test_random_functions_stay(seed):
    """Twelve operations, each on earlier results."""
    random = torch.Generator().manual_seed(seed)

    def pick(count):
        return int(torch.randint(count, (), generator=random))

    steps = [(pick(2), pick(len(_UNARY)), pick(len(_BINARY)), pick(i + 1), pick(i + 1)) for i in range(12)]

    def function(x):
        found = [x]
        for is_binary, unary, binary, i, j in steps:
            found.append(_BINARY[binary](found[i], found[j]) if is_binary else _UNARY[unary](found[i]))
        return torch.stack(found[1:]).tanh().sum(0)

    x = torch.randn(3, 2, dtype=torch.float64, generator=random)
    _, graph = _both(function, [x])
    for scale in (1.0, 0.3):
        assert torch.allclose(graph.written()(scale * x), function(scale * x), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_constants_of_a_graph_are_all_there_and_part_of_itsidentity() -> None:
    """A weight that is no input, under two names; other values are another graph to the compiler's store."""
    x = torch.randn(3, dtype=torch.float64)

    def graph(weight: nn.Parameter) -> fx.GraphModule:
        return draft(lambda x: (x * weight, weight.detach() + x), [x]).written()

    first, second = (graph(nn.Parameter(torch.full((3,), value, dtype=torch.float64))) for value in (1.0, 2.0))
    assert constants(first) and all(not isinstance(value, nn.Parameter) for value in constants(first).values())
    assert torch.equal(shortened(first).written()(x), x)
    assert first.code == second.code
    assert (
        len({identity(made, [x], [x.stride()]) for made in (first, second, graph(nn.Parameter(torch.ones(3).double())))})
        == 2
    )
