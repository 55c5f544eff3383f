"""Sizes and durations as people write them: parse and format.

Called by the command line and by reports; pure functions, any thread.
"""

from __future__ import annotations

import re

from pbkfs.errors import UsageError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtp])i?b?|b)?", re.IGNORECASE)
_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|m|h|d|w|)", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(text: str) -> int:
    """Return bytes for ``64MB``, ``64Mi``, ``1.5g`` or ``8192``; every unit is a power of 1024.

    Source: PostgreSQL's memory units are powers of 1024 too (guc.c, memory_unit_conversion_table).
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        return int(float(match[1]) * _BYTES[(match[2] or "").lower()])
    raise UsageError(
        f"size {text!r} is not understood", hint="Write a number and a unit, for example 64MB."
    )


def parse_rate(text: str) -> int:
    """Return bytes a second for ``50MB``, ``50MB/s`` or ``0`` (no limit)."""
    return parse_size(text.strip().lower().removesuffix("/s"))


def parse_duration(text: str) -> float:
    """Return seconds for ``2h``, ``7d``, ``1h30m``, ``250ms`` or ``30`` (seconds)."""
    text = text.strip()
    total, position = 0.0, 0
    for match in _DURATION.finditer(text):
        if match.start() != position or match.end() == match.start():
            break
        total += float(match[1]) * _SECONDS[match[2].lower()]
        position = match.end()
    if not text or position != len(text):
        raise UsageError(
            f"duration {text!r} is not understood",
            hint="Write a number and a unit, for example 30s or 2h.",
        )
    return total


def format_bytes(n_bytes: int) -> str:
    """Return ``n_bytes`` for people: ``12.3 MiB``, ``8 KiB``, ``17 B``."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            text = f"{value:.1f}".removesuffix(".0")
            return f"{text} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """Return ``seconds`` with at most two units: ``2d 3h``, ``5m 12s``, ``0s``."""
    rest = max(0, int(seconds))
    parts = []
    for name, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{name}")
    return " ".join(parts[:2]) or "0s"
