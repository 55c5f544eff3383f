"""What a failed request answers."""

from __future__ import annotations

import errno
import logging
import stat
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from pbkfs.errors import FormatError, UnsupportedError
from pbkfs.fuse.operations import Operations, error_number


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


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("mkdir", (7, b"there", 0o700)),
        ("create", (7, b"there", stat.S_IFREG | 0o600, 0)),
        ("mknod", (7, b"there", stat.S_IFREG | 0o600, 0)),
        ("symlink", (7, b"there", b"to")),
        ("link", (8, 7, b"there")),
    ],
)
def test_kernel_is_told_of_a_name_that_it_holds_to_be_missing(
    op: str, args: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where a request was carried out and its caller killed before it was sent again."""

    def exists(*_args: object) -> None:
        raise FileExistsError(errno.EEXIST, "there")

    monkeypatch.setattr("pbkfs.fuse.tablespaces.is_tablespace_link", lambda *_args: False)
    tree: Any = SimpleNamespace(was_done=lambda _number: None)
    for name in ("mkdir", "create", "symlink", "link"):
        setattr(tree, name, exists)
    told: list[tuple[int, bytes]] = []
    operations = Operations(
        tree,
        lambda _ino: None,
        lambda _token: (2, 1),
        lambda parent, name: told.append((parent, name)),
    )
    ctx: Any = SimpleNamespace(pid=1, uid=0, gid=0)

    async def ask() -> None:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await getattr(operations, op)(*args, ctx)
        assert caught.value.errno == errno.EEXIST

    trio.run(ask)
    assert told == [(7, b"there")]
