"""Programs of whole solves, found again by what they were made for, and looked at again while they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffopt.optimizers.held import held
from diffopt.rollout.compiled import kind_of, owner, warn
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import as_written
from diffopt.rollout.hidden_state import left_alone
from diffopt.rollout.program import Program
from diffopt.rollout.record import Counts
from diffopt.tensors.captures import Given
from diffopt.tensors.reads import Reads

Function: TypeAlias = Callable[..., Sequence[Tensor]]


@final
class Known:
    """A program, while it is right for what is read now.

    Attributes:
        program: it; ``None``: none could be made, or it has been given up.
        counts: what it computes, if it is one of a backward pass.
        forms: the structures of what is observed and of what the loss returns besides.
    """

    def __init__(self, dynamics: Dynamics, program: Program | None) -> None:
        """Take note of what the functions of the problem read."""
        self.program, self._calls = program, 0
        self.counts: Counts | None = None
        self._reads = _reads(dynamics) if program is not None else None
        self._observes = _identity(dynamics)
        self.forms = [form.structure for form in _forms(dynamics)]

    def serves(self, dynamics: Dynamics) -> bool:
        """Whether it may be used for this problem, which has the same key."""
        return self.program is not None and self.program.fits and self._observes == _identity(dynamics)

    @property
    def unchanged(self) -> bool:
        """Whether all that is read by closure is as it was."""
        return self._reads is not None and self._reads.unchanged

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """What the program returns; ``None``: there is none, or it stumbles, and the plain way raises its own error."""
        try:
            return None if self.program is None else self.program(tensors)
        except Exception:  # such as of a matrix that is singular
            return None

    def is_due(self) -> bool:
        """Whether this use of it, the 1st, 2nd, 4th, 8th, ..., is to be compared with the plain way."""
        self._calls += 1
        return not self._calls & (self._calls - 1)

    def agrees(self, got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        """Whether two ways to the same numbers agree; if not, the program is given up."""
        assert self.program is not None
        try:
            self.program.compare(got, expected)
        except ArithmeticError as error:
            self.program = None
            warn(error)
            return False
        return True

    def settle(self, dynamics: Dynamics) -> None:
        """What is read now gives the same numbers as what was read when it was made: take note of it.

        But for tensors, of which it would go on to read those of then.
        """
        if self.program is not None and self.program.captured:
            self.program = None
        elif not self.unchanged:
            self._reads = _reads(dynamics)

    def set_forms(self, dynamics: Dynamics) -> None:
        """Let the problem know how the trees of its functions are made up, which have not been called."""
        for form, structure in zip(_forms(dynamics), self.forms, strict=True):
            form.structure = structure


_known: Any = WeakIdKeyDictionary()
"""By loss (or the object whose method it is), each its own: two that are equal may differ in what is not compared."""

_functions: Counter[Any] = Counter()
"""By the code of a loss: of how many functions that share it programs have been made."""

_MOST = 2
"""Of so many functions of one code programs are made: of what is made anew at every call steps alone are compiled."""


def key_of(dynamics: Dynamics, what: tuple[Hashable, ...], tensors: Sequence[Tensor]) -> Hashable | None:
    """What the program of a solve with these tensors is made for; ``None``: there can be none."""
    if any([type(x) not in _PLAIN or x.layout != torch.strided for x in tensors]):
        return None
    state = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    key = (*kind_of(dynamics, what, tensors), state, _observers(dynamics))
    try:
        hash(key)
    except TypeError:  # an argument that cannot be hashed
        return None
    return key


_PLAIN = (Tensor, torch.nn.Parameter)


def find(dynamics: Dynamics, key: Hashable, tensors: Sequence[Tensor], made: Callable[[], Function]) -> Known | None:
    """The program of ``made()(*tensors)``, a part of a solve; ``None``: there is none, nor can be one.

    It is made at the first call, which takes seconds.
    """
    try:
        known: dict[Hashable, Known] = _known.setdefault(owner(dynamics.loss), {})
    except TypeError:  # a loss that cannot be referred to weakly
        return None
    found = known.get(key)
    if found is None:
        made_for_many = _is_one_of_many(key, known)
        found = known[key] = Known(dynamics, None if made_for_many else _made(dynamics, known, tensors, made()))
    return found if found.serves(dynamics) else None


_MOST_ALIKE = 8
"""So many programs are made that differ in shapes and numbers of steps only; compiled steps serve any number."""


def _is_one_of_many(key: Any, known: dict[Hashable, Known]) -> bool:
    """Whether many programs of rollouts have been made that differ from this one in shapes and steps only."""
    if key[0] != "rollout":
        return False
    alike = [other for other in known if _but_for_shapes(other) == _but_for_shapes(key)]
    return len(alike) >= _MOST_ALIKE


def _but_for_shapes(key: Any) -> Any:
    name, _, _, *others = key
    return name == "rollout" and [x for i, x in enumerate(others) if i != _SHAPES]


_SHAPES = 4
"""Where they stand in a key of a rollout, behind its first kept step and its number of steps."""


def _made(
    dynamics: Dynamics,
    known: dict[Hashable, Known],
    tensors: Sequence[Tensor],
    function: Function,
) -> Program | None:
    code = getattr(as_written(dynamics.loss), "__code__", None)
    if code is not None and not known:
        _functions[code] += 1
    if _functions[code] > _MOST or _reads(dynamics).unseen is not None:
        return None
    try:
        with left_alone(_functions_of(dynamics)):
            program = Program(function, tensors)
            program.check(function, tensors)
    except (
        Exception
    ):  # whatever the compiler stumbles over: steps are compiled one by one, or not at all, with a warning
        return None
    return program


def _reads(dynamics: Dynamics) -> Reads:
    return Reads(_functions_of(dynamics))


def _functions_of(dynamics: Dynamics) -> list[object]:
    """What a program of a problem calls that is not the library's, and what it is given that is no tensor."""
    own = () if dynamics.own_update else [type(x).update for x in held(dynamics.optimizer.template)]
    observe = () if dynamics.observer is None else (dynamics.observer.function,)
    return [as_written(dynamics.loss), *observe, *own, Given(dynamics.layout.constants())]


def _forms(dynamics: Dynamics) -> list[Any]:
    return [form for form in (dynamics.observer and dynamics.observer.form, dynamics.aux) if form is not None]


def _observers(dynamics: Dynamics) -> tuple[Hashable, ...]:
    """What tells apart how a problem is looked at, by what lives on."""
    observe: Any = None if dynamics.observer is None else dynamics.observer.function
    other: Any = type(observe)
    return getattr(observe, "__code__", other), dynamics.aux is not None


def _identity(dynamics: Dynamics) -> Any:
    """What is equal for two ``observe`` that are one function: a lambda is made anew wherever it is written."""
    observe = None if dynamics.observer is None else dynamics.observer.function
    if isinstance(observe, FunctionType):
        inside = [cell.cell_contents for cell in observe.__closure__ or ()] + list(observe.__defaults__ or ())
        inside += [x for pair in (observe.__kwdefaults__ or {}).items() for x in pair]
        return [observe.__code__, id(observe.__globals__), *map(_Is, inside)]
    return None if observe is None else _Is(observe)


@final
class _Is:
    """An object, equal to itself only."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]
