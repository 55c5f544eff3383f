"""Log lines: text, JSON, the journal's protocol; a log that can't be written is no failure."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbkfs import log


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, logging.raiseExceptions = handlers, raises
    root.setLevel(level)
    logging.captureWarnings(False)


def test_text_line(tmp_path: Path) -> None:
    log.configure("file", path=tmp_path / "log")
    logging.getLogger("pbkfs.x").info("page %d is gone", 7)
    logging.getLogger("pbkfs.x").debug("too much")
    line = (tmp_path / "log").read_text()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    \[\d+\] pbkfs\.x: page 7 is gone\n", line
    )


def test_json_line_holds_a_traceback(tmp_path: Path) -> None:
    log.configure("file", path=tmp_path / "log", style="json", debug=True)
    try:
        raise ZeroDivisionError("of\nall")
    except ZeroDivisionError:
        logging.getLogger("pbkfs.x").exception("worker failed")
    (line,) = (tmp_path / "log").read_text().splitlines()
    entry = json.loads(line)
    assert entry["level"] == "error"
    assert entry["message"] == "worker failed"
    assert "ZeroDivisionError: of\nall" in entry["traceback"]


def test_rotated_file_is_opened_again(tmp_path: Path) -> None:
    log.configure("file", path=tmp_path / "log")
    logging.getLogger("pbkfs").info("one")
    (tmp_path / "log").rename(tmp_path / "log.1")
    logging.getLogger("pbkfs").info("two")
    assert "one" in (tmp_path / "log.1").read_text()
    assert "two" in (tmp_path / "log").read_text()


def test_directory_that_has_gone_is_no_failure(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    log.configure("file", path=place / "log")
    (place / "log").unlink()
    place.rmdir()
    logging.getLogger("pbkfs").info("lost")
    place.mkdir()
    logging.getLogger("pbkfs").info("there again")
    assert (place / "log").read_text().endswith("pbkfs: there again\n")


def test_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        log.configure("file", path=tmp_path / "log")
    (tmp_path / "log").unlink()
    log.configure("file", path=tmp_path / "log")
    (tmp_path / "log").unlink()
    (tmp_path / "log").symlink_to(victim)
    logging.getLogger("pbkfs").info("not there")
    assert victim.read_text() == ""


def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="it is a fifo"):
        log.configure("file", path=tmp_path / "log")
    (tmp_path / "log").unlink()
    log.configure("file", path=tmp_path / "log")
    (tmp_path / "log").unlink()
    os.mkfifo(tmp_path / "log")
    logging.getLogger("pbkfs").info("not there")
    (tmp_path / "log").unlink()
    logging.getLogger("pbkfs").info("there again")
    assert (tmp_path / "log").read_text().endswith("pbkfs: there again\n")


def test_second_configuration_replaces_the_first(tmp_path: Path) -> None:
    log.configure("file", path=tmp_path / "a")
    log.configure("file", path=tmp_path / "b")
    logging.getLogger("pbkfs").info("one")
    assert (tmp_path / "a").read_text() == ""
    assert (tmp_path / "b").read_text().count("one") == 1


def parse_journal(data: bytes) -> dict[str, str]:
    """Undo the journal's native protocol."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, is_short, value = line.partition(b"=")
        if not is_short:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[9 + length :]
        fields[name.decode()] = value.decode()
    return fields


def test_journal_datagram(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(path)
        handler = log.JournalHandler(path)
        logger = logging.getLogger("a journal's")
        logger.addHandler(handler)
        logger.error("two\nlines")
        fields = parse_journal(journald.recv(65536))
        logger.removeHandler(handler)
        handler.close()
    assert fields["MESSAGE"] == "two\nlines"
    assert fields["PRIORITY"] == "3"
    assert fields["SYSLOG_IDENTIFIER"] == "pbkfs"


def test_missing_journald_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        log.JournalHandler(str(tmp_path / "absent"))


def test_line_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    code = (
        "import logging, resource, sys; from pathlib import Path; from pbkfs import log;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
        "log.configure('file', path=Path(sys.argv[1])); logging.error('x'); print('alive')"
    )
    command = [sys.executable, "-c", code, tmp_path / "log"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n"
    assert (tmp_path / "log").read_bytes() == b""
