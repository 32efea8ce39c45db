"""How a battery finds: a claim and the number that decides it; the checks one after the other; the error at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import TypeVar

from diffopt.comparing.comparison import brief
from diffopt.reports import Finding, Report


def decided(claim: str, held: bool, measured: object, expected: object, fix: str) -> Finding:
    """A claim, whether it is so, and what decides that."""
    return Finding(claim, "ok" if held else "FAIL", str(measured), str(expected), fix)


def at_most(claim: str, measured: float, limit: float, fix: str) -> Finding:
    """A claim that a number is small; NaN is not."""
    return decided(claim, measured <= limit, _number(measured), f"<= {_number(limit)}", fix)


def above(claim: str, measured: float, limit: float, fix: str) -> Finding:
    """A claim that a number is not small; NaN is not above anything."""
    return decided(claim, measured > limit, _number(measured), f"> {_number(limit)}", fix)


def _number(value: float) -> str:
    return str(int(value)) if value == 0 or isinstance(value, int) else f"{value:.1e}"


def equal(claim: str, measured: object, expected: object, fix: str) -> Finding:
    """A claim that two values are equal."""
    return decided(claim, measured == expected, measured, expected, fix)


def holds(claim: str, held: bool, fix: str) -> Finding:
    """A claim that is so or not."""
    return decided(claim, held, "yes" if held else "no", "yes", fix)


def raises(claim: str, kind: type[Exception], action: Callable[[], object], fix: str) -> Finding:
    """A claim that something is refused by an error of this kind."""
    try:
        action()
        got = "no error"
    except kind as error:
        return decided(claim, True, type(error).__name__, kind.__name__, fix)
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:60]}"
    return decided(claim, False, got, kind.__name__, fix)


def title(subject: object) -> str:
    """The call that makes what is tested, in one line."""
    text = " ".join(brief(subject).split()) if is_dataclass(subject) else f"{type(subject).__name__}()"
    return text if len(text) <= 120 else f"{text[:117]}..."


Subject = TypeVar("Subject")


def _made(check: Callable[[Subject], Iterable[Finding]], subject: Subject) -> Iterator[Finding]:
    """The findings of one check; an error ends it and is one more."""
    try:
        yield from check(subject)
    except Exception as error:
        name, text = check.__name__.replace("_", " "), " ".join(str(error).split())
        yield decided(name, False, type(error).__name__, "no error", text[:300])


def run(name: str, subject: Subject, checks: Sequence[Callable[[Subject], Iterable[Finding]]]) -> Report:
    """Make all checks, one after the other whatever the others found.

    Raises:
        ConformanceError: a claim is broken; the message names all of them.
    """
    report = Report(tuple(finding for check in checks for finding in _made(check, subject)), name)
    report.raise_if_failed()
    return report
