"""Durations as Go writes them, and days and weeks: a branch's time to live. Pure."""

from __future__ import annotations

import math
import re

from pbkfs.branch.errors import InvalidRequestError

# Source: Go's time.ParseDuration, without the units below a millisecond; d and w are ours.
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|d|w)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_LONGEST_S = 100 * 365 * 86400.0

NEVER = "never"


def parse_duration(text: str) -> float:
    """Return seconds for ``2h``, ``7d``, ``90m``, ``1h30m`` or ``500ms``.

    Every number needs its unit. Raises InvalidRequestError.
    """
    word, total, at = text.strip(), 0.0, 0
    for match in _PART.finditer(word):
        if match.start() != at:
            break
        total += float(match[1]) * _SECONDS[match[2]]
        at = match.end()
    if not word or at != len(word) or not math.isfinite(total):
        raise InvalidRequestError(
            f"duration {text!r} is not understood",
            hint="Write numbers with a unit: 90m, 2h, 7d, 1h30m.",
        )
    return total


def parse_ttl(text: str) -> float | None:
    """Return seconds to live for ``2h`` or ``7d``, None for ``never``.

    Raises InvalidRequestError, also for a time that is over at once or later than a century.
    """
    return _parse_limit(text, "time to live", "2h or 7d")


def parse_idle_stop(text: str) -> float | None:
    """Return after how many seconds without a client a branch stops, None for ``never``.

    Raises InvalidRequestError.
    """
    return _parse_limit(text, "idle time", "30m or 2h")


def _parse_limit(text: str, what: str, example: str) -> float | None:
    if text.strip().lower() == NEVER:
        return None
    seconds = parse_duration(text)
    if not 0 < seconds <= _LONGEST_S:
        raise InvalidRequestError(
            f"{what} {text!r} is out of range",
            hint=f"Write something like {example}, or never.",
        )
    return seconds
