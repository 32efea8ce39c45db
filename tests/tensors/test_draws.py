"""Which steps of a rollout drew random numbers, told from the generators' states alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from diffopt.tensors import random_state

CPU = torch.device("cpu")
DRAWS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a number": lambda: torch.rand(()),
    "a normal number": lambda: torch.randn(()),
    "many": lambda: torch.rand(2 * 624),
    "a permutation": lambda: torch.randperm(5),
    "a new seed": lambda: torch.manual_seed(7),
}


def plainly(function: Callable[[Tensor], Tensor]) -> None:
    function(torch.ones(()))


UNDER: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "nothing": plainly,
    "grad": lambda f: grad(f)(torch.ones(())),
    "vmap": lambda f: vmap(f, randomness="same")(torch.ones(2)),
    "grad of vmap": lambda f: grad(lambda x: vmap(f, randomness="different")(x).sum())(torch.ones(2)),
    "vmap of grad": lambda f: vmap(grad(f), randomness="different")(torch.ones(2)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_noticed_under_every_transform(name: str, under: str) -> None:
    found: list[bool] = []

    def function(x: Tensor) -> Tensor:
        before = random_state.snapshot(CPU)
        DRAWS[name]()
        found.append(random_state.changed(before, random_state.snapshot(CPU)))
        return x * x

    UNDER[under](function)
    assert found == [name != "nothing"]


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("drawing", [(), (1,), (3,), (1, 2, 5), (2, 4)], ids=str)
def test_the_steps_that_drew_are_known_with_what_stood_before_them(drawing: tuple[int, ...], under: str) -> None:
    draws: list[random_state.Draws] = []
    states: dict[int, Tensor] = {}

    def function(x: Tensor) -> Tensor:
        draws.append(random_state.Draws(CPU))
        for step in range(1, 6):
            states[step] = torch.get_rng_state()
            if step in drawing:
                torch.randn(())  # every other one takes a number that the generator has kept
            draws[-1].look(step)
        return x * x

    UNDER[under](function)
    assert tuple(draws[0].known) == drawing
    assert all(torch.equal(draws[0].known[step][0], states[step]) for step in drawing)


def test_what_was_to_be_drawn_again_stays_known() -> None:
    before = random_state.snapshot(CPU)
    torch.rand(3)
    draws = random_state.Draws(CPU, {2: before})
    draws.look(1)
    torch.rand(1)
    draws.look(2)
    assert draws.known == {2: before}
