"""A daemon elsewhere, with the methods of ``branch.service.Service``: for ``--api-url``.

The command line uses it in the place of the service in its own process. One connection a call,
blocking, any thread. Knows only HTTP and the REST interface; errors come back as what they were.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

from pbkfs.branch.engine import Size
from pbkfs.branch.errors import InvalidRequestError
from pbkfs.branch.settings import MAIN
from pbkfs.branch.store import Event, Head, Kind
from pbkfs.branch.trunks import TrunkSource
from pbkfs.branch.views import Connection, HeadView, Log, Overview
from pbkfs.errors import HostError, NotRunningError, PbkfsError, UnsupportedError, UsageError

# A creation may be waiting for its turn, a copy of a server takes its time.
_LIMIT_S = 3600.0
_PATHS: dict[Kind, str] = {"branch": "branches", "trunk": "trunks"}


class RefusedError(HostError):
    """The daemon did not let us in."""

    slug = "unauthorized"
    default_hint = "Give the daemon's token with --api-token or PBKFS_API_TOKEN."


class RemoteService:
    """What a daemon does for us."""

    def __init__(self, url: str, token: str = "") -> None:
        """Take ``http://HOST:PORT`` or ``unix:PATH``. Raises UsageError."""
        self._api = _Api(url, token)
        self.branches = RemoteBranches(self._api)
        self.trunks = RemoteTrunks(self._api)

    def tree(self) -> list[HeadView]:
        """Return trunks and branches."""
        return [*self.trunks.list_all(), *self.branches.list_all()]

    def overview(self) -> Overview:
        """Return the daemon's counts."""
        found = self._api.call("GET", "health")
        return Overview(
            version=found["version"],
            trunks_running=found["trunks_running"],
            trunks_total=found["trunks_total"],
            branches_running=found["branches_running"],
            branches_stopped=found["branches_stopped"],
            branches_total=found["branches_total"],
            storage_used_bytes=found["storage_used_bytes"],
            shared_bytes=found["shared_bytes"],
            status=found["status"],
            uptime_s=found["uptime_seconds"],
        )


class _Remote:
    kind: Kind = "branch"

    def __init__(self, api: _Api) -> None:
        self._api = api

    def _view(self, found: dict[str, Any]) -> HeadView:
        return _to_view(found, self.kind)

    def _post(self, name: str, verb: str, body: dict[str, Any] | None = None) -> HeadView:
        return self._view(self._api.call("POST", _path(self.kind, name, verb), body))

    def info(self, name: str) -> HeadView:
        """Return one head. Raises UnknownHeadError."""
        return self._view(self._api.call("GET", _path(self.kind, name)))

    def stop(self, name: str) -> HeadView:
        """Stop a head."""
        return self._post(name, "stop")

    def restart(self, name: str, say: object = None) -> HeadView:
        """Stop a head and start it again."""
        del say
        return self._post(name, "restart")

    def flatten(self, name: str, say: object = None) -> HeadView:
        """Fold all sealed layers below a head into one."""
        del say
        return self._post(name, "flatten")


