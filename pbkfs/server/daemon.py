"""The daemon's process: from its start to its graceful end.

Order: ``Hands`` (a fork, so before any thread and before the web framework is imported), lock,
sockets, store, then trio with hypercorn, the reaper, and a task for signals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pbkfs import log
from pbkfs.branch.layout import Layout
from pbkfs.branch.service import open_service
from pbkfs.branch.settings import PREFIXES, Settings
from pbkfs.server.hands import Hands
from pbkfs.server.listening import check_address, listen_tcp, listen_unix, only_daemon

if TYPE_CHECKING:
    from pbkfs.branch.service import Service

SOCKET_NAME = "pbkfs.sock"
LOCK_NAME = "server.lock"

# What is under way at the end gets this long to finish; it goes on by itself after that, too.
_GRACE_S = 300.0
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bind:
    """Where to listen. Port 0: only on the socket."""

    host: str
    port: int
    socket: Path


def run(settings: Settings, bind: Bind, style: log.Format = "text") -> None:
    """Serve until SIGTERM or SIGINT. Raises PbkfsError for whatever keeps it from starting."""
    check_address(bind.host, settings.api_token)
    layout = Layout(settings.data_dir)
    layout.prepare()
    log.configure("stderr", style=style, debug=settings.log_level == "debug")
    logging.getLogger().setLevel(_LEVELS[settings.log_level])
    for prefix in PREFIXES:
        # Servers are started with our environment, and their users can look at it.
        os.environ.pop(f"{prefix}API_TOKEN", None)
    # First of all: what it forks must have neither our lock nor our sockets, and SQLite's
    # connection must not be carried over a fork.
    with (
        contextlib.closing(Hands.start(settings)) as hands,
        only_daemon(layout.root / LOCK_NAME),
        _sockets(bind) as sockets,
        open_service(settings) as service,
    ):
        _serve(service, hands, bind, sockets)


@contextlib.contextmanager
def _sockets(bind: Bind) -> Iterator[list[socket.socket]]:
    made = []
    try:
        if bind.port:
            made.append(listen_tcp(bind.host, bind.port))
        made.append(listen_unix(bind.socket))
        yield made
    finally:
        for each in made:
            each.close()
        if made and made[-1].family == socket.AF_UNIX:
            bind.socket.unlink(missing_ok=True)


def _serve(service: Service, hands: Hands, bind: Bind, sockets: list[socket.socket]) -> None:
    import trio

    trio.run(_main, service, hands, bind, sockets, strict_exception_groups=True)


async def _main(service: Service, hands: Hands, bind: Bind, sockets: list[socket.socket]) -> None:
    import trio
    from hypercorn.config import Config
    from hypercorn.trio import serve

    from pbkfs.server.app import make_app
    from pbkfs.server.control import Control
    from pbkfs.server.guard import Guard
    from pbkfs.server.idle import Idle

    config = Config()
    # hypercorn closes what it is given, so it gets descriptors of its own.
    config.bind = [f"fd://{os.dup(each.fileno())}" for each in sockets]
    config.errorlog = logging.getLogger("hypercorn")
    logging.getLogger("hypercorn").setLevel(logging.WARNING)
    config.include_server_header = False
    config.graceful_timeout = _GRACE_S
    config.backlog = 1024
    ending = trio.Event()
    async with trio.open_nursery() as nursery:
        control = Control(service, hands, nursery)
        app = Guard(make_app(control), service.settings.api_token, control.numbers)

        async def end_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                nursery.start_soon(run_server)
                async for number in signals:
                    name = signal.Signals(number).name
                    if ending.is_set():
                        logger.warning("%s again: not waiting for what is under way", name)
                        nursery.cancel_scope.cancel()
                        return
                    logger.info("%s: ending once what is under way has ended", name)
                    control.is_stopping = True
                    ending.set()

        async def run_server() -> None:
            await serve(cast("Any", app), config, shutdown_trigger=ending.wait, mode="asgi")
            with trio.move_on_after(_GRACE_S):
                await control.finish()
            nursery.cancel_scope.cancel()

        nursery.start_soon(end_on_signal)
        nursery.start_soon(control.settle_at_start)
        nursery.start_soon(control.reap_for_ever)
        nursery.start_soon(Idle(control, nursery).run)
        places = [f"http://{bind.host}:{bind.port}"] if bind.port else []
        logger.info("listening on %s", " and ".join([*places, str(bind.socket)]))
        if bind.port and not service.settings.api_token:
            logger.info("no token is set: every user of this host can use port %d", bind.port)
        _notify("READY=1")
    logger.info("ended; servers run on")


def _notify(state: str) -> None:
    """Tell systemd, if it started us (Type=notify). Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(state.encode())
