"""Biased estimators: under every composition with ``torch.func`` the numbers of the same called task by task."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS
from every_way import STEPS, TASKS, EveryWay, Setting, flat
from limits import sampled
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Implicit, Krylov, MultiStep, Reptile, Reverse, Truncated
from diffopt.linear_solve import GMRES

# A task alone stops at its own rtol, one in a batch when all are within it: the rest is 1e-12 times a condition number.
BINOMIAL = [Binomial(2), Binomial(2, window=3, chunk_size=2)]
OTHERS = [Krylov(2), Truncated(1), FirstOrder(), Reptile(), MultiStep(2), MultiStep(2, Binomial(1))]
ESTIMATORS = [*BINOMIAL, *OTHERS, Implicit(GMRES(30, rtol=1e-12, throw=False))]
BY_NAME = {case.name: case for case in OPTIMIZERS}


@pytest.fixture(scope="module", params=["momentum", "adam", "diagonal"])
def setting(request):
    return Setting(BY_NAME[request.param])


@pytest.fixture(scope="module", params=sampled(ESTIMATORS, 2), ids=str)
def estimator(request):
    return request.param


@pytest.fixture(scope="module")
def rows(setting, estimator):
    """Each task's gradients."""
    return [setting.alone(estimator, i, setting.data[i]) for i in range(TASKS)]


class TestEveryWay(EveryWay):
    """In every way that exact estimators are tried in, and in what a biased one might get wrong by itself."""

    # Sums in another order; GMRES at 13 parameters and a condition number of some hundred; floor 1e-6 of relative_error
    round_off = 1e-8

    def test_batches_per_step_on_any_axis(self, setting, estimator):
        expected = [setting.alone(estimator, i, setting.batches[:, i]) for i in range(TASKS)]
        for axis in (1, 2):
            batches = setting.batches.movedim(1, axis)
            per_task = vmap(self.derivative(setting, estimator), in_dims=(None, None, None, axis, 0))
            self.agree_by_task(flat(per_task(*setting.meta, batches, setting.query)), expected)

    def test_unused_outputs(self, setting, estimator):
        """An outer loss that reads one leaf of three, of some tasks only, and none of the buffers."""

        def run(params, data):
            options = {"optimizer": setting.case.optimizer(setting.hypers), "steps": STEPS, "estimator": estimator}
            inputs = (params, setting.problem.weights, setting.targets, data)
            return diffopt.solve(setting.loss, *inputs, **options).params[1].square().sum()

        together, separate = ([p.clone().requires_grad_() for p in setting.meta[0]] for _ in range(2))
        vmap(run, in_dims=(None, 0))(together, setting.data)[:2].sum().backward()
        for i in range(2):
            run(separate, setting.data[i]).backward()
        if isinstance(
            estimator, Reptile
        ):  # it moves towards every task's solution, whatever the outer loss makes of it
            run(separate, setting.data[2]).backward()
        self.agree([x.grad for x in together], [x.grad for x in separate])

    @pytest.mark.parametrize("wanted", ["params", "weights", "hypers", "data", "one leaf"])
    def test_subsets_of_inputs(self, setting, estimator, rows, wanted):
        """The other terms are not asked for, and these are the same."""
        names = ["params", "params", "one leaf", "weights", *["hypers"] * len(setting.hypers), "data", "query"]
        chosen = [i for i, name in enumerate(names) if name == wanted or (wanted == "params" and i < 3)]
        made, given = setting.leaves(setting.data[0], setting.query[0])
        for i, x in enumerate(made):
            x.requires_grad_(i in chosen)
        got = torch.autograd.grad(setting.run(estimator, *given), [made[i] for i in chosen], materialize_grads=True)
        self.agree(got, [rows[0][i] for i in chosen])


PRODUCTS = [
    (Binomial(2), 2 * (STEPS - 1), 2 * (STEPS - 1)),  # the mixed products are by-products
    (Krylov(2), STEPS + STEPS - 1, STEPS + STEPS - 1 + STEPS),  # one more level
    *((Truncated(1), 1, 1), (FirstOrder(), 0, 0), (Reptile(), 0, 0), (MultiStep(2, Reverse("graph")), 2, 2)),
]


@pytest.mark.parametrize(("estimator", "alone", "with_weights"), PRODUCTS, ids=str)
def test_unwanted_terms_cost_nothing(estimator, alone, with_weights):
    setting, counts = Setting(BY_NAME["momentum"]), []
    for learned in (False, True):
        params, weights = ([p.clone().requires_grad_() for p in setting.meta[0]], setting.meta[1].clone())
        inputs = (params, weights.requires_grad_(learned), setting.targets, setting.data[0])
        optimizer = diffopt.SGD(0.1, momentum=0.5)
        solution = diffopt.solve(setting.loss, *inputs, optimizer=optimizer, steps=STEPS, estimator=estimator)
        sum(p.square().sum() for p in solution.params).backward()
        assert (weights.grad is not None) == learned
        counts.append(solution.counts.products)
    assert counts == [alone, with_weights]
