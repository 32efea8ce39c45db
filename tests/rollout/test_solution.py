"""What ``solve`` takes and gives back: trees, arguments of every kind, zero steps; its inputs are left alone."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error

import diffopt
from diffopt.adjoint.trajectory import Cotangents
from diffopt.estimators import Adjoint, Binomial, FirstOrder, ForwardMode, Keep, Krylov, Reverse, Truncated, Unrolled


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_params_that_are_also_an_argument_count_once_in_the_inner_gradient(estimator, check):
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)

    def loss(p, c):
        return p.pow(4).sum() + (p * c.sin()).sum()

    solution = diffopt.solve(loss, w, w, optimizer=diffopt.SGD(0.05), steps=3, estimator=estimator, check=check)
    now = w
    for _ in range(3):
        now = now - 0.05 * (4 * now**3 + w.sin())
    assert relative_error([solution.params], [now]) < 1e-12
    got = torch.autograd.grad(solution.params.square().sum(), w)
    assert relative_error(got, torch.autograd.grad(now.square().sum(), w)) < 1e-12


@pytest.mark.parametrize("estimator", [Reverse(), FirstOrder(), Unrolled()], ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_what_was_not_kept_is_not_reported(estimator, learned):
    w = torch.tensor([1.0, -2.0], requires_grad=learned)
    kept = diffopt.solve(lambda p: p.pow(4).sum(), w, optimizer=diffopt.SGD(0.01), steps=3, estimator=estimator).kept
    if learned and estimator == Reverse():
        assert kept.checkpoint == "graph"
    else:
        assert (kept.checkpoint, kept.states, kept.bytes) == (None, 0, 0)


@pytest.mark.parametrize("estimator", [Reverse(1), Binomial(1)], ids=str)
def test_the_losses_are_the_callers_to_change(estimator):
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    solution = diffopt.solve(lambda p: p.pow(4).sum(), w, optimizer=diffopt.SGD(0.01), steps=3, estimator=estimator)
    solution.losses.zero_()
    solution.params.sum().backward()


def under_autocast(estimator, **options):
    """The start, and the final params of a solve that autocast has made coarse."""
    torch.manual_seed(0)
    w, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = {"optimizer": diffopt.SGD(1.0), "steps": 4, "estimator": estimator, **options}
        return w, diffopt.solve(lambda w, x: (x @ w).float().tanh().square().mean(), w, x, **given).params


@pytest.mark.parametrize("estimator", [Reverse(1), Reverse("sqrt")], ids=str)
def test_steps_are_recomputed_under_the_autocast_of_the_rollout(estimator):
    def run(estimator):
        w, end = under_autocast(estimator)
        return torch.autograd.grad(end.square().sum(), w)

    # without autocast in the recomputation the two differ by some 1e-3
    assert relative_error(run(estimator), run(Reverse("graph"))) < 1e-5


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), Truncated(4), Binomial(2)], ids=str)
def test_a_second_backward_pass_runs_under_the_autocast_of_the_rollout(estimator):
    w, end = under_autocast(estimator, check=False)  # which would refuse the other losses
    first, second = (torch.autograd.grad(end.square().sum(), w, retain_graph=True) for _ in range(2))
    assert relative_error(second, first) < 1e-5  # without autocast they differ by some 1e-3


@pytest.mark.parametrize("estimator", [Binomial(1), Binomial(2, chunk_size=1), Krylov(1), Krylov(2)], ids=str)
def test_estimators_that_batch_over_steps_run_where_autocast_gives_a_loss_another_dtype_under_vmap(estimator):
    torch.manual_seed(0)
    w, filter = torch.randn(6, requires_grad=True), torch.tensor([[[0.2, 0.5, 0.3]]])

    def loss(w, filter):
        smooth = torch.nn.functional.conv1d(w[None, None], filter, padding=1)
        return torch.logsumexp(smooth[0, 0], 0)  # bfloat16 by itself, float32 under vmap

    def run(estimator, autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            end = diffopt.solve(loss, w, filter, optimizer=diffopt.SGD(0.5), steps=3, estimator=estimator)
            assert end.losses.dtype == (torch.bfloat16 if autocast else torch.float32)
        return torch.autograd.grad(end.params.square().sum(), w)

    # eight bits, rounded some ten times
    assert relative_error(run(estimator, True), run(estimator, False)) < 0.05


def test_trees_of_every_kind_and_arguments_that_are_not_tensors():
    params = {"b": (torch.tensor(1.0), [torch.tensor([2.0, 3.0])]), "a": torch.tensor(0.5)}
    leaves = [params["b"][0].requires_grad_(), params["b"][1][0].requires_grad_(), params["a"].requires_grad_()]
    labels = torch.tensor([1, 0])

    def loss(p, power, options, labels):
        assert options == {"name": "x", "none": None}
        return (p["b"][0] * p["b"][1][0][labels].pow(power).sum() * p["a"]).square()

    solution = diffopt.solve(loss, params, 2, {"name": "x", "none": None}, labels, optimizer=diffopt.SGD(1e-5), steps=2)
    assert isinstance(solution.params["b"], tuple)
    assert isinstance(solution.params["b"][1], list)
    assert solution.losses.shape == (2,)
    assert solution.state.params["a"] is solution.params["a"]
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(solution.params["a"], leaves))


def test_zero_steps_return_the_initial_parameters():
    w = torch.ones(2, requires_grad=True)
    solution = diffopt.solve(lambda w: w.sum(), w, optimizer=diffopt.SGD(0.1, momentum=0.9), steps=0)
    assert torch.equal(solution.params, w)
    assert torch.equal(torch.autograd.grad(solution.params.sum(), w)[0], torch.ones(2))
    assert solution.losses.shape == (0,)
    assert not solution.state.buffers["velocity"].any()


def test_the_inputs_are_left_alone():
    w, x = torch.ones(3, requires_grad=True), torch.ones(3)
    before = [w.detach().clone(), x.clone()]
    solution = diffopt.solve(lambda w, x: (w * x).square().sum(), w, x, optimizer=diffopt.ProximalGD(0.1, 1.0), steps=3)
    with torch.no_grad():
        solution.state.buffers["center"].mul_(7)
    assert torch.equal(w, before[0])
    assert torch.equal(x, before[1])
    assert w.grad is None


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("estimator", [FirstOrder(), Truncated(0), Reverse()], ids=str)
def test_zeros_take_no_memory_inside_and_are_the_callers_to_change(estimator, tasks):
    """Initial buffers, and the adjoint of what the outer loss does not read: one number each, until handed out."""
    sizes = []

    class Looking(Adjoint):
        def keep(self, steps):
            return estimator.keep(steps)

        def pullback(self, trajectory, cotangent):
            zeros = (*trajectory.initial[2:], *cotangent[1:])
            sizes.extend(x.untyped_storage().nbytes() // x.element_size() for x in zeros)
            return estimator.pullback(trajectory, cotangent)

    def run(read, other):
        given = {
            "optimizer": diffopt.SGD(0.1, momentum=0.9),
            "steps": 2 * (estimator != Reverse()),
            "estimator": Looking(),
        }
        loss = lambda p: p[0].square().sum() + p[1].square().sum()  # noqa: E731
        return diffopt.solve(loss, (read, other), **given).params[0].square().sum()

    leaves = [torch.ones(*([] if tasks is None else [tasks]), 1000).requires_grad_() for _ in range(2)]
    value = run(*leaves) if tasks is None else torch.func.vmap(run)(*leaves).sum()
    for found in torch.autograd.grad(value, leaves):
        found.mul_(2)
    assert len(sizes) == 5
    assert max(sizes) <= (tasks or 1)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Reverse("sqrt"), Truncated(5)], ids=str)
def test_a_hook_on_the_params_acts_on_the_inner_gradient_only(estimator):
    """Not on the adjoint of the chain of states, which is none of the loss's."""

    def loss(p):
        if p.requires_grad:
            p.register_hook(lambda g: g.clamp(-0.5, 0.5))  # which clips no gradient here, but an adjoint of 3
        return p.square().sum()

    w = torch.full((3,), 0.05, requires_grad=True)
    solution = diffopt.solve(loss, w, optimizer=diffopt.SGD(0.05), steps=5, estimator=estimator)
    (3 * solution.params.sum()).backward()
    torch.testing.assert_close(w.grad, torch.full((3,), 3 * 0.9**5))


def test_params_keep_their_memory_format():
    w = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    solution = diffopt.solve(lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=2)
    assert solution.params.is_contiguous(memory_format=torch.channels_last)


def test_terms_by_anything_but_places_are_refused():
    class ByNumber(Adjoint):
        def keep(self, steps):
            return Keep(first=steps + 1)

        def pullback(self, trajectory, cotangent):
            return Cotangents(cotangent, {0: torch.ones(())})

    w, a = torch.ones(2, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "estimator": ByNumber()}
    solution = diffopt.solve(lambda w, a: (a * w).square().sum(), w, a, **options)
    with pytest.raises(diffopt.EstimatorError, match=r"direct terms of \[0\].*expected their places"):
        solution.params.sum().backward()
