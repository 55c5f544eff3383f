"""Runs in the tests' virtual machine: does what the test asks for, one JSON line for another.

``{"args": […], "cgroup": PATH or null}`` is answered ``{"code": …, "out": …}``, with the output and
the errors of the command as they came.
"""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
from pathlib import Path

PORT = 7


class Handler(socketserver.StreamRequestHandler):
    """One connection, one command."""

    def handle(self) -> None:
        asked = json.loads(self.rfile.readline())

        def enter() -> None:
            if asked["cgroup"]:
                Path(asked["cgroup"], "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            asked["args"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=enter,
        )
        self.wfile.write(json.dumps({"code": done.returncode, "out": done.stdout}).encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    """Each command in a thread of its own."""

    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    with Server(("", PORT), Handler) as server:
        server.serve_forever()
