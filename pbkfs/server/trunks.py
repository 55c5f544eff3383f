"""The routes of trunks."""

from __future__ import annotations

import os
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from pbkfs.branch.errors import InvalidRequestError
from pbkfs.branch.names import check_name
from pbkfs.server.heads import destroy, read_log, run
from pbkfs.server.models import (
    Credentials,
    Destroyed,
    HeadLog,
    NewTrunk,
    Refresh,
    Trunk,
    TrunkList,
    TrunkStart,
    credentials_of,
    trunk_of,
)
from pbkfs.server.parameters import (
    CHANGING,
    READING,
    Controlled,
    WaitIfAsked,
    WaitUnlessAsked,
)
from pbkfs.server.problems import NotImplementedHereError

router = APIRouter(prefix="/trunks", tags=["trunks"])


@router.post("", status_code=201, responses=CHANGING)
async def create_trunk(
    control: Controlled, wait: WaitIfAsked, response: Response, body: NewTrunk
) -> Trunk:
    """Make a trunk: answered once it has its place, see its status for the rest."""
    check_name(body.name)
    _check_source(body)
    given = body.model_dump()
    if given["store"] is not None:
        given["backup_id"] = given["backup_id"] or "latest"
    view, notes = await control.create("trunk", given, wait_s=wait)
    view.notes.extend(notes)
    response.headers["location"] = f"/api/v1/trunks/{view.name}"
    return trunk_of(view)


def _check_source(body: NewTrunk) -> None:
    sources = ("store", "directory", "url", "pg_version")
    given = [name for name in sources if getattr(body, name) is not None]
    if len(given) > 1:
        raise InvalidRequestError(
            f"{given[0]} and {given[1]} exclude each other", hint="Name one source."
        )
    if (body.instance or body.backup_id) and body.store is None:
        raise InvalidRequestError("instance and backup_id need a store", hint="Name the store.")
    for name in ("store", "directory"):
        path = getattr(body, name)
        if path is not None and not (os.path.isabs(path) and "\0" not in path):
            raise InvalidRequestError(
                f"{name} {path!r} is not absolute",
                hint="Name the whole path, as the daemon has it.",
            )


@router.get("", responses=READING)
async def list_trunks(control: Controlled) -> TrunkList:
    """List trunks, oldest first."""
    found = [trunk_of(view) for view in await control.views("trunk")]
    return TrunkList(trunks=found, total=len(found))


@router.get("/{name}", responses=READING)
async def get_trunk(control: Controlled, name: str) -> Trunk:
    """Show one trunk, with the branches that were made of it."""
    return trunk_of(await control.show(name, "trunk"))


@router.delete("/{name}", status_code=202, responses=CHANGING)
async def destroy_trunk(
    control: Controlled,
    name: str,
    wait: WaitIfAsked,
    recursive: Annotated[bool, Query(description="Also its branches.")] = True,
) -> Destroyed:
    """Remove a trunk and all branches made of it; what it was made from stays."""
    return await destroy(control, name, "trunk", recursive=recursive, wait_s=wait)


@router.get("/{name}/connection", responses={**READING, 409: CHANGING[409]})
async def get_trunk_connection(control: Controlled, name: str) -> Credentials:
    """Show how to connect to a running trunk, with its password."""
    return credentials_of(await control.read(control.service.branches.connection, name, "trunk"))


@router.get("/{name}/log", responses=READING)
async def get_trunk_log(
    control: Controlled,
    name: str,
    lines: Annotated[int, Query(ge=0, le=10_000, description="Of the server's log.")] = 100,
) -> HeadLog:
    """Show what happened to a trunk, and the end of its server's log."""
    return await read_log(control, name, "trunk", lines)


_STARTING: dict[int | str, dict[str, Any]] = {**CHANGING, 202: {"model": Trunk}}


@router.post("/{name}/start", responses=_STARTING)
async def start_trunk(
    control: Controlled,
    name: str,
    wait: WaitUnlessAsked,
    response: Response,
    body: TrunkStart | None = None,
) -> Trunk:
    """Start a trunk; one that runs is left as it is."""
    given = {"port": body.port} if body else {}
    return trunk_of(await run(control, "start", name, "trunk", wait, response, **given))


@router.post("/{name}/stop", responses=_STARTING)
async def stop_trunk(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Trunk:
    """Stop a trunk; its branches go on."""
    return trunk_of(await run(control, "stop", name, "trunk", wait, response))


@router.post("/{name}/restart", responses=_STARTING)
async def restart_trunk(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Trunk:
    """Stop a trunk and start it again."""
    return trunk_of(await run(control, "restart", name, "trunk", wait, response))


@router.post("/{name}/flatten", responses=_STARTING)
async def flatten_trunk(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Trunk:
    """Fold the sealed layers below a trunk into one; what it shows stays as it is."""
    return trunk_of(await run(control, "flatten", name, "trunk", wait, response))


@router.post("/{name}/refresh", responses=_STARTING)
async def refresh_trunk(
    control: Controlled,
    name: str,
    wait: WaitUnlessAsked,
    response: Response,
    body: Refresh | None = None,
) -> Trunk:
    """Put a trunk on a newer backup; its branches stay on what they were made from."""
    given = body.model_dump() if body else {}
    return trunk_of(await run(control, "refresh", name, "trunk", wait, response, **given))


@router.api_route(
    "/{name}/replication",
    methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
    include_in_schema=False,
)
@router.api_route(
    "/{name}/replication/{rest:path}",
    methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
    include_in_schema=False,
)
async def replication(name: str) -> None:
    """Answer that this version replicates nothing."""
    raise NotImplementedHereError(f"replication of trunk {name!r} is not part of this version")
