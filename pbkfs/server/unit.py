"""The unit of systemd that runs the daemon, with the paths of this installation. Pure."""

from __future__ import annotations

from pathlib import Path

_UNIT = """\
# {place}
[Unit]
Description=pbkfs: trunks and branches of PostgreSQL
After=local-fs.target network.target

[Service]
Type=notify
ExecStart={program} server
# PBKFS_API_TOKEN=… and other settings; for root and this user's eyes only.
EnvironmentFile=-{environment}
# Servers and mounts run on when the daemon ends, and the next one finds them.
KillMode=process
# What is under way at the end gets five minutes.
TimeoutStopSec=330
Restart=on-failure
# The kernel ending one server for want of memory is no reason to end the daemon.
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=524288
# For limits of branches (--cpu, --memory); older versions of systemd ignore the second line.
Delegate=cpu memory
DelegateSubgroup=daemon

[Install]
WantedBy={target}
"""


def format_unit(program: Path, *, is_root: bool) -> str:
    """Return the unit, with a first line that says where it goes."""
    system = {
        "place": "/etc/systemd/system/pbkfs.service; then: systemctl enable --now pbkfs",
        "environment": "/etc/pbkfs.env",
        "target": "multi-user.target",
    }
    user = {
        "place": "~/.config/systemd/user/pbkfs.service; then: systemctl --user enable --now pbkfs",
        "environment": "%E/pbkfs.env",
        "target": "default.target",
    }
    # Source: systemd.service(5), "Command lines": quoted words, and % doubled.
    quoted = str(program).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if quoted != str(program) or " " in quoted:
        quoted = f'"{quoted}"'
    return _UNIT.format(program=quoted, **(system if is_root else user))
