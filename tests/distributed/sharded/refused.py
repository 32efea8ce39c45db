"""What is refused of params that are spread: estimators, collectives, and means that torch gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import numbers
from sharded.layouts import ROWS, WHOLE, Layout, full, gradients, same, sgd
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import diffopt
from diffopt.estimators import Binomial, Krylov, Reverse, Unrolled


def check_what_is_refused() -> None:
    for estimator in (Binomial(order=1), Krylov(order=1)):
        with pytest.raises(diffopt.DeviceError, match="a DTensor and an ordinary tensor"):
            gradients(Layout(ROWS, WHOLE), sgd, estimator=estimator)
    with pytest.raises(diffopt.EstimatorError, match="a leaf of the state that is a DTensor"):
        gradients(Layout(ROWS, WHOLE), sgd, estimator=Reverse(1, offload="disk"))
    for function in (diffopt.distributed.copied, diffopt.distributed.summed):
        with pytest.raises(diffopt.LeafError, match="a DTensor"):
            function(Layout(ROWS).spread(numbers(4, seed=1), ROWS))


def check_means_with_a_wrong_gradient() -> None:
    look_at_means(F.mse_loss)


def check_slow_other_means() -> None:
    look_at_means(F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.binary_cross_entropy)


def look_at_means(*functions: Any) -> None:
    """Those of torch over sharded numbers are refused; a mean of numbers, and one over whole tensors, are right."""
    x, y, w = numbers(8, 3, seed=1), numbers(8, 4, seed=2).sigmoid(), numbers(4, 3, seed=3)
    for function in functions:

        def found(at: Layout, estimator: Any, means: bool, function: Any = function) -> Tensor:
            def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
                ends = (x @ w.t()).sigmoid()
                return function(ends, y) if means else function(ends, y, reduction="none").mean()

            start = at.spread(w, at.params).requires_grad_()
            data = at.spread(x, at.data), at.spread(y, at.data)
            solution = diffopt.solve(loss, start, *data, optimizer=diffopt.SGD(0.5), steps=2, estimator=estimator)
            return full(torch.autograd.grad(solution.params.pow(3).sum(), start)[0])

        for estimator in (Reverse(), Reverse(1), Unrolled()):
            for places in ((ROWS, WHOLE), (WHOLE, ROWS)):
                with pytest.raises(diffopt.RanksError, match=r'write reduction="none" there, and .mean\(\) behind it'):
                    found(Layout(*places), estimator, True)
                same([found(Layout(*places), estimator, False)], [found(Layout(), estimator, False)], function)
            same([found(Layout(WHOLE, WHOLE), estimator, True)], [found(Layout(), estimator, True)], function)
