"""The unit of systemd."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from fix_mounts import run_pbkfs

from pbkfs.server import daemon
from pbkfs.server.unit import format_unit


def _parse(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_unit_runs_this_installation() -> None:
    text = run_pbkfs("server", "--systemd-unit").stdout
    service = _parse(text)["Service"]
    program, verb = service["ExecStart"].split(" ")
    assert Path(program).is_absolute()
    assert Path(program).name == "pbkfs"
    assert verb == "server"
    # As the daemon does: it says when it is ready, leaves servers alone, and takes its time.
    assert service["Type"] == "notify"
    assert service["KillMode"] == "process"
    assert int(service["TimeoutStopSec"]) > daemon._GRACE_S


def test_unit_of_root_and_of_others() -> None:
    root = format_unit(Path("/opt/pb kfs/50%/pbkfs"), is_root=True)
    assert _parse(root)["Service"]["ExecStart"] == '"/opt/pb kfs/50%%/pbkfs" server'
    assert _parse(root)["Install"]["WantedBy"] == "multi-user.target"
    assert root.startswith("# /etc/systemd/system/pbkfs.service")
    user = format_unit(Path("/usr/bin/pbkfs"), is_root=False)
    assert _parse(user)["Service"]["ExecStart"] == "/usr/bin/pbkfs server"
    assert _parse(user)["Install"]["WantedBy"] == "default.target"
    assert re.search(r"(?m)^EnvironmentFile=-%E/", user)
