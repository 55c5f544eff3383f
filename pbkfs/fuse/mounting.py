"""mount(2) and umount(2) of a FUSE file system, as root or through fusermount3.

Called by ``Session`` and, for the mount of a worker that is gone, by ``pbkfs.mount``. Nothing else
in the program mounts or unmounts. Any thread; unmounting waits until the kernel has written its
dirty pages back, so the worker itself must not do it on the thread that serves names.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from pbkfs import aside
from pbkfs.errors import BusyError, HostError, NotRunningError

DEVICE = "/dev/fuse"
HELPER = "fusermount3"

# Source: linux/mount.h, sys/mount.h.
_MS_NOSUID = 2
_MS_NODEV = 4
_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


def check_host() -> None:
    """Raise HostError where nothing can be mounted: no device, no helper. Changes nothing."""
    if os.geteuid() == 0 or not os.path.exists(DEVICE):
        os.close(_open_device())
    elif shutil.which(HELPER) is None:
        raise _no_helper()


def open_and_mount(mountpoint: Path, *, fsname: str, subtype: str, allow_other: bool) -> int:
    """Mount on ``mountpoint`` (absolute); returns the fuse descriptor, close-on-exec.

    From here on, whoever touches the mount point waits for an answer on the descriptor. Raises
    HostError, with nothing mounted.
    """
    if os.geteuid() == 0:
        return _mount_as_root(mountpoint, fsname, subtype, allow_other)
    return _mount_by_helper(mountpoint, fsname, subtype, allow_other)


def unmount(mountpoint: Path) -> None:
    """Unmount; the kernel writes its dirty pages back first.

    Raises BusyError while files or working directories are open, NotRunningError if nothing is
    mounted there, HostError.
    """
    _unmount(mountpoint, is_lazy=False)


def detach(mountpoint: Path) -> None:
    """Take the mount away from its place at once; who still has it open keeps it.

    Works on a dead endpoint. Raises as ``unmount``, but for BusyError.
    """
    _unmount(mountpoint, is_lazy=True)


def abort(mountpoint: Path) -> None:
    """End the connection: all who wait for an answer get an error, and nothing is written back.

    For a worker that waits for itself; without root nothing happens. What is mounted stays.
    """
    if os.geteuid() == 0:
        # Busy it is, as long as the worker lives; the connection has ended all the same.
        aside.errno_of(
            "umount2", os.fsencode(mountpoint), ctypes.c_int(_UMOUNT_NOFOLLOW | _MNT_FORCE)
        )


# --- mount ----------------------------------------------------------------------------------------


def _mount_as_root(mountpoint: Path, fsname: str, subtype: str, allow_other: bool) -> int:
    fd = _open_device()
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    options += ",default_permissions"
    if allow_other:
        options += ",allow_other"
    number = aside.errno_of(
        "mount",
        os.fsencode(fsname),
        os.fsencode(mountpoint),
        b"fuse." + os.fsencode(subtype),
        ctypes.c_ulong(_MS_NOSUID | _MS_NODEV),
        options.encode(),
    )
    if number == 0:
        return fd
    os.close(fd)
    message = f"cannot mount on {mountpoint}: {os.strerror(number).lower()}"
    match number:
        case errno.EPERM | errno.EACCES:
            hint = "Root needs CAP_SYS_ADMIN to mount; a container needs --cap-add SYS_ADMIN."
        case errno.ENODEV:
            hint = "This kernel has no FUSE; load it with 'modprobe fuse'."
        case errno.ENOENT | errno.ENOTDIR:
            hint = "Make the directory first."
        case _:
            hint = "See the kernel's log (dmesg) for more."
    raise HostError(message, hint=hint)


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            hint = "Load FUSE with 'modprobe fuse'; a container needs --device /dev/fuse."
        else:
            hint = "Give this user access to the device, or run pbkfs as root."
        reason = os.strerror(error.errno or 0).lower()
        raise HostError(f"cannot open {DEVICE}: {reason}", hint=hint) from error


def _mount_by_helper(mountpoint: Path, fsname: str, subtype: str, allow_other: bool) -> int:
    if not os.path.exists(DEVICE):
        os.close(_open_device())  # raises with the reason
    options = ["nosuid", "nodev", "default_permissions"]
    options += [f"fsname={_escape(fsname)}", f"subtype={_escape(subtype)}"]
    if allow_other:
        options.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            # Source: libfuse util/fusermount.c: the descriptor comes back over _FUSE_COMMFD.
            helper = _start_helper(
                ["-o", ",".join(options), "--", os.fspath(mountpoint)],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
            )
        _, said = helper.communicate()
        fds: list[int] = []
        if helper.returncode == 0:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if fds:
        os.set_inheritable(fds[0], False)
        return fds[0]
    said = _without_prefix(said)
    if "user_allow_other" in said:
        hint = "Add a line 'user_allow_other' to /etc/fuse.conf, or mount as root."
    elif DEVICE in said:
        hint = "Give this user access to /dev/fuse (mode 0666), or run pbkfs as root."
    else:
        hint = "Check that this user owns the mount point and may write to it, or mount as root."
    raise HostError(
        f"cannot mount on {mountpoint}: {said or 'fusermount3 gave no reason'}", hint=hint
    )


def _start_helper(
    args: list[str], *, env: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [HELPER, *args],
            env=env,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise _no_helper() from error


def _no_helper() -> HostError:
    return HostError(
        f"{HELPER} is not installed", hint="Install the package fuse3, or run pbkfs as root."
    )


def _escape(value: str) -> str:
    """Escape a value of a comma-separated option. Source: util/fusermount.c, get_string_opt()."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _without_prefix(said: str) -> str:
    lines = said.strip().splitlines()
    return re.sub(r"^.*?fusermount3: ", "", lines[-1]) if lines else ""


# --- unmount --------------------------------------------------------------------------------------


def _unmount(mountpoint: Path, *, is_lazy: bool) -> None:
    if os.geteuid() == 0:
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if is_lazy else 0)
        number = aside.unmount(mountpoint, flags)
        if number:
            _raise_unmount(mountpoint, number, os.strerror(number).lower())
        return
    helper = _start_helper(["-u", *(["-z"] if is_lazy else []), "--", os.fspath(mountpoint)])
    _, said = helper.communicate()
    if helper.returncode != 0:
        said = _without_prefix(said).lower()
        if "busy" in said:
            number = errno.EBUSY
        elif "not mounted" in said or "not found in" in said or "invalid argument" in said:
            number = errno.EINVAL
        else:
            number = errno.EPERM
        _raise_unmount(mountpoint, number, said or "fusermount3 gave no reason")


def _raise_unmount(mountpoint: Path, number: int, reason: str) -> None:
    if number == errno.EBUSY:
        raise BusyError(
            f"{mountpoint} is in use",
            hint="Stop what uses it first: a server, a shell whose working directory it is.",
        )
    if number in (errno.EINVAL, errno.ENOENT):
        raise NotRunningError(f"nothing is mounted on {mountpoint}")
    raise HostError(
        f"cannot unmount {mountpoint}: {reason}",
        hint="Run pbkfs as the user who mounted it, or as root.",
    )


# --- the kernel's list of mounts ------------------------------------------------------------------


def find_device(mountpoint: Path) -> str | None:
    """Return major:minor of what is mounted there, from the kernel's list: stat(2) might wait."""
    wanted = os.fsencode(mountpoint)
    found = None
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split(b" ")
            # Source: proc_pid_mountinfo(5): space, tab, newline and backslash are octal.
            path = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), fields[4])
            if path == wanted:
                found = fields[2].decode("ascii")
    return found
