"""``chargpt check``: is a run folder whole?"""

from __future__ import annotations

from dataclasses import dataclass

from chargpt.base.terminal import visible
from chargpt.cli.shared import EXIT_FAILED, RunFolder


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read every file of a run, compare its SHA-256 sums, tell what is damaged (exit code 1)."""

    run: RunFolder


def make_flags(_: str) -> type:
    """Return the flags of ``check`` as a dataclass."""
    return Check


def run(command: Check) -> int:
    """Print a line for each part of the run, and return 0 if all are good."""
    from chargpt.measure.inspect import inspect_run

    findings = inspect_run(command.run)
    width = max(len(finding.part) for finding in findings)
    for finding in findings:
        remark = visible(finding.remark)
        print(f"{'ok ' if finding.good else 'BAD'}  {finding.part:{width}}  {remark}")
    return 0 if all(finding.good for finding in findings) else EXIT_FAILED
