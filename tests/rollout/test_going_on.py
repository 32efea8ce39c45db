"""Going on from a state: solves in a chain are one solve, and live ``torch.optim`` optimizers are read and written."""

from __future__ import annotations

import functools
from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from estimator_names import exact
from hypothesis import given
from hypothesis import strategies as st
from limits import sampled
from oracles import relative_error

import diffopt
from diffopt import Schedule, State, solve, state_of
from diffopt.estimators import MultiStep, Reverse, Truncated
from diffopt.tensors import tree

STEPS = 6
OPTIMIZERS = {
    "sgd": lambda lr, other: diffopt.SGD(lr),
    "dampened": lambda lr, other: diffopt.SGD(lr, momentum=other, dampening=0.3, weight_decay=0.02),
    "nesterov": lambda lr, other: diffopt.SGD(lr, momentum=other, nesterov=True),
    "adam": lambda lr, other: diffopt.Adam(lr, betas=(other, 0.99), amsgrad=True),
    "adamw": lambda lr, other: diffopt.AdamW(lr, betas=(0.8, other), weight_decay=0.1),
    "rmsprop": lambda lr, other: diffopt.RMSprop(lr, alpha=other, momentum=0.5, centered=True),
    "adagrad": lambda lr, other: diffopt.Adagrad(lr, lr_decay=0.2, initial_accumulator_value=other),
    "proximal": lambda lr, other: diffopt.ProximalGD(lr, other),
    "lifted": lambda lr, other: diffopt.from_torch(torch.optim.NAdam, lr=lr, betas=(0.7, 0.9)),
}
EXACT = exact(STEPS, "graph", "states", "every second", "sqrt", "forward", "unrolled", "window of one")


def loss(params, slope, batch):
    """Not a quadratic, and with a batch of its own at every step."""
    a, b = params["a"], params["b"]
    return (slope * a * batch).sin().sum() + (b * slope.sum()).square().sum() / 8 + (a.sum() * b).sum() / 5


def numbers(dtype=torch.float64):
    """Everything that is differentiated: the initial params, the argument, the batches, lr by step, another one."""
    given = {
        "params": {"a": torch.linspace(-1, 1, 3), "b": torch.tensor([0.7, -0.4])},
        "slope": torch.tensor([0.5, 1.0, 2.0]),
        "batches": 1 + torch.linspace(0, 1, 3 * STEPS).reshape(STEPS, 3).sin(),
        "lr": torch.linspace(0.06, 0.13, STEPS + 2),
        "other": torch.tensor(0.6),
    }
    return tree.map_leaves(lambda x: x.to(dtype).requires_grad_(), given)


def chain(given, make, parts, estimator, **options):
    """The solution after the parts one after the other, each from the state after the one before."""
    optimizer, state, done = make(Schedule(given["lr"]), given["other"]), given["params"], 0
    for steps in parts:
        options.update(
            batches=given["batches"][done : done + steps], optimizer=optimizer, steps=steps, estimator=estimator
        )
        state, done = solve(loss, state, given["slope"], **options).state, done + steps
    return state


def measured(state):
    """A scalar that depends on params and buffers."""
    leaves = tree.flatten((state.params, state.buffers))[0]
    return sum((x.cos() * (1 + i)).sum() for i, x in enumerate(leaves))


def gradient(given, *others, **options):
    leaves, _ = tree.flatten(given)
    found = torch.autograd.grad(measured(chain(given, *others, **options)), leaves, materialize_grads=True)
    return torch.cat([x.flatten() for x in found])


parts = st.lists(st.integers(0, 4), min_size=2, max_size=4).filter(lambda x: sum(x) == STEPS)


@functools.cache
def in_one(name, mode):
    """The state after one solve of all steps, and the hypergradient."""
    values = numbers()
    end = chain(values, OPTIMIZERS[name], [STEPS], EXACT[mode]).detach()
    return end, gradient(values, OPTIMIZERS[name], [STEPS], EXACT[mode])


