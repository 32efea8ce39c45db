"""What a series of checks found: findings that are data, the report of them, and the one printer of all tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, final

from diffopt.errors import ConformanceError, DiffoptError

Outcome = Literal["ok", "note", "FAIL", "skipped"]


@final
@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        check: what was looked at, or claimed.
        outcome: ``"ok"``; ``"note"``: fit, but worth knowing; ``"FAIL"``; ``"skipped"``.
        measured: what was found.
        expected: what it was to be; empty where nothing in particular was.
        fix: what to do about it if it failed; empty where nothing is to be done.
        error: the error that this finding is, where it failed by one.
    """

    check: str
    outcome: Outcome
    measured: str
    expected: str = ""
    fix: str = ""
    error: DiffoptError | None = None

    @classmethod
    def of(cls, check: str, error: DiffoptError) -> Finding:
        """The finding that a check failed by this error, whose parts it takes."""
        return cls(check, "FAIL", error.got or str(error), error.expected, error.fix, error)

    @property
    def held(self) -> bool:
        """Whether the check did not fail."""
        return self.outcome != "FAIL"

    # what version 0.1 called them
    claim = property(attrgetter("check"), doc="Another name of ``check``.")
    mend = property(attrgetter("fix"), doc="Another name of ``fix``.")
    look = property(attrgetter("fix"), doc="Another name of ``fix``.")


@final
@dataclass(frozen=True)
class Report:
    """What :func:`diffopt.check` and the batteries of ``diffopt.testing`` found; ``print`` it.

    Attributes:
        findings: one per check.
        subject: what was checked, where that has a name.
    """

    findings: tuple[Finding, ...]
    subject: str = ""

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return tuple(finding for finding in self.findings if not finding.held)

    broken = property(attrgetter("failures"), doc="Another name of ``failures``.")

    def __getitem__(self, check: str) -> Finding:
        """The finding of one check, by its name."""
        return next(finding for finding in self.findings if finding.check == check)

    def raise_if_failed(self) -> None:
        """Raise the error of the first check that failed, if any did.

        Raises:
            DiffoptError: the same class that :func:`diffopt.solve` raises for this fault, where it can see it.
            ConformanceError: the checks are claims, which have no errors of their own; it names all that are broken.
        """
        for finding in self.failures:
            raise finding.error or self._broken_claims()

    def _broken_claims(self) -> ConformanceError:
        lines = [str(DiffoptError(f"{f.check}: got {f.measured}", f.expected, f.fix)) for f in self.failures]
        got = f"{len(lines)} of {len(self.findings)} claims of {self.subject or 'it'} are broken"
        return ConformanceError(got, "none", "\n".join(["each with its fix:", *lines]), table=str(self))

    def __str__(self) -> str:
        """A table for the terminal, with what to do under each finding that needs it, and the count of failures."""
        limits = all(finding.expected for finding in self.findings)  # else it is sentences that were measured
        columns = ["check", "outcome", "measured", *["expected"] * limits]
        rows: list[tuple[str, ...]] = []
        for finding in self.findings:
            rows.append((finding.check, finding.outcome, finding.measured, finding.expected)[: len(columns)])
            advice = [f"expected {finding.expected}"] if finding.expected and not limits else []
            advice += [f"fix: {finding.fix}"] if finding.fix and finding.outcome != "ok" else []
            rows += [(f"    {'; '.join(advice)}",)] if advice else []
        subject = [self.subject] if self.subject else []
        verdict = f"{len(self.failures) or 'none'} of {len(self.findings)} checks failed"
        return "\n".join([*subject, table(columns, rows), verdict])


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    form: Literal["text", "markdown"] = "text",
    align: str = "l",
) -> str:
    """A table as lines of text, in columns for a terminal or in Markdown.

    Args:
        columns: the header.
        rows: the cells. The last cell of a row that is too short takes the rest of its line.
        form: in Markdown, a ``|`` in a cell is written so that it does not end the cell.
        align: for each column ``l`` or ``r``, to which side; the last letter holds for all columns that follow.
    """
    align = align.ljust(len(columns), align[-1])
    lines = [[" ".join(cell.splitlines()) for cell in row] for row in (columns, *rows)]
    if form == "markdown":
        escaped = [[cell.replace("|", "\\|") for cell in line] + [""] * (len(columns) - len(line)) for line in lines]
        rule = "".join("|--:" if side == "r" else "|---" for side in align)
        header, *body = (f"| {' | '.join(line)} |" for line in escaped)
        return "\n".join([header, f"{rule}|", *body])
    counted = [line if len(line) == len(columns) else line[:-1] for line in lines]
    widths = [max((_width(line[i]) for line in counted if i < len(line)), default=0) for i in range(len(columns))]
    header, *body = ("  ".join(map(_padded, line, widths, _sides(line, align))).rstrip() for line in lines)
    return "\n".join([header, "-" * _width(header), *body])


def _sides(line: Sequence[str], align: str) -> str:
    """The sides of a line's cells: one that takes the rest of the line starts where its column does."""
    return align if len(line) == len(align) else f"{align[: len(line) - 1]}l"


def _padded(cell: str, width: int, side: str) -> str:
    blank = " " * (width - _width(cell))
    return blank + cell if side == "r" else cell + blank


def _width(text: str) -> int:
    """How many columns of a terminal a text takes: two for a wide letter, none for an accent."""
    return sum((unicodedata.east_asian_width(x) in "WF") + (not unicodedata.combining(x)) for x in text)
