"""What the routes of trunks and of branches share."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from pbkfs.branch.store import Kind
from pbkfs.branch.views import HeadView
from pbkfs.server.control import Control
from pbkfs.server.models import Destroyed, HeadLog, log_of


async def run(
    control: Control,
    operation: str,
    name: str,
    kind: Kind,
    wait_s: float,
    response: Response,
    **given: Any,
) -> HeadView:
    """Do something with a head that is there; the answer is 202 if it is not done in ``wait_s``."""
    await control.show(name, kind)
    arguments = {"name": name, "kind": kind, **given}
    is_done = await control.begin(operation, arguments).wait(wait_s)
    response.status_code = 200 if is_done else 202
    return await control.show(name, kind)


async def read_log(control: Control, name: str, kind: Kind, n_lines: int) -> HeadLog:
    """Return what happened to a head, and the end of its server's log."""

    def look() -> HeadLog:
        return log_of(control.service.branches.log(name, kind, n_lines=n_lines))

    return await control.read(look)


async def destroy(
    control: Control, name: str, kind: Kind, *, recursive: bool, wait_s: float
) -> Destroyed:
    """Begin to remove a head and return what goes with it, its nearest branches first.

    Raises UnknownHeadError, HasChildrenError, ProtectedError.
    """
    await control.show(name, kind)
    below = await control.read(_descendants, control, name)
    operation = control.begin("destroy", {"name": name, "kind": kind, "recursive": recursive})
    is_done = await operation.wait(wait_s, at_least_begun=True)
    return Destroyed(name=name, status="deleted" if is_done else "deleting", children_deleted=below)


def _descendants(control: Control, name: str) -> list[str]:
    children: dict[str | None, list[str]] = {}
    for view in control.service.life.view(with_sizes=False):
        children.setdefault(view.parent, []).append(view.name)
    found, level = [], children.get(name, [])
    while level:
        found += level
        level = [child for parent in level for child in children.get(parent, [])]
    return found
