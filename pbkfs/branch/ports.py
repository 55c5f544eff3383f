"""Which port a head gets: the one it had, else the first that nobody has or wishes for.

Called inside of a transaction of the store, so that no two heads get the same. Whether another
program has a port is asked of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from pbkfs.branch.errors import InsufficientResourcesError
from pbkfs.branch.settings import Settings
from pbkfs.branch.store import Head, Transaction
from pbkfs.errors import BusyError


def assign_port(
    tx: Transaction,
    head: Head,
    settings: Settings,
    is_free: Callable[[int], bool],
    *,
    avoid: Collection[int] = (),
    may_move: bool = False,
) -> int:
    """Give ``head`` a port and return it.

    A trunk keeps the port that it got at its creation, unless it ``may_move``: a new one whose port
    nobody asked for. A branch's is of the range. ``avoid`` are ports that were found taken a moment
    ago. Raises InsufficientResourcesError, BusyError where a trunk's own port is taken.
    """
    taken = {port for port, owner in tx.ports().items() if owner != head.id}

    def is_usable(port: int) -> bool:
        return port not in taken and port not in avoid and is_free(port)

    if head.port and is_usable(head.port):
        port = head.port
    elif head.kind == "trunk" and head.port and not may_move:
        raise BusyError(
            f"port {head.port} of trunk {head.name!r} is in use",
            hint=f"Free it, or start it on another one: pbkfs trunk start {head.name} --port PORT",
        )
    else:
        wished = {other.port for other in tx.heads() if other.id != head.id and other.port}
        port = _choose(head, settings, wished, is_usable)
    tx.take_port(port, head.id)
    return port


def _choose(
    head: Head, settings: Settings, wished: Collection[int], is_usable: Callable[[int], bool]
) -> int:
    if head.kind == "trunk":
        for port in range(settings.trunk_port, 65536):
            in_range = settings.port_range_start <= port <= settings.port_range_end
            if not in_range and port not in wished and is_usable(port):
                return port
        raise InsufficientResourcesError(f"no free port from {settings.trunk_port} for a trunk")
    candidates = range(settings.port_range_start, settings.port_range_end + 1)
    # A port that a stopped branch had is only given away when there is no other.
    for port in sorted(candidates, key=lambda port: port in wished):
        if is_usable(port):
            return port
    raise InsufficientResourcesError(
        f"no free port from {settings.port_range_start} to {settings.port_range_end}"
    )
