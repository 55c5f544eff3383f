"""The routes of branches."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from pbkfs.branch.durations import parse_idle_stop, parse_ttl
from pbkfs.branch.limits import parse_limits
from pbkfs.branch.names import check_name, check_tag
from pbkfs.server.heads import destroy, read_log, run
from pbkfs.server.models import (
    Branch,
    BranchChange,
    BranchList,
    Credentials,
    Destroyed,
    HeadLog,
    NewBranch,
    State,
    branch_of,
    credentials_of,
)
from pbkfs.server.parameters import (
    CHANGING,
    READING,
    Controlled,
    WaitIfAsked,
    WaitUnlessAsked,
)

router = APIRouter(prefix="/branches", tags=["branches"])


@router.post("", status_code=201, responses=CHANGING)
async def create_branch(
    control: Controlled,
    wait: WaitIfAsked,
    response: Response,
    body: NewBranch | None = None,
) -> Branch:
    """Make a branch and start it: answered once it has its place, see its status for the rest.

    The same request again while it is creating is answered with the same branch.
    """
    wish = body or NewBranch()
    if wish.name is not None:
        check_name(wish.name)
    if wish.ttl is not None:
        parse_ttl(wish.ttl)
    if wish.idle_stop is not None:
        parse_idle_stop(wish.idle_stop)
    control.service.life.serving.cgroups.check(parse_limits(wish.cpu, wish.memory))
    for tag in wish.tags:
        check_tag(tag)
    given = {
        "name": wish.name,
        "parent": wish.parent,
        "ttl": wish.ttl,
        "idle_stop": wish.idle_stop,
        "cpu": wish.cpu,
        "memory": wish.memory,
        "tags": wish.tags,
        "auth": wish.auth,
    }
    view, notes = await control.create("branch", given, wait_s=wait)
    view.notes.extend(notes)
    response.headers["location"] = f"/api/v1/branches/{view.name}"
    return branch_of(view)


@router.get("", responses=READING)
async def list_branches(
    control: Controlled,
    status: Annotated[State | None, Query(description="Only those in this state.")] = None,
    parent: Annotated[str | None, Query(description="Only those branched from this.")] = None,
    tag: Annotated[str | None, Query(description="Only those with this tag.")] = None,
) -> BranchList:
    """List branches, oldest first."""
    found = [
        branch_of(view)
        for view in await control.views("branch")
        if (status is None or view.status == status)
        and (parent is None or view.parent == parent)
        and (tag is None or tag in view.tags)
    ]
    return BranchList(branches=found, total=len(found))


@router.get("/{name}", responses=READING)
async def get_branch(control: Controlled, name: str) -> Branch:
    """Show one branch, with the branches that were made of it."""
    return branch_of(await control.show(name, "branch"))


@router.patch("/{name}", responses=CHANGING)
async def change_branch(control: Controlled, name: str, body: BranchChange) -> Branch:
    """Change name, tags, time to live, or after which time without a client it is stopped.

    All that is said, or nothing if a part is not possible.
    """
    if body.name is not None:
        check_name(body.name)
    for tag in (*body.add_tags, *body.remove_tags):
        check_tag(tag)
    if body.ttl is not None:
        parse_ttl(body.ttl)
    if body.idle_stop is not None:
        parse_idle_stop(body.idle_stop)
    await control.show(name, "branch")
    wish = {
        "new_name": body.name,
        "ttl": body.ttl,
        "idle_stop": body.idle_stop,
        "add_tags": body.add_tags,
        "remove_tags": body.remove_tags,
    }
    operation = control.begin("change", {"name": name, "wish": wish})
    await operation.wait(float("inf"))
    return branch_of(await control.show(operation.result, "branch"))


@router.delete("/{name}", status_code=202, responses=CHANGING)
async def destroy_branch(
    control: Controlled,
    name: str,
    wait: WaitIfAsked,
    recursive: Annotated[bool, Query(description="Also what was branched from it.")] = False,
) -> Destroyed:
    """Remove a branch, running or not."""
    return await destroy(control, name, "branch", recursive=recursive, wait_s=wait)


@router.get("/{name}/connection", responses={**READING, 409: CHANGING[409]})
async def get_branch_connection(control: Controlled, name: str) -> Credentials:
    """Show how to connect to a running branch, with its password."""
    return credentials_of(await control.read(control.service.branches.connection, name, "branch"))


@router.get("/{name}/log", responses=READING)
async def get_branch_log(
    control: Controlled,
    name: str,
    lines: Annotated[int, Query(ge=0, le=10_000, description="Of the server's log.")] = 100,
) -> HeadLog:
    """Show what happened to a branch, and the end of its server's log."""
    return await read_log(control, name, "branch", lines)


_STARTING: dict[int | str, dict[str, Any]] = {**CHANGING, 202: {"model": Branch}}


@router.post("/{name}/start", responses=_STARTING)
async def start_branch(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Branch:
    """Start a branch that is stopped or in error; one that runs is left as it is."""
    return branch_of(await run(control, "start", name, "branch", wait, response))


@router.post("/{name}/stop", responses=_STARTING)
async def stop_branch(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Branch:
    """Stop a branch; its data stays, its port is free for others."""
    return branch_of(await run(control, "stop", name, "branch", wait, response))


@router.post("/{name}/restart", responses=_STARTING)
async def restart_branch(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Branch:
    """Stop a branch and start it again."""
    return branch_of(await run(control, "restart", name, "branch", wait, response))


@router.post("/{name}/flatten", responses=_STARTING)
async def flatten_branch(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Branch:
    """Fold the sealed layers below a branch into one; what it shows stays as it is."""
    return branch_of(await run(control, "flatten", name, "branch", wait, response))


@router.post("/{name}/reset", responses=_STARTING)
async def reset_branch(
    control: Controlled, name: str, wait: WaitUnlessAsked, response: Response
) -> Branch:
    """Take a branch back to where it began; name, port and password stay."""
    return branch_of(await run(control, "reset", name, "branch", wait, response))
