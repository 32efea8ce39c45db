"""``diffopt.compiled``: one program, the numbers of plain calls, and what is noticed when something has changed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import Interpreted
from oracles import relative_error
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, Krylov
from diffopt.outer_program import Compiled, _taken_apart
from diffopt.rollout import program
from diffopt.rollout.program import Program, UnsafeCodeError, _from_store, _looked_through, frees_in_a_loop
from diffopt.tensors import tracing
from diffopt.tensors.reads import Reads

pytestmark = pytest.mark.compiler

W = torch.tensor([1.0, -2.0], dtype=torch.float64)
ROWS = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(3, 2)
LR = torch.tensor(0.05, dtype=torch.float64)


def inner(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (a * w**2).sum() + (w**4).sum() / 4


def outer(w: Tensor, rows: Tensor, lr: Tensor, power: int = 2) -> Tensor:
    def of_task(a: Tensor) -> Tensor:
        solution = diffopt.solve(inner, w, a, optimizer=diffopt.SGD(lr, momentum=0.5), steps=4)
        return ((solution.params - 1) ** power).sum() + solution.losses.sum()

    return vmap(of_task)(rows).mean()


class Plain:
    """In the place of a program: the function itself, so that a test of what is around it takes no compiler."""

    made = 0
    fits = True

    def __init__(self, function: Any, tensors: Any) -> None:
        type(self).made += 1
        self.function = function

    def __call__(self, tensors: Any) -> list[Tensor]:
        return self.function(*[x.detach() for x in tensors])

    def check(self, function: Any, tensors: Any) -> None:
        """Nothing to be seen."""

    def warn(self) -> None:
        """The function itself has warned."""

    compare = Program.compare


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> type[Plain]:
    monkeypatch.setattr(Plain, "made", 0)
    monkeypatch.setattr("diffopt.outer_program.Program", Plain)
    return Plain


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_compiled_program_gives_the_numbers_of_plain_calls(dtype: torch.dtype, tolerance: float) -> None:
    """By every argument, at other numbers than those of the first call; a divergence is refused as in a plain call."""
    program = diffopt.compiled(outer)
    given = (W.to(dtype), ROWS.to(dtype), LR.to(dtype))
    for factor in (1.0, 1.1, 0.9):
        value, grads = program.value_and_grad(*[factor * x for x in given], argnums=(0, 1, 2))
        leaves = [(factor * x).requires_grad_() for x in given]
        expected = outer(*leaves)
        assert relative_error([value, *grads], [expected.detach(), *torch.autograd.grad(expected, leaves)]) < tolerance
    [[entry]] = program._entries.values()
    assert entry.program is not None
    assert entry.calls == 3
    with pytest.raises(diffopt.DivergenceError, match="step"):
        program.value_and_grad(1e8 * given[0], *given[1:], argnums=(0, 1, 2))


@pytest.mark.slow
def test_a_program_reads_captured_tensors_anew_and_takes_integers_and_views() -> None:
    scale = torch.ones(2, dtype=torch.float64)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return inner(w, a * scale)

    def outer(w: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        a = rows[at][0]
        return diffopt.solve(loss, w, a, optimizer=diffopt.SGD(0.05), steps=3).params.square().sum()

    program, wide = diffopt.compiled(outer), torch.stack([ROWS, ROWS], dim=2)
    for factor, at in ((1.0, 0), (3.0, 2), (0.5, 1)):
        scale.mul_(factor)
        given = W, wide[:, :, 0], torch.tensor([at])
        w = W.clone().requires_grad_()
        expected = outer(w, *given[1:])
        value, grad = program.value_and_grad(*given)
        assert relative_error([value, grad], [expected.detach(), *torch.autograd.grad(expected, w)]) < 1e-12
    [[entry]] = program._entries.values()
    assert entry.program is not None


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
def test_the_graph_gives_what_the_function_gives(dtype: torch.dtype, autocast: bool) -> None:
    """Dtypes too; in half precision the very same operations."""

    def product(w: Tensor, rows: Tensor) -> Tensor:
        def loss(w: Tensor) -> Tensor:
            return ((rows.detach() @ w) ** 2).sum()

        return diffopt.solve(loss, w, optimizer=diffopt.SGD(0.05), steps=3).params.square().sum()

    given = W.to(dtype), ROWS.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        function = Compiled(product)._function(_taken_apart(given, [0]))
        graph, captured = tracing.trace(function, given)
        found, expected = graph(1.5 * given[0], given[1], *captured), function(1.5 * given[0], given[1])
    torch.testing.assert_close(list(found), expected)


def test_code_that_frees_a_temporary_at_every_step_is_known() -> None:
    """As torch 2.13 writes it for a loop over a view; outside of a loop the same is right."""
    taken, kept = "assign(RAIIAtenTensorHandle(tmp_arg6_1_0), &handle);", "assign(buf16, &handle);"
    for before, body, bad in ((kept, taken, True), (taken, kept, False), (kept, kept, False)):
        code = f"{before} while (1) {{ if (x) {{ {kept} }} {body} }} {kept if bad else taken}"
        assert frees_in_a_loop(code) is bad


@pytest.mark.slow
def test_what_has_been_compiled_is_found_again_by_all_that_matters() -> None:
    """By torch's store, as in a second process; a number within the loop's body is part of what it is found by."""
    fresh_cache: Any = importlib.import_module("torch._inductor.utils").fresh_cache
    counters: Any = importlib.import_module("torch._dynamo.utils").counters

    def of(factor: float, steps: int) -> Callable[..., list[Tensor]]:
        def function(w: Tensor) -> list[Tensor]:
            given = {"optimizer": diffopt.SGD(0.1), "steps": steps}
            return [diffopt.solve(lambda w: factor * (w**4).sum(), w, **given).params]

        return function

    found = []
    with fresh_cache():
        for factor, steps in ((0.5, 3), (0.5, 3), (0.25, 3), (0.5, 4), (0.5, 3)):
            before = _from_store(counters)
            program = Program(of(factor, steps), [W])
            program.check(of(factor, steps), [W])
            found.append(_from_store(counters) > before)
    assert found == [False, True, False, False, True]


def test_what_the_compiler_has_written_is_looked_at_before_it_is_stored() -> None:
    """And a compiler that does not show it, and has found nothing in its store, is not trusted."""
    lowering: Any = importlib.import_module("torch._inductor.graph").GraphLowering
    with pytest.raises(UnsafeCodeError, match="a loop over views"), _looked_through(W.device):
        lowering.save_output_code("while (1) { assign(RAIIAtenTensorHandle(tmp_arg6_1_0), &handle); }")
    with pytest.raises(UnsafeCodeError, match="has not shown"), _looked_through(W.device):
        pass
    with _looked_through(W.device):
        lowering.save_output_code("while (1) { }")
    assert lowering.save_output_code is None


@pytest.mark.parametrize(
    ("system", "cpp", "place", "asked"),
    [
        ("linux", {"vec_isa_ok": None}, "cpu", {"cpp_wrapper": True, "cpp.vec_isa_ok": True}),
        ("linux", {"vec_isa_ok": False}, "cpu", {"cpp_wrapper": True}),  # the user's choice
        ("linux", {}, "cpu", {"cpp_wrapper": True}),  # another version of torch
        ("darwin", {"vec_isa_ok": None}, "cpu", {"cpp_wrapper": True}),
        ("linux", {"vec_isa_ok": None}, "cuda", {}),
    ],
)
def test_instruction_sets_are_not_tried_out_where_torch_lets_them(
    monkeypatch: pytest.MonkeyPatch, system: str, cpp: dict[str, Any], place: str, asked: dict[str, Any]
) -> None:
    config = SimpleNamespace(cpp=SimpleNamespace(**cpp))
    monkeypatch.setattr(program, "importlib", SimpleNamespace(import_module=lambda name: config))
    monkeypatch.setattr(program, "sys", SimpleNamespace(platform=system))
    assert program._options(torch.device(place)) == asked


def test_arguments_of_another_kind_get_a_program_of_their_own(plain: type[Plain]) -> None:
    program = diffopt.compiled(outer)
    for given in (
        (W, ROWS, LR),
        (2 * W, ROWS, LR),
        (W, ROWS[:2], LR),
        (W, ROWS, LR, 4),
        (W, ROWS, LR, 4.0),
        (W.float(), ROWS.float(), LR.float()),
    ):
        assert program.value_and_grad(*given)[1].dtype == given[0].dtype
    assert plain.made == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program.value_and_grad(W, ROWS, LR)
    program.value_and_grad(W, ROWS, LR, argnums=(0, 2))
    assert plain.made == 7


def test_trees_and_several_arguments(plain: type[Plain]) -> None:
    def sums(params: Any, data: Any) -> Tensor:
        return (params["a"] * data[0]).sum() + params["b"][0] ** 2

    program = diffopt.compiled(sums)
    params, data = {"b": [torch.tensor(3.0)], "a": torch.ones(2)}, (torch.tensor([1.0, 2.0]), "text")
    for _ in range(2):
        value, grads = program.value_and_grad(params, data)
        assert value == 12
        assert (grads["a"].tolist(), grads["b"][0].item()) == ([1.0, 2.0], 6.0)
    first, second = program.value_and_grad(params, data[:1], argnums=[0, -1])[1]
    assert (first["b"][0].item(), second[0].tolist()) == (6.0, [1.0, 1.0])


def test_the_value_can_be_differentiated_once(plain: type[Plain]) -> None:
    program = diffopt.compiled(outer)
    for _ in range(2):
        w, lr = W.clone().requires_grad_(), LR.clone().requires_grad_()
        (3 * program(w, ROWS, lr)).backward()
        v, lr_plain = W.clone().requires_grad_(), LR.clone().requires_grad_()
        (3 * outer(v, ROWS, lr_plain)).backward()
        torch.testing.assert_close((w.grad, lr.grad), (v.grad, lr_plain.grad))
    value = program(w, ROWS, LR)
    [grad] = torch.autograd.grad(value, w, create_graph=True)
    with pytest.raises(diffopt.SecondDerivativeError):
        grad.sum().backward()
    with torch.no_grad():
        assert not program(w, ROWS, LR).requires_grad


def test_what_is_read_by_closure_may_change_and_is_noticed(plain: type[Plain]) -> None:
    """A number gets a program of its own, until there are too many; then calls are plain ones."""
    scale, places = 1.0, {"power": 2}

    def scaled(w: Tensor) -> Tensor:
        return scale * (w ** places["power"]).sum()

    program = diffopt.compiled(scaled)
    assert program.value_and_grad(W)[0] == program.value_and_grad(W)[0] == 5
    scale = 2.0
    assert program.value_and_grad(W)[0] == 10
    scale = 1.0
    assert program.value_and_grad(W)[0] == 5
    assert plain.made == 2
    places["power"] = 4
    assert program.value_and_grad(W)[0] == 17
    scale = 3.0
    assert program.value_and_grad(W)[0] == 51
    scale = 4.0
    with pytest.warns(diffopt.CompileWarning, match="keeps changing; pass it as an argument"):
        program.value_and_grad(W)
    assert program.value_and_grad(W)[0] == 68
    assert plain.made == 4


def test_objects_among_the_arguments_are_looked_at_too(plain: type[Plain]) -> None:
    class Options:
        def __init__(self, power: int) -> None:
            self.power = power

    program = diffopt.compiled(lambda w, options: (w**options.power).sum())
    first, second = Options(2), Options(2)
    for options in (first, second, first):
        assert program.value_and_grad(W, options)[0] == 5
    assert plain.made == 2
    second.power = 4
    assert program.value_and_grad(W, second)[0] == 17
    assert program.value_and_grad(W, first)[0] == 5
    assert plain.made == 3


def test_a_change_that_nobody_sees_is_noticed_by_and_by(plain: type[Plain], monkeypatch: pytest.MonkeyPatch) -> None:
    """A large array is data, which is not looked at again and again."""
    hidden = np.ones(2000)

    def moody(w: Tensor) -> Tensor:
        return float(hidden[0]) * w.square().sum()

    program = diffopt.compiled(moody)
    program.value_and_grad(W)
    of_then = [W.square().sum(), W.new_zeros(()), 2 * W]
    monkeypatch.setattr(plain, "__call__", lambda self, tensors: of_then)
    hidden[0] = 2.0
    with pytest.warns(diffopt.CompileWarning, match="it is off by"):
        assert program.value_and_grad(W)[0] == 10  # the second call, of which the program gave 5
    assert program.value_and_grad(W)[0] == 10


def test_reads_are_the_same_while_their_values_are() -> None:
    module, numbers = torch.nn.Dropout(0.5), [0.25]

    def function() -> Any:
        return module, numbers

    reads = Reads([function])
    assert reads.unchanged
    numbers[0] = float("0.25")
    assert reads.unchanged
    numbers.append(1.0)
    assert not reads.unchanged
    numbers.pop()
    module.eval()
    assert not reads.unchanged
    module.train()
    assert reads.unchanged


def test_what_cannot_be_compiled_runs_plainly_after_one_warning() -> None:
    def looking(w: Tensor) -> Tensor:
        return w.square().sum() if bool(w[0] > 0) else w.sum()

    program = diffopt.compiled(looking)
    with pytest.warns(
        diffopt.CompileWarning, match=r"code looks at the numbers in a tensor \(test_compiled_outer.py, line \d"
    ):
        assert program.value_and_grad(W)[0] == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, grad = program.value_and_grad(-W)
    assert (value, grad.tolist()) == (1, [1, 1])
    implicit = diffopt.compiled(
        lambda w: diffopt.solve(
            inner, w, W, optimizer=diffopt.SGD(0.1), steps=2, estimator=diffopt.estimators.Unrolled()
        ).params.sum()
    )
    with pytest.warns(diffopt.CompileWarning, match=r"runs plainly: a solve by Unrolled"):
        implicit.value_and_grad(W)


@pytest.mark.parametrize("estimator", [Binomial(2), Krylov(2)], ids=repr)
def test_a_bad_estimate_is_warned_of_at_every_call(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by plain calls: once each, those that are compared among them, too."""
    monkeypatch.setattr("diffopt.outer_program.Program", Interpreted)

    def of_rate(rows: Tensor, lr: Tensor) -> Tensor:
        given = {"optimizer": diffopt.SGD(lr), "steps": 6, "estimator": estimator}
        return vmap(lambda a: diffopt.solve(inner, W, a, **given).params.square().sum())(rows).mean()

    program = diffopt.compiled(of_rate)
    for lr, bad in [(0.01, False), *[(0.3, True)] * 3, (0.01, False)]:
        told = []
        for function in (lambda *given: program.value_and_grad(*given)[1], torch.func.grad(of_rate)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function(ROWS, torch.tensor(lr, dtype=torch.float64))
            told.append([str(one.message) for one in caught if one.category is diffopt.EstimateWarning])
        assert told[0] == told[1]
        assert len(told[0]) == bad


def test_what_is_refused(plain: type[Plain]) -> None:
    program = diffopt.compiled(outer)
    with pytest.raises(diffopt.LossError, match="outer is int 3"):
        diffopt.compiled(3)  # type: ignore[arg-type]
    with pytest.raises(diffopt.LossError, match="outer returned"):
        diffopt.compiled(lambda w: w).value_and_grad(W)
    with pytest.raises(diffopt.HyperparameterError, match="argnums is int 3"):
        program.value_and_grad(W, ROWS, LR, argnums=3)
    with pytest.raises(diffopt.LeafError, match="the gradient is asked for in int 2"):
        program.value_and_grad(W, ROWS, LR, 2, argnums=3)
    with pytest.raises(diffopt.GradModeError, match=r"under a torch\.func transform"):
        torch.func.grad(program)(W, ROWS, LR)
    captured = W.clone().requires_grad_()
    capturing = diffopt.compiled(
        lambda w: diffopt.solve(lambda w: inner(w, captured), w, optimizer=diffopt.SGD(0.1), steps=2).params.sum()
    )
    with pytest.raises(diffopt.CapturedTensorError, match="captured"):
        capturing.value_and_grad(W)


def test_a_conjugate_that_is_not_computed_yet_is_what_it_stands_for() -> None:
    """Compiled code reads memory, where it lies as what it is of; so does the imaginary part of one, negated."""
    z = torch.tensor([1.0 + 2.0j])
    for given in (z.conj(), z.conj().imag, z[0].conj()):
        assert torch.equal(program._ready(given), given)
        for x in (program._ready(given), tracing.in_order(given)):
            assert (x.is_conj(), x.is_neg()) == (False, False)
