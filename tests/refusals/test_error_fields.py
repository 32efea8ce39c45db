"""Messages are data: an error keeps what was got, what was expected and the fix, also as a copy and in a pickle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

import diffopt.errors
from diffopt import ConformanceError, DiffoptError, DivergenceError, LossError, StepsError

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


def test_a_step_and_a_table_may_come_by_position() -> None:
    assert (DivergenceError("a", 3).step, str(DivergenceError("a", 3))) == (3, "a")
    assert (ConformanceError("a", "b").table, str(ConformanceError("a", "b"))) == ("b", "a")


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