class RemoteBranches(_Remote):
    """The operations on branches."""

    def create(
        self,
        name: str | None = None,
        *,
        parent: str = MAIN,
        ttl: str | None = None,
        tags: Sequence[str] = (),
        auth: Literal["password", "trust"] = "password",
        idle_stop: str | None = None,
        cpu: str | None = None,
        memory: str | None = None,
        say: object = None,
        wait: bool = True,
    ) -> HeadView:
        """Make a branch and, unless told otherwise, wait until it is ready."""
        del say
        body = {"name": name, "parent": parent, "ttl": ttl, "tags": list(tags), "auth": auth}
        body |= {"idle_stop": idle_stop, "cpu": cpu, "memory": memory}
        return self._view(self._api.call("POST", f"branches?wait={str(wait).lower()}", body))

    def list_all(
        self, *, status: str | None = None, parent: str | None = None, tag: str | None = None
    ) -> list[HeadView]:
        """Return the branches that fit, oldest first."""
        wishes = {"status": status, "parent": parent, "tag": tag}
        query = urlencode({name: value for name, value in wishes.items() if value is not None})
        found = self._api.call("GET", f"branches?{query}")
        return [self._view(branch) for branch in found["branches"]]

    def connection(self, name: str, kind: Kind = "branch") -> Connection:
        """Return how to connect to a running head, with its password."""
        found = self._api.call("GET", _path(kind, name, "connection"))
        is_trusting = f":{quote(found['password'], safe='')}@" not in found["uri"]
        return Connection(
            host=found["host"],
            port=found["port"],
            user=found["user"],
            database=found["database"],
            password=None if is_trusting else found["password"],
        )

    def log(self, name: str, kind: Kind = "branch", *, n_lines: int = 100) -> Log:
        """Return what happened to a head, and the end of its server's log."""
        found = self._api.call("GET", _path(kind, name, f"log?lines={n_lines}"))
        events = [Event(e["at"], name, e["what"], e["detail"]) for e in found["events"]]
        return Log(events, found["lines"], found["path"])

    def start(self, name: str, say: object = None) -> HeadView:
        """Start a branch."""
        del say
        return self._post(name, "start")

    def reset(self, name: str, say: object = None) -> HeadView:
        """Take a branch back to where it began."""
        del say
        return self._post(name, "reset")

    def rename(self, name: str, new_name: str) -> HeadView:
        """Give a branch another name."""
        return self._change(name, {"name": new_name})

    def tag(self, name: str, tags: Sequence[str], *, remove: bool = False) -> HeadView:
        """Add tags to a branch, or remove them."""
        return self._change(name, {"remove_tags" if remove else "add_tags": list(tags)})

    def extend(self, name: str, ttl: str) -> HeadView:
        """Let a branch live for ``ttl`` from now."""
        return self._change(name, {"ttl": ttl})

    def set_idle_stop(self, name: str, idle_stop: str) -> HeadView:
        """Let a branch be stopped after so long without a client."""
        return self._change(name, {"idle_stop": idle_stop})

    def _change(self, name: str, body: dict[str, Any]) -> HeadView:
        return self._view(self._api.call("PATCH", _path("branch", name), body))

    def destroy(self, name: str, *, recursive: bool = False, say: object = None) -> list[str]:
        """Remove a branch; returns the names of what is gone."""
        del say
        return _destroy(self._api, "branch", name, recursive)


class RemoteTrunks(_Remote):
    """The operations on trunks."""

    kind: Kind = "trunk"

    def create(
        self,
        name: str,
        source: TrunkSource,
        *,
        port: int | None = None,
        wal_level: str | None = None,
        auth: Literal["password", "trust"] = "password",
        owner: tuple[int, int] | None = None,
        start: bool | None = None,
        say: object = None,
    ) -> HeadView:
        """Make a trunk and wait until it is ready. Paths are the daemon's."""
        del say
        if owner is not None:
            raise UnsupportedError(
                "the owner of a trunk can't be chosen through the daemon",
                hint="Leave --owner out, or make the trunk where the daemon runs.",
            )
        body = {
            "name": name,
            "store": str(source.store) if source.store else None,
            "instance": source.instance,
            "backup_id": source.backup_id,
            "directory": str(source.directory) if source.directory else None,
            "url": source.url,
            "pg_version": source.pg_major,
            "port": port,
            "wal_level": wal_level,
            "auth": auth,
            "start": start,
        }
        return self._view(self._api.call("POST", "trunks?wait=true", body))

    def list_all(self) -> list[HeadView]:
        """Return all trunks, oldest first."""
        return [self._view(trunk) for trunk in self._api.call("GET", "trunks")["trunks"]]

    def start(self, name: str, *, port: int | None = None, say: object = None) -> HeadView:
        """Start a trunk."""
        del say
        return self._post(name, "start", {"port": port})

    def destroy(self, name: str, *, recursive: bool = False, say: object = None) -> list[str]:
        """Remove a trunk; returns the names of what is gone."""
        del say
        return _destroy(self._api, "trunk", name, recursive)

    def refresh(
        self,
        name: str,
        *,
        backup_id: str | None = None,
        directory: Path | None = None,
        say: object = None,
    ) -> HeadView:
        """Put a trunk on a newer backup."""
        del say
        place = str(directory) if directory else None
        return self._post(name, "refresh", {"backup_id": backup_id, "directory": place})


