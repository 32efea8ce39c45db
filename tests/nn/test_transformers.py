"""Fine-tuning GPT-2, Llama and BERT: hypergradients beside a loop unrolled by hand, with attention by torch's math."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import small_transformers as small  # which skips all this where transformers is not installed
import torch
from small_transformers import BLOCKS, batch, by_hand, inner_loss, losses, metas, model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt.estimators import Reverse
from diffopt.nn import second_order_attention

KINDS = sorted(BLOCKS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers


def by_diffopt(
    kind: str, module: nn.Module, checkpoint: Any, context: Any = second_order_attention, estimator: Any = None
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The final parameters, the initial ones, and the meta-parameters."""
    function, params = diffopt.functional(module, checkpoint=checkpoint)
    meta = metas()
    optimizer = diffopt.AdamW(diffopt.Schedule(meta["rates"]), small.BETAS, small.EPS, small.DECAY)
    end = diffopt.solve(
        lambda params, meta: inner_loss(kind, function, params, meta, context),
        params,
        {name: meta[name] for name in ("weights", "mixture")},
        optimizer=diffopt.Clip(optimizer, max_norm=small.NORM),
        steps=small.STEPS,
        estimator=Reverse() if estimator is None else estimator,
    ).params
    return end, params, meta


def unrolled(kind: str, module: nn.Module, context: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    params, meta = {name: p.detach().clone().requires_grad_() for name, p in named.items()}, metas()
    return by_hand(kind, module, params, meta, context), params, meta


def hypergradients(kind: str, module: nn.Module, found: Any) -> dict[str, Tensor]:
    """Of the loss on other data: of the meta-parameters and of where training began."""
    end, params, meta = found
    data = batch(kind, seed=1)
    module.eval()
    with sdpa_kernel([SDPBackend.MATH]):
        outer = losses(kind, torch.func.functional_call(module, end, (), data).logits, data).mean()
    module.train()
    leaves = {**meta, **params}
    return dict(zip(leaves, torch.autograd.grad(outer, list(leaves.values())), strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-12 of each meta-parameter's length; all that training begins with is one of them."""
    assert found.keys() == expected.keys()
    groups = [[name] for name in metas()] + [[name for name in expected if name not in metas()]]
    for names in groups:
        a, b = (torch.cat([x[name].flatten() for name in names]) for x in (found, expected))
        assert float((a - b).norm() / b.norm()) < 1e-12, names[:3]
    assert all(expected[name].abs().min() > 1e-7 for name in metas())


def math() -> Any:
    return sdpa_kernel([SDPBackend.MATH])


def mostly_slow(fast: set[tuple[Any, ...]], *values: Sequence[Any]) -> list[Any]:
    """All combinations, of which only those in ``fast`` run every time."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(*some, marks=marks[some in fast]) for some in itertools.product(*values)]


@pytest.mark.parametrize(
    ("kind", "lora", "blocks"),
    mostly_slow(
        {("gpt2", False, False), ("gpt2", True, True), ("llama", True, True), ("bert", False, True)},
        KINDS,
        [False, True],
        [False, True],
    ),
)
def test_four_steps_of_adamw(kind: str, lora: bool, blocks: bool) -> None:
    """Weights of examples, mixture, rates, the initial parameters (with LoRA: its factors), at once."""
    module = model(kind, lora=lora)
    found = hypergradients(kind, module, by_diffopt(kind, module, BLOCKS[kind] if blocks else ()))
    assert_equal(found, hypergradients(kind, module, unrolled(kind, module, math)))
    if lora:
        assert sorted(name.rpartition(".")[2] for name in found if "." in name) == ["down", "up"]
        assert all(found[name].abs().max() > 1e-6 for name in found)


@pytest.mark.parametrize(
    ("kind", "estimator", "blocks"),
    mostly_slow({("gpt2", Reverse(1), True)}, ["bert", "gpt2"], [Reverse(), Reverse(1)], [False, True]),
)
def test_dropout_beside_attention(kind: str, estimator: Any, blocks: bool) -> None:
    """After one seed the loop by hand drops the same."""
    module = model(kind, dropout=0.3)
    torch.manual_seed(5)
    found = hypergradients(kind, module, by_diffopt(kind, module, BLOCKS[kind] if blocks else (), estimator=estimator))
    torch.manual_seed(5)
    assert_equal(found, hypergradients(kind, module, unrolled(kind, module, math)))


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bert", "gpt2"))])
def test_dropout_in_attention(kind: str) -> None:
    """Attention drops by numbers of its own, so the loop by hand uses it; a replay and recomputed blocks do not."""
    module = model(kind, attention_dropout=0.3)
    torch.manual_seed(5)
    found = hypergradients(kind, module, by_diffopt(kind, module, BLOCKS[kind], estimator=Reverse(1)))
    torch.manual_seed(5)
    assert_equal(found, hypergradients(kind, module, unrolled(kind, module, second_order_attention)))


@pytest.mark.parametrize("kind", KINDS)
def test_without_it_the_error_names_it(kind: str) -> None:
    module = model(kind)
    solved = by_diffopt(kind, module, (), nullcontext, Reverse(1))
    with pytest.raises(diffopt.MissingDerivativeError, match=r"diffopt\.nn\.second_order_attention\(\)"):
        hypergradients(kind, module, solved)


def test_a_cache_is_refused_in_a_block_that_is_computed_again() -> None:
    module = model("gpt2")
    module.config.use_cache = True
    with pytest.raises(diffopt.HiddenStateError, match=r"Cache.*use_cache=False"):
        by_diffopt("gpt2", module, BLOCKS["gpt2"])
