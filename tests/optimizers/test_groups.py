"""``Groups``: which leaf is whose, hyperparameters of parts, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from oracles import relative_error

import diffopt
from diffopt import SGD, Adam, Clip, Groups, Schedule
from diffopt.errors import HyperparameterError, OptimizerError, ShapeError, StepsError, StructureError
from diffopt.estimators import Binomial

DOUBLE = torch.float64


def one_step(params, optimizer):
    """One step on the sum of all numbers: what was taken off each leaf is its step size."""

    def loss(p):
        leaves = torch.utils._pytree.tree_leaves(p)
        return torch.stack([leaf.sum() for leaf in leaves]).sum()

    return diffopt.solve(loss, params, optimizer=optimizer, steps=1).params


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=DOUBLE)


NESTED = {"body": {"w": zeros(2), "b": zeros(1)}, "head": [zeros(2), zeros(1)]}
FLAT = {"body.1.w": zeros(2), "body.1.b": zeros(1), "body.10.w": zeros(1), "head.w": zeros(1)}


def rates(params):
    return [float(-x.flatten()[0]) for x in torch.utils._pytree.tree_leaves(params)]


def test_names_begin_paths_of_nested_params_and_of_those_of_modules():
    got = one_step(NESTED, Groups({"body": SGD(0.1), "head": SGD(0.2)}))
    assert rates([got["body"]["b"], got["body"]["w"], *got["head"]]) == [0.1, 0.1, 0.2, 0.2]
    got = one_step(NESTED, Groups({"body.w": SGD(0.1), "body.b": SGD(0.3), "head.0": SGD(0.2), "head.1": SGD(0.4)}))
    assert rates([got["body"]["w"], got["body"]["b"], *got["head"]]) == [0.1, 0.3, 0.2, 0.4]
    got = one_step(FLAT, Groups({"body.1": SGD(0.1), "body.10": SGD(0.3), "head": SGD(0.2)}))
    assert {name: rates(x)[0] for name, x in got.items()} == dict(zip(FLAT, [0.1, 0.1, 0.3, 0.2], strict=True))


def test_a_function_of_the_path_says_whose_a_leaf_is():
    seen = []

    def by(path):
        seen.append(path)
        return "vectors" if path.endswith(".b") else "rest"

    got = one_step(FLAT, Groups(by, {"vectors": SGD(0.1), "rest": SGD(0.2)}))
    assert sorted(seen) == sorted(FLAT)
    assert {name: rates(x)[0] for name, x in got.items() if rates(x)[0] == 0.1} == {"body.1.b": 0.1}
    bare = one_step(zeros(2), Groups(lambda path: f"all{path}", {"all": SGD(0.5)}))
    assert rates(bare) == [0.5]


class Parts(NamedTuple):
    body: torch.Tensor
    head: list[torch.Tensor]


def test_fields_of_named_tuples_are_keys():
    params = {"net": Parts(zeros(2), [zeros(1), zeros(3)])}
    got = one_step(params, Groups({"net.body": SGD(0.1), "net.head.0": SGD(0.2), "net.head.1": SGD(0.3)}))
    assert rates([got["net"].body, *got["net"].head]) == [0.1, 0.2, 0.3]
    got = one_step(params, Groups({"net.body": SGD(0.1), "net.head": SGD([0.2, 0.3])}))
    assert rates([got["net"].body, *got["net"].head]) == [0.1, 0.2, 0.3]


def test_a_module_in_parts():
    """Against torch's param groups, with momentum in one and Adam in the other."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    function, params = diffopt.functional(net)
    groups = Groups({"0": SGD(0.05, 0.9, weight_decay=0.1), "2": Adam(0.02)})

    def loss(p, x, y):
        return (function(p, x) - y).square().mean()

    end = diffopt.solve(loss, params, x, y, optimizer=groups, steps=15).params
    body = torch.optim.SGD(net[0].parameters(), 0.05, 0.9, weight_decay=0.1)
    head = torch.optim.Adam(net[2].parameters(), 0.02)
    for _ in range(15):
        net.zero_grad()
        (net(x) - y).square().mean().backward()
        body.step()
        head.step()
    expected = dict(net.named_parameters())
    assert relative_error([end[k] for k in expected], [p.detach() for p in expected.values()]) < 1e-13


