"""``second_order_attention``: modules as they are, whose hypergradients are those by torch's math kernel; float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt.estimators import Binomial, FirstOrder, ForwardMode, Reverse, Truncated, Unrolled
from diffopt.nn import attention_sums, second_order_attention

Context = Callable[[], AbstractContextManager[Any]]
MATH: Context = lambda: sdpa_kernel([SDPBackend.MATH])  # noqa: E731


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_sums, "_ENTRIES", 1)
    monkeypatch.setattr(attention_sums, "_QUERIES", 2)


class Attending(nn.Module):
    """A layer that is called with what each kind of layer takes, and is causal if it can be."""

    def __init__(self, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        if kind.startswith("multihead"):
            self.layer: nn.Module = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        elif kind == "encoder layer":
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        elif kind == "decoder layer":
            self.layer = nn.TransformerDecoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        else:
            self.layer, self.dropout = nn.Linear(4, 12), dropout

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[-2], dtype=x.dtype)
        if self.kind == "multihead":
            return self.layer(x, x, x, need_weights=False)[0]
        if self.kind == "multihead, masked":
            return self.layer(x, x, x, need_weights=False, attn_mask=causal, is_causal=True)[0]
        if self.kind == "encoder layer":
            return self.layer(x, src_mask=causal, is_causal=True)
        if self.kind == "decoder layer":
            return self.layer(x, x.flip(1), tgt_mask=causal, tgt_is_causal=True)
        q, k, v = self.layer(x).unflatten(-1, (3, 2, 2)).movedim(-3, 0).transpose(-2, -3)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)


KINDS = ["multihead", "multihead, masked", "encoder layer", "decoder layer", "function"]


def made(kind: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return Attending(kind, dropout).double()


def hypergradient(
    module: nn.Module, context: Context, estimator: Any, tasks: int | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Of the data, the initial parameters and the learning rate, after three steps."""
    function, params = diffopt.functional(module)
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(*([] if tasks is None else [tasks]), 2, 5, 4, generator=drawn, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def loss(params: Any, x: Tensor) -> Tensor:
        with context():
            return (function(params, x).sin() - 1).square().mean()

    def outer(x: Tensor, params: Any, lr: Tensor) -> Tensor:
        optimizer = diffopt.SGD(lr, momentum=0.5)
        end = diffopt.solve(loss, params, x, optimizer=optimizer, steps=3, estimator=estimator, **options).params
        return loss(end, x.roll(1, 0)) if module.training and not options else sum(p.sin().sum() for p in end.values())

    gradient = torch.func.grad(outer, (0, 1, 2))
    if tasks is not None:
        gradient = torch.func.vmap(gradient, (0, None, None), randomness="different")
    of_x, of_params, of_lr = gradient(x, params, lr)
    return of_x, *(of_params[name] for name in sorted(of_params)), of_lr


ESTIMATORS = [Reverse(), Reverse(1), Unrolled(), ForwardMode(), Truncated(2), Binomial(order=2)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("kind", ["encoder layer", "function"])
def test_hypergradients_are_those_by_the_math_kernel(kind: str, estimator: Any) -> None:
    if isinstance(estimator, ForwardMode) and kind == "encoder layer":
        kind = "multihead"  # fewer parameters: a direction each
    found, expected = (hypergradient(made(kind), c, estimator) for c in (second_order_attention, MATH))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [None, 3])
def test_modules_of_torch_are_reached(kind: str, tasks: int | None) -> None:
    found, expected = (hypergradient(made(kind), c, Reverse(), tasks) for c in (second_order_attention, MATH))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["multihead", "encoder layer", "function"])
def test_without_it_the_error_says_how_to_use_it(kind: str) -> None:
    with pytest.raises(
        diffopt.MissingDerivativeError, match=r"attention.*run it under diffopt\.nn\.second_order_attention\(\) or sdpa"
    ):
        hypergradient(made(kind), nullcontext, Reverse())


