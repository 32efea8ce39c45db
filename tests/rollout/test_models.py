"""``solve`` with ``nn.Module`` models: every layer's second derivative, in every style of calling.

The oracle is a Python loop over tasks that unrolls momentum SGD by plain autograd; no transform, no ``solve``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt.estimators import Reverse, Unrolled

TASKS, STEPS, LR, MOMENTUM = 3, 3, 0.2, 0.6
Params = dict[str, Tensor]
Data = dict[str, Tensor]


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Recurrent(nn.Module):
    """A GRU and a read-out of its last output; ``x`` is ``[batch, time, features]``.

    ``fused`` calls torch's kernel, which torch's ``vmap`` does not know; else the same cell is written out.
    """

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.gru, self.head = fused, nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.head(self.gru(x)[0][:, -1])
        gru, hidden = self.gru, x.new_zeros(len(x), 4)
        for now in x.unbind(1):
            r, z, n = functional.linear(now, gru.weight_ih_l0, gru.bias_ih_l0).chunk(3, -1)
            from_r, from_z, from_n = functional.linear(hidden, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, -1)
            update = torch.sigmoid(z + from_z)
            hidden = (1 - update) * torch.tanh(n + torch.sigmoid(r + from_r) * from_n) + update * hidden
        return self.head(hidden)


class Attention(nn.Module):
    """Self-attention with two heads over ``[batch, length, 4]``, by the kernel named, or by the default one."""

    def __init__(self, kernel: SDPBackend | None = SDPBackend.MATH) -> None:
        super().__init__()
        self.kernel, self.mix, self.head = kernel, nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (2, 2)).transpose(-3, -2) for h in self.mix(x).chunk(3, dim=-1))
        if self.kernel is None:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel([self.kernel]):
                mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.head(mixed.transpose(-3, -2).flatten(-2).mean(-2))


def batch_norm(norm: type[nn.Module], features: int) -> nn.Module:
    """Batch norm that uses the batch's own statistics and keeps none."""
    return norm(features, track_running_stats=False)


def dense(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Linear(5, 2))


def convolutional(norm: nn.Module, channels: int) -> nn.Module:
    layers = nn.Conv2d(1, channels, 3), norm, nn.Softplus(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * channels, 2))


# name -> (the model, the shape of its inputs)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: dense(nn.Identity()), (6, 3)),
    "tied": (Tied, (6, 4)),
    "batch_norm_1d": (lambda: dense(batch_norm(nn.BatchNorm1d, 5)), (6, 3)),
    "batch_norm_2d": (lambda: convolutional(batch_norm(nn.BatchNorm2d, 3), 3), (5, 1, 4, 4)),
    "layer_norm": (lambda: dense(nn.LayerNorm(5)), (6, 3)),
    "group_norm": (lambda: convolutional(nn.GroupNorm(2, 4), 4), (5, 1, 4, 4)),
    "gru": (lambda: Recurrent(fused=False), (5, 3, 3)),
    "gru_fused": (lambda: Recurrent(fused=True), (5, 3, 3)),
    "attention": (Attention, (5, 3, 4)),
}