def _destroy(api: _Api, kind: Kind, name: str, recursive: bool) -> list[str]:
    query = urlencode({"recursive": str(recursive).lower(), "wait": "true"})
    found = api.call("DELETE", f"{_path(kind, name)}?{query}")
    return [*reversed(found["children_deleted"]), found["name"]]


def _path(kind: Kind, name: str, rest: str = "") -> str:
    return f"{_PATHS[kind]}/{quote(name, safe='')}" + (f"/{rest}" if rest else "")


def _to_view(found: dict[str, Any], kind: Kind) -> HeadView:
    place = found["connection"]
    head = Head(
        id=found["id"],
        name=found["name"],
        kind=kind,
        parent_id=None,
        status=found["status"],
        engine="",
        pg_user=place["user"] if place else "",
        pg_database=found["database"],
        auth=found["auth"],
        created_at=found["created_at"],
        error=found["error"] or "",
        source=found.get("source", ""),
        port=found["port"] or 0,
        pg_version=found["pg_version"],
        wal_level=found.get("wal_level", ""),
        started_at=found["started_at"],
        expires_at=found.get("expires_at"),
        idle_stop_s=found.get("idle_stop_seconds"),
        is_asleep=found.get("asleep", False),
        cpu_limit=found.get("cpu_limit"),
        memory_limit_bytes=found.get("memory_limit_bytes"),
    )
    return HeadView(
        head=head,
        status=found["status"],
        parent=found.get("parent"),
        tags=found.get("tags", []),
        size=Size(found["own_bytes"], found["shared_bytes"]),
        connection=Connection(place["host"], place["port"], place["user"], place["database"])
        if place
        else None,
        children=found["children"],
        notes=found["notes"],
    )


# --- HTTP ---------------------------------------------------------------------------------------


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        # Through the directory's descriptor, as a socket's path may be too long otherwise.
        directory = os.open(os.path.dirname(self._path) or ".", os.O_PATH | os.O_CLOEXEC)
        try:
            self.sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(self._path)}")
        finally:
            os.close(directory)


class _Api:
    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token
        self._prefix = "/api/v1"
        self._connect = self._choose(url)

    def _choose(self, url: str) -> Callable[[], http.client.HTTPConnection]:
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme == "unix" and parts.path:
            return lambda: _UnixConnection(parts.path)
        if parts.scheme == "http" and host:
            self._prefix = parts.path.rstrip("/").removesuffix("/api/v1") + "/api/v1"
            return lambda: http.client.HTTPConnection(host, port, timeout=_LIMIT_S)
        if parts.scheme == "https" and host:
            self._prefix = parts.path.rstrip("/").removesuffix("/api/v1") + "/api/v1"
            return lambda: http.client.HTTPSConnection(host, port, timeout=_LIMIT_S)
        raise UsageError(
            f"{url!r} is no address of a daemon",
            hint="Give http://HOST:PORT, https://HOST or unix:/PATH/pbkfs.sock.",
        )

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request and return the answer's JSON. Raises what the daemon's problem says."""
        headers = {"Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        connection = self._connect()
        try:
            connection.request(method, f"{self._prefix}/{path}", content, headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise NotRunningError(
                f"no daemon answers at {self._url}: {why.lower()}",
                hint="Start it with pbkfs server, or leave --api-url out.",
            ) from error
        finally:
            connection.close()
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if answer.status < 400 and found is not None:
            return found
        raise _to_error(self._url, answer.status, found)


def _to_error(url: str, status: int, found: Any) -> PbkfsError:
    if not isinstance(found, dict) or "code" not in found:
        return HostError(
            f"what answers at {url} is no daemon of pbkfs (status {status})",
            hint="Check the address.",
        )
    code, detail, hint = found["code"], str(found.get("detail")), found.get("hint")
    if code == RefusedError.slug:
        return RefusedError(f"{url}: {detail}")
    if code == InvalidRequestError.slug:
        return InvalidRequestError(detail, hint=hint)
    classes = [PbkfsError]
    for cls in classes:
        if cls.slug == code:
            return cls(detail, hint=hint)
        classes += cls.__subclasses__()
    nearest = min(
        PbkfsError.__subclasses__(),
        key=lambda cls: 0 if cls.http_status == status else math.inf,
    )
    return (nearest if nearest.http_status == status else HostError)(detail, hint=hint)
