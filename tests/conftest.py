"""The frame of a test session: what is enabled, what a skip means, and that nothing stays behind.

Fixtures live in the plugins ``fix_*.py`` beside this file, which are loaded here. This file owns
what concerns the session as a whole:

* the header, which says what of this machine the tests can use, and what is left out and why;
* with ``CI=true`` a skip is a failure: there, everything has to run;
* at the end, no mount, no process and no loop device of this session may be left.

Every process that a test starts inherits ``PBKFS_TEST_SESSION``, by which the last check finds it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import signal
import tempfile
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from machine import (
    IS_CI,
    MAJORS,
    SESSION,
    TESTS,
    catalogs_directory,
    fuse_obstacle,
    kept_recording,
    postgres_majors,
    postgres_root,
    session_directory,
)

_LOCK = pytest.StashKey[BinaryIO | None]()

pytest_plugins = sorted(path.stem for path in TESTS.glob("fix_*.py"))

# --- the header -------------------------------------------------------------------------------


def _report() -> list[tuple[str, str, str | None]]:
    """Rows of (what, what there is, what that leaves out or None)."""
    obstacle = fuse_obstacle()
    majors = postgres_majors()
    missing = [str(major) for major in MAJORS if major not in majors]
    catalogs = catalogs_directory()
    names = sorted(p.name.split("_")[0] for p in catalogs.glob("*.tar.zst"))
    is_root = os.geteuid() == 0
    return [
        ("FUSE", obstacle or "yes", "everything that mounts" if obstacle else None),
        (
            "PostgreSQL",
            " ".join(map(str, majors)) or "none",
            f"servers of {' '.join(missing)}: not in {postgres_root()}" if missing else None,
        ),
        (
            "catalogs",
            f"{' '.join(names) or 'none'} ({catalogs})",
            None if len(names) > 1 else "all but the small catalog that is kept in tests/data",
        ),
        (
            "root",
            "yes" if is_root else "no",
            None if is_root else "what only root can do: other owners, loop devices, bind mounts",
        ),
    ]


def pytest_report_header() -> list[str]:
    rows = _report()
    lines = [f"{what}: {there}" for what, there, _ in rows]
    lines += [f"left out ({what}): {out}" for what, _, out in rows if out]
    if IS_CI:
        lines.append("CI=true: whatever would be skipped fails")
    return lines


# --- a skip in CI is a failure ----------------------------------------------------------------


def _fail_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IS_CI and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        why = report.longrepr
        reason = why[2] if isinstance(why, tuple) else str(why)
        report.outcome = "failed"
        report.longrepr = f"in CI nothing is skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_skip(report)
    return report


# --- nothing is left behind -------------------------------------------------------------------


def _mounts() -> dict[str, str]:
    """Mount point -> type, of everything in this mount namespace."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode("latin-1").decode("unicode_escape")
        found[point] = right.split(" ")[0]
    return found


def _loop_devices() -> dict[str, str]:
    """Device -> the file behind it."""
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found[path.parts[3]] = path.read_text().strip()
        except OSError:
            continue  # let go of meanwhile
    return found


def _processes_of(token: str) -> dict[int, str]:
    """Processes that inherited the session's mark, but for this one."""
    needle = f"{SESSION}={token}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if needle not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # ended meanwhile, or another user's
        if state != "Z":
            found[int(entry.name)] = command.strip() or entry.name
    return found


class LeftBehind:
    """Compares the machine before and after the session; only in the process that steers it."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._mounts = _mounts()
        self._loops = _loop_devices()

    def find(self, place: str) -> list[str]:
        def is_ours(path: str) -> bool:
            # Alone on its machine, all that is new is the session's. Elsewhere somebody else may
            # mount at the same time, so only what lies below the session's own directory counts.
            return IS_CI or path.startswith(place)

        found = [
            f"mount: {point} ({kind})"
            for point, kind in _mounts().items()
            if point not in self._mounts and is_ours(point)
        ]
        found += [
            f"loop device: {device} on {file}"
            for device, file in _loop_devices().items()
            if self._loops.get(device) != file and is_ours(file)
        ]
        found += [f"process {pid}: {name}" for pid, name in _processes_of(self._token).items()]
        return found

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        place = session_directory()
        found = self.find(f"{place}/")
        if found:
            report = pytest.TestReport(
                nodeid="the machine",
                location=("the machine", None, "the machine"),
                keywords={},
                outcome="failed",
                longrepr="left behind by the tests:\n" + "\n".join(found),
                when="teardown",
            )
            terminal = session.config.pluginmanager.get_plugin("terminalreporter")
            if terminal is not None:
                terminal.stats.setdefault("error", []).append(report)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            shutil.rmtree(place, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts its background jobs with SIGINT ignored, which all children inherit, and then
    # nothing that a test interrupts would end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        return  # a worker of xdist: the process that steers the session looks after it
    token = os.environ.setdefault(SESSION, uuid.uuid4().hex[:8])
    place = session_directory()
    place.mkdir(mode=0o755, exist_ok=True)
    place.chmod(0o755)  # whatever the umask: servers run as another user than root
    config.stash[_LOCK] = _take_lock(place)
    _remove_old_sessions(place)
    if config.option.basetemp is None:
        config.option.basetemp = str(place / "pytest")
    config.pluginmanager.register(LeftBehind(token), "pbkfs-left-behind")


def _take_lock(place: Path) -> BinaryIO | None:
    """Mark a session's directory as in use for as long as the file is open; None: it is already."""
    file = (place / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _remove_old_sessions(place: Path) -> None:
    """What a session kept because a test failed goes when the next one starts, unless that one is
    to use it."""
    wanted = kept_recording()
    for other in place.parent.glob("pbkfs-test-*"):
        try:
            if other == place or other.stat().st_uid != os.geteuid():
                continue
            if wanted is not None and wanted.is_relative_to(other.resolve()):
                continue
            lock = _take_lock(other)
        except OSError:
            continue  # not ours to judge, or gone meanwhile
        if lock is not None:
            if not any(point.startswith(f"{other}/") for point in _mounts()):
                shutil.rmtree(other, ignore_errors=True)
            lock.close()


# --- the log and the places ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _log_is_quiet(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Nothing of ours logs a warning or an error in this process, unless the test expects it."""
    yield
    expected = [re.compile(mark.args[0]) for mark in request.node.iter_markers("expect_log")]
    unexpected = [
        record.getMessage()
        for when in ("setup", "call")
        for record in caplog.get_records(when)
        if record.name.partition(".")[0] == "pbkfs"
        and record.levelno >= logging.WARNING
        and not any(pattern.search(record.getMessage()) for pattern in expected)
    ]
    assert not unexpected, "unexpected in the log"


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory, 0755, that every user can reach (tmp_path is 0700 all the way down) and
    whose path is short enough for a Unix socket. Removed after the test."""
    path = Path(tempfile.mkdtemp(prefix="p-", dir=session_directory()))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)
