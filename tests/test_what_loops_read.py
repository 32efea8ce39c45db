"""What loops of a program are given to read, and in what order: nothing that is copied, or crashes, needlessly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_compiled_programs import A, W, compared, quadratic, solved, squares, with_gradients
from torch import Tensor

import diffopt
from diffopt.estimators import MultiStep, Reverse, Truncated
from diffopt.tensors import tracing

pytestmark = pytest.mark.compiler


def graphs_of(outer: Callable[..., Tensor], tensors: Sequence[Tensor], count: int = 1) -> list[Any]:
    """The graph and those of its loops' bodies."""
    graph, _ = tracing.trace(with_gradients(outer, count), tensors)
    return [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]


def calls(graphs: Sequence[Any], name: str) -> list[Any]:
    """The nodes that call the operation of this name."""
    every = [node for graph in graphs for node in graph.nodes if hasattr(node.target, "name")]
    return [node for node in every if node.target.name().partition(".")[0] == name]


@pytest.mark.parametrize("turned", [False, True])
def test_products_of_large_matrices_with_vectors_are_left_to_a_library(turned: bool) -> None:
    """The compiler would write loops of its own; of small ones it may. The numbers are the same."""

    def outer(w: Tensor, m: Tensor) -> Tensor:
        def loss(w: Tensor, m: Tensor) -> Tensor:
            return ((m.t() if turned else m) @ w).sin().square().sum()

        return squares(diffopt.solve(loss, w, m, optimizer=diffopt.SGD(1e-3), steps=3).params)

    for size, large in ((128, True), (20, False)):
        given = [torch.linspace(-1, 1, n, dtype=torch.float64).cos().reshape(-1, size) for n in (size, size**2)]
        given[0] = given[0].flatten()
        assert compared(outer, given, 1) < 1e-11
        graphs = graphs_of(outer, given)
        assert bool(calls(graphs, "aten::mv")) is not large
        assert bool(calls(graphs, "aten::mm")) is large


SHARED = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).reshape(3, 2, 2)


@pytest.mark.parametrize("rule", [Reverse(), Reverse(2), Truncated(3)], ids=repr)
def test_what_loops_read_is_copied_once_at_most_and_nothing_is_turned_around(rule: Any) -> None:
    """Arguments and what a loop has stacked are read where they lie; of a view there is one copy for both loops."""

    def outer(w: Tensor, a: Tensor, many: Tensor) -> Tensor:
        end = diffopt.solve(lambda w, a, m: quadratic(w, a * m), w, a, many[1, 0], **given)
        return squares(end.params)

    given: Any = {"optimizer": diffopt.SGD(0.05, momentum=0.5), "steps": 6, "estimator": rule}
    assert compared(outer, [W, A, SHARED], 1) < 1e-12
    top = graphs_of(outer, [W, A, SHARED])[0]
    views = [node for node in calls([top], "aten::where") if node.meta["val"].shape == (2,)]
    assert len(views) == 1
    assert not [node for node in calls([top], "aten::flip") if node.meta["val"].ndim > 1]


def test_states_of_a_block_that_are_put_together_are_not_copied_again() -> None:
    def outer(w: Tensor, a: Tensor) -> Tensor:
        return squares(solved(w, a, steps=9, estimator=Reverse(3)).params)

    bodies = graphs_of(outer, [W, A])[1:]
    together = calls(bodies, "aten::cat")
    assert together
    for node in together:
        assert [user.target.name() for user in node.users] == ["scan"]


@pytest.mark.parametrize("rule", [Reverse(), Reverse(2), Reverse(3), MultiStep(2, Reverse(2))], ids=repr)
def test_no_loop_is_given_a_view(rule: Any) -> None:
    """Not even what a loop within a loop reads of its own row: torch's compiler would write code that crashes."""

    def outer(w: Tensor, rows: Tensor, many: Tensor) -> Tensor:
        given = {"optimizer": diffopt.SGD(0.05, momentum=0.5), "batches": rows, "estimator": rule}
        end = diffopt.solve(lambda w, m, b: quadratic(w, b * m), w, many[1, 0], steps=8, **given)
        return squares(end.params) + many[:, 1].t().sum()

    rows = torch.linspace(0.5, 1.5, 16, dtype=torch.float64).reshape(8, 2)
    graph, _ = tracing.trace(with_gradients(outer, 1), [W, rows, SHARED])
    loops = 0
    for module in graph.modules():
        for node in calls([module.graph] if isinstance(module, torch.fx.GraphModule) else [], "scan"):
            loops += 1
            body, carry, own, shared = node.args
            own_rows = [x for x in getattr(module, body.target).graph.nodes if x.op == "placeholder"][len(carry) :]
            for x in own_rows[: len(own)]:
                x.meta["a row"] = True
            for x in map(tracing._source, (*own, *shared)):
                assert not x.meta.get("a row")
                assert getattr(x.target, "is_view", False) is False
    assert loops >= 2


@pytest.mark.parametrize(
    "given", [SHARED[0].t(), SHARED[:, :, 1], SHARED.movedim(0, 2)], ids=["turned", "part", "moved"]
)
def test_a_graph_is_made_for_tensors_in_order(given: Tensor) -> None:
    """As its program is given them, captured ones too, however those lie in memory for which it is made."""

    def outer(w: Tensor, a: Tensor) -> Tensor:
        return squares(solved(w, a[0].flatten()[:2] * given.flatten()[:2], steps=2).params)

    graph, captured = tracing.trace(with_gradients(outer, 1), [W, given])
    assert captured == [given]
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == 3
    assert all(x.is_contiguous() for x in inputs)
