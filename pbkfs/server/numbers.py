"""Counters of the daemon, and their Prometheus text. trio's thread only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pbkfs
from pbkfs.branch.views import HeadView

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_STATES = ("creating", "starting", "running", "stopped", "error", "deleting")


@dataclass(slots=True)
class Numbers:
    """What has been counted since the daemon's start."""

    started_at: float = field(default_factory=time.monotonic)
    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """By method, route and status."""
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By operation and ``done`` or the slug of its error."""
    operation_s: dict[str, float] = field(default_factory=dict)
    n_running: int = 0
    reaper_runs: int = 0
    reaped: int = 0
    settled: int = 0

    def add_time(self, operation: str, spent_s: float) -> None:
        """Count the time that an operation took."""
        self.operation_s[operation] = self.operation_s.get(operation, 0.0) + spent_s

    def uptime_s(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started_at


@dataclass(frozen=True, slots=True)
class Storage:
    """What all trunks and branches take on disk."""

    used_bytes: int = 0
    shared_bytes: int = 0


def format_metrics(numbers: Numbers, views: list[HeadView], storage: Storage) -> str:
    """Return all numbers in Prometheus' text format."""
    lines: list[str] = []

    def add(
        name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]
    ) -> None:
        lines.append(f"# HELP pbkfs_{name} {text}")
        lines.append(f"# TYPE pbkfs_{name} {kind}")
        for labels, value in samples:
            lines.append(f"pbkfs_{name}{_format_labels(labels)} {_format_value(value)}")

    add("build_info", "gauge", "Version.", [({"version": pbkfs.__version__}, 1)])
    add("uptime_seconds", "gauge", "Since the daemon's start.", [({}, numbers.uptime_s())])
    for kind, name in (("trunk", "trunks"), ("branch", "branches")):
        counts = Counter(view.status for view in views if view.head.kind == kind)
        add(
            name, "gauge", f"Number of {name} by state.",
            [({"status": state}, counts[state]) for state in _STATES],
        )  # fmt: skip
    add("storage_bytes", "gauge", "Space used on disk.", [({}, storage.used_bytes)])
    add(
        "storage_shared_bytes", "gauge", "Of that, what several share.",
        [({}, storage.shared_bytes)],
    )  # fmt: skip
    add("reaper_runs_total", "counter", "Runs of the reaper.", [({}, numbers.reaper_runs)])
    add("reaped_total", "counter", "Branches that expired.", [({}, numbers.reaped)])
    add("settled_total", "counter", "Things that a crash had left.", [({}, numbers.settled)])
    add("operations_running", "gauge", "Operations under way.", [({}, numbers.n_running)])
    add(
        "operations_total", "counter", "Operations by their result.",
        [
            ({"operation": operation, "result": result}, n)
            for (operation, result), n in sorted(numbers.operations.items())
        ],
    )  # fmt: skip
    add(
        "operation_seconds_total", "counter", "Time that operations took.",
        [({"operation": name}, spent) for name, spent in sorted(numbers.operation_s.items())],
    )  # fmt: skip
    add(
        "http_requests_total", "counter", "Requests by method, route and status.",
        [
            ({"method": method, "route": route, "status": str(status)}, n)
            for (method, route, status), n in sorted(numbers.requests.items())
        ],
    )  # fmt: skip
    return "\n".join(lines) + "\n"


def _format_labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _format_value(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6f}"