TREES = [
    ("like params", {"body": {"w": 0.1, "b": torch.tensor(0.2, dtype=DOUBLE)}, "head": [9.0, 9.0]}),
    ("without the others", {"body": {"w": 0.1, "b": 0.2}}),
    ("the branch with all", {"w": torch.tensor([0.1, 0.1], dtype=DOUBLE), "b": 0.2}),
]


@pytest.mark.parametrize(("how", "lr"), TREES, ids=[how for how, _ in TREES])
@pytest.mark.parametrize("nested", [False, True])
def test_a_tree_of_hyperparameters_looks_like_params_or_like_the_part(how, lr, nested):
    inner = Clip(SGD(lr), value=5.0) if nested else SGD(lr)
    got = one_step(NESTED, Groups({"body": inner, "head": SGD(0.7)}))
    assert rates([got["body"]["w"], got["body"]["b"]]) == [0.1, 0.2]
    scheduled = Schedule({"w": torch.tensor([0.1], dtype=DOUBLE), "b": torch.tensor([0.2], dtype=DOUBLE)})
    got = one_step(NESTED, Groups({"body": SGD(scheduled), "head": SGD(0.7)}))
    assert rates([got["body"]["w"], got["body"]["b"]]) == [0.1, 0.2]


def test_a_part_of_a_list_is_a_dict_by_position_and_one_leaf_is_itself():
    params = [zeros(2), zeros(1), zeros(3)]
    groups = Groups(lambda path: "odd" if path == "1" else "even", {"odd": SGD(0.5), "even": SGD({0: 0.1, 2: 0.2})})
    assert rates(one_step(params, groups)) == [0.1, 0.5, 0.2]
    one = torch.tensor([0.3], dtype=DOUBLE)
    groups = Groups(lambda path: "odd" if path == "1" else "even", {"odd": SGD(one), "even": SGD([0.1, 9.0, 0.2])})
    assert rates(one_step(params, groups)) == [0.1, 0.3, 0.2]
    ordered = OrderedDict(b=zeros(1), a=zeros(2))
    groups = Groups({"a": SGD({"a": 0.1}), "b": SGD(OrderedDict(b=0.2))})
    assert [float(-x[0]) for x in one_step(ordered, groups).values()] == [0.2, 0.1]


def test_groups_within_groups_see_whole_paths():
    inner = Groups({"body.w": SGD(0.1), "body.b": SGD({"b": 0.2})})
    got = one_step(NESTED, Groups({"body": inner, "head": SGD(0.3)}))
    assert rates([got["body"]["w"], got["body"]["b"], *got["head"]]) == [0.1, 0.2, 0.3, 0.3]


def test_buffers_are_named_after_their_group():
    params = {"a": torch.ones(2, dtype=DOUBLE), "b": torch.ones(2, dtype=DOUBLE)}
    groups = Groups({"a": SGD(0.1, 0.5), "b": Groups({"b": Adam(0.1)})})
    buffers = diffopt.solve(lambda p: 2 * p["a"].sum() + p["b"].sum(), params, optimizer=groups, steps=1).state.buffers
    assert sorted(buffers) == ["a.velocity", "b.b.mean", "b.b.square"]
    assert buffers["a.velocity"][0].tolist() == [2.0, 2.0]
    assert buffers["b.b.mean"][0].tolist() == pytest.approx([0.1, 0.1])