@pytest.mark.parametrize("name", sampled(OPTIMIZERS, 3))
@given(parts=parts, mode=st.sampled_from(sorted(EXACT)))
def test_solves_in_a_chain_are_one_solve(name, parts, mode):
    """States, and hypergradients of all that goes in, a schedule by the number of the step among them."""
    values, (whole, expected) = numbers(), in_one(name, mode)
    chained = chain(values, OPTIMIZERS[name], parts, EXACT[mode])
    assert chained.step == STEPS
    torch.testing.assert_close(tuple(chained.detach()), tuple(whole), rtol=1e-11, atol=1e-12)
    found = gradient(values, OPTIMIZERS[name], parts, EXACT[mode])
    assert expected.norm() > 0.1
    assert relative_error([found], [expected]) < 1e-10


@pytest.mark.parametrize("name", ["dampened", "adam"])
@pytest.mark.parametrize("mode", ["graph", "sqrt", "unrolled"])
def test_under_vmap_a_state_goes_from_call_to_call(name, mode):
    """One call of vmap returns the states of its tasks, a second goes on from them."""
    values, estimator, factors = numbers(), EXACT[mode], torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    optimizer = OPTIMIZERS[name](Schedule(values["lr"]), values["other"])

    def some(state, factor, first, last):
        batches = values["batches"][first:last]
        slope = factor * values["slope"]
        return solve(
            loss, state, slope, batches=batches, optimizer=optimizer, steps=last - first, estimator=estimator
        ).state

    def whole(factors):
        return torch.func.vmap(lambda f: some(values["params"], f, 0, STEPS))(factors)

    def halves(factors):
        first = torch.func.vmap(lambda f: some(values["params"], f, 0, 2))(factors)
        assert first.step == 2
        return torch.func.vmap(lambda s, f: some(s, f, 2, STEPS))(first, factors)

    leaves = tree.flatten(values)[0]
    found, expected = (
        torch.autograd.grad(measured(way(factors)), leaves, materialize_grads=True) for way in (halves, whole)
    )
    assert relative_error(found, expected) < 1e-10


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("name", sampled(["adam", "nesterov"], 2))
def test_compiled_steps_count_on(name):
    """A compiled step is given the number of its first update; another start is not another function."""
    values = numbers()
    expected = gradient(values, OPTIMIZERS[name], [STEPS], Reverse())
    for split in ([2, 4], [3, 3]):
        found = gradient(values, OPTIMIZERS[name], split, Reverse(), compile=True)
        assert relative_error([found], [expected]) < 1e-10


def test_windows_go_on_where_a_window_ends():
    values = numbers()
    expected, found = (gradient(values, OPTIMIZERS["adam"], split, MultiStep(2)) for split in ([STEPS], [4, 2]))
    assert relative_error([found], [expected]) < 1e-10


def test_a_detached_state_truncates():
    """What came before is a constant: as truncated back-propagation of a solve of all steps has it."""
    values = numbers()
    optimizer = OPTIMIZERS["dampened"](Schedule(values["lr"]), values["other"])
    first = chain(values, OPTIMIZERS["dampened"], [4], None).detach()
    assert not any(x.requires_grad for x in tree.flatten(first)[0])
    found = solve(loss, first, values["slope"], steps=2, optimizer=optimizer, batches=values["batches"][4:]).state
    whole = chain(values, OPTIMIZERS["dampened"], [STEPS], Truncated(2))
    wanted = [values["slope"], values["lr"], values["other"]]
    found, expected = (torch.autograd.grad(measured(state), wanted) for state in (found, whole))
    assert relative_error(found, expected) < 1e-10


