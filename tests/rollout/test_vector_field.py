"""Vector fields in the place of a loss: every estimator and every transform, against autograd through a plain loop."""

from __future__ import annotations

from functools import partial

import oracles
import pytest
import torch
from cases import OPTIMIZERS as CASES
from estimator_names import exact
from fields import BATCHES, STEPS, arguments, normal, outer, start, turning, walked
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import relative_error
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Binomial, ESJacobian, ForwardMode, Krylov, MultiStep, Reverse, Truncated, Unrolled

ROUND_OFF = 1e-10
FIELD = diffopt.VectorField(turning)
BY_STEPS = (
    "default",
    "graph",
    "states",
    "every third",
    "sqrt",
    "offloaded",
    "unrolled",
    "forward",
    "forward in chunks",
)
EXACT = [
    *exact(STEPS, *BY_STEPS, "forward in chunks").values(),
    *exact(STEPS, "truncated at all", "truncated in states", "binomial of all", "window of one").values(),
    *(Binomial(STEPS, chunk_size=2), MultiStep(1, Binomial(STEPS))),
]
OPTIMIZERS = {
    "descent": (diffopt.SGD, oracles.sgd_step, {"lr": 0.1}, {}),
    "momentum": (diffopt.SGD, oracles.sgd_step, {"lr": 0.07, "momentum": 0.7, "weight_decay": 0.04}, {}),
    "nesterov": (diffopt.SGD, oracles.sgd_step, {"lr": 0.06, "momentum": 0.5}, {"nesterov": True}),
    "adam": (diffopt.Adam, oracles.adam_step, {"lr": 0.1, "eps": 0.1}, {"betas": (0.8, 0.9)}),
    "rmsprop": (diffopt.RMSprop, oracles.rmsprop_step, {"lr": 0.05, "eps": 0.1}, {"alpha": 0.8}),
}


def leaves(optimizer: str) -> list[torch.Tensor]:
    """The start, the arguments, the batches and the hyperparameters, all in one list."""
    params, (coupling, pull) = start(), arguments()
    hypers = [torch.tensor(x, dtype=torch.float64) for x in OPTIMIZERS[optimizer][2].values()]
    made = [params["w"], params["in"]["b"], coupling, pull["w"], pull["b"], BATCHES, *hypers]
    return [x.clone().requires_grad_() for x in made]


def sides(optimizer: str, *tensors: torch.Tensor):
    w, b, coupling, pull_w, pull_b, batches, *hypers = tensors
    options = {**dict(zip(OPTIMIZERS[optimizer][2], hypers, strict=True)), **OPTIMIZERS[optimizer][3]}
    return {"w": w, "in": {"b": b}}, (coupling, {"w": pull_w, "b": pull_b}), batches, options


def by_library(optimizer: str, estimator, *tensors: torch.Tensor, compile: bool = False) -> torch.Tensor:
    params, args, batches, options = sides(optimizer, *tensors)
    given = {"optimizer": OPTIMIZERS[optimizer][0](**options), "steps": STEPS, "batches": batches, "compile": compile}
    return outer(diffopt.solve(FIELD, params, *args, estimator=estimator, **given).params)


def by_hand(optimizer: str, *tensors: torch.Tensor) -> torch.Tensor:
    params, args, batches, options = sides(optimizer, *tensors)
    return outer(walked(OPTIMIZERS[optimizer][1], turning, params, args, batches, options))


def expected(optimizer: str) -> list[torch.Tensor]:
    made = leaves(optimizer)
    return list(torch.autograd.grad(by_hand(optimizer, *made), made))


