"""``--api-url`` and ``--api-token``: which daemon does the work, if any."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

_URL = ("PBKFS_API_URL", "PGBRANCH_API_URL")
_TOKEN = ("PBKFS_API_TOKEN", "PGBRANCH_API_TOKEN")


def remote_options(function: Function) -> Function:
    """Add ``--api-url`` and ``--api-token``; ``api_url`` and ``api_token`` tell what they say."""

    def remember(name: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
        def callback(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
            if value is not None:
                os.environ[name] = value

        return callback

    function = click.option(
        "--api-token", expose_value=False, callback=remember(_TOKEN[0]), metavar="TOKEN",
        help="The daemon's token; better as PBKFS_API_TOKEN.",
    )(function)  # fmt: skip
    return click.option(
        "--api-url", expose_value=False, callback=remember(_URL[0]), metavar="URL",
        help="Let a daemon do it: http://HOST:PORT or unix:PATH (PBKFS_API_URL).",
    )(function)  # fmt: skip


def api_url() -> str:
    """Return the daemon's address; empty: this process does the work."""
    return _first(_URL)


def api_token() -> str:
    """Return the daemon's token."""
    return _first(_TOKEN)


def _first(names: tuple[str, ...]) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")
