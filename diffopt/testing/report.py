"""What a battery found: one finding per claim, a table of them, and the error if any claim is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import TypeVar, final

from diffopt.comparing.comparison import brief
from diffopt.errors import ConformanceError


@final
@dataclass(frozen=True)
class Finding:
    """One claim and what was measured.

    Attributes:
        claim: what was claimed.
        held: whether it is so.
        measured: the number that decides.
        expected: what it was to be.
        look: what to check if it is not so.
    """

    claim: str
    held: bool
    measured: str
    expected: str
    look: str


def at_most(claim: str, measured: float, limit: float, look: str) -> Finding:
    """A claim that a number is small; NaN is not."""
    return Finding(claim, measured <= limit, _number(measured), f"<= {_number(limit)}", look)


def above(claim: str, measured: float, limit: float, look: str) -> Finding:
    """A claim that a number is not small; NaN is not above anything."""
    return Finding(claim, measured > limit, _number(measured), f"> {_number(limit)}", look)


def _number(value: float) -> str:
    return str(int(value)) if value == 0 or isinstance(value, int) else f"{value:.1e}"


def equal(claim: str, measured: object, expected: object, look: str) -> Finding:
    """A claim that two values are equal."""
    return Finding(claim, measured == expected, str(measured), str(expected), look)


def holds(claim: str, held: bool, look: str) -> Finding:
    """A claim that is so or not."""
    return Finding(claim, held, "yes" if held else "no", "yes", look)


def raises(claim: str, kind: type[Exception], action: Callable[[], object], look: str) -> Finding:
    """A claim that something is refused by an error of this kind."""
    try:
        action()
        got = "no error"
    except kind as error:
        return Finding(claim, True, type(error).__name__, kind.__name__, look)
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:60]}"
    return Finding(claim, False, got, kind.__name__, look)


@final
@dataclass(frozen=True)
class Report:
    """What :func:`check_estimator` and :func:`check_optimizer` return; ``print`` it for a table.

    Attributes:
        subject: what was checked.
        findings: one per claim.
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The claims that do not hold."""
        return tuple(finding for finding in self.findings if not finding.held)

    def __str__(self) -> str:
        """A table for the terminal, with what to check under each broken claim."""
        rows = [("claim", "", "measured", "expected"), *(_cells(finding) for finding in self.findings)]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for i in reversed(range(len(self.findings))):
            if not self.findings[i].held:
                lines.insert(i + 2, f"    check: {self.findings[i].look}")
        return "\n".join([self.subject, lines[0], "-" * (sum(widths) + 6), *lines[1:]])


def title(subject: object) -> str:
    """The call that makes what is tested, in one line."""
    text = " ".join(brief(subject).split()) if is_dataclass(subject) else f"{type(subject).__name__}()"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    return (finding.claim, "holds" if finding.held else "BROKEN", finding.measured, finding.expected)


Subject = TypeVar("Subject")


def _made(check: Callable[[Subject], Iterable[Finding]], subject: Subject) -> Iterator[Finding]:
    """The findings of one check; an error ends it and is one more."""
    try:
        yield from check(subject)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Finding(check.__name__.replace("_", " "), False, "an error", "none", text[:300])


def run(name: str, subject: Subject, checks: Sequence[Callable[[Subject], Iterable[Finding]]]) -> Report:
    """Make all checks, one after the other whatever the others found.

    Raises:
        ConformanceError: a claim is broken; the message names all of them.
    """
    findings = [finding for check in checks for finding in _made(check, subject)]
    report = Report(name, tuple(findings))
    if report.broken:
        lines = [
            f"{broken.claim}: got {broken.measured}, expected {broken.expected}; check: {broken.look}"
            for broken in report.broken
        ]
        head = f"{len(lines)} of {len(findings)} claims of {name} are broken:"
        raise ConformanceError("\n".join([head, *lines]), str(report))
    return report