def test_params_start_anew_and_a_state_does_not():
    """The error that a chain of params makes is no round-off: which of the two is meant must be said."""
    values = numbers()
    make = OPTIMIZERS["adam"]
    optimizer, whole = make(Schedule(values["lr"]), values["other"]), chain(values, make, [STEPS], None)
    first = solve(loss, values["params"], values["slope"], batches=values["batches"][:3], optimizer=optimizer, steps=3)
    anew = solve(loss, first.params, values["slope"], batches=values["batches"][3:], optimizer=optimizer, steps=3)
    assert anew.state.step == 3
    assert float((anew.params["a"] - whole.params["a"]).abs().max().detach()) > 0.01


# ------------------------------------------------------------------------------------------------ the object


def test_a_state_unpacks_moves_and_is_stored(tmp_path):
    state = chain(numbers(), OPTIMIZERS["adam"], [2], None)
    params, buffers = state
    assert params is state.params
    assert buffers is state.buffers
    single = state.to(torch.float32)
    assert {x.dtype for x in tree.flatten(single)[0]} == {torch.float32}
    assert single.step == 2
    torch.save(state.state_dict(), tmp_path / "state.pt")
    read = State.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(tuple(read), tuple(state.detach()), rtol=0, atol=0)
    assert read.step == 2
    going_on = [
        solve(lambda w: w["a"].sum() + w["b"].square().sum(), s, optimizer=diffopt.Adam(amsgrad=True), steps=1).params
        for s in (state, read)
    ]
    torch.testing.assert_close(going_on[0], going_on[1], rtol=0, atol=0)


MOMENTUM = diffopt.SGD(0.1, momentum=0.9)
SHORT = diffopt.Adam(Schedule([0.1, 0.1]))
OF_SOMETHING_ELSE = [
    (lambda s: s, MOMENTUM, r"the state's buffers are .*expected those of SGD: \['velocity'\]"),
    (lambda s: State(s.params, None), diffopt.Adam(), "the state's buffers are NoneType"),
    (lambda s: replace(s, buffers={"mean": 0, "square": 1}), diffopt.Adam(), "the state's buffer 'mean' is int 0"),
    (lambda s: State(s.params, {**s.buffers, "mean": torch.ones(2)}, 2), diffopt.Adam(), "buffer 'mean'"),
    (lambda s: s.to(torch.float32), SHORT, "at least one per step since the first: 4"),
]


@pytest.mark.parametrize(("wrong", "optimizer", "told"), [(lambda s: s.params, MOMENTUM, None), *OF_SOMETHING_ELSE])
def test_a_state_of_something_else_is_refused(wrong, optimizer, told):
    def going_on(start, optimizer):
        return solve(lambda w: w["a"].square().sum(), start, optimizer=optimizer, steps=2).state

    given = wrong(going_on({"a": torch.ones(3, dtype=torch.float64)}, diffopt.Adam()))
    if told is None:
        assert going_on(given, optimizer).step == 2
        return
    with pytest.raises(diffopt.DiffoptError, match=told):
        going_on(given, optimizer)


@pytest.mark.parametrize("step", [-1, 1.5, "2", None])
def test_the_number_of_a_state_is_a_count(step):
    with pytest.raises(diffopt.DiffoptError, match="State: step is"):
        State(torch.ones(1), {}, step)


@pytest.mark.parametrize("wrong", [{}, {"params": 1, "buffers": 2, "step": 0}, [], {"params": 1, "buffers": {}}])
def test_a_dictionary_of_something_else_is_no_state(wrong):
    with pytest.raises(diffopt.DiffoptError, match=r"State\.from_state_dict got"):
        State.from_state_dict(wrong)


ONES, TWOS = torch.ones(2), torch.full((2,), 2.0)


PAIR = {"a": ONES, "b": ONES}
OF_OTHERS = [
    (PAIR, {"b": ONES, "c": TWOS}, r"\['a'\] is missing, .*\['c'\] is too many"),
    (PAIR, (ONES, TWOS), r"\['a'\] is missing"),
    ([ONES, ONES], {"x": ONES, "y": TWOS}, r"a tree like params"),
    ({"a": {"x": ONES}, "b": ONES}, {"a": ONES, "b": {"x": TWOS}}, r"\['a'\]\['x'\] is missing"),
    (PAIR, {"a": ONES}, "or a tuple of other length"),
]