@pytest.mark.parametrize("estimator", EXACT, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_estimators_equal_autograd_through_a_plain_loop(optimizer, estimator):
    made = leaves(optimizer)
    got = torch.autograd.grad(by_library(optimizer, estimator, *made), made)
    assert relative_error(got, expected(optimizer)) < ROUND_OFF


def test_krylov_with_a_space_as_large_as_the_system():
    made = leaves("momentum")
    got = torch.autograd.grad(by_library("momentum", Krylov(5 * STEPS), *made), made)
    assert relative_error(got, expected("momentum")) < ROUND_OFF


def test_differences_along_all_directions():
    made = leaves("descent")
    estimator = ESJacobian(64, 1e-5, "orthonormal")
    got = torch.autograd.grad(by_library("descent", estimator, *made), made)
    assert relative_error(got, expected("descent")) < 1e-6  # of central differences


@pytest.mark.parametrize("steps", [1, 3])
def test_truncated_goes_back_through_the_last_steps_only(steps):
    made = leaves("descent")
    got = torch.autograd.grad(by_library("descent", Truncated(steps), *made), made)
    params, args, batches, options = sides("descent", *made)
    with torch.no_grad():
        before = walked(oracles.sgd_step, turning, params, args, batches[:-steps], options)
    now = {"w": before["w"].requires_grad_(), "in": {"b": before["in"]["b"].requires_grad_()}}
    end = outer(walked(oracles.sgd_step, turning, now, args, batches[-steps:], options))
    answer = torch.autograd.grad(end, [now["w"], now["in"]["b"], *made[2:]])
    assert relative_error(got, answer) < ROUND_OFF


@given(seed=st.integers(0, 2**20), case=st.sampled_from(CASES), estimator=st.sampled_from(EXACT), batched=st.booleans())
def test_random_fields_under_every_optimizer(seed, case, estimator, batched):
    """A field with a random coupling; batched: beside other tasks, which take no part in the answer."""
    names, values = zip(*case.learned.items(), strict=True)
    made = [normal(seed, 3), normal(seed + 1, 2), 0.5 * normal(seed + 2, 3, 3), 0.3 * normal(seed + 3, 3)]
    made += [normal(seed + 4, 2), normal(seed + 5, STEPS, 3), *(torch.tensor(x, dtype=torch.float64) for x in values)]
    made = [x.requires_grad_() for x in made]

    def parts(w, b, coupling, pull_w, pull_b, batches, *hypers):
        args, values = (coupling, {"w": pull_w, "b": pull_b}), dict(zip(names, hypers, strict=True))
        return {"w": w, "in": {"b": b}}, args, batches, values

    def library(*tensors):
        params, args, batches, values = parts(*tensors)
        options = {"optimizer": case.optimizer(values), "steps": STEPS, "batches": batches, "estimator": estimator}
        return outer(diffopt.solve(FIELD, params, *args, **options).params)

    params, args, batches, hypers = parts(*made)
    hand = outer(walked(case.step, turning, params, args, batches, case.options(hypers), case.buffers))
    assume(bool(hand.isfinite()) and abs(float(hand.detach())) < 1e3)
    answer = torch.autograd.grad(hand, made, materialize_grads=True)
    assume(max(float(x.abs().max()) for x in answer) < 1e4)
    value = library(*made)
    if batched:
        pairs = [torch.stack([0.5 * made[0], made[0]]), *made[1:]]
        value = vmap(library, in_dims=(0,) + (None,) * (len(made) - 1))(*pairs)[1]
    got = torch.autograd.grad(value, made, materialize_grads=True)
    # some derivatives are zero in exact arithmetic, such as those for Adam's betas after one step
    assert relative_error(got, answer) < 1e-8


ESTIMATORS = [Reverse(), Reverse(1), Reverse(2), Unrolled(), ForwardMode(), Truncated(STEPS), Binomial(STEPS)]
TASKS = 3


def stacked(optimizer: str) -> list[torch.Tensor]:
    """A start and a batch of their own for each task; all else is shared."""
    made = [x.detach() for x in leaves(optimizer)]
    made[0], made[5] = normal(11, TASKS, 3), normal(12, TASKS, STEPS, 3)
    return made


DIMS = (0, None, None, None, None, 0, None, None, None)


def rows(optimizer: str) -> list[list[torch.Tensor]]:
    """Each task's derivatives, by a plain loop over plain loops."""
    found = []
    for i in range(TASKS):
        own = [x[i] if dim == 0 else x for x, dim in zip(stacked(optimizer), DIMS, strict=True)]
        made = [x.clone().requires_grad_() for x in own]
        found.append(list(torch.autograd.grad(by_hand(optimizer, *made), made)))
    return found


def over_tasks(found: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    columns = [torch.stack(column) for column in zip(*found, strict=True)]
    return [column if dim == 0 else column.sum(0) for column, dim in zip(columns, DIMS, strict=True)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
class TestTransforms:
    def test_vmap_then_backward(self, estimator):
        made = [x.clone().requires_grad_() for x in stacked("momentum")]
        total = vmap(partial(by_library, "momentum", estimator), in_dims=DIMS)(*made).sum()
        assert relative_error(torch.autograd.grad(total, made), over_tasks(rows("momentum"))) < ROUND_OFF

    def test_grad_of_vmap(self, estimator):
        def total(*made):
            return vmap(partial(by_library, "momentum", estimator), in_dims=DIMS)(*made).sum()

        got = grad(total, argnums=tuple(range(9)))(*stacked("momentum"))
        assert relative_error(got, over_tasks(rows("momentum"))) < ROUND_OFF

    def test_vmap_of_grad(self, estimator):
        of_one = grad(partial(by_library, "momentum", estimator), argnums=tuple(range(9)))
        got = vmap(of_one, in_dims=DIMS)(*stacked("momentum"))
        for i, row in enumerate(rows("momentum")):
            assert relative_error([x[i] for x in got], row) < ROUND_OFF

    def test_nested_vmap_of_grad(self, estimator):
        of_one = grad(partial(by_library, "momentum", estimator), argnums=tuple(range(9)))
        made = stacked("momentum")
        made[6] = torch.stack([0.5 * made[6], made[6]])
        outermost = (None,) * 6 + (0, None, None)
        got = vmap(vmap(of_one, in_dims=DIMS), in_dims=outermost)(*made)
        for i, row in enumerate(rows("momentum")):
            assert relative_error([x[1, i] for x in got], row) < ROUND_OFF


@pytest.mark.compiler
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(2), Truncated(2)], ids=str)
def test_compiled_steps_give_the_same(estimator):
    made = leaves("momentum")
    plain = torch.autograd.grad(by_library("momentum", estimator, *made), made)
    compiled = torch.autograd.grad(by_library("momentum", estimator, *made, compile=True), made)
    assert relative_error(compiled, plain) < ROUND_OFF


@pytest.mark.compiler
def test_a_function_is_compiled_as_a_loss_and_as_a_field():
    """Both are called ``squares`` by the compiler's cache, and differ."""

    def squares(w):
        return (w**3).sum() if w.ndim == 0 else w

    w = torch.tensor(0.5, dtype=torch.float64)
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "compile": True}
    of_loss = diffopt.solve(squares, w, **options).params
    of_field = diffopt.solve(diffopt.VectorField(squares), w, **options).params
    again = diffopt.solve(diffopt.VectorField(squares), w, **options).params
    first = 0.5 - 0.1 * 3 * 0.25
    assert float(of_loss) == pytest.approx(first - 0.1 * 3 * first**2, abs=1e-14)
    assert float(of_field) == float(again) == pytest.approx(0.4875 - 0.1 * 0.4875**3, abs=1e-14)


