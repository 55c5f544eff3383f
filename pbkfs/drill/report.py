"""What a drill found, and its three forms: text, JSON and JUnit's XML.

Filled by ``run``, printed and written by the command line. Seconds are wall time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from pbkfs import durable
from pbkfs.errors import HostError, NotFoundError, PbkfsError
from pbkfs.units import format_bytes

CheckResult = Literal["passed", "failed", "not available", "not enabled", "not run"]
DrillResult = Literal["passed", "failed", "error", "timed out", "interrupted"]

# A damaged cluster can give a line for every page of it; all of them help nobody.
MAX_DETAILS = 200
# A failed start has the last 20 lines of the log.
_SHOWN_DETAILS = 20
_UNPRINTABLE = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


@dataclass(slots=True)
class Phase:
    """One step of a drill, in the order of their beginning."""

    name: str
    seconds: float


@dataclass(slots=True)
class Check:
    """One thing that was to be proven. Only ``failed`` fails the drill."""

    name: str
    result: CheckResult
    message: str
    seconds: float = 0.0
    details: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Recovery:
    """The point that the server reached."""

    target: str
    lsn: str | None = None
    time: str | None = None
    """Of the last transaction replayed, UTC; None where PostgreSQL does not tell."""
    timeline: int | None = None


@dataclass(slots=True)
class Problem:
    """Why a drill ended before its end."""

    slug: str
    message: str
    hint: str | None
    exit_code: int


@dataclass(slots=True)
class Report:
    """All about one drill. What was not reached is None or empty."""

    result: DrillResult = "error"
    exit_code: int = 1
    backup: dict[str, Any] = field(default_factory=dict)
    host: str = ""
    pbkfs_version: str = ""
    postgres_version: str | None = None
    started_at: str = ""
    ended_at: str = ""
    seconds: float = 0.0
    recovery: Recovery | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes: ``pgdata`` and ``stored`` as the store has them, ``databases``, ``diff``."""
    phases: list[Phase] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    mount_log: list[str] = field(default_factory=list)
    """The worker's warnings and errors: a damaged stored page is named here."""
    problem: Problem | None = None
    kept: dict[str, str] | None = None

    def fail(self, error: PbkfsError, result: DrillResult = "error") -> None:
        """Record why the drill ends here; the first reason stays."""
        if self.problem is None:
            self.problem = Problem(error.slug, error.message, error.hint, error.exit_code)
            self.result = result

    def conclude(self) -> None:
        """Set result and exit code from the checks, unless the drill ended early."""
        if self.problem is not None:
            self.exit_code = self.problem.exit_code
        else:
            has_failed = any(check.result == "failed" for check in self.checks)
            self.result = "failed" if has_failed else "passed"
            self.exit_code = int(has_failed)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        return asdict(self)


# --- text -------------------------------------------------------------------------------------


def format_text(report: Report) -> str:
    """Return the report for people."""
    lines = [f"restore drill of {report.backup.get('name', 'a backup')}: {report.result.upper()}"]
    lines += _format_facts(report)
    if report.checks:
        width = max(len(check.result) for check in report.checks)
        lines += ["", "checks"]
        for check in report.checks:
            lines.append(f"  {check.result:<{width}}  {check.name}: {check.message}")
            shown = check.details[:_SHOWN_DETAILS]
            lines += [f"  {'':<{width}}    {detail}" for detail in shown]
            if len(check.details) > len(shown):
                n_more = len(check.details) - len(shown)
                lines.append(f"  {'':<{width}}    … and {n_more} more lines, in --report FILE")
    for title, found in (("notices", report.notices), ("the mount's log", report.mount_log)):
        if found:
            lines += ["", title, *(f"  {line}" for line in found)]
    if report.phases:
        width = max(len(phase.name) for phase in report.phases)
        lines += ["", "phases"]
        lines += [f"  {each.name:<{width}}  {each.seconds:9.2f} s" for each in report.phases]
    if report.kept:
        lines += ["", "kept"]
        lines += [f"  {name}: {value}" for name, value in report.kept.items()]
    return "\n".join(lines)


