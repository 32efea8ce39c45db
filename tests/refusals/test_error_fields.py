"""Messages are data: an error keeps what was got, what was expected and the fix, also as a copy and in a pickle."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from in_parts import IN_PARTS, calls, error_classes, is_a_sentence, lacks_a_part, modules

import diffopt
from diffopt import ConformanceError, DiffoptError, DivergenceError, LossError, StepsError
from diffopt.commands.estimator_names import estimator
from diffopt.estimators import MultiStep, Reverse
from diffopt.experiments.framework.run_folder import RunFolder
from diffopt.tasks.data import check_split

KINDS = [kind for kind in vars(diffopt.errors).values() if isinstance(kind, type) and issubclass(kind, DiffoptError)]
EXTRA: dict[type[DiffoptError], dict[str, Any]] = {DivergenceError: {"step": 3}, ConformanceError: {"table": "a\nb"}}
PARTS = ("steps is -1", "an integer >= 0", "count up")


def made(kind: type[DiffoptError]) -> DiffoptError:
    return kind(*PARTS, **EXTRA.get(kind, {}))


class LooseLayerError(LossError):
    """An error as a user may derive it, with an argument of its own and another number of them."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"layer {layer} is loose", "a tight one", "tighten it")
        self.layer = layer


class CodeError(DiffoptError):
    """One that leaves the base's arguments alone."""

    def __init__(self, code: int) -> None:
        self.code = code


def same(error: DiffoptError, other: DiffoptError) -> bool:
    return (type(error), str(error), error.args, vars(error)) == (type(other), str(other), other.args, vars(other))


WAYS: list[Callable[[DiffoptError], DiffoptError]] = [
    copy.copy,
    copy.deepcopy,
    *(lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol)) for protocol in range(6)),  # type: ignore[misc]
]


def test_the_text_is_composed_of_the_parts() -> None:
    assert str(LossError(*PARTS)) == "steps is -1, expected an integer >= 0; count up"
    assert str(LossError("a", "b")) == "a, expected b"
    assert str(LossError("a", fix="c")) == "a; c"
    assert str(LossError("a, expected b; c")) == "a, expected b; c"
    assert repr(LossError("a", "b")) == "LossError('a, expected b')"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_class_keeps_its_parts_in_copies(kind: type[DiffoptError]) -> None:
    error = made(kind)
    assert (error.got, error.expected, error.fix) == PARTS
    for way in WAYS:
        assert same(error, way(error)), way


@pytest.mark.parametrize(
    "error", [LooseLayerError(4), CodeError(7), LossError("alone"), DiffoptError("a", fix="c")], ids=repr
)
def test_classes_of_users_keep_their_parts_in_copies(error: DiffoptError) -> None:
    for way in WAYS:
        assert same(error, way(error)), way


def test_what_is_added_to_an_error_goes_with_it() -> None:
    error = LooseLayerError(4)
    error.place = "params"  # type: ignore[attr-defined]
    assert copy.copy(error).place == "params"  # type: ignore[attr-defined]


def test_a_class_that_leaves_the_arguments_alone_has_pythons_text() -> None:
    assert str(CodeError(7)) == "7"
    assert CodeError(7).fix == ""


def fails(number: int) -> None:
    raise [StepsError(*PARTS), DivergenceError(*PARTS, step=3), LooseLayerError(4)][number]


def test_errors_come_back_from_other_processes() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for number, kind in enumerate((StepsError, DivergenceError, LooseLayerError)):
            with pytest.raises(kind) as caught:
                pool.submit(fails, number).result()
            with pytest.raises(kind) as here:
                fails(number)
            assert (caught.value.fix, str(caught.value)) == (here.value.fix, str(here.value))


def test_what_is_raised_is_given_in_parts() -> None:
    names = {"DiffoptError", *error_classes()}
    made = {f"{path}:{call.lineno}": call for path, module in modules().items() for call in calls(module, names)}
    assert [place for place, call in made.items() if lacks_a_part(call)] == []
    assert [place for place, call in made.items() if is_a_sentence(call)] == []
    assert all(any(place.startswith(part) for place in made) for part in IN_PARTS), "a part that raises nothing"


@pytest.mark.parametrize(
    ("source", "whole"),
    [
        ('LossError(f"{x} is 1, expected 2; add 1")', True),
        ('LossError("1", fix="add 1")', True),
        ('diffopt.LossError("1", "2; expected 3")', True),
        ('LossError("1", "2", "; add 1")', True),
        ('LossError("1", "2", "add 1: 2 is expected")', False),
        ('LossError(got="1", expected=f"{x}")', False),
        ('DivergenceError("1", "2", step=3)', False),
    ],
)
def test_a_whole_sentence_is_noticed(source: str, whole: bool) -> None:
    (call,) = calls(ast.parse(source), {"LossError", "DivergenceError"})
    assert (lacks_a_part(call) or is_a_sentence(call)) == whole


REAL: dict[str, tuple[Callable[[], Any], tuple[str, str, str]]] = {
    "an option": (lambda: diffopt.SGD(0.1, nesterov="yes"), ("SGD: nesterov is str 'yes'", "True or False", "")),
    "a class for an object": (
        lambda: MultiStep(2, adjoint=Reverse),
        ("MultiStep: adjoint is ", "an estimator such as Reverse()", "call it: adjoint=Reverse(...)"),
    ),
    "a hyperparameter": (
        lambda: diffopt.solve(torch.sum, torch.ones(2), optimizer=diffopt.SGD(lambda t: 0.1), steps=1),
        ("lr is function ", "a float or a tensor", "a function of the step: diffopt.Schedule("),
    ),
    "a module": (lambda: diffopt.functional(3), ("module is int 3", "a torch.nn.Module", "make it")),
    "a lifted class": (
        lambda: diffopt.from_torch(torch.optim.LBFGS),
        ("LBFGS cannot be lifted: it evaluates", "a class whose step can be followed", "use SGD"),
    ),
    "a citation": (lambda: diffopt.cite([3]), ("cite was given list [3]", "an estimator, ", "give them one by one")),
    "data": (lambda: check_split("all"), ("split is 'all'", "one of train, ", "")),
    "a name": (lambda: estimator("reverse:0"), ("the estimator 'reverse:0' cannot be: ", "", "")),
    "a run": (lambda: RunFolder("nowhere").header(), ("there is no run in nowhere", "one to resume", "check --out")),
}


@pytest.mark.parametrize("name", REAL)
def test_real_errors_have_their_parts(name: str) -> None:
    call, parts = REAL[name]
    with pytest.raises(DiffoptError) as caught:
        call()
    error = caught.value
    found = (error.got, error.expected, error.fix)
    assert all(part.startswith(start) for part, start in zip(found, parts, strict=True)), found
    assert "" not in (error.got, error.expected)
    assert str(error) == f"{error.got}, expected {error.expected}" + (f"; {error.fix}" if error.fix else "")
    assert same(error, pickle.loads(pickle.dumps(error)))