# ------------------------------------------------------------------------------------------ values


def test_what_is_reported_is_the_norm_of_the_field():
    def away(w):
        return {"a": w["a"] - 3.0, "b": 2 * w["b"]}

    w = {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor(2.0)}
    solution = diffopt.solve(diffopt.VectorField(away), w, optimizer=diffopt.SGD(0.5), steps=2)
    torch.testing.assert_close(solution.losses, torch.tensor([5.0, 1.5]))
    assert not solution.losses.requires_grad
    assert float(diffopt.VectorField(away)(w)) == 5.0


def test_each_task_has_a_norm_of_its_own():
    field = diffopt.VectorField(lambda w, a: a * w)
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    found = vmap(lambda w: diffopt.solve(field, w, 2.0, optimizer=diffopt.SGD(0.1), steps=1).losses)(w)
    torch.testing.assert_close(found, torch.tensor([[10.0], [0.0], [2.0]]))


def test_a_field_of_zeros_is_no_fault():
    """At a root the norm has no derivative; the field has."""
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for estimator in (Reverse(), ForwardMode(), Unrolled()):
        field, start = diffopt.VectorField(lambda w, a: w**2 - a**2), torch.tensor([2.0, -2.0], dtype=torch.float64)
        w = diffopt.solve(field, start, a, optimizer=diffopt.SGD(0.1), steps=1, estimator=estimator).params
        assert torch.autograd.grad(w.sum(), a)[0].item() == pytest.approx(2 * 0.1 * 2 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype):
    made = [x.detach().to(dtype).requires_grad_() for x in leaves("descent")]
    exact = [x.detach().to(torch.float64).requires_grad_() for x in made]
    got = torch.autograd.grad(by_library("descent", Reverse(), *made), made)
    answer = torch.autograd.grad(by_hand("descent", *exact), exact)
    assert all(g.dtype == dtype for g in got)
    assert relative_error([g.double() for g in got], answer) < 30 * torch.finfo(dtype).eps


