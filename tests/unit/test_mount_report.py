"""An error crosses a process boundary with its class, message and hint."""

from __future__ import annotations

import os
import time

import pytest

from pbkfs.errors import DiffError, HostError, PbkfsError
from pbkfs.mount.report import (
    ReportReader,
    ReportWriter,
    WorkerBugError,
    error_to_fields,
    fields_to_error,
)


@pytest.mark.parametrize("cls", PbkfsError.__subclasses__())
def test_every_class_comes_back(cls: type[PbkfsError]) -> None:
    found = fields_to_error(error_to_fields(cls("message", hint="Hint.")))
    assert type(found) is cls
    assert isinstance(found, PbkfsError)
    assert (found.message, found.hint) == ("message", "Hint.")


def test_unexpected_exception_brings_its_traceback() -> None:
    try:
        raise ZeroDivisionError("of\nall things")
    except ZeroDivisionError as error:
        found = fields_to_error(error_to_fields(error))
    assert isinstance(found, WorkerBugError)
    assert found.args[0] == "ZeroDivisionError: of all things"
    assert "test_unexpected_exception_brings_its_traceback" in found.__notes__[0]


def test_messages_in_order_then_the_end() -> None:
    read_end, write_end = os.pipe()
    reader, writer = ReportReader(read_end), ReportWriter(write_end)
    writer.send("started", pid=7)
    writer.send("error", **error_to_fields(HostError("no /dev/fuse", hint="Load it.")))
    writer.close()
    assert reader.receive(None) == {"event": "started", "pid": 7}
    message = reader.receive(None)
    assert message is not None
    assert isinstance(fields_to_error(message), HostError)
    assert reader.receive(None) is None
    reader.close()


def test_reader_gives_up_at_its_deadline() -> None:
    read_end, write_end = os.pipe()
    reader = ReportReader(read_end)
    os.write(write_end, b'{"event": "sta')
    with pytest.raises(TimeoutError):
        reader.receive(time.monotonic() + 0.01)
    os.write(write_end, b'rted"}\n')
    assert reader.receive(time.monotonic() + 10) == {"event": "started"}
    os.close(write_end)
    reader.close()


def test_reader_that_left_is_no_failure() -> None:
    read_end, write_end = os.pipe()
    writer = ReportWriter(write_end)
    os.close(read_end)
    writer.send("ok")
    writer.send("error", **error_to_fields(DiffError("x")))