PAIRS = {
    "Adam first": lambda lr: {"a": Adam(lr, (0.8, 0.9), 0.05), "b": SGD(lr)},
    "Adam last": lambda lr: {"a": SGD(lr), "b": Adam(lr, (0.8, 0.9), 0.05)},
    "two momenta": lambda lr: {"a": SGD(lr, 0.8), "b": SGD(lr, 0.3)},
}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_buffers_of_parts_are_no_copies_of_the_params(order, make):
    """Two leaves of one shape, and as many buffers as would be one for each: not so, in estimators without graphs."""
    start = [torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in ([0.4, -1.0, 0.7], [1.1, 0.3, -0.6])]
    lr = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)

    def loss(p):
        return (p["a"] * p["b"]).sin().sum() + 0.5 * p["a"].square().sum() + p["b"].square().sum()

    def hypergradient(optimizer):
        params = dict(zip("ab", start, strict=True))
        end = diffopt.solve(loss, params, optimizer=optimizer, steps=4, estimator=Binomial(order)).params
        return torch.autograd.grad(end["a"].sum() + end["b"].square().sum(), [*start, lr])

    apart = Groups(make(lr))
    assert relative_error(hypergradient(apart), hypergradient(Mixing(apart))) < 1e-12


@dataclass(frozen=True)
class Mixing(diffopt.Optimizer):
    """The same, without the promise that coordinates are treated one by one."""

    optimizer: diffopt.Optimizer

    def init(self, params):
        return self.optimizer.init(params)

    def update(self, params, grads, buffers, step):
        return self.optimizer.update(params, grads, buffers, step)


ONE = SGD(0.1)
NO_GROUPS = [
    ([{}], HyperparameterError, "Groups: got dict {}, expected a dict from names"),
    ([ONE], HyperparameterError, "Groups: got SGD"),
    ([lambda path: "a"], HyperparameterError, "Groups: got function"),
    ([{"a": ONE}, {"a": ONE}], HyperparameterError, "by is dict"),
    ([{"a": 0.1}], OptimizerError, r"Groups: optimizers\['a'\] is float 0.1"),
    ([{"a": SGD}], OptimizerError, "call it, as in SGD"),
    ([{0: ONE}], HyperparameterError, "Groups: int 0 names a group, expected a string"),
    ([{"a": ONE, "a.b": ONE}], HyperparameterError, "the name 'a' begins 'a.b'.*a parameter would be in both"),
]


@pytest.mark.parametrize(("given", "error", "match"), NO_GROUPS)
def test_what_is_no_dict_of_optimizers_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        Groups(*given)


IN_NONE = "the parameter '{}' is in none of the groups '{}'"
PATHS = "the paths of params are 'body.b', 'body.w', 'head.0', ..."
OTHER = r"the function returned 'other' for 'body\.b', expected one of \['a'\]"
LR = r"optimizers\['body'\]\.lr"
THREE = torch.ones(3, dtype=DOUBLE)
MISFITS = [
    ([{"body": ONE}], StructureError, IN_NONE.format("head.0", "body")),
    ([{"body": ONE, "head": ONE, "tail": ONE}], StructureError, f"no parameter is in group 'tail'.*{PATHS}"),
    ([lambda path: None, {"a": ONE}], StructureError, IN_NONE.format("body.b", "a")),
    ([lambda path: "other", {"a": ONE}], StructureError, OTHER),
    ([{"body": SGD({"w": 0.1}), "head": ONE}], StructureError, f"{LR} is dict .*of params, or of the group's part"),
    ([{"body": SGD({"w": THREE, "b": 0.1}), "head": ONE}], ShapeError, rf"{LR}\['w'\] has shape \(3,\)"),
    ([{"body": SGD(Schedule([])), "head": ONE}], StepsError, f"the schedule of {LR} has 0 entries"),
]


@pytest.mark.parametrize(("given", "error", "match"), MISFITS)
def test_groups_that_do_not_fit_the_params_are_refused(given, error, match):
    with pytest.raises(error, match=match):
        one_step(NESTED, Groups(*given))
