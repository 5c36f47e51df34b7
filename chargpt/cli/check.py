"""``chargpt check``: is a run folder whole?"""

from __future__ import annotations

from typing import Any

from chargpt.base.terminal import visible
from chargpt.cli import shared


def make_flags(_: str) -> type:
    """Return the flags of ``check`` as a dataclass."""
    text = "Read every file of a run, compare its SHA-256 sums, list damage (exit code 1)."
    return shared.flags_class(text, [shared.RUN])


def run(command: Any) -> int:
    """Print one line per part of the run, and return 0 if all are good."""
    from chargpt.measure.inspect import inspect_run

    findings = inspect_run(command.run)
    width = max(len(finding.part) for finding in findings)
    for finding in findings:
        verdict = "ok " if finding.good else "BAD"
        print(f"{verdict}  {finding.part:{width}}  {visible(finding.remark)}")
    return 0 if all(finding.good for finding in findings) else shared.EXIT_FAILED