class Setting:
    """A model, the data of some tasks, and the losses."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(len(name))
        make, shape = MODELS[name]
        self.module = make().double()
        with torch.no_grad():  # away from the norm layers' ones and zeros, where terms vanish
            for p in self.module.parameters():
                p.add_(0.2 * torch.randn_like(p))
        self.params: Params = dict(self.module.named_parameters())
        out = self.module(torch.zeros(shape, dtype=torch.float64)).shape
        self.data: Data = {
            part: torch.randn(TASKS, *size, dtype=torch.float64).requires_grad_()
            for part, size in {"x": shape, "y": out, "query_x": shape, "query_y": out}.items()
        }

    def task(self, i: int) -> Data:
        return {name: value[i] for name, value in self.data.items()}

    def inner(self, params: Params, task: Data) -> Tensor:
        return functional.mse_loss(functional_call(self.module, params, (task["x"],)), task["y"])

    def outer(self, params: Params, task: Data) -> Tensor:
        error = functional_call(self.module, params, (task["query_x"],)) - task["query_y"]
        return error.square().mean() + sum(0.01 * p.pow(3).sum() for p in params.values())

    def solved(self, params: Params, task: Data, estimator: Any) -> Tensor:
        optimizer = diffopt.SGD(LR, momentum=MOMENTUM)
        solution = diffopt.solve(self.inner, params, task, optimizer=optimizer, steps=STEPS, estimator=estimator)
        return self.outer(solution.params, task)

    def unrolled(self, params: Params, task: Data) -> Tensor:
        """The oracle."""
        velocity = {name: torch.zeros_like(p) for name, p in params.items()}
        for _ in range(STEPS):
            grads = torch.autograd.grad(self.inner(params, task), list(params.values()), create_graph=True)
            velocity = {name: MOMENTUM * velocity[name] + g for name, g in zip(params, grads, strict=True)}
            params = {name: p - LR * velocity[name] for name, p in params.items()}
        return self.outer(params, task)

    def leaves(self) -> list[Tensor]:
        return [*self.params.values(), *self.data.values()]

    def expected(self) -> list[Tensor]:
        total = torch.stack([self.unrolled(self.params, self.task(i)) for i in range(TASKS)]).sum()
        return list(torch.autograd.grad(total, self.leaves()))


def by_loop(setting: Setting, estimator: Any) -> list[Tensor]:
    total = torch.stack([setting.solved(setting.params, setting.task(i), estimator) for i in range(TASKS)]).sum()
    return list(torch.autograd.grad(total, setting.leaves()))


def by_vmap(setting: Setting, estimator: Any) -> list[Tensor]:
    each = vmap(lambda p, task: setting.solved(p, task, estimator), in_dims=(None, 0))(setting.params, setting.data)
    return list(torch.autograd.grad(each.sum(), setting.leaves()))


def by_vmap_of_grad(setting: Setting, estimator: Any) -> list[Tensor]:
    derivative = grad(lambda p, task: setting.solved(p, task, estimator), argnums=(0, 1))
    for_params, for_data = vmap(derivative, in_dims=(None, 0))(setting.params, setting.data)
    return [*(g.sum(0) for g in for_params.values()), *for_data.values()]


STYLES = {"loop": by_loop, "vmap": by_vmap, "vmap_of_grad": by_vmap_of_grad}
ESTIMATORS = {"graph": Reverse("graph"), "states": Reverse(1), "unrolled": Unrolled()}


def assert_equal_to_rounding(actual: list[Tensor], expected: list[Tensor]) -> None:
    """To 1e-10 of each leaf: rounding only, some 1e-14, over a few products of Hessians.

    The scale has a floor, because a bias in front of a batch norm has no gradient but rounding errors.
    """
    floor = 1e-4 * max(e.abs().max() for e in expected)
    assert all(
        (a - e).abs().max() <= 1e-10 * e.abs().max().clamp(min=floor) for a, e in zip(actual, expected, strict=True)
    )


@pytest.fixture(scope="module", params=MODELS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


@pytest.fixture(scope="module")
def expected(setting: Setting) -> list[Tensor]:
    return setting.expected()


def not_under_vmap_if_fused(setting: Setting, style: str) -> AbstractContextManager[Any]:
    """What torch's own ``vmap`` cannot run raises torch's own error, under ``solve`` too."""
    fused = isinstance(setting.module, Recurrent) and setting.module.fused and style != "loop"
    return pytest.raises(RuntimeError, match=r"aten::gru|broadcast shape") if fused else nullcontext()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_hypergradient_is_that_of_the_loop(
    setting: Setting, expected: list[Tensor], estimator: str, style: str
) -> None:
    with not_under_vmap_if_fused(setting, style):
        assert_equal_to_rounding(STYLES[style](setting, ESTIMATORS[estimator]), expected)


def test_the_oracle_agrees_with_finite_differences(setting: Setting, expected: list[Tensor]) -> None:
    """Guards against a wrong second derivative in torch itself: all else here would then agree on it."""
    torch.manual_seed(1)
    directions, values, h = [torch.randn_like(leaf) for leaf in setting.leaves()], [], 1e-5
    for sign in (1, -1):
        moved = [(leaf + sign * h * d).detach() for leaf, d in zip(setting.leaves(), directions, strict=True)]
        params = {name: p.requires_grad_() for name, p in zip(setting.params, moved, strict=False)}
        data = dict(zip(setting.data, moved[len(params) :], strict=True))
        tasks = [{name: value[i] for name, value in data.items()} for i in range(TASKS)]
        values.append(sum(setting.unrolled(params, task).item() for task in tasks))
    slope = sum((g * d).sum().item() for g, d in zip(expected, directions, strict=True))
    # central differences in float64: h**2 from the third derivative and 1e-16 / h from rounding
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("style", ["loop", "vmap"])
def test_backward_fills_the_grad_of_parameters(setting: Setting, expected: list[Tensor], style: str) -> None:
    with not_under_vmap_if_fused(setting, style):
        if style == "vmap":
            each = vmap(lambda p, task: setting.solved(p, task, None), in_dims=(None, 0))
            each(setting.params, setting.data).sum().backward()
        else:
            for i in range(TASKS):  # accumulates, as .backward() does
                setting.solved(setting.params, setting.task(i), None).backward()
        assert_equal_to_rounding([p.grad for p in setting.module.parameters()], expected[: len(setting.params)])
        assert_equal_to_rounding([leaf.grad for leaf in setting.data.values()], expected[len(setting.params) :])
    for leaf in setting.leaves():
        leaf.grad = None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_parameters_passed_as_args_get_no_grad(estimator: str) -> None:
    """The first layer is a frozen feature extractor in the args, the second adapts."""
    setting = Setting("mlp")
    frozen = {name: p.requires_grad_(False) for name, p in setting.params.items() if name.startswith("0.")}
    adapted = {name: p for name, p in setting.params.items() if name not in frozen}
    x, y = setting.data["x"][0].detach(), setting.data["y"][0].detach()

    def inner(adapted: Params, frozen: Params) -> Tensor:
        return functional.mse_loss(functional_call(setting.module, {**frozen, **adapted}, (x,)), y)

    optimizer, rule = diffopt.SGD(LR, momentum=MOMENTUM), ESTIMATORS[estimator]
    solution = diffopt.solve(inner, adapted, frozen, optimizer=optimizer, steps=STEPS, estimator=rule)
    sum(p.pow(3).sum() for p in solution.params.values()).backward()
    assert all(p.grad is None for p in frozen.values())
    assert all(p.grad is not None and p.grad.norm().item() > 1e-3 for p in adapted.values())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_attention_without_a_second_derivative_is_refused(estimator: str, style: str) -> None:
    """Torch's default kernel has none: an error, never another number."""
    setting = Setting("attention")
    setting.module.kernel = None
    with pytest.raises(RuntimeError, match=r"attention.* is not implemented|sdpa_kernel"):
        STYLES[style](setting, ESTIMATORS[estimator])
