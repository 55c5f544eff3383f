"""What a failed request answers."""

from __future__ import annotations

import errno
import logging

import pytest

from pbkfs.errors import FormatError, UnsupportedError
from pbkfs.fuse.operations import error_number


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FileNotFoundError(errno.ENOENT, "x"), errno.ENOENT),
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        # The kernel would switch the operation off for the life of the mount.
        (OSError(errno.ENOSYS, "x"), errno.EOPNOTSUPP),
        # The kernel takes no such number, and the caller would wait for ever.
        (OSError(99999, "x"), errno.EIO),
        (OSError(-5, "x"), errno.EIO),
        (OSError("no number"), errno.EIO),
    ],
)
def test_errors_of_the_system_pass_through(error: OSError, number: int) -> None:
    assert error_number(error) == number


@pytest.mark.expect_log("request failed")
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FormatError("page 5 does not inflate"), errno.EIO),
        (UnsupportedError("cfs"), errno.ENOTSUP),
        (RuntimeError("bug"), errno.EIO),
    ],
)
def test_other_errors_are_logged(
    error: Exception, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert error_number(error) == number
    assert len(caplog.records) == 1
    assert (caplog.records[0].exc_info is not None) == isinstance(error, RuntimeError)