def test_numbers_whose_squares_overflow():
    w = torch.tensor([3e30, 4e30])
    solution = diffopt.solve(diffopt.VectorField(lambda w: 0.5 * w), w, optimizer=diffopt.SGD(1.0), steps=2)
    torch.testing.assert_close(solution.losses, torch.tensor([2.5e30, 1.25e30]))


def test_a_field_that_autocast_has_lowered():
    matrix = normal(21, 3, 3).float().requires_grad_()
    for estimator in (Reverse(1), ForwardMode(), Unrolled()):
        with torch.autocast("cpu", torch.bfloat16):
            options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "estimator": estimator}
            w = diffopt.solve(diffopt.VectorField(lambda w, m: m @ w), torch.ones(3), matrix, **options).params
        assert w.dtype == torch.float32
        got = torch.autograd.grad(w.sum(), matrix)[0]
        now = torch.ones(3)
        for _ in range(2):
            now = now - 0.1 * matrix @ now
        assert relative_error([got], torch.autograd.grad(now.sum(), matrix)) < 0.05


@pytest.mark.parametrize("estimator", [Reverse(), ForwardMode(), Unrolled(), Binomial(2)], ids=str)
def test_a_complex_argument(estimator):
    """The field is real; of a complex argument torch's gradient is the derivative by real plus i by imaginary part."""

    def field(w, c):
        return torch.view_as_real(c * torch.view_as_complex(w)).sin() + c.real * w

    c = torch.tensor(0.3 - 0.8j, dtype=torch.complex128, requires_grad=True)
    w = normal(31, 4, 2)
    options = {"optimizer": diffopt.SGD(0.3), "steps": 2, "estimator": estimator}
    got = torch.autograd.grad(diffopt.solve(diffopt.VectorField(field), w, c, **options).params.square().sum(), c)
    now = w
    for _ in range(2):
        now = now - 0.3 * field(now, c)
    assert torch.allclose(got[0], torch.autograd.grad(now.square().sum(), c)[0], rtol=1e-10)


def test_a_field_within_a_loss():
    """It is one more term of the gradient, and forward mode sees that it is there."""

    def loss(w, a):
        return diffopt.VectorField(lambda w: torch.stack([a * w[1], -w[0]]))(w) + 0.2 * (a * w).square().sum()

    def by_hand(w, a):
        for _ in range(3):
            w = w - 0.1 * (torch.stack([a * w[1], -w[0]]) + 0.4 * a**2 * w)
        return w

    w, a = normal(41, 2), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    answer = torch.autograd.grad(by_hand(w, a).sum(), a)[0]
    for estimator in (Reverse(), ForwardMode(), Unrolled(), Binomial(3)):
        solution = diffopt.solve(loss, w, a, optimizer=diffopt.SGD(0.1), steps=3, estimator=estimator)
        assert torch.autograd.grad(solution.params.sum(), a)[0].item() == pytest.approx(answer.item(), rel=1e-10)


