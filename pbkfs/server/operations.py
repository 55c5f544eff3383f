"""What the daemon's clients can have done, by name; runs in an operation's process (``hands``).

Arguments and results are JSON. Each operation opens the service for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbkfs.branch.branches import Branches
from pbkfs.branch.lifecycle import Say
from pbkfs.branch.service import Service, open_service
from pbkfs.branch.settings import Settings
from pbkfs.branch.trunks import Trunks, TrunkSource
from pbkfs.branch.views import HeadView

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Work:
    """One operation under way."""

    service: Service
    given: Arguments
    begun: Callable[[], None]
    say: Say


def run_operation(
    settings: Settings,
    operation: str,
    arguments: Arguments,
    *,
    begun: Callable[[], None],
    say: Say,
) -> Any:
    """Run an operation; ``begun`` is called once it can be seen by others. Raises PbkfsError."""
    # The daemon measures when it is asked for sizes.
    with open_service(settings, measures=False) as service:
        return _OPERATIONS[operation](_Work(service, arguments, begun, say))


def _create_branch(work: _Work) -> list[str]:
    return work.service.branches.create(
        **work.given, begun=lambda _head: work.begun(), say=work.say
    ).notes


def _create_trunk(work: _Work) -> list[str]:
    given = dict(work.given)
    source = {key: given.pop(key, None) for key in ("store", "directory")}
    made = TrunkSource(
        store=Path(source["store"]) if source["store"] else None,
        directory=Path(source["directory"]) if source["directory"] else None,
        instance=given.pop("instance", None),
        backup_id=given.pop("backup_id", None),
        url=given.pop("url", None),
        pg_major=given.pop("pg_version", None),
    )
    return work.service.trunks.create(
        given.pop("name"), made, **given, begun=lambda _head: work.begun(), say=work.say
    ).notes


def _start(work: _Work) -> list[str]:
    name, kind = work.given["name"], work.given["kind"]
    if kind == "trunk":
        return work.service.trunks.start(name, port=work.given.get("port"), say=work.say).notes
    return work.service.branches.start(name, say=work.say).notes


def _stop(work: _Work) -> list[str]:
    return _of_kind(work).stop(work.given["name"]).notes


def _restart(work: _Work) -> list[str]:
    return _of_kind(work).restart(work.given["name"], say=work.say).notes


def _flatten(work: _Work) -> list[str]:
    return _of_kind(work).flatten(work.given["name"], say=work.say).notes


def _of_kind(work: _Work) -> Trunks | Branches:
    return work.service.trunks if work.given["kind"] == "trunk" else work.service.branches


def _destroy(work: _Work) -> list[str]:
    def say(text: str) -> None:
        work.begun()  # it is said of what is deleting by then
        work.say(text)

    return _of_kind(work).destroy(work.given["name"], recursive=work.given["recursive"], say=say)


def _fall_asleep(work: _Work) -> bool:
    return work.service.branches.fall_asleep(work.given["name"])


def _reset(work: _Work) -> list[str]:
    return work.service.branches.reset(work.given["name"], say=work.say).notes


def _change(work: _Work) -> str:
    """Change what a branch is called and when it ends or stops; returns its name."""
    view: HeadView = work.service.branches.change(work.given["name"], **work.given["wish"])
    return view.name


def _refresh(work: _Work) -> list[str]:
    directory = work.given.get("directory")
    return work.service.trunks.refresh(
        work.given["name"],
        backup_id=work.given.get("backup_id"),
        directory=Path(directory) if directory else None,
        say=work.say,
    ).notes


def _settle(work: _Work) -> list[str]:
    return work.service.settle()


_OPERATIONS: dict[str, Callable[[_Work], Any]] = {
    "create_branch": _create_branch,
    "create_trunk": _create_trunk,
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "flatten": _flatten,
    "destroy": _destroy,
    "fall_asleep": _fall_asleep,
    "reset": _reset,
    "change": _change,
    "refresh": _refresh,
    "settle": _settle,
}