@pytest.mark.parametrize("kind", ["multihead", "function"])
@pytest.mark.parametrize("estimator", [Reverse(1), Reverse("sqrt"), Truncated(3)], ids=repr)
@pytest.mark.parametrize("tasks", [None, 2])
def test_dropout_is_the_same_in_the_replay(kind: str, estimator: Any, tasks: int | None) -> None:
    """As the unrolled loop, which evaluates everything once."""
    found = []
    for rule in (estimator, Unrolled()):
        module = made(kind, dropout=0.4)
        torch.manual_seed(3)
        found.append(hypergradient(module, second_order_attention, rule, tasks))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_dropout_is_the_same_in_a_replay_beside_another_thread() -> None:
    found, end = [], threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        for rule in (Reverse(1), Unrolled()):
            module = made("function", dropout=0.4)
            torch.manual_seed(3)
            found.append(hypergradient(module, second_order_attention, rule))
    finally:
        end.set()
        thread.join()
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


@pytest.mark.compiler
@pytest.mark.slow
def test_a_compiled_step_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_sums, "_ENTRIES", 2**20)  # one chunk: the compiler takes long enough for that
    module = made("function").eval()
    found = hypergradient(module, second_order_attention, Reverse(1), compile=True)
    expected = hypergradient(module, MATH, Reverse(1), compile=False)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_check_finds_it_fit() -> None:
    function, params = diffopt.functional(made("encoder layer"))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = second_order_attention()(lambda params: (function(params, x) - 1).square().mean())
    assert diffopt.check(loss, params).ok


# ------------------------------------------------------------------------------------------------- where it holds


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what the library's attention computes."""
    from diffopt.nn import attention_functions

    lengths: list[int] = []
    compute = attention_functions.derivatives.output

    def counting(z: Any, *options: Any) -> Tensor:
        lengths.append(z.q.shape[-2])
        return compute(z, *options)

    monkeypatch.setattr(attention_functions.derivatives, "output", counting)
    return lengths


X = torch.ones(1, 5, 4, dtype=torch.float64)


def test_it_ends_with_its_block_and_after_an_error(counted: list[int]) -> None:
    F.scaled_dot_product_attention(X, X, X)
    with pytest.raises(RuntimeError, match="shapes"), second_order_attention():
        F.scaled_dot_product_attention(X, X, X) @ torch.ones(2, 3)
    F.scaled_dot_product_attention(X, X, X)
    assert counted == [5]


def test_it_nests_and_is_a_decorator(counted: list[int]) -> None:
    @second_order_attention()
    def called(x: Tensor) -> Tensor:
        with second_order_attention():
            y = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(y[:, :3], x, x)

    called(X)
    called(X)
    assert counted == [5, 3, 5, 3]


@pytest.mark.parametrize("kind", ["multihead", "function"])
def test_a_mode_of_somebody_else_s_around_it_or_within_makes_no_difference(kind: str, counted: list[int]) -> None:
    """``torch.device`` as a context is one."""
    module = made(kind)
    with torch.device("cpu"), second_order_attention(), torch.device("cpu"):
        module(X)
    with second_order_attention(), torch.device("cpu"):
        module(X)
    with torch.device("cpu"), second_order_attention():
        module(X)
    assert counted == [5, 5, 5]


def test_other_threads_are_left_alone(counted: list[int]) -> None:
    with second_order_attention():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(X, X, X))
        thread.start()
        thread.join()
    assert counted == []


def test_torch_s_own_function_is_not_changed() -> None:
    before = dict(vars(F))
    with second_order_attention():
        made("multihead")(X)
        assert dict(vars(F)) == before
    assert F.multi_head_attention_forward.__globals__["scaled_dot_product_attention"] is F.scaled_dot_product_attention


def test_first_derivatives_and_values_need_no_more_than_torch(counted: list[int]) -> None:
    """A rule without curvature is as exact with either."""
    for context in (second_order_attention, nullcontext):
        found = hypergradient(made("function"), context, FirstOrder())
        assert all(torch.isfinite(x).all() for x in found)
    assert counted
