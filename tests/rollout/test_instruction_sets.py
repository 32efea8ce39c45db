"""What torch's compiler is spared trying out."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from diffopt.rollout.instruction_sets import known_to_gcc

builder: Any = importlib.import_module("torch._inductor.cpp_builder")
sets: Any = importlib.import_module("torch._inductor.cpu_vec_isa")


@pytest.mark.parametrize(("gcc", "version", "known"), [(True, 12, True), (True, 10, False), (False, 12, False)])
def test_only_what_a_new_gcc_knows_is_not_tried_out(
    monkeypatch: pytest.MonkeyPatch, gcc: bool, version: int, known: bool
) -> None:
    tried: list[str] = []

    def check_build(own: Any, code: str) -> bool:
        tried.append(code)
        return False

    monkeypatch.setattr(sets.VecISA, "check_build", check_build)
    monkeypatch.setattr(builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(builder, "_is_gcc", lambda compiler: gcc)
    monkeypatch.setattr(builder, "_is_gcc_version_less_than", lambda compiler, least: version < least)
    before, instructions, code = sets.VecISA.check_build, sets.VecAMX(), sets.VecAMX._amx_code
    with known_to_gcc():
        assert instructions.check_build(code) is known
        assert not instructions.check_build("other code")
    assert tried == ([] if known else [code]) + ["other code"]
    assert sets.VecISA.check_build is before
