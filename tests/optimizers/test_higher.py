"""``higher`` as an outside oracle for SGD and momentum."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error

import diffopt
from diffopt.estimators import ForwardMode, Reverse, Unrolled

higher = pytest.importorskip("higher")


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize(
    "estimator", [Reverse("graph"), Reverse(1), Reverse("sqrt"), Unrolled(), ForwardMode()], ids=str
)
def test_hypergradients_agree_with_higher(options, estimator):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def outer(prediction):
        return (prediction - 1).square().mean()

    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), **options), copy_initial_weights=False) as (f, o):
        for _ in range(4):
            o.step(scale * (f(inputs) - targets).square().mean())
        expected = torch.autograd.grad(outer(f(inputs)), [*net.parameters(), scale])

    def predict(params):
        return torch.func.functional_call(net, params, (inputs,))

    params = dict(net.named_parameters())
    given = {"optimizer": diffopt.SGD(**options), "steps": 4, "estimator": estimator}
    solution = diffopt.solve(lambda p, s: s * (predict(p) - targets).square().mean(), params, scale, **given)
    got = torch.autograd.grad(outer(predict(solution.params)), [*params.values(), scale])
    assert relative_error(got, expected) < 1e-12
