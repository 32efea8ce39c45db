"""``diffopt.nn.attention`` beside torch's math kernel, which autograd differentiates as often as it likes; float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt.nn import attention, attention_sums

BATCH, HEADS, QUERIES, KEYS, WIDTH, VALUES = 2, 3, 7, 5, 4, 6
LOADED = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by forward mode
ORDERS = ("value", "first", "second", "third")


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries a chunk, and one in the last."""
    monkeypatch.setattr(attention_sums, "_ENTRIES", 2 * BATCH * HEADS * KEYS)
    monkeypatch.setattr(attention_sums, "_QUERIES", 2)


def by_math(*tensors: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        return F.scaled_dot_product_attention(*tensors, **options)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(heads: int = HEADS, queries: int = QUERIES) -> list[Tensor]:
    shapes = [(BATCH, HEADS, queries, WIDTH), (BATCH, heads, KEYS, WIDTH), (BATCH, heads, KEYS, VALUES)]
    return [drawn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def to_third_order(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The value, and gradients of nonlinear functions of the derivative before: three orders, mixed ones included."""
    value = function(*leaves)
    found, outer = [value], (value**3 * drawn(*value.shape, seed=20)).sum()
    for order in (1, 2, 3):
        gradients = torch.autograd.grad(outer, leaves, create_graph=True)
        found += gradients
        terms = [(g.sin() * drawn(*g.shape, seed=21 + order)).sum() for g in gradients]
        outer = sum(terms[1:], terms[0])
    return [x.detach() for x in found]


def assert_equal(function: Callable[..., Tensor], leaves: Sequence[Tensor], **options: Any) -> None:
    found = to_third_order(lambda *x: function(attention, *x), leaves)
    expected = to_third_order(lambda *x: function(by_math, *x), leaves)
    for name, a, b in zip(["value"] + [o for o in ORDERS[1:] for _ in leaves], found, expected, strict=True):
        scale = max(1.0, float(b.abs().max()))
        tolerance = (
            1e-12 if name != "third" else 1e-11
        )  # of sums that are several hundred times as large as their parts
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def visible(*shape: int) -> Tensor:
    """A mask of booleans in which some are ``False``, but never a whole row."""
    mask = drawn(*shape, seed=7) > 0
    mask[..., 0] = True
    return mask


def with_masked_rows() -> Tensor:
    mask = visible(QUERIES, KEYS)
    mask[2] = mask[-1] = False
    return mask


MASKS: dict[str, Any] = {
    "none": lambda: {},
    "causal": lambda: {"is_causal": True},
    "scale": lambda: {"scale": 0.3},
    "bool": lambda: {"attn_mask": visible(QUERIES, KEYS)},
    "bool, of each example": lambda: {"attn_mask": visible(BATCH, 1, QUERIES, KEYS)},
    "padding": lambda: {"attn_mask": visible(BATCH, 1, 1, KEYS)},
    "whole rows": lambda: {"attn_mask": with_masked_rows()},
    "numbers": lambda: {"attn_mask": drawn(QUERIES, KEYS, seed=8)},
    "minus infinity": lambda: {
        "attn_mask": torch.zeros(QUERIES, KEYS).double().masked_fill(~visible(7, 5), -torch.inf)
    },
    "rows of minus infinity": lambda: {"attn_mask": drawn(7, 5).masked_fill(~with_masked_rows(), -torch.inf)},
    "causal, beyond the keys": lambda: {"is_causal": True, "scale": 2.0},
}


@pytest.mark.parametrize("name", MASKS)
def test_three_orders_of_derivatives_are_those_of_the_math_kernel(name: str) -> None:
    assert_equal(lambda f, *x: f(*x, **MASKS[name]()), inputs())


@pytest.mark.parametrize("shape", [(7, 5), (3, 1, 5), (2, 1, 7, 1), (1,)], ids=str)
def test_a_mask_of_numbers_is_differentiated_where_it_broadcasts(shape: tuple[int, ...]) -> None:
    bias = drawn(*shape, seed=9).requires_grad_()
    assert_equal(lambda f, *x: f(*x[:3], attn_mask=x[3]), [*inputs(), bias])


def test_a_learned_mask_may_hide_keys_and_whole_rows() -> None:
    bias = drawn(QUERIES, KEYS, seed=9).masked_fill(~with_masked_rows(), -torch.inf).requires_grad_()
    assert_equal(lambda f, *x: f(*x[:3], attn_mask=x[3]), [*inputs(), bias])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_in_groups_share_keys_and_values(heads: int, causal: bool) -> None:
    assert_equal(lambda f, *x: f(*x, enable_gqa=True, is_causal=causal), inputs(heads=heads))


def test_the_same_tensor_as_query_key_and_value() -> None:
    assert_equal(lambda f, x: f(x, x, x, is_causal=True), [drawn(BATCH, HEADS, KEYS, WIDTH).requires_grad_()])


@pytest.mark.parametrize("shapes", [((7, 4), (5, 4), (5, 6)), ((3, 7, 4), (1, 5, 4), (3, 5, 6))], ids=["2", "3"])
def test_leading_axes_are_any_and_broadcast(shapes: Any) -> None:
    assert_equal(lambda f, *x: f(*x), [drawn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)])


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (7, 0), (1, 1)])
def test_lengths_of_zero_and_one(queries: int, keys: int) -> None:
    x = [drawn(2, queries, 4), drawn(2, keys, 4), drawn(2, keys, 3)]
    torch.testing.assert_close(attention(*x), by_math(*x))


def test_tensors_need_not_be_contiguous() -> None:
    turned = [x.detach().transpose(-2, -3).contiguous().transpose(-2, -3).requires_grad_() for x in inputs()]
    assert_equal(lambda f, *x: f(*x, is_causal=True), turned)


# ----------------------------------------------------------------------------------------------------- torch.func


def task_loss(kind: Callable[..., Tensor], mask: Tensor | None = None) -> Callable[..., Tensor]:
    weights = drawn(QUERIES, VALUES, seed=12)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (kind(q, k, v, attn_mask=mask).square() * weights).sum()

    return loss


IN_DIMS = [(0, 0, 0), (0, None, None), (None, 1, 0)]


@LOADED
@pytest.mark.parametrize("dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_transforms_are_those_of_the_math_kernel(dims: tuple[int | None, ...], masked: bool) -> None:
    func = torch.func
    shapes = [(QUERIES, WIDTH), (KEYS, WIDTH), (KEYS, VALUES)]
    x = [
        drawn(*(s if d is None else (*s[:d], 4, *s[d:])), seed=i)
        for i, (s, d) in enumerate(zip(shapes, dims, strict=True))
    ]
    mask = with_masked_rows() if masked else None
    for transform in (
        lambda f: func.vmap(f, dims),
        lambda f: func.vmap(func.grad(f, (0, 1, 2)), dims),
        lambda f: func.vmap(func.jacrev(func.grad(f, 0), (0, 1)), dims),
        lambda f: func.vmap(func.jacfwd(func.grad(f, (0, 2))), dims),
        lambda f: func.grad(lambda *y: func.vmap(func.grad(f, 1), dims)(*y).sin().sum(), (0, 1, 2)),
    ):
        found, expected = transform(task_loss(attention, mask))(*x), transform(task_loss(by_math, mask))(*x)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_vmapped_mask_of_numbers_gets_the_gradient_of_each_task() -> None:
    q, k, v = drawn(QUERIES, WIDTH), drawn(KEYS, WIDTH), drawn(KEYS, VALUES)
    bias = drawn(QUERIES, KEYS, seed=9)

    def gradient(kind: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(lambda m, q: kind(q, k, v, attn_mask=m).square().sum(), (0, 1))

    for many, dims in (((bias, q.expand(3, 7, 4) + drawn(3, 7, 4)), (None, 0)), ((drawn(3, 7, 5), q), (0, None))):
        found, expected = (torch.func.vmap(gradient(f), dims)(*many) for f in (attention, by_math))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@LOADED
@pytest.mark.parametrize("name", ["none", "causal", "numbers", "bool"])
def test_forward_mode_to_second_order(name: str) -> None:
    """Tangents of values, of gradients, and gradients of tangents; also by plain forward mode."""
    point, rates = (
        tuple(x.detach() for x in inputs()),
        tuple(drawn(*x.shape, seed=30 + i) for i, x in enumerate(inputs())),
    )
    options = MASKS[name]()
    for use in (
        lambda f: torch.func.jvp(lambda *x: f(*x, **options), point, rates),
        lambda f: torch.func.jvp(torch.func.grad(lambda *x: f(*x, **options).pow(3).sum(), (0, 1, 2)), point, rates),
        lambda f: torch.func.grad(
            lambda *x: torch.func.jvp(lambda *y: f(*y, **options), x, rates)[1].pow(3).sum(), (0, 2)
        )(*point),
        lambda f: torch.func.jvp(lambda *x: torch.func.jvp(lambda *y: f(*y, **options), x, rates)[1], point, rates),
        lambda f: _dual(lambda *x: f(*x, **options), point, rates),
    ):
        torch.testing.assert_close(use(attention), use(by_math), rtol=1e-11, atol=1e-11)


@LOADED
def test_a_query_that_sees_no_key_has_no_tangent() -> None:
    """Where torch's math kernel gives NaN."""
    point, rates = tuple(x.detach() for x in inputs()), tuple(drawn(*x.shape, seed=3) for x in inputs())
    rate = torch.func.jvp(lambda *x: attention(*x, attn_mask=with_masked_rows()), point, rates)[1]
    assert not rate[..., [2, -1], :].any()
    assert rate[..., :2, :].all()


def _dual(function: Callable[..., Tensor], point: Sequence[Tensor], rates: Sequence[Tensor]) -> Any:
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        return forward.unpack_dual(function(*map(forward.make_dual, point, rates)))


@LOADED
def test_a_mask_that_moves_in_forward_mode() -> None:
    x, bias, rate = [y.detach() for y in inputs()], drawn(7, 5, seed=9), drawn(7, 5, seed=10)
    found, expected = (
        torch.func.jvp(torch.func.grad(lambda m, f=f: f(*x, attn_mask=m).pow(3).sum()), (bias,), (rate,))
        for f in (attention, by_math)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- dropout


def dropped_weights(p: float, length: int = 40, heads: int = 50, seed: int = 3) -> Tensor:
    """``M`` itself: equal scores, and values that say which key they are of."""
    torch.manual_seed(seed)
    zeros = torch.zeros(heads, length, 1, dtype=torch.float64)
    return attention(zeros, zeros, torch.eye(length, dtype=torch.float64).expand(heads, -1, -1), dropout_p=p) * length


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_it_should_and_each_entry_by_itself(p: float) -> None:
    kept = dropped_weights(p)
    assert set(kept.unique().tolist()) <= {0.0, kept.max().item()}
    torch.testing.assert_close(kept.max().item(), 1 / (1 - p))
    keeps = (kept > 0).double() - (1 - p)
    noise = (p * (1 - p) / keeps.numel()) ** 0.5
    assert abs(keeps.mean()) < 5 * noise
    for axis in range(3):  # neighbours, in every direction, know nothing of each other
        pairs = keeps * keeps.roll(1, axis)
        assert abs(pairs.mean()) < 5 * p * (1 - p) / keeps.numel() ** 0.5
        assert keeps.mean(axis).var() < 1.5 * p * (1 - p) / keeps.shape[axis]


def test_dropout_of_all_is_zero_and_of_a_seed_the_same() -> None:
    assert not dropped_weights(1.0).any()
    assert torch.equal(dropped_weights(0.5), dropped_weights(0.5))
    assert not torch.equal(dropped_weights(0.5), dropped_weights(0.5, seed=4))


def test_what_is_dropped_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for entries in (1, 10**6):
        monkeypatch.setattr(attention_sums, "_ENTRIES", entries)
        found.append(dropped_weights(0.5, heads=3))
        torch.manual_seed(0)
        found.append(attention(*inputs(), is_causal=True, dropout_p=0.5))
    torch.testing.assert_close(found[:2], found[2:])


def explicit(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) * factors) @ v


@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_with_dropout_are_those_with_its_factors(causal: bool) -> None:
    """The factors are found from equal scores, after the same seed."""
    torch.manual_seed(0)
    flat = torch.zeros(BATCH, HEADS, QUERIES, 1, dtype=torch.float64), torch.zeros(BATCH, HEADS, KEYS, 1).double()
    factors = attention(*flat, torch.eye(KEYS).double().expand(BATCH, HEADS, -1, -1), dropout_p=0.4) * KEYS

    def ours(*x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return attention(*x, dropout_p=0.4, is_causal=causal)

    found = to_third_order(ours, inputs())
    expected = to_third_order(lambda *x: explicit(*x, factors, causal), inputs())
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-11)


def test_dropout_under_vmap_is_each_task_s_own_or_the_same() -> None:
    x = [y.detach() for y in inputs()]
    many = [y.expand(4, *y.shape) for y in x]
    run = lambda *y: attention(*y, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(0)
    same = torch.func.vmap(run, randomness="same")(*many)
    torch.manual_seed(0)
    torch.testing.assert_close(same, run(*x).expand(4, *same.shape[1:]))
    different = torch.func.vmap(run, randomness="different")(*many)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(different, 2))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(*many)


# ---------------------------------------------------------------------------------------------- precision and options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_computed_in_single(dtype: torch.dtype, causal: bool) -> None:
    """So values and gradients of the same numbers in float64 are missed by their own rounding only."""
    low = [x.detach().to(dtype).requires_grad_() for x in inputs()]
    exact = [x.detach().double().requires_grad_() for x in low]
    half = torch.finfo(dtype).eps / 2
    found, expected = (attention(*x, is_causal=causal) for x in (low, exact))
    pairs = [torch.autograd.grad(x.sum(), y, create_graph=True) for x, y in ((found, low), (expected, exact))]
    for a, b in zip((found, *pairs[0]), (expected, *pairs[1]), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=1.02 * half, atol=2e-6)
    again = [torch.autograd.grad(p[0].sum() + p[1].sum(), y) for p, y in zip(pairs, (low, exact), strict=True)]
    for a, b in zip(*again, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=16 * half, atol=60 * half)


def test_autocast_lowers_it_as_torch_s() -> None:
    x = [y.detach().float().requires_grad_() for y in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = attention(*x), by_math(*x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(found.sum(), x))


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    """What the graphs of value, gradient and second derivative save, counted by torch's own hooks."""
    saved: dict[int, int] = {}

    def kept(length: int) -> int:
        saved.clear()
        x = [drawn(1, 2, length, 4, seed=i).requires_grad_() for i in range(3)]
        with torch.autograd.graph.saved_tensors_hooks(_counting(saved), lambda y: y):
            value = attention(*x, is_causal=True)
            gradient = torch.autograd.grad(value.sum(), x, create_graph=True)
            torch.autograd.grad(gradient[0].sum(), x, create_graph=True)
        return sum(saved.values())

    assert kept(512) <= 2 * kept(256)


def _counting(saved: dict[int, int]) -> Callable[[Tensor], Tensor]:
    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    return pack


# ---------------------------------------------------------------------------------------------------------- refusals

Q = torch.ones(2, 3, 4)
REFUSED: dict[str, Any] = {
    "probability": (lambda: attention(Q, Q, Q, dropout_p=1.5), diffopt.errors.HyperparameterError, r"dropout_p=1\.5"),
    "dtypes": (lambda: attention(Q, Q.double(), Q), diffopt.errors.DtypeError, "float32, torch.float64, torch.float32"),
    "integers": (lambda: attention(Q.int(), Q.int(), Q.int()), diffopt.errors.DtypeError, "one floating dtype"),
    "mask of integers": (
        lambda: attention(Q, Q, Q, torch.ones(3, 3).int()),
        diffopt.errors.DtypeError,
        "attn_mask is torch.int32, .*mask != 0",
    ),
    "widths": (lambda: attention(Q, Q[..., :2], Q), diffopt.errors.ShapeError, r"key \(2, 3, 2\)"),
    "lengths": (lambda: attention(Q, Q, Q[:, :2]), diffopt.errors.ShapeError, r"value \(2, 2, 4\)"),
    "heads": (lambda: attention(Q[None], Q[None, :1].expand(1, 3, 3, 4), Q[None]), diffopt.errors.ShapeError, "gqa"),
    "groups": (
        lambda: attention(Q[None], torch.ones(1, 3, 3, 4), Q[None], enable_gqa=True),
        diffopt.errors.ShapeError,
        "enable_gqa",
    ),
    "mask": (lambda: attention(Q, Q, Q, torch.ones(2, 3).bool()), diffopt.errors.ShapeError, r"attn_mask \(2, 3\)"),
    "mask of more": (
        lambda: attention(Q, Q, Q, torch.ones(5, 2, 3, 3).bool()),
        diffopt.errors.ShapeError,
        r"attn_mask \(5, 2, 3, 3\)",
    ),
    "mask beside causal": (
        lambda: attention(Q, Q, Q, torch.ones(3, 3).bool(), is_causal=True),
        diffopt.errors.ShapeError,
        r"beside is_causal=True, .*tril\(\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    call, kind, says = REFUSED[name]
    with pytest.raises(kind, match=says):
        call()


def test_a_fourth_derivative_is_refused() -> None:
    leaves = inputs()
    outer = attention(*leaves).pow(3).sum()
    for _ in range(3):
        outer = sum(g.pow(3).sum() for g in torch.autograd.grad(outer, leaves, create_graph=True))
    with pytest.raises(
        diffopt.errors.MissingDerivativeError, match=r"four times, expected at most three times; .*MATH"
    ):
        torch.autograd.grad(outer, leaves)


@pytest.mark.parametrize("name", ["scale", "dropout_p"])
def test_a_tensor_where_a_number_belongs_is_refused(name):
    """As a constant it would lose its gradient in silence."""
    x = torch.randn(2, 3, 4)
    with pytest.raises(diffopt.errors.DtypeError, match=rf"{name} is a tensor.*multiply the query"):
        diffopt.nn.attention(x, x, x, **{name: torch.tensor(0.5, requires_grad=True)})


def test_a_mask_in_double_precision_beside_others_is_refused():
    x = torch.randn(2, 3, 4)
    with pytest.raises(diffopt.errors.DtypeError, match=r"attn_mask is torch\.float64"):
        diffopt.nn.attention(x, x, x, torch.zeros(3, 3, dtype=torch.float64))


def test_queries_and_keys_of_no_numbers_attend_to_all_alike():
    q, v = torch.randn(2, 3, 0), torch.randn(2, 3, 4)
    torch.testing.assert_close(diffopt.nn.attention(q, q, v), v.mean(-2, keepdim=True).expand(2, 3, 4))
