"""Learning what and where to transfer: the losses against their definitions, written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from data_files import refuses
from oracles import relative_error
from plain_networks import shaken
from torch.utils._pytree import tree_flatten, tree_unflatten

import diffopt
from diffopt.estimators import FirstOrder, MultiStep
from diffopt.tasks import MetaTransfer, PlainStages, ProblemError, functional

SOURCE, TARGET = (2, 3), (3, 4, 2)


@pytest.fixture
def problem(generator):
    """A task, its parameters, images, labels and features of a source, of other sizes than the target's."""
    apply, network = functional(PlainStages(1, 5, TARGET, 1, generator))
    task = MetaTransfer(apply, SOURCE, TARGET, beta=0.7)
    params = task.start(shaken(network, generator), generator)
    params["match"] = shaken(params["match"], generator)
    meta = {kind: shaken(tree, generator) for kind, tree in task.meta_start(params["match"]["0.0.bias"]).items()}
    images = torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    source = tuple(
        torch.rand(6, c, s, s, generator=generator, dtype=torch.float64) for c, s in zip(SOURCE, (8, 4), strict=True)
    )
    return task, params, meta, images, torch.tensor([0, 1, 2, 3, 4, 0]), source


def resized(x, size):
    """Bilinear, pixel centres aligned, as a matrix on either side."""
    old = x.shape[-1]
    at = ((torch.arange(size) + 0.5) * old / size - 0.5).clamp(0, old - 1)
    matrix = (1 - (torch.arange(old) - at[:, None]).abs()).clamp(min=0).to(x)
    return torch.einsum("ij,bcjk,lk->bcil", matrix, x, matrix)


def plain_mismatch(task, params, meta, images, source):
    """One example, one pair, one channel after the other."""
    features, total = task.target(params["network"], images).features, 0.0
    for m, n in task.pairs:
        match, weights = params["match"], f"{m}.{n}.weight"
        wanted = resized(source[m], features[n].shape[-1])
        mapped = torch.einsum("oi,bijk->bojk", match[weights], features[n]) + match[f"{m}.{n}.bias"][:, None, None]
        for b in range(len(images)):
            mean = source[m][b].flatten(1).mean(1)
            where = (meta["where"][weights] @ mean + meta["where"][f"{m}.{n}.bias"]).item()
            scores = (meta["what"][weights] @ mean + meta["what"][f"{m}.{n}.bias"]).exp()
            for c in range(SOURCE[m]):
                error = (mapped[b, c] - wanted[b, c]).square().mean()
                total = total + min(max(where, 0), 6) * scores[c] / scores.sum() * error / len(images)
    return total


def test_the_losses_are_their_definition(problem):
    task, params, meta, images, labels, source = problem
    assert len(task.pairs) == 6
    expected = plain_mismatch(task, params, meta, images, source)
    assert task.transfer_loss(params, meta, images, source).item() == pytest.approx(expected.item(), rel=1e-12)
    logits = task.target(params["network"], images).logits
    entropy = sum(x.logsumexp(0) - x[y] for x, y in zip(logits, labels, strict=True)) / 6
    assert task.task_loss(params, images, labels).item() == pytest.approx(entropy.item(), rel=1e-12)
    total = task.total_loss(params, meta, images, labels, source)
    assert total.item() == pytest.approx((entropy + 0.7 * expected).item(), rel=1e-12)


def test_weights_start_alike_and_stay_in_range(problem):
    task, _, meta, _, _, source = problem
    for where, what in task.weights(task.meta_start(source[0]), source).values():
        assert where.eq(1).all()
        torch.testing.assert_close(what, torch.full_like(what, 1 / what.shape[1]))
    for factor, bound in ((100, 6), (-100, 0)):  # all mean features are positive, and biases lie near one
        moved = {kind: {name: factor * x.abs() for name, x in tree.items()} for kind, tree in meta.items()}
        assert all(where.eq(bound).all() for where, _ in task.weights(moved, source).values())


def test_chosen_pairs_only(problem):
    task, params, meta, images, _, source = problem
    single = [replace(task, pairs=(pair,)).transfer_loss(params, meta, images, source) for pair in task.pairs]
    torch.testing.assert_close(sum(single), task.transfer_loss(params, meta, images, source), rtol=1e-12, atol=0)
    match = replace(task, pairs=((1, 2),)).start(params["network"], torch.Generator())["match"]
    assert set(match) == {"1.2.weight", "1.2.bias"}


def test_the_hypergradient_reaches_the_meta_networks(problem):
    """Two plain steps on the transfer loss, written out; first order sees nothing."""
    task, params, meta, images, labels, source = problem
    leaves = [x.requires_grad_() for tree in meta.values() for x in tree.values()]

    def found(estimator):
        options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "estimator": estimator}
        moved = diffopt.solve(task.transfer_loss, params, meta, images, source, **options)
        return torch.autograd.grad(task.task_loss(moved.params, images, labels), leaves, allow_unused=True)

    def plain(window):
        now, form = tree_flatten(params)
        now, slopes = [x.clone().requires_grad_() for x in now], []
        for step in range(2):
            if step % window == 0:
                loss = task.transfer_loss(tree_unflatten(now, form), meta, images, source)
                slopes = torch.autograd.grad(loss, now, create_graph=True, materialize_grads=True)
            now = [x - 0.1 * slope for x, slope in zip(now, slopes, strict=True)]
        return torch.autograd.grad(task.task_loss(tree_unflatten(now, form), images, labels), leaves)

    assert max(x.norm() for x in plain(1)) > 1e-4
    assert relative_error(found(None), plain(1)) < 1e-10  # rounding through two batch normalisations
    assert relative_error(found(MultiStep(2)), plain(2)) < 1e-10
    assert relative_error(plain(2), plain(1)) > 1e-3
    assert all(x is None or not x.any() for x in found(FirstOrder()))


def test_bad_values_are_refused(problem, generator):
    task, _, meta, _, _, source = problem
    for pairs in (((0, 3),), ((2, 0),), ((-1, 0),), ((0, 0), (0, 0))):
        refuses("expected pairs", replace, task, pairs=pairs, kind=ProblemError)
    refuses("of 0 and 3 stages", MetaTransfer, task.target, (), TARGET, kind=ProblemError)
    for beta in (-1.0, math.inf, math.nan):
        refuses("beta is", replace, task, beta=beta, kind=ProblemError)
    refuses(r"\(3, 2\) channels, expected \(2, 3\)", task.weights, meta, source[::-1], kind=ProblemError)
