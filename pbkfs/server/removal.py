"""Destroying a trunk or branch: what both routes share."""

from __future__ import annotations

from pbkfs.branch.store import Kind
from pbkfs.server.control import Control
from pbkfs.server.models import Destroyed


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
