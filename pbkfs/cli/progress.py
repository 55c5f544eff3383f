"""How hydration is shown: one line of text, and a bar that grows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import click

from pbkfs.units import format_bytes, format_duration

_EVERY_S = 0.5
_BAR_WIDTH = 24


def describe_hydration(found: dict[str, Any]) -> str:
    """Return the status as one line."""
    state = found["state"]
    if state in ("off", "looking"):
        return str(state)
    amounts = (
        f"{found['files_done']} of {found['files_total']} files, "
        f"{format_bytes(found['bytes_done'])} of {format_bytes(found['bytes_total'])}"
    )
    parts = [f"{state}, {amounts}"]
    if state == "running":
        parts.append(f"{format_bytes(found['rate'])}/s")
        left = found["bytes_total"] - found["bytes_done"]
        if found["rate"]:
            parts.append(f"about {format_duration(left / found['rate'])} left")
    if found["rate_limit"]:
        parts.append(f"limit {format_bytes(found['rate_limit'])}/s")
    if found["error"]:
        parts.append(found["error"])
    return ", ".join(parts)


def percent_of(found: dict[str, Any]) -> int:
    """Return how much is done, rounded down: 100 is all."""
    total, done = found["bytes_total"], found["bytes_done"]
    if found["files_done"] < found["files_total"]:
        return min(99, 100 * done // total if total else 99)
    return 100 if found["state"] == "done" else min(99, 100 * done // total if total else 0)


class Bar:
    """A bar on a terminal, a line for every tenth elsewhere; both on stderr."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown = -1

    def show(self, found: dict[str, Any]) -> None:
        """Show the status."""
        percent = percent_of(found)
        if self._is_terminal:
            n_filled = _BAR_WIDTH * percent // 100
            bar = "#" * n_filled + "." * (_BAR_WIDTH - n_filled)
            text = f"[{bar}] {percent:3d}%  {describe_hydration(found)}"
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)
        elif found["state"] == "running" and percent // 10 > self._shown // 10:
            self._shown = percent
            click.echo(f"{percent}%  {describe_hydration(found)}", err=True)

    def end(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._is_terminal:
            click.echo(err=True)


def watch(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Show what ``ask`` returns until hydration ends; returns the last status."""
    bar = Bar()
    try:
        while True:
            found = ask()
            bar.show(found)
            if found["state"] not in ("looking", "running"):
                return found
            time.sleep(_EVERY_S)
    finally:
        bar.end()
