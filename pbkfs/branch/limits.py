"""Limits of a branch's server as users write them. Pure."""

from __future__ import annotations

import re

from pbkfs.branch.errors import InvalidRequestError
from pbkfs.errors import UsageError
from pbkfs.postgres.cgroup import Limits
from pbkfs.units import parse_size

_CPUS = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(m?)")
# A server without a single client takes 30 MiB or so; the kernel ends one that has less at once.
_LEAST_CPUS, _LEAST_BYTES = 0.01, 32 << 20
_MOST_CPUS, _MOST_BYTES = 100_000, 1 << 60


def parse_limits(cpu: str | None, memory: str | None) -> Limits:
    """Return limits for ``2``, ``0.5`` or ``500m`` processors and ``512Mi``.

    Raises InvalidRequestError.
    """
    return Limits(
        None if cpu is None else _parse_cpus(cpu), None if memory is None else _parse_memory(memory)
    )


def _parse_cpus(text: str) -> float:
    match = _CPUS.fullmatch(text)
    cpus = float(match[1]) / (1000 if match[2] else 1) if match else 0.0
    if not _LEAST_CPUS <= cpus <= _MOST_CPUS:
        raise InvalidRequestError(
            f"number of processors {text!r} is not possible",
            hint="Write something like 2, 0.5 or 500m; 10m is the least.",
        )
    return cpus


def _parse_memory(text: str) -> int:
    try:
        n_bytes = parse_size(text) if text == text.strip() else 0
    except (UsageError, OverflowError):
        n_bytes = 0
    if not _LEAST_BYTES <= n_bytes <= _MOST_BYTES:
        raise InvalidRequestError(
            f"amount of memory {text!r} is not possible",
            hint="Write something like 512Mi or 2Gi; 32Mi is the least.",
        )
    return n_bytes