def test_dropout_is_drawn_again():
    def field(w, a):
        return torch.nn.functional.dropout(a * w, 0.5) + w.roll(1)

    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = []
    for estimator in (Reverse("graph"), Reverse(2), ForwardMode(), Unrolled()):
        torch.manual_seed(3)
        options = {"optimizer": diffopt.SGD(0.1), "steps": 3, "estimator": estimator}
        w = diffopt.solve(diffopt.VectorField(field), normal(51, 6), a, **options).params
        found.append(torch.autograd.grad(w.square().sum(), a)[0].item())
    assert found == pytest.approx([found[0]] * 4, rel=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode loads it
def test_unrolled_gives_second_derivatives():
    made = [x.detach() for x in leaves("descent")]

    def value(one, a):
        return one(*made[:4], a, *made[5:])

    library, hand = partial(by_library, "descent", Unrolled()), partial(by_hand, "descent")
    got, answer = (torch.autograd.functional.hessian(partial(value, one), made[4]) for one in (library, hand))
    assert relative_error([got], [answer]) < ROUND_OFF
    twice = torch.func.hessian(partial(value, library))(made[4])
    assert relative_error([twice], [answer]) < ROUND_OFF


@pytest.mark.parametrize("estimator", EXACT[: len(BY_STEPS) + 1], ids=str)
def test_sharpness_aware_steps(estimator):
    """The gradient at a point that is a learned way uphill; its Jacobian is no Hessian's."""
    target = normal(61, 3)

    def loss(w, scale):
        return ((scale * w - target) ** 4).sum() + (w[0] * w[1]).sin()

    def uphill(w, scale, radius):
        slope = grad(loss)(w, scale)
        return grad(loss)(w + radius * slope / slope.norm(), scale)

    made = [x.requires_grad_() for x in (normal(62, 3), normal(63, 3), torch.tensor(0.05, dtype=torch.float64))]
    options = {"optimizer": diffopt.SGD(0.02, momentum=0.5), "steps": STEPS, "estimator": estimator}
    found = diffopt.solve(diffopt.VectorField(uphill), *made, **options).params
    w, velocity = made[0], 0.0
    for _ in range(STEPS):
        (slope,) = torch.autograd.grad(loss(w, made[1]), w, create_graph=True)
        above = w + made[2] * slope / slope.norm()
        (there,) = torch.autograd.grad(loss(above, made[1]), above, create_graph=True)
        velocity = 0.5 * velocity + there
        w = w - 0.02 * velocity
    got, answer = (torch.autograd.grad(x.sin().sum(), made) for x in (found, w))
    assert relative_error(got, answer) < ROUND_OFF


# ------------------------------------------------------------------------------------------ refusals

W = torch.tensor([1.0, 2.0])
TREE = {"a": W, "b": torch.tensor(1.0)}
A = torch.tensor(0.5, requires_grad=True)


def gradient_without_graph(w):
    return torch.autograd.grad((w**4).sum(), w)[0]


BAD = {
    "a scalar": (lambda w: w.sum(), W, diffopt.ShapeError, r"v has shape \(\)"),
    "a tuple of one": (lambda w: (w,), W, diffopt.StructureError, r"take \[0\] of what torch.autograd.grad returns"),
    "an entry missing": (lambda w: {"a": w["a"]}, TREE, diffopt.StructureError, r"v\['b'\] is missing"),
    "an entry too many": (lambda w: {**w, "c": w["b"]}, TREE, diffopt.StructureError, r"v\['c'\] is too many"),
    "a list for a dict": (lambda w: [w["a"], w["b"]], TREE, diffopt.StructureError, "structure of params"),
    "another shape": (lambda w: {**w, "b": w["a"]}, TREE, diffopt.ShapeError, r"v\['b'\] has shape \(2,\)"),
    "another dtype": (lambda w: {**w, "b": w["b"].double()}, TREE, diffopt.DtypeError, r"v\['b'\] is torch.float64"),
    "complex": (lambda w: w + 0j, W, diffopt.DtypeError, "v is torch.complex64"),
    "no tensor": (lambda w: {**w, "b": 1.0}, TREE, diffopt.StructureError, r"v\['b'\] is float 1.0"),
    "nothing": (lambda w: None, W, diffopt.StructureError, "v is NoneType None"),
    "a gradient without its graph": (gradient_without_graph, W, diffopt.DisconnectedError, "create_graph=True"),
    "one entry without its graph": (
        lambda w: {"a": w["a"], "b": gradient_without_graph(w["b"])},
        TREE,
        diffopt.DisconnectedError,
        r"entry v\['b'\] does not depend on anything",
    ),
    "constants": (lambda w: torch.ones(2), W, diffopt.DisconnectedError, "add 0 \\* params"),
    "detached": (lambda w: w.detach() ** 2, W, diffopt.DisconnectedError, "does not depend on params"),
    "infinite": (lambda w: w / 0, W, diffopt.NonFiniteLossError, "inf at the initial params"),
    "captured": (lambda w: A * w, W, diffopt.CapturedTensorError, "`A`"),
    "too few arguments": (lambda: W, W, diffopt.LossError, r"takes \(\) and was given 1 arguments"),
}


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(2), ForwardMode(), Unrolled()], ids=str)
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_field_is_refused(name, estimator):
    v, params, error, message = BAD[name]
    if name == "captured" and isinstance(estimator, Unrolled):
        return  # which gives it its hypergradient
    with pytest.raises(error, match=message):
        diffopt.solve(diffopt.VectorField(v), params, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator)


