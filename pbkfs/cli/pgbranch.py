"""``pgbranch``: the older command line, in front of ``pbkfs branch``, ``trunk`` and ``status``.

Its global options may stand anywhere before a ``--``; the commands and their options are the same.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

# Commands of pbkfs that pgbranch has under the same name; whatever else is one on branches.
_OWN = ("trunk", "status", "completion", "server")
_WITH_VALUE = {
    "--api-url": "PBKFS_API_URL",
    "--api-token": "PBKFS_API_TOKEN",
    "-o": "PBKFS_OUTPUT",
    "--output": "PBKFS_OUTPUT",
}
_ABOUT = """\
pgbranch COMMAND is 'pbkfs branch COMMAND', but for pgbranch trunk, status, completion and
server, which are pbkfs's own. -o, -v, --api-url and --api-token may stand anywhere.

"""
_SWITCHES = {"-v": "PBKFS_VERBOSE", "--verbose": "PBKFS_VERBOSE", "--no-color": "NO_COLOR"}
# The older command line is one of Go's, where only --wait=false switches off what is on. Source:
# strconv.ParseBool.
_FALSE = ("0", "f", "false")


def translate(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments for ``pbkfs``, and what the global options set in the environment."""
    rest: list[str] = []
    env: dict[str, str] = {}
    left = iter(arguments)
    for word in left:
        name, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *left]
        elif name in _WITH_VALUE and (equals or (following := next(left, None)) is not None):
            env[_WITH_VALUE[name]] = value if equals else str(following)
        elif name in ("-w", "--wait") and equals:
            rest.append("--no-wait" if value.lower() in _FALSE else "--wait")
        elif word in _SWITCHES:
            env[_SWITCHES[word]] = "1"
        else:
            rest.append(word)
    verb = next((word for word in rest if not word.startswith("-")), None)
    if verb == "status" and "PBKFS_OUTPUT" in env:
        rest += ["-o", env["PBKFS_OUTPUT"]]
    if verb is not None and verb not in _OWN:
        rest = ["branch", *rest]
    return rest, env


def main() -> NoReturn:
    """Run the command line; the console script ``pgbranch``."""
    from pbkfs.cli.main import main as run

    arguments, env = translate(sys.argv[1:])
    os.environ.update(env)
    if arguments in ([], ["-h"], ["--help"]):
        sys.stdout.write(_ABOUT)
        arguments = ["branch", "--help"]
    run(arguments)
