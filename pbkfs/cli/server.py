"""``pbkfs server``: the daemon with the REST interface of trunks and branches."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.options import PATH


@click.command("server")
@click.option(
    "--bind",
    "host",
    envvar=["PBKFS_API_BIND", "PGBRANCH_API_BIND"],
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on; another one than the loopback needs a token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port; 0: only the socket.  [default: PBKFS_API_PORT, else 8080]",
)
@click.option(
    "--socket",
    "path",
    type=PATH,
    metavar="PATH",
    help="Unix socket, for this user only.  [default: DATA/pbkfs.sock]",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="A file with the token; else PBKFS_API_TOKEN.",
)
@click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="Form of the log on stderr.",
)
@click.option(
    "--systemd-unit", "shows_unit", is_flag=True, help="Print a unit for systemd, and end."
)
def command(
    host: str,
    port: int | None,
    path: Path | None,
    token_file: Path | None,
    log_format: str,
    shows_unit: bool,
) -> None:
    """Serve trunks and branches over REST, in the foreground: /api/v1 on a socket and the loopback.

    Settings are PBKFS_* (or PGBRANCH_*) in the environment. It ends on SIGTERM or Ctrl-C once what
    is under way has ended; servers of trunks and branches run on.
    """
    import dataclasses
    import os
    import shutil
    import sys

    if shows_unit:
        from pbkfs.server.unit import format_unit

        program = Path(shutil.which(sys.argv[0]) or Path(sys.executable).with_name("pbkfs"))
        click.echo(format_unit(program.absolute(), is_root=os.geteuid() == 0), nl=False)
        return
    from pbkfs.branch.settings import read_settings
    from pbkfs.errors import UsageError
    from pbkfs.server.daemon import SOCKET_NAME, Bind, run

    settings = read_settings()
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
        if not token:
            raise UsageError(f"the token file {token_file} is empty", hint="Put one in it.")
        settings = dataclasses.replace(settings, api_token=token)
    bind = Bind(
        host=host,
        port=settings.api_port if port is None else port,
        socket=(path or settings.data_dir / SOCKET_NAME).absolute(),
    )
    run(settings, bind, "json" if log_format == "json" else "text")