@pytest.mark.parametrize(("params", "velocity", "told"), OF_OTHERS)
def test_a_buffer_of_other_keys_belongs_to_other_parameters(params, velocity, told):
    """As many tensors of the same shapes, which would go to one another's parameters."""
    state = State(params, {"velocity": velocity}, 1)
    live = [ONES.clone().requires_grad_() for _ in range(2)]
    training = torch.optim.SGD(live, 0.1, momentum=0.9)
    with pytest.raises(diffopt.OptimizerError, match=told):
        solve(lambda p: p["a"].sum(), state, optimizer=MOMENTUM, steps=1)
    with pytest.raises(diffopt.OptimizerError, match=told):
        state.into(training)
    assert not training.state
    assert bool((live[0] == 1).all())


def test_buffers_are_found_by_their_keys():
    """A dictionary that keeps its order is the same tree, and a group's buffers stay a tuple or a list."""

    def moved(state, optimizer):
        """Where the buffers alone lead."""
        return solve(lambda p: 0 * p["a"].sum() + 0 * p["b"].sum(), state, optimizer=optimizer, steps=1).params

    velocity = OrderedDict(b=TWOS, a=torch.zeros(2))
    for start in (PAIR, OrderedDict(b=ONES, a=ONES)):
        found = moved(State(start, {"velocity": velocity}, 1), diffopt.SGD(1.0, 1.0))
        assert {key: float(x[0]) for key, x in found.items()} == {"a": 1, "b": -1}
    groups = diffopt.Groups({"a": diffopt.SGD(1.0, 1.0), "b": diffopt.SGD(1.0)})
    for kind in (tuple, list):
        assert float(moved(State(PAIR, {"a.velocity": kind([TWOS])}, 1), groups)["a"][0]) == -1


# ------------------------------------------------------------------------------------------------ live optimizers


def native(name, **options):
    """A class of torch's with options, and the library's own of that name."""
    return getattr(torch.optim, name), options, getattr(diffopt, name)(**options)


def lifted(name, **options):
    """A class of torch's with options, and what it is lifted to."""
    return getattr(torch.optim, name), options, diffopt.from_torch(getattr(torch.optim, name), **options)


LIVE = {
    "sgd": native("SGD", lr=0.05),
    "momentum": native("SGD", lr=0.05, momentum=0.9, dampening=0.3),
    "adam": native("Adam", lr=0.05, amsgrad=True),
    "adamw": native("AdamW", lr=0.05),
    "rmsprop": native("RMSprop", lr=0.01, momentum=0.5, centered=True),
    "adagrad": native("Adagrad", lr=0.1, initial_accumulator_value=0.2, lr_decay=0.1),
    "nadam": lifted("NAdam", lr=0.05),
    "radam": lifted("RAdam", lr=0.05),
}


