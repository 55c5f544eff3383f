"""Parameters that several routes have, and the problems that they can answer."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import Depends, Query, Request

from pbkfs.branch.durations import parse_duration
from pbkfs.branch.errors import InvalidRequestError
from pbkfs.server import problems
from pbkfs.server.control import Control
from pbkfs.server.models import Problem

_WORDS = {"": math.inf, "true": math.inf, "1": math.inf, "false": 0.0, "0": 0.0}
_WAIT = Query(
    description="true, false, or for how long at most: 30s. What was begun goes on afterwards.",
    json_schema_extra={"pattern": r"^(true|false|1|0|)$|^([0-9]+(\.[0-9]*)?(ms|s|m|h|d|w))+$"},
)


def control_of(request: Request) -> Control:
    """Return the daemon's state."""
    found = request.app.state.control
    assert isinstance(found, Control)
    return found


Controlled = Annotated[Control, Depends(control_of)]


def parse_wait(text: str) -> float:
    """Return for how many seconds to wait. Raises InvalidRequestError."""
    word = text.lower()
    if word in _WORDS:
        return _WORDS[word]
    if word != word.strip():
        raise InvalidRequestError(f"wait: {text!r} is not understood", hint="Leave blanks out.")
    try:
        return parse_duration(word)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"wait: {error.message}", hint=error.hint) from error


def _no_wait(wait: Annotated[str, _WAIT] = "false") -> float:
    return parse_wait(wait)


def _wait(wait: Annotated[str, _WAIT] = "true") -> float:
    return parse_wait(wait)


WaitIfAsked = Annotated[float, Depends(_no_wait)]
WaitUnlessAsked = Annotated[float, Depends(_wait)]

_DESCRIPTIONS = {
    400: "invalid_request or invalid_name",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found or parent_not_found",
    405: "method_not_allowed",
    409: "name_conflict, has_children, wrong_state, protected or busy",
    413: "too_large",
    422: "max_branches_exceeded, max_depth_exceeded, parent_not_ready, unsupported, chain, format",
    500: "internal",
    501: "not_implemented",
    502: "postgres",
    503: "insufficient_resources, host, not_ready or stopping",
    504: "timed_out",
}


def can_fail(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the problems of a route for the document: these, and what every route can answer."""
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    return {
        status: {
            "description": _DESCRIPTIONS[status],
            "content": {problems.MEDIA_TYPE: {"schema": schema}},
        }
        for status in sorted({*statuses, 400, 401, 403, 500, 503})
    }


READING = can_fail(404)
CHANGING = can_fail(404, 409, 413, 422, 502, 504)
