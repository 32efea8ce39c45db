"""A function of tensors, solves and hypergradients included, as one compiled program."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor

from diffopt.rollout.instruction_sets import known_to_gcc
from diffopt.tensors import agreement, random_state, tracing, transforms


class UnsafeCodeError(Exception):
    """The compiler has written code that is known to crash."""


@final
class Program:
    """A function of tensors of these shapes, traced and lowered by inductor.

    What it captures is an input of the program: it reads the present numbers of the same tensors at every call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> None:
        """Trace and compile; seconds.

        Raises:
            Exception: whatever the compiler, or the trace, stumbles over.
        """
        place = tensors[0].device
        with warnings.catch_warnings(), random_state.preserved(place):
            warnings.simplefilter("ignore")  # the compiler's own; the function's have been seen
            noted = tracing.Trace()
            graph, self._captured = tracing.trace(function, tensors, noted)
            self._expected, self._excesses = noted.expected, list[Tensor]()
            self._kinds = list(map(_kind, self._captured))
            given = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            with torch.no_grad(), known_to_gcc() if place.type == "cpu" else nullcontext(), _looked_through(place):
                inductor: Any = importlib.import_module("torch._inductor")
                self._compiled: Any = inductor.compile(graph, given, options=_options(place))

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the function returns, without a graph."""
        with torch.no_grad():
            found = list(self._compiled(*map(_ready, (*tensors, *self._captured))))
        return self._without_excesses(found)

    def _without_excesses(self, found: list[Tensor]) -> list[Tensor]:
        end = len(found) - len(self._expected)
        self._excesses = found[end:]
        return found[:end]

    def warn(self) -> None:
        """Warn of estimates whose own measures were too large when it was last called."""
        for expected, excess in zip(self._expected, self._excesses, strict=True):
            expected.warn(excess)

    @property
    def fits(self) -> bool:
        """Whether what it captures is of the kind that it was made for."""
        return list(map(_kind, self._captured)) == self._kinds

    @property
    def captured(self) -> tuple[tuple[Tensor, int], ...]:
        """The tensors that it reads and is not given, each with how often it has been written to."""
        return tuple([(x, transforms.version(x)) for x in self._captured])

    def check(self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> None:
        """Compare it with the function, at other numbers: what the trace took for equal, or zero, is so no longer.

        Raises:
            ArithmeticError: they differ by more than round-off.
        """
        others = [agreement.moved(x.detach(), i) for i, x in enumerate(tensors)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = function(*others)
            except Exception:  # a loss that only takes what it was given
                others = [x.detach().clone() for x in tensors]
                expected = function(*others)
        self.compare(self(others), expected)

    def compare(self, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Refuse numbers of the program that are not those of the function."""
        for x, y in zip(got, expected, strict=True):
            off = agreement.difference(x, y.detach())
            if off:
                raise ArithmeticError(f"compiled, it is off by {off:.1e}")


def _options(place: torch.device) -> dict[str, Any]:
    """What inductor is asked for.

    # NOTE [a second process]
    torch keeps no compiled graph that has a loop. Ours hold no object, but shapes and operations only, all of which are
    part of what they are found by, as is the text here; and whatever is found is compared with the function
    (:meth:`Program.check`).

    # NOTE [instruction sets]
    Whether the compiler can write for a processor's vector instructions, torch tries out for each set of them, in
    processes of their own: a quarter of a first call's time, and a fifth of that in every later process. What it looks
    for, compilers that torch's own headers are too new for, cannot have come so far.
    """
    # torch's C++ wrapper, of which a step of a loop costs little, is for the CPU
    options: dict[str, Any] = {"cpp_wrapper": True} if place.type == "cpu" else {}
    config: Any = importlib.import_module("torch._inductor.config")
    if place.type == "cpu" and sys.platform == "linux" and getattr(config.cpp, "vec_isa_ok", False) is None:
        options["cpp.vec_isa_ok"] = True
    if hasattr(config, "aot_inductor"):  # nobody asks which line of a program takes its time
        for name in ("enable_line_tables", "enable_frame_pointer"):
            options |= {f"aot_inductor.{name}": False} if hasattr(config.aot_inductor, name) else {}
    if hasattr(config, _STORABLE):
        known = "of diffopt, whose code has been looked at, 1"
        options[_STORABLE] = {f"torch.ops.higher_order.{name}": known for name in ("scan", "while_loop")}
    return options


_STORABLE = "unsafe_marked_cacheable_functions"


def _ready(tensor: Tensor) -> Tensor:
    # (a conjugate or a negative that has not been computed yet lies in memory as what it is of)
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.is_contiguous() and not tensor.requires_grad else tensor.detach().contiguous()


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, bool]:
    # (the plain call refuses one that requires grad from now on)
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


@contextmanager
def _looked_through(place: torch.device) -> Iterator[None]:
    """Refuse C++ that frees, at every step of a loop, what it was given once.

    # NOTE [what a loop may be given]
    torch 2.13 hands a view to a loop as a temporary that its body takes over again and again. ``scan`` gives it
    no views; should one come about all the same, the process must not crash.
    """
    lowering: Any = importlib.import_module("torch._inductor.graph").GraphLowering
    counters: Any = importlib.import_module("torch._dynamo.utils").counters
    found, seen, before = _from_store(counters), list[str](), lowering.save_output_code

    def look(code: str) -> None:  # before it is compiled, or stored
        seen.append(code)
        if place.type == "cpu" and frees_in_a_loop(code):
            raise UnsafeCodeError("torch's compiler has written a loop over views")

    lowering.save_output_code = look
    try:
        yield
    finally:
        lowering.save_output_code = before
    if place.type == "cpu" and not seen and _from_store(counters) == found:
        raise UnsafeCodeError("torch's compiler has not shown what it has written")


def _from_store(counters: Any) -> int:
    """A number that grows when a compiled graph is found in torch's store; what is there has been looked at before."""
    return int(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])


def frees_in_a_loop(code: str) -> bool:
    """Whether a loop of some C++ takes over a temporary that was made outside of it."""
    begin = code.find("while (1) {")
    while begin >= 0:
        end, depth = code.index("{", begin) + 1, 1
        while depth and end < len(code):
            depth += {"{": 1, "}": -1}.get(code[end], 0)
            end += 1
        if "(RAIIAtenTensorHandle(tmp_" in code[begin:end]:
            return True
        begin = code.find("while (1) {", end)
    return False
