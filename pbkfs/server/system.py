"""The routes that are about the daemon itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response

import pbkfs
from pbkfs.branch.views import HeadView
from pbkfs.server import numbers
from pbkfs.server.models import Health, Ready
from pbkfs.server.parameters import Controlled, can_fail
from pbkfs.server.problems import NotReadyError, StoppingError

router = APIRouter(tags=["system"])

_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/api/v1/health", responses=can_fail())
async def health(control: Controlled) -> Health:
    """Show that the daemon is there, and its counts. Needs no token."""
    storage = await control.measure()
    views = await control.views(with_sizes=False)
    return Health(
        status="stopping" if control.is_stopping else "healthy",
        version=pbkfs.__version__,
        trunks_running=_count(views, "trunk", "running"),
        trunks_total=_count(views, "trunk"),
        branches_running=_count(views, "branch", "running"),
        branches_stopped=_count(views, "branch", "stopped"),
        branches_total=_count(views, "branch"),
        storage_used_bytes=storage.used_bytes,
        shared_bytes=storage.shared_bytes,
        uptime_seconds=int(control.numbers.uptime_s()),
    )


@router.get("/readyz", responses=can_fail())
async def readyz(control: Controlled) -> Ready:
    """Tell whether the daemon has settled and takes requests. Needs no token."""
    if control.is_stopping:
        raise StoppingError("the daemon is about to end")
    if not control.is_ready:
        raise NotReadyError("the daemon settles what it found at its start")
    await control.read(control.service.store.find, "")
    return Ready(status="ready")


@router.get("/metrics", responses=_TEXT | can_fail(), response_class=Response)
async def metrics(control: Controlled) -> Response:
    """Show counters for Prometheus."""
    storage = await control.measure()
    views = await control.views(with_sizes=False)
    text = numbers.format_metrics(control.numbers, views, storage)
    return Response(text, headers={"content-type": numbers.MEDIA_TYPE})


def _count(views: Sequence[HeadView], kind: str, status: str | None = None) -> int:
    return sum(
        view.head.kind == kind and (status is None or view.status == status) for view in views
    )
