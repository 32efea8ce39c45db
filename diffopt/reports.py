"""What :func:`diffopt.check` returns: one finding per check, and what to do about those that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from diffopt.errors import DiffoptError

Outcome = Literal["ok", "note", "FAIL", "skipped"]


@final
@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        check: what was looked at.
        outcome: ``"ok"``; ``"note"``: fit, but worth knowing; ``"FAIL"``; ``"skipped"``.
        measured: what was found.
        mend: what to do about it; empty where nothing is to be done.
        error: the error that this finding is, where it failed.
    """

    check: str
    outcome: Outcome
    measured: str
    mend: str = ""
    error: DiffoptError | None = None


@final
@dataclass(frozen=True)
class Report:
    """What :func:`diffopt.check` found; ``print`` it.

    Attributes:
        findings: one per check.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return tuple(finding for finding in self.findings if finding.outcome == "FAIL")

    def __getitem__(self, check: str) -> Finding:
        """The finding of one check, by its name."""
        return next(finding for finding in self.findings if finding.check == check)

    def raise_if_failed(self) -> None:
        """Raise the error of the first check that failed, if any did.

        Raises:
            DiffoptError: the same class that :func:`diffopt.solve` raises for this fault, where it can see it.
        """
        for finding in self.failures:
            if finding.error is not None:
                raise finding.error

    def __str__(self) -> str:
        """A table for the terminal."""
        check_width = max(len(finding.check) for finding in self.findings)
        lines = [f"{'check':{check_width}}  outcome  what was measured"]
        lines.append("-" * len(lines[0]))
        for finding in self.findings:
            lines.append(f"{finding.check:{check_width}}  {finding.outcome:7}  {finding.measured}")
            if finding.mend:
                lines.append(f"{'':{check_width}}  {'':7}  mend: {finding.mend}")
        fit = "fit" if self.ok else f"not fit: {len(self.failures)} of {len(self.findings)} checks failed"
        return "\n".join([*lines, fit])