def test_a_field_of_arguments_only_is_refused():
    """What looks like it most often: a gradient without its graph, times an argument."""
    a = torch.ones(2, requires_grad=True)
    field = diffopt.VectorField(lambda w, a: a * gradient_without_graph(w))
    with pytest.raises(diffopt.DisconnectedError, match="the vector field's value does not depend on params"):
        diffopt.solve(field, W, a, optimizer=diffopt.SGD(0.1), steps=2)


def test_constants_that_are_meant():
    """An entry of zeros stays where it is; another constant is joined to its param."""
    a = torch.tensor(2.0, requires_grad=True)
    field = diffopt.VectorField(lambda w, a: {"a": a * w["a"], "b": torch.zeros(())})
    w = diffopt.solve(field, TREE, a, optimizer=diffopt.SGD(0.1), steps=1).params
    assert w["b"].item() == 1.0
    assert torch.autograd.grad(w["a"].sum(), a)[0].item() == pytest.approx(-0.3)
    drift = diffopt.VectorField(lambda w, a: a.expand(2) + 0 * w)
    w = diffopt.solve(drift, W, a, optimizer=diffopt.SGD(0.1), steps=3).params
    assert torch.autograd.grad(w.sum(), a)[0].item() == pytest.approx(-0.6)


def test_what_is_no_function_is_refused():
    for bad in (None, 3.0, torch.ones(2)):
        with pytest.raises(diffopt.LossError, match="v is"):
            diffopt.VectorField(bad)


def test_a_plain_gradient_under_vmap_is_refused():
    field = diffopt.VectorField(lambda w: torch.autograd.grad((w**4).sum(), w, create_graph=True)[0])
    once = diffopt.solve(field, W, optimizer=diffopt.SGD(0.1), steps=1)
    torch.testing.assert_close(once.params, W - 0.4 * W**3)
    with pytest.raises(diffopt.VmapError, match=r"torch.func.grad"):
        vmap(lambda w: diffopt.solve(field, w, optimizer=diffopt.SGD(0.1), steps=1).params)(W[None])
