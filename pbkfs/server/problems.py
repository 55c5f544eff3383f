"""Errors as problems (RFC 9457): the daemon's edge of ``pbkfs.errors``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pbkfs.errors import HostError, PbkfsError
from pbkfs.server.models import Problem

MEDIA_TYPE = "application/problem+json"
INTERNAL = "internal"

# What the command line calls usage is a request here.
_SLUGS = {"usage": "invalid_request"}
_BY_STATUS = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    501: "not_implemented",
}


class StoppingError(HostError):
    """The daemon is about to end and begins nothing new."""

    slug, http_status = "stopping", 503
    default_hint = "Try again when it is back."


class NotReadyError(HostError):
    """The daemon has not settled yet what it found at its start."""

    slug, http_status = "not_ready", 503
    default_hint = "Try again in a moment."


class NotImplementedHereError(PbkfsError):
    """A part of the interface that this version has not."""

    slug, http_status = "not_implemented", 501
    default_hint = "GET /api/v1/openapi.json says what there is."


def of_error(error: PbkfsError) -> Problem:
    """Return the problem of an expected failure."""
    slug = _SLUGS.get(error.slug, error.slug)
    return _make(slug, error.http_status, error.message, error.hint)


def of_status(status: int, detail: str, hint: str | None = None) -> Problem:
    """Return the problem of an HTTP status that has no error of ours."""
    return _make(_BY_STATUS.get(status, "error"), status, detail, hint)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Return the problem of a request that is not what the document says."""
    said = []
    for error in errors:
        place = ".".join(str(part) for part in error.get("loc", ()) if part != "body")
        said.append(f"{place}: {error.get('msg', 'invalid')}" if place else str(error.get("msg")))
    detail = "; ".join(said) or "the request is not understood"
    return _make("invalid_request", 400, detail, "GET /api/v1/openapi.json says what is possible.")


def of_bug() -> Problem:
    """Return the problem of an unexpected failure."""
    return _make(INTERNAL, 500, "an unexpected failure (this is a bug)", "See the daemon's log.")


def encode(problem: Problem) -> bytes:
    """Return a problem as JSON."""
    return json.dumps(problem.model_dump(exclude_none=True), ensure_ascii=False).encode()


def headers(problem: Problem) -> dict[str, str]:
    """Return the headers that go with a problem."""
    found = {"content-type": MEDIA_TYPE}
    if problem.status == 401:
        found["www-authenticate"] = "Bearer"
    if problem.status == 503:
        found["retry-after"] = "2"
    return found


def _make(slug: str, status: int, detail: str, hint: str | None) -> Problem:
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    if slug not in _BY_STATUS.values():
        title = slug.replace("_", " ").capitalize()
    return Problem(type=slug, code=slug, title=title, status=status, detail=detail, hint=hint)
