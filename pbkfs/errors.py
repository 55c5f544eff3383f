"""The one tree of errors: every failure a user can meet is a class here.

Each class carries a slug (machine readable, stable), the exit code of the command line, the HTTP
status of the daemon and the errno a file-system request gets. They are translated once per edge:
``cli`` makes an exit code and one line, ``fuse`` an errno.

Exit codes: 0 done, 1 a bug (traceback in the log), 2 usage, 3 not mounted / not running, then one
code a class.
"""

from __future__ import annotations

import errno


class PbkfsError(Exception):
    """Base of all expected failures.

    The message is lower case, has no full stop and names the object and its values. ``hint`` is a
    full sentence that says what to do; where the place of the error knows nothing better, it is the
    class's ``default_hint``.
    """

    slug = "error"
    exit_code = 1
    http_status = 500
    errno = errno.EIO
    default_hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint


class UsageError(PbkfsError):
    """The command line or a request cannot be understood, or its values contradict each other."""

    slug, exit_code, http_status, errno = "usage", 2, 400, errno.EINVAL
    default_hint = "pbkfs COMMAND --help shows what can be given."


class NotRunningError(PbkfsError):
    """Nothing is mounted, or no server runs, where one is needed."""

    slug, exit_code, http_status, errno = "not_running", 3, 409, errno.ENOTCONN
    default_hint = "pbkfs list shows the mounts of this host, pbkfs status a server."


class NotFoundError(PbkfsError):
    """A named store, instance, backup, directory or diff does not exist."""

    slug, exit_code, http_status, errno = "not_found", 4, 404, errno.ENOENT
    default_hint = "Check the name and the path."


class ChainError(PbkfsError):
    """A backup chain cannot be mounted: status, missing parent, cycle, mixed versions."""

    slug, exit_code, http_status, errno = "chain", 5, 422, errno.EINVAL
    default_hint = "pbkfs backups shows which backups of the store can be mounted."


class FormatError(PbkfsError):
    """Bytes of a store or a diff are not what their format says."""

    slug, exit_code, http_status, errno = "format", 6, 422, errno.EIO
    default_hint = "The file is damaged: put it back from a copy, or take another backup."


class DiffError(PbkfsError):
    """A diff belongs to another base, is of another format version, or is damaged."""

    slug, exit_code, http_status, errno = "diff", 7, 409, errno.EINVAL
    default_hint = "Restore the diff from a copy, or begin with a new one."


class BusyError(PbkfsError):
    """The object is in use by a live owner: diff, mount point, backup, port."""

    slug, exit_code, http_status, errno = "busy", 8, 409, errno.EBUSY
    default_hint = "Wait until it is free, or end what uses it."


class HostError(PbkfsError):
    """This machine lacks something: /dev/fuse, fusermount3, privilege, space, a writable place."""

    slug, exit_code, http_status, errno = "host", 9, 503, errno.EPERM
    default_hint = "Check what this user may do there, and the system's log."


class PostgresError(PbkfsError):
    """PostgreSQL's binaries are missing, or the server did not start, stop or recover."""

    slug, exit_code, http_status, errno = "postgres", 10, 502, errno.EIO
    default_hint = "See the server's log, in the diff's directory log."


class UnsupportedError(PbkfsError):
    """The input is understood but declined by name, for example a CFS tablespace."""

    slug, exit_code, http_status, errno = "unsupported", 11, 422, errno.ENOTSUP
    default_hint = "The README says what can be mounted."


class TimedOutError(PbkfsError):
    """A wait reached its limit; what was waited for may still be going on."""

    slug, exit_code, http_status, errno = "timed_out", 12, 504, errno.ETIMEDOUT
    default_hint = "It may still be going on: look again later."
