"""Ask a server one thing over its trusted socket, without a client program or library.

Speaks just enough of PostgreSQL's protocol 3.0: the simple query, answers in text. Called by
``branch`` and the command line; any thread.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import socket
import struct
from pathlib import Path

from pbkfs.errors import PostgresError, TimedOutError

_ITERATIONS = 4096


def run_query(
    socket_dir: Path,
    port: int,
    sql: str,
    *,
    user: str,
    database: str = "postgres",
    timeout_s: float = 60.0,
) -> list[list[str | None]]:
    """Run ``sql`` (several statements are one transaction) and return the rows of the last one.

    Raises PostgresError with the server's message, TimedOutError.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(f"{socket_dir}/.s.PGSQL.{port}")
            return _converse(connection, sql, user, database)
    except TimeoutError:
        raise TimedOutError(
            f"the server on port {port} did not answer within {timeout_s:g} s"
        ) from None
    except OSError as error:
        raise PostgresError(
            f"cannot talk to the server on port {port}: {error.strerror or error}"
        ) from error


def _converse(
    connection: socket.socket, sql: str, user: str, database: str
) -> list[list[str | None]]:
    # Source: PostgreSQL's documentation, "Message Formats".
    words = [b"user", user.encode(), b"database", database.encode()]
    words += [b"application_name", b"pbkfs", b"client_encoding", b"UTF8"]
    body = struct.pack("!I", 3 << 16) + b"\0".join(words) + b"\0\0"
    connection.sendall(struct.pack("!I", 4 + len(body)) + body)
    query = sql.encode() + b"\0"
    rows: list[list[str | None]] = []
    problem: PostgresError | None = None
    has_asked = False
    with connection.makefile("rb") as stream:
        while head := stream.read(5):
            kind, payload = head[:1], stream.read(struct.unpack("!I", head[1:])[0] - 4)
            if kind == b"R" and payload != b"\0\0\0\0":
                raise PostgresError(
                    f"the server's socket asks {user} for a password",
                    hint="It was not started by pbkfs with a trusted socket: start it again.",
                )
            if kind == b"E":
                problem = _to_error(payload)
                if not has_asked:
                    raise problem
            elif kind == b"T":
                rows = []
            elif kind == b"D":
                rows.append(_parse_row(payload))
            elif kind == b"Z":
                if has_asked:
                    if problem is not None:
                        raise problem
                    connection.sendall(b"X\0\0\0\4")
                    return rows
                has_asked = True
                connection.sendall(b"Q" + struct.pack("!I", 4 + len(query)) + query)
    raise problem or PostgresError("the server closed the connection")


def _parse_row(payload: bytes) -> list[str | None]:
    (count,) = struct.unpack_from("!H", payload)
    row: list[str | None] = []
    at = 2
    for _ in range(count):
        (length,) = struct.unpack_from("!i", payload, at)
        at += 4
        row.append(None if length < 0 else payload[at : at + length].decode(errors="replace"))
        at += max(0, length)
    return row


def _to_error(payload: bytes) -> PostgresError:
    fields = {part[:1]: part[1:].decode(errors="replace") for part in payload.split(b"\0") if part}
    return PostgresError(f"the server says: {fields.get(b'M', 'an error')}")


def quote_identifier(name: str) -> str:
    """Return ``name`` as SQL has identifiers."""
    return '"' + name.replace('"', '""') + '"'


def make_scram_secret(password: str, salt: bytes | None = None) -> str:
    """Return what ``ALTER ROLE … PASSWORD`` takes in the place of a password in plain text.

    So that the password is in no log of the server. Source: RFC 5803; src/common/scram-common.c,
    scram_build_secret. The password has to be ASCII.
    """
    salt = os.urandom(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, _ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")

    def encode(data: bytes) -> str:
        return base64.b64encode(data).decode()

    return f"SCRAM-SHA-256${_ITERATIONS}:{encode(salt)}${encode(stored)}:{encode(server)}"
