"""What goes over the wire: the bodies of requests and responses. Pure; the OpenAPI document is made
of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pbkfs.branch.views import Connection as ConnectionView
from pbkfs.branch.views import HeadView, Log

State = Literal["creating", "starting", "running", "stopped", "error", "deleting"]
Auth = Literal["password", "trust"]
# Written into the document, but checked by the service: its errors have their own types.
_NAME = {"pattern": "^[a-z0-9][a-z0-9._-]{0,62}$"}
_TAG = {"pattern": "^[^\\s,\\u0000]{1,128}$"}
_DURATION = r"([0-9]+(\.[0-9]*)?(ms|s|m|h|d|w))+"
_IDLE_STOP = {"pattern": f"^(never|{_DURATION})$", "examples": ["30m", "2h"]}
_CPU = {"pattern": r"^([0-9]+(\.[0-9]+)?|\.[0-9]+)m?$", "examples": ["500m", "2"]}
_MEMORY = {"pattern": "^[0-9]+(\\.[0-9]+)?[KMGT]i?$", "examples": ["512Mi"]}
_TTL = {"pattern": f"^(never|{_DURATION})$", "examples": ["2h", "7d", "90m"]}


def _check_text(text: str) -> str:
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds characters that no text has")
    return text


Text = Annotated[
    str, AfterValidator(_check_text), Field(json_schema_extra={"pattern": "^[^\\u0000]*$"})
]
Name = Annotated[Text, Field(json_schema_extra=_NAME)]
Tag = Annotated[Text, Field(json_schema_extra=_TAG)]
IdleStop = Annotated[
    Text | None,
    Field(
        description="Stopped after so long without a client; the next client starts it again.",
        json_schema_extra=_IDLE_STOP,
    ),
]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewBranch(_Request):
    """A branch to be made. Without a name it gets one."""

    name: Name | None = None
    parent: Annotated[Text, Field(description="Trunk or branch.")] = "main"
    ttl: Annotated[Text | None, Field(json_schema_extra=_TTL)] = None
    idle_stop: IdleStop = None
    tags: list[Tag] = []
    auth: Auth = "password"
    cpu: Annotated[
        Text | None,
        Field(
            description="Most processors, where cgroups of version 2 are.", json_schema_extra=_CPU
        ),
    ] = None
    memory: Annotated[
        Text | None,
        Field(description="Most memory, where they are.", json_schema_extra=_MEMORY),
    ] = None


class BranchChange(_Request):
    """What is to be changed of a branch; what is left out stays."""

    name: Name | None = None
    ttl: Annotated[Text | None, Field(description="From now on.", json_schema_extra=_TTL)] = None
    idle_stop: IdleStop = None
    add_tags: list[Tag] = []
    remove_tags: list[Tag] = []


class NewTrunk(_Request):
    """A trunk to be made, of one source: a store, a directory, a URL, or (none) an empty cluster.

    Paths are the daemon's.
    """

    name: Name
    store: Annotated[Text | None, Field(description="A store of pg_probackup.")] = None
    instance: Text | None = None
    backup_id: Annotated[Text | None, Field(description="Of the store; default: latest.")] = None
    directory: Annotated[Text | None, Field(description="A copy of a data directory.")] = None
    url: Annotated[Text | None, Field(description="A running server, to be copied.")] = None
    pg_version: Annotated[int | None, Field(ge=14, description="Major of an empty one.")] = None
    port: Port | None = None
    wal_level: Literal["minimal", "replica", "logical"] | None = None
    auth: Auth = "password"
    start: Annotated[bool | None, Field(description="Default: TRUNK_AUTO_START.")] = None


class TrunkStart(_Request):
    """How to start a trunk."""

    port: Annotated[Port | None, Field(description="Another port, from now on.")] = None


class Refresh(_Request):
    """What a trunk is to be put on."""

    backup_id: Annotated[Text | None, Field(description="Default: latest.")] = None
    directory: Text | None = None


# --- responses ----------------------------------------------------------------------------------


class Connection(BaseModel):
    """Where a server listens."""

    host: str
    port: int
    user: str
    database: str
    uri: str


class Credentials(Connection):
    """How to connect: ``password`` is ``trust`` where none is asked for."""

    password: str
    psql: str


class _Head(BaseModel):
    id: str
    name: str
    status: State
    created_at: str
    started_at: str | None
    database: str
    port: Annotated[int | None, Field(description="Null until it has had one.")]
    connection: Connection | None
    auth: Auth
    pg_version: str
    size_bytes: Annotated[int, Field(ge=0, description="On disk, with what it shares.")]
    own_bytes: Annotated[int, Field(ge=0)]
    shared_bytes: Annotated[int, Field(ge=0)]
    children: list[str]
    error: Annotated[str | None, Field(description="Why it is in the state error.")] = None
    notes: list[str] = []


class Branch(_Head):
    """A branch."""

    parent: str | None
    tags: list[str]
    expires_at: str | None
    idle_stop_seconds: float | None
    asleep: Annotated[bool, Field(description="Stopped as idle; a client starts it.")]
    cpu_limit: Annotated[float | None, Field(description="In processors.")]
    memory_limit_bytes: int | None


class Trunk(_Head):
    """A trunk."""

    wal_level: str
    source: str


class BranchList(BaseModel):
    """Branches, oldest first."""

    branches: list[Branch]
    total: int


class TrunkList(BaseModel):
    """Trunks, oldest first."""

    trunks: list[Trunk]
    total: int


class Destroyed(BaseModel):
    """What a destroy has begun to remove."""

    name: str
    status: Literal["deleting", "deleted"]
    children_deleted: list[str]


class LoggedEvent(BaseModel):
    """One thing that happened to a trunk or branch."""

    at: str
    what: str
    detail: str


class HeadLog(BaseModel):
    """What happened, and the end of the server's own log."""

    events: list[LoggedEvent]
    lines: list[str]
    path: str


class Health(BaseModel):
    """The daemon and its counts."""

    status: Literal["healthy", "stopping"]
    version: str
    trunks_running: int
    trunks_total: int
    branches_running: int
    branches_stopped: int
    branches_total: int
    storage_used_bytes: int
    shared_bytes: int
    uptime_seconds: int


class Ready(BaseModel):
    """The daemon has settled what it found and takes requests."""

    status: Literal["ready"]


class Problem(BaseModel):
    """An error (RFC 9457). ``type`` and ``code`` are the same stable word."""

    type: str
    code: str
    title: str
    status: int
    detail: str
    hint: str | None = None


# --- from the service's views -------------------------------------------------------------------


def branch_of(view: HeadView) -> Branch:
    """Return a branch as it goes over the wire."""
    return Branch.model_validate(_fields(view))


def trunk_of(view: HeadView) -> Trunk:
    """Return a trunk as it goes over the wire."""
    return Trunk.model_validate(_fields(view))


def _fields(view: HeadView) -> dict[str, Any]:
    return view.to_json()


def credentials_of(view: ConnectionView) -> Credentials:
    """Return how to connect, with the password."""
    return Credentials(
        host=view.host,
        port=view.port,
        user=view.user,
        database=view.database,
        uri=view.uri,
        password="trust" if view.password is None else view.password,
        psql=view.psql,
    )


def log_of(found: Log) -> HeadLog:
    """Return a log as it goes over the wire."""
    return HeadLog(
        events=[LoggedEvent(at=e.at, what=e.what, detail=e.detail) for e in found.events],
        lines=found.lines,
        path=found.path,
    )
