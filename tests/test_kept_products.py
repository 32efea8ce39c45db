"""Products that a traced rollout keeps for its way back: the numbers of the plain way, and which are kept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from limits import sampled
from test_compiled_programs import compared
from test_what_loops_read import graphs_of
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

import diffopt
from diffopt.estimators import MultiStep, Reverse, Truncated
from diffopt.rollout.products import Noting, Recalling
from diffopt.tensors.leaves import Leaves

pytestmark = pytest.mark.compiler

WIDE = 128
"""So many terms has an entry of a product that is kept."""


def draw(*shape: int) -> Tensor:
    return torch.linspace(-3, 3, torch.Size(shape).numel(), dtype=torch.float64).sin().reshape(shape)


def of_vector(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w[0]).sin().square().mean()


def of_matrix(w: Tensor, x: Tensor) -> Tensor:
    """Twice, of which the second product is changed in place."""
    hidden = (x @ w.t() / 10).sin()
    return functional.relu_((x - 0.1) @ w.t()).square().mean() + hidden.mean() ** 2


def of_layer(w: Tensor, x: Tensor) -> Tensor:
    """With a bias, which is added in place, and one more product, of few terms."""
    hidden = functional.linear(x, w, w[:, 0])
    hidden += 0.5
    return (hidden.sin() @ hidden.t()).mean()


def outer(loss: Callable[..., Tensor], rule: Any, steps: int = 6, **options: Any) -> Callable[..., Tensor]:
    def run(w: Tensor, x: Tensor) -> Tensor:
        optimizer = diffopt.SGD(0.05, momentum=0.5)
        end = diffopt.solve(loss, w, x, optimizer=optimizer, steps=steps, estimator=rule, **options)
        return end.params.square().sum()

    return run


def kept(run: Callable[..., Tensor], tensors: Sequence[Tensor]) -> int:
    """How many products the first loop stacks, besides the losses and the state's two leaves."""
    top = graphs_of(run, tensors)[0]
    loop = next(node for node in top.nodes if str(node.target) == "scan")
    results = len(loop.meta["val"])
    return results - len(loop.args[1]) - 3


RULES = [Reverse(), Truncated(2), MultiStep(2)]


@pytest.mark.parametrize("rule", sampled(RULES, 2), ids=repr)
@pytest.mark.parametrize(("loss", "count"), [(of_vector, 1), (of_matrix, 2), (of_layer, 1)])
def test_products_are_kept_and_give_the_numbers_of_the_plain_way(loss: Any, count: int, rule: Any) -> None:
    given = [0.1 * draw(3, WIDE), draw(4, WIDE)]
    assert compared(outer(loss, rule), given) < 1e-10
    assert kept(outer(loss, rule), given) == count


def test_products_of_tasks_are_kept_too() -> None:
    """A product for all tasks, and one that is each task's own."""

    def tasks(w: Tensor, x: Tensor) -> Tensor:
        return vmap(outer(of_matrix, Reverse(), 3), (None, 0))(w, x).sum()

    given = [0.1 * draw(3, WIDE), draw(2, 4, WIDE)]
    assert compared(tasks, given) < 1e-10
    assert kept(tasks, given) == 2


@pytest.mark.parametrize(
    ("loss", "rule", "rows", "wide"),
    [
        (of_matrix, Reverse(), 4, WIDE - 1),  # an entry is soon summed
        (of_matrix, Reverse(), 2 * WIDE + 1, WIDE),  # they outweigh the states
        (of_matrix, Reverse(2), 4, WIDE),  # the steps of a block are taken again
        (of_vector, MultiStep(4), 4, WIDE),  # the last window is short
    ],
)
def test_what_is_not_worth_keeping_is_computed_again(loss: Any, rule: Any, rows: int, wide: int) -> None:
    given = [0.1 * draw(3, wide), draw(rows, wide)]
    assert compared(outer(loss, rule), given) < 1e-10
    top = graphs_of(outer(loss, rule), given)[0]
    stacks = [x.meta["val"] for x in top.nodes if x.target is operator.getitem]
    assert not any(x.shape[-2:] in ((rows, 3), (3, rows)) or x.shape[1:] == (rows,) for x in stacks)


def test_another_product_than_was_noted_is_computed() -> None:
    a, b = draw(3, WIDE), draw(WIDE, 2)
    with Noting() as noting:
        products = [a @ b, b.t() @ a.t(), draw(2, 3) @ draw(3, 2)]
    assert len(noting.found) == 2
    assert noting.kept(Leaves([a])) == noting.found
    assert noting.kept(Leaves([b[:5, 0]])) == []
    with Recalling([2 * x for x in noting.found]) as recalling:
        found = [b.t() @ a.t(), a @ b, (b.t() @ a.t()).float(), b.t() @ a.t()]
        single = a.float() @ b.float()
    assert torch.equal(found[0], products[1])  # of another shape than what comes next
    assert torch.equal(found[1], 2 * products[0])
    assert torch.equal(found[2], (2 * products[1]).float())
    assert torch.equal(found[3], products[1])  # none is left
    torch.testing.assert_close(single, products[0].float())
    assert not recalling.as_noted
    with Recalling(products):
        (a @ b).zero_()
    torch.testing.assert_close(products[0], a @ b)  # what is done to what is recalled is not done to what is kept
    with Recalling(noting.found):
        torch.testing.assert_close(a.float() @ b.float(), products[0].float())


def test_products_are_as_noted_if_all_are_recalled() -> None:
    a, b = draw(3, WIDE), draw(WIDE, 3)
    with Noting() as noting:
        _ = a @ b, b.t() @ a.t()
    for products, as_noted in ((0, False), (1, False), (2, True), (3, False)):
        with Recalling(noting.found) as recalling:
            _ = [a @ b for _ in range(products)]
        assert recalling.as_noted == as_noted
    with Recalling([]) as recalling:
        _ = a @ b
    assert recalling.as_noted  # nothing was noted


def of_stack(w: Tensor, x: Tensor) -> Tensor:
    """``x`` times a stack of matrices, which torch computes as one product if ``x`` requires grad."""
    stack = torch.stack([w.t(), 0.5 * w.t()])
    return ((x @ stack).sin() * torch.bmm(x.expand(2, *x.shape), stack + 0.1)).mean()


def of_asking(w: Tensor, x: Tensor) -> Tensor:
    """Of a product more, of the same shape, where ``x`` requires no grad."""
    nothing = 0.0 if x.requires_grad else 0.0 * ((x + 1) @ w.t()).sum()
    return (x @ w.t()).sin().square().mean() + nothing


class Layer(torch.autograd.Function):
    """A square product whose backward computes what requires grad only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.mm(w)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, Tensor]:
        x, w = ctx.saved_tensors
        return cotangents[0].mm(w.t()) if ctx.needs_input_grad[0] else None, x.t().mm(cotangents[0])


def of_penalty(w: Tensor, x: Tensor) -> Tensor:
    """The size of a gradient, whose cost is another where ``x`` requires grad."""
    (slope,) = torch.autograd.grad(Layer.apply(x, w).sin().sum(), w, create_graph=True)
    return slope.square().mean()


@pytest.mark.parametrize("loss", sampled([of_stack, of_asking, of_penalty], 2))
def test_where_the_way_back_computes_other_products_none_is_recalled(loss: Any) -> None:
    rows = WIDE if loss is of_penalty else 3
    given = [0.1 * draw(rows, WIDE), draw(rows if loss is of_penalty else 4, WIDE)]
    assert compared(outer(loss, Reverse(), 3), given) < 1e-10
    assert kept(outer(loss, Reverse(), 3), given) > 0