def _format_facts(report: Report) -> list[str]:
    facts = [("began", f"{report.started_at}, took {report.seconds:.1f} s, on {report.host}")]
    backup = report.backup
    if backup.get("mode"):
        wal = "STREAM" if backup.get("stream") else "ARCHIVE"
        facts.append(("backup", f"{backup['mode']}, {wal}, as of {backup.get('recovery_time')}"))
    versions = f"pbkfs {report.pbkfs_version}"
    if report.postgres_version:
        versions = f"PostgreSQL {report.postgres_version}, {versions}"
    facts.append(("versions", versions))
    recovery = report.recovery
    if recovery is not None:
        reached = f"{recovery.target}"
        if recovery.lsn:
            reached += f"; reached LSN {recovery.lsn}, timeline {recovery.timeline}"
        if recovery.time:
            reached += f", last transaction of {recovery.time}"
        facts.append(("recovery", reached))
    if report.sizes:
        sizes = (f"{name} {format_bytes(n_bytes)}" for name, n_bytes in report.sizes.items())
        facts.append(("sizes", ", ".join(sizes)))
    return [f"  {name + ':':<10} {value}" for name, value in facts]


# --- JUnit ------------------------------------------------------------------------------------


def format_junit(report: Report) -> bytes:
    """Return the report as one test suite of JUnit's XML, UTF-8."""
    problems = int(report.problem is not None)
    counts = {
        "tests": len(report.checks) + problems,
        "failures": sum(check.result == "failed" for check in report.checks),
        "errors": problems,
        "skipped": sum(check.result not in ("passed", "failed") for check in report.checks),
    }
    numbers = {name: str(count) for name, count in counts.items()}
    root = ElementTree.Element("testsuites", numbers, time=f"{report.seconds:.3f}")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        numbers,
        name="restore drill",
        timestamp=report.started_at.removesuffix("Z"),
        hostname=report.host,
        time=f"{report.seconds:.3f}",
    )
    _add_properties(suite, report)
    for check in report.checks:
        _add_case(suite, check)
    if report.problem is not None:
        problem = report.problem
        case = ElementTree.SubElement(suite, "testcase", classname="drill", name="drill", time="0")
        error = ElementTree.SubElement(
            case, "error", type=problem.slug, message=_printable(problem.message)
        )
        error.text = _printable(problem.hint or "")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _add_properties(suite: ElementTree.Element, report: Report) -> None:
    properties = ElementTree.SubElement(suite, "properties")
    values: dict[str, Any] = {f"backup.{name}": value for name, value in report.backup.items()}
    values |= {"pbkfs": report.pbkfs_version, "postgres": report.postgres_version}
    if report.recovery is not None:
        values |= {f"recovery.{k}": v for k, v in asdict(report.recovery).items()}
    values |= {f"bytes.{name}": value for name, value in report.sizes.items()}
    values |= {f"seconds.{phase.name}": f"{phase.seconds:.3f}" for phase in report.phases}
    for name, value in values.items():
        if value is not None:
            text = _printable(str(value))
            ElementTree.SubElement(properties, "property", name=name, value=text)


def _add_case(suite: ElementTree.Element, check: Check) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname="drill",
        name=_printable(check.name),
        time=f"{check.seconds:.3f}",
    )
    message = _printable(check.message)
    if check.result == "failed":
        failure = ElementTree.SubElement(case, "failure", type="failed", message=message)
        failure.text = _printable("\n".join(check.details))
    elif check.result == "passed":
        ElementTree.SubElement(case, "system-out").text = message
    else:
        ElementTree.SubElement(case, "skipped", message=f"{check.result}: {message}")


def _printable(text: str) -> str:
    """Replace what XML 1.0 cannot hold. Source: https://www.w3.org/TR/xml/#charsets."""
    return _UNPRINTABLE.sub("?", text)


# --- files ------------------------------------------------------------------------------------


def check_files(paths: Sequence[Path]) -> None:
    """Raise NotFoundError or HostError where a report could not be written hours later."""
    for path in paths:
        directory = path.parent
        if not directory.is_dir():
            raise NotFoundError(f"directory {directory} of report {path.name} does not exist")
        if path.is_dir() or not os.access(path if _is_special(path) else directory, os.W_OK):
            raise HostError(
                f"cannot write report {path}", hint="Name a file that this user can write."
            )


def write_file(path: Path, data: bytes) -> None:
    """Write a report: whole or not at all where ``path`` is a plain file. Raises HostError."""
    try:
        if _is_special(path):
            path.write_bytes(data)
        else:
            durable.replace_file(path, data, label="report:replace", mode=0o644)
    except OSError as error:
        raise HostError(f"cannot write report {path}: {error.strerror}") from error


def _is_special(path: Path) -> bool:
    """Whether ``path`` has to be written as it is: /dev/stdout, a pipe, somebody's link."""
    return path.is_symlink() or (path.exists() and not path.is_file())