class Training:
    """A network in training by ``torch.optim``, and the same as an inner problem."""

    def __init__(self, name, named=False):
        generator = torch.Generator().manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        self.inputs = torch.randn(12, 2, generator=generator, dtype=torch.float64)
        self.kind, self.options, self.ours = LIVE[name]
        self.named = named
        self.optimizer = self.anew()
        self.params = dict(self.net.named_parameters())
        self.like = self.ours if name in ("nadam", "radam") else None

    def anew(self):
        return self.kind(self.net.named_parameters() if self.named else self.net.parameters(), **self.options)

    def loss(self, params):
        out = torch.func.functional_call(self.net, params, (self.inputs,))
        return (out[:, 0] - self.inputs.prod(1)).square().mean()

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss(self.params).backward()
            self.optimizer.step()

    def ahead(self, state, steps):
        return solve(self.loss, state, optimizer=self.ours, steps=steps)

    def same(self, params):
        pairs = zip(self.params.values(), params.values(), strict=True)
        return all(torch.allclose(x, y, rtol=1e-12, atol=1e-13) for x, y in pairs)


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("made", [0, 1, 3])
def test_a_live_optimizer_is_read_and_goes_on_as_it_would(name, made):
    training = Training(name)
    training.train(made)
    state = state_of(training.optimizer, training.params, like=training.like)
    if name not in ("sgd", "momentum"):
        assert state.step == made
    found = training.ahead(state, 3)
    assert not training.same(found.params)
    training.train(3)
    assert training.same(found.params)
    assert not any(x.requires_grad for x in tree.flatten(state)[0])
    again = training.ahead(state, 3)  # from copies, which training has left alone
    torch.testing.assert_close(again.params, found.params, rtol=0, atol=0)


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("named", [False, True])
def test_a_state_is_written_back_and_training_goes_on_from_it(name, named):
    training = Training(name, named)
    training.train(2)
    found = training.ahead(state_of(training.optimizer, training.params, like=training.like), 2)
    with torch.no_grad():
        for p in training.net.parameters():
            p.zero_()
    if training.like is None:
        training.optimizer = training.anew()  # also one that has made no step yet
    found.state.into(training.optimizer)
    assert training.same(found.params)
    further = training.ahead(found.state, 3)
    training.train(3)
    assert training.same(further.params)


def test_a_tree_says_which_parameter_is_which():
    """Two of one shape, of which the optimizer was told in another order than the state has."""
    first, second = (torch.full((2,), x, requires_grad=True) for x in (1.0, 2.0))
    optimizer = torch.optim.SGD([first, second])
    state = State({"b": torch.full((2,), 5.0), "a": torch.full((2,), 7.0)}, {})
    state.into(optimizer)  # in the order in which the dictionary was written
    assert (first[0], second[0]) == (5, 7)
    state.into(optimizer, {"a": first, "b": second})
    assert (first[0], second[0]) == (7, 5)


def test_what_a_live_optimizer_cannot_say_is_refused():
    training = Training("nadam")
    refused = pytest.raises(diffopt.DiffoptError, match=r"NAdam.*one of.*or like=.*from_torch")
    with refused:
        state_of(training.optimizer, training.params)
    copies = {name: p.detach().clone() for name, p in training.params.items()}
    with pytest.raises(diffopt.DiffoptError, match="which NAdam does not hold"):
        state_of(training.optimizer, copies, like=training.ours)
    with pytest.raises(diffopt.DiffoptError, match="optimizer is SGD"):
        state_of(diffopt.SGD(0.1), training.params)
    training.train(1)
    with pytest.raises(diffopt.DiffoptError, match=r"NAdam keeps no 'velocity'"):
        state_of(training.optimizer, training.params, like=diffopt.SGD(0.1, momentum=0.9))
    with pytest.raises(diffopt.DiffoptError, match="has not made a step yet"):
        state_of(training.optimizer, training.params, like=training.ours).into(training.anew())


def test_steps_on_some_parameters_only_are_refused():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([a, b])
    a.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(diffopt.DiffoptError, match=r"made 1 steps on .* 0 on"):
        state_of(optimizer, {"a": a, "b": b})
    assert state_of(optimizer, {"a": a}).step == 1


@pytest.mark.parametrize(("held", "told"), [([1, 2, 3], "holds 3 parameters"), ([2, 4], r"expected \(4,\)")])
def test_a_state_of_another_network_is_not_written(held, told):
    optimizer = torch.optim.SGD([torch.ones(n, requires_grad=True) for n in held], lr=0.1)
    with pytest.raises(diffopt.DiffoptError, match=told):
        State({"a": torch.ones(2), "b": torch.ones(3)}, {}).into(optimizer)


NET = {"a": torch.ones(2, 3), "b": torch.ones(3)}


