"""Lifted classes with hyperparameters of every form, params of every dtype, and nothing shared between solves."""

from __future__ import annotations

import pytest
import torch
from lifted import SHAPES, tensors, trained, wavy
from oracles import relative_error
from torch.func import vmap

import diffopt
from diffopt import Schedule, from_torch
from diffopt.estimators import ForwardMode, MultiStep, Reverse, Unrolled


class TestHyperparameters:
    """The forms that a hyperparameter may have."""

    @property
    def params(self):
        return {"a": tensors([(2, 1, 2)], 3)[0], "b": tensors([(3,)], 4)[0]}  # an axis of length 1 within

    @staticmethod
    def loss(p):
        return (p["a"].square().sum() + 1) * (p["b"].sin().sum() + 4)

    def both(self, native, lifted, leaves, steps=4, rule=None):
        found = []
        for optimizer in (native, lifted):
            solution = diffopt.solve(self.loss, self.params, optimizer=optimizer, steps=steps, estimator=rule)
            outer = solution.params["a"].square().sum() + solution.params["b"].sum()
            found.append([outer, *torch.autograd.grad(outer, leaves)])
        assert relative_error(found[1], found[0]) < 1e-11

    @staticmethod
    def leaf(*shape):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.rand(shape, generator=generator, dtype=torch.float64).mul(0.1).add(0.05).requires_grad_()

    @pytest.mark.parametrize("rule", [Reverse(1), Unrolled(), ForwardMode()], ids=str)
    def test_one_for_each_coordinate_and_one_for_each_leaf(self, rule):
        lr, decay = {"a": self.leaf(2, 1, 2), "b": self.leaf(3)}, {"a": self.leaf(), "b": 0.2}
        leaves = [*lr.values(), decay["a"]]
        options = {"lr": lr, "weight_decay": decay}
        self.both(diffopt.SGD(**options), from_torch(torch.optim.SGD, **options), leaves, rule=rule)
        options = {**options, "eps": 0.05}
        self.both(diffopt.AdamW(**options), from_torch(torch.optim.AdamW, **options), leaves, rule=rule)

    def test_an_option_that_only_the_constructor_reads_may_differ_from_leaf_to_leaf(self):
        start = {"a": self.leaf(2, 1, 2), "b": self.leaf()}
        options = {"lr": 0.1, "initial_accumulator_value": start}
        self.both(diffopt.Adagrad(**options), from_torch(torch.optim.Adagrad, **options), list(start.values()))

    @pytest.mark.parametrize("rule", [Reverse(2), Unrolled(), MultiStep(2)], ids=str)
    def test_schedules(self, rule):
        rates, per_leaf = self.leaf(4), {"a": self.leaf(4), "b": self.leaf(4, 3)}
        momentum = Schedule([0.5, 0.6, 0.0, 0.8])
        options = {"lr": Schedule(rates), "momentum": momentum, "weight_decay": Schedule(per_leaf)}
        leaves = [rates, *per_leaf.values()]
        self.both(diffopt.SGD(**options), from_torch(torch.optim.SGD, **options), leaves, rule=rule)

    @pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
    def test_a_learned_zero_has_a_derivative(self, name):
        zero = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        options = {"lr": 0.1, "weight_decay": zero}
        native, lifted = getattr(diffopt, name)(**options), from_torch(getattr(torch.optim, name), **options)
        self.both(native, lifted, [zero])

    def test_a_misfit_is_named_by_the_option(self):
        pair = (torch.tensor(0.9), {"a": torch.ones(5, dtype=torch.float64), "b": 0.9})
        optimizer = from_torch(torch.optim.Adam, betas=pair)
        with pytest.raises(diffopt.ShapeError, match=r"betas\[1\]\['a'\] has shape"):
            diffopt.solve(self.loss, self.params, optimizer=optimizer, steps=1)

    def test_it_says_what_it_is(self):
        assert repr(from_torch(torch.optim.SGD, lr=0.1, nesterov=True, momentum=0.5)) == (
            "from_torch(SGD, lr=0.1, nesterov=True, momentum=0.5)"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "NAdam", "Adagrad", "Rprop", "Adafactor"])
def test_other_dtypes_and_shapes(name, dtype):
    kind, start = getattr(torch.optim, name), tensors([(2, 3, 1, 2), (), (1,)], 0, dtype)
    start.append(tensors([(3,)], 1)[0])  # of float64, beside the others
    target = torch.tensor(0.7, dtype=dtype)
    solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, lr=0.01), steps=4)
    assert [p.dtype for p in solution.params] == [p.dtype for p in start]
    expected = trained(kind, {"lr": 0.01}, start, target, 4)
    # some tens of roundings
    assert relative_error(solution.params, expected) < 64 * torch.finfo(dtype).eps
    assert relative_error(solution.params[-1:], expected[-1:]) < 1e-6 + 64 * torch.finfo(dtype).eps


class TestNothingIsShared:
    """A lifted optimizer is a value: what one solve does is unknown to the next."""

    def run(self, optimizer):
        options = {"optimizer": optimizer, "steps": 5}
        return diffopt.solve(wavy, tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64), **options)

    @pytest.mark.parametrize("name", ["SGD", "NAdam", "Adagrad", "ASGD"])
    def test_solves_do_not_see_each_other(self, name):
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = from_torch(getattr(torch.optim, name), lr=0.1, **options)
        first = self.run(optimizer)
        with torch.no_grad():
            for x in [*first.params, *(x for buffer in first.state.buffers.values() for x in buffer)]:
                x.mul_(3)
        vmap(lambda t: diffopt.solve(wavy, [t.cos()], t, optimizer=optimizer, steps=2).params[0])(torch.ones(3))
        second, fresh = self.run(optimizer), self.run(from_torch(getattr(torch.optim, name), lr=0.1, **options))
        assert all(torch.equal(a, b) for a, b in zip(second.params, fresh.params, strict=True))

    def test_inputs_and_random_numbers_are_left_alone(self):
        start, lr = tensors(SHAPES, 0), torch.tensor(0.1, dtype=torch.float64)
        before, state = [p.clone() for p in start], torch.get_rng_state()
        optimizer = from_torch(torch.optim.Adam, lr=lr, eps=0.0123)
        solution = diffopt.solve(wavy, start, lr, optimizer=optimizer, steps=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(start, solution.params, strict=True))
        assert float(lr) == 0.1

    def test_it_can_be_made_under_every_mode_and_transform(self):
        kind = torch.optim.Adam

        def final(lr):
            optimizer = from_torch(kind, lr=lr, eps=0.0321)
            return diffopt.solve(lambda w: w.pow(4).sum(), torch.ones(2).double(), optimizer=optimizer, steps=2).params

        lr = torch.tensor(0.1, dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(final, lr)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            from_torch(kind, lr=0.1, eps=0.0111)
        with torch.inference_mode():
            from_torch(kind, lr=0.1, eps=0.0222)
        with torch.device("meta"):
            from_torch(kind, lr=0.1, eps=0.0333)
        assert relative_error([torch.func.jacrev(final)(lr)], [expected]) < 1e-12
        assert relative_error([vmap(torch.func.jacrev(final))(lr.expand(3))[2]], [expected]) < 1e-12
