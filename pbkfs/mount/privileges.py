"""What the worker of root gives up once it has mounted, and its keeper at once.

Called on a process's only thread: capabilities belong to a thread, and those that are started
later inherit them. A worker of an ordinary user has none to give up.
"""

from __future__ import annotations

import ctypes
import os
import struct

# Source: linux/capability.h. Each is kept for what stands beside it.
KEPT = {
    "CAP_CHOWN": 0,  # files of the diff belong to the server's user
    "CAP_DAC_OVERRIDE": 1,  # … and its directories, and those of the base, to whomever
    "CAP_FOWNER": 3,  # their modes and times
    "CAP_FSETID": 4,  # … and modes of a group that is not root's
    "CAP_KILL": 5,  # the server's processes stand still while a seal switches layers
    "CAP_IPC_LOCK": 14,  # buffers that stay in memory
    "CAP_SYS_PTRACE": 19,  # whose files are open on the mount, and who is the server
    "CAP_SYS_ADMIN": 21,  # unmounting
    "CAP_SYS_RESOURCE": 24,  # threads that the kernel must not make wait for this mount
}

# Source: linux/capability.h, linux/prctl.h.
_VERSION_3 = 0x20080522
_CAP_SETPCAP = 8
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_LAST = "/proc/sys/kernel/cap_last_cap"


def drop() -> None:
    """Keep of root's capabilities what serving a mount takes, for good, also over an exec.

    Raises OSError if the kernel refuses.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    held = _get(libc)
    with open(_LAST) as file:
        last = int(file.read())
    wanted = sum(1 << number for number in KEPT.values())
    if held >> _CAP_SETPCAP & 1:
        for number in range(last + 1):
            if not wanted >> number & 1:
                _call(libc.prctl, _PR_CAPBSET_DROP, number, 0, 0, 0)
    _call(libc.prctl, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _set(libc, held & wanted)


def _get(libc: ctypes.CDLL) -> int:
    """Return the set of capabilities that this thread may have in effect."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    _call(libc.capget, header, data)
    _, low, _, _, high, _ = struct.unpack("=6I", data.raw[:24])
    return int(low | high << 32)


def _set(libc: ctypes.CDLL, held: int) -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    low, high = held & 0xFFFFFFFF, held >> 32
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0))
    _call(libc.capset, header, data)


def _call(function: object, *args: object) -> None:
    if function(*args) != 0:  # type: ignore[operator]
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