def pair(kind, options=(), steps=1):
    """A live optimizer on a matrix and a vector, with ones in them, after some steps."""
    params = {key: x.clone().requires_grad_() for key, x in NET.items()}
    training = kind(params.values(), lr=0.1, **dict(options))
    walk(training, params, steps)
    return training, params


def walk(training, params, steps):
    for _ in range(steps):
        for x in params.values():
            x.grad = x.detach().sin()
        training.step()


def solved(optimizer, steps=2, start=NET):
    """A state after some steps along the same gradients."""
    return solve(lambda p: -(p["a"].cos().sum() + p["b"].cos().sum()), start, optimizer=optimizer, steps=steps).state


SGD, ADAM, RMSPROP, ADAGRAD = torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad
FOREIGN = {
    "sgd into momentum": (diffopt.SGD(0.1), SGD, {"momentum": 0.9}),
    "momentum into sgd": (diffopt.SGD(0.1, momentum=0.9), SGD, {}),
    "momentum into adam": (diffopt.SGD(0.1, momentum=0.9), ADAM, {}),
    "adam into momentum": (diffopt.Adam(), SGD, {"momentum": 0.9}),
    "average": (diffopt.EMA(diffopt.SGD(0.1)), SGD, {}),
    "momentum into adagrad": (diffopt.SGD(0.1, momentum=0.9), ADAGRAD, {}),
    "rmsprop with momentum into adagrad": (diffopt.RMSprop(momentum=0.9), ADAGRAD, {}),
    "centred rmsprop into plain": (diffopt.RMSprop(centered=True), RMSPROP, {}),
    "adam into amsgrad": (diffopt.Adam(), ADAM, {"amsgrad": True}),
    "amsgrad into adam": (diffopt.Adam(amsgrad=True), ADAM, {}),
    "groups": (diffopt.Groups({"a": diffopt.SGD(0.1, 0.9), "b": diffopt.Adam()}), SGD, {"momentum": 0.9}),
    "groups into adam": (diffopt.Groups({"a": diffopt.Adam(), "b": diffopt.Adam()}), ADAM, {}),
    "adam into nadam": (diffopt.Adam(), torch.optim.NAdam, {}),
    "radam into nadam": (diffopt.from_torch(torch.optim.RAdam, lr=0.1), torch.optim.NAdam, {}),
    "nadam into radam": (diffopt.from_torch(torch.optim.NAdam, lr=0.1), torch.optim.RAdam, {}),
    "sgd into adadelta": (diffopt.SGD(0.1), torch.optim.Adadelta, {}),
    "lifted adagrad into rmsprop": (diffopt.from_torch(ADAGRAD, lr=0.1), RMSPROP, {}),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("made", [0, 2])
def test_a_state_of_another_optimizer_is_not_written(name, made):
    """Refused before anything is written, into one that has made steps and one that has not."""
    ours, kind, options = FOREIGN[name]
    training, params = pair(kind, options, made)
    before = deepcopy((dict(params), training.state_dict()))
    with pytest.raises(diffopt.OptimizerError, match=r"the state's buffers are|has not made a step yet"):
        solved(ours).into(training)
    torch.testing.assert_close((dict(params), training.state_dict()), before, rtol=0, atol=0)
    assert made or kind is ADAGRAD or not training.state


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_a_lifted_known_class_is_written_by_its_own_names(name):
    kind = getattr(torch.optim, name)
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    training, params = pair(kind, options, 0)
    state = solved(diffopt.from_torch(kind, lr=0.1, **options))
    state.into(training)
    walk(training, params, 1)
    _, live = pair(kind, options, 3)
    torch.testing.assert_close(params, live)


@pytest.mark.parametrize("name", ["Adafactor", "Rprop", "Adamax", "ASGD"])
def test_a_lifted_class_is_written_where_it_keeps_what(name):
    """Adafactor keeps other buffers of a matrix than of a vector."""
    kind = getattr(torch.optim, name)
    training, params = pair(kind, {}, 1)
    solved(diffopt.from_torch(kind, lr=0.1), 3).into(training)
    walk(training, params, 2)
    _, live = pair(kind, {}, 5)
    torch.testing.assert_close(params, live)
    with pytest.raises(diffopt.OptimizerError, match="has made steps"):
        solved(diffopt.from_torch(kind, lr=0.1), 0).into(training)
    anew, params = pair(kind, {}, 0)
    solved(diffopt.from_torch(kind, lr=0.1), 0).into(anew)
    walk(anew, params, 5)
    torch.testing.assert_close(params, live)


def test_buffers_of_other_shapes_are_not_written():
    training, _ = pair(ADAM)
    state = solved(diffopt.Adam())
    turned = replace(state, buffers={**state.buffers, "mean": {"a": torch.ones(3, 2), "b": torch.ones(3)}})
    told = r"buffer for 'exp_avg' of Adam is .*expected tensors of shapes"
    for wrong in (turned, replace(state, buffers={**state.buffers, "mean": {"a": 1, "b": 2}})):
        with pytest.raises(diffopt.OptimizerError, match=told):
            wrong.into(training)
    with pytest.raises(diffopt.OptimizerError, match="buffers are NoneType"):
        State(state.params, None, 1).into(training)


@pytest.mark.parametrize("made", [0, 1])
@pytest.mark.parametrize(("kind", "ours"), [(ADAM, diffopt.Adam(0.1)), (SGD, diffopt.SGD(0.1, momentum=0.9))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_of_another_precision_is_cast(made, kind, ours, dtype):
    options = {"momentum": 0.9} if kind is SGD else {}
    training, params = pair(kind, options, made)
    solved(ours).to(dtype).into(training)
    assert {x.dtype for store in training.state.values() for x in store.values()} == {torch.float32}
    walk(training, params, 1)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
@pytest.mark.parametrize("made", [0, 1])
def test_the_count_stays_what_it_was(options, made):
    """In double precision by default only where torch has it so, and a count that is there keeps its dtype."""
    training, params = pair(ADAM, options, made)
    torch.set_default_dtype(torch.float64)
    try:
        solved(diffopt.Adam(0.1)).into(training)
        dtype = torch.float32 if made or "fused" in options else torch.float64
        assert {(store["step"].dtype, float(store["step"])) for store in training.state.values()} == {(dtype, 2.0)}
        walk(training, params, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(params, pair(ADAM, options, 3)[1])


class MyAdam(torch.optim.Adam):
    """A subclass that changes nothing."""


class MySGD(torch.optim.SGD):
    """Another."""


class Counting(torch.optim.AdamW):
    """One that keeps something besides."""

    def step(self, closure=None):
        super().step(closure)
        for store in self.state.values():
            store["norm"] = store["exp_avg"].norm()


SUBCLASSES = {
    "adam": (MyAdam, {}, diffopt.Adam(0.1)),
    "lifted": (MyAdam, {}, diffopt.from_torch(MyAdam, lr=0.1)),
    "momentum": (MySGD, {"momentum": 0.9}, diffopt.SGD(0.1, momentum=0.9)),
    "plain": (MySGD, {}, diffopt.SGD(0.1)),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_is_read_and_written_as_what_it_is(name):
    kind, options, ours = SUBCLASSES[name]
    training, params = pair(kind, options, 2)
    with pytest.raises(diffopt.OptimizerError, match="or like="):
        state_of(training, params)
    solved(ours, start=state_of(training, params, like=ours)).into(training)
    walk(training, params, 1)
    torch.testing.assert_close(params, pair(kind, options, 5)[1])


def test_what_a_subclass_keeps_besides_is_not_left_behind():
    training, params = pair(Counting, {}, 2)
    state = state_of(training, params, like=diffopt.AdamW(0.1))
    with pytest.raises(diffopt.OptimizerError, match="'norm'"):
        state.into(training)
    with pytest.raises(diffopt.OptimizerError, match="has not made a step"):
        state.into(pair(Counting, {}, 0)[0])
