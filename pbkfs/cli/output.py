"""What commands print: tables and JSON on stdout, warnings on stderr.

Plain string formatting on purpose: importing rich costs more than ``pbkfs list`` may take.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

FORMATS = ("text", "json")


def format_option(function: Function) -> Function:
    """Add ``-o/--output/--format text|json`` as the parameter ``output``."""
    return click.option(
        "-o",
        "--output",
        "--format",
        "output",
        type=click.Choice(("text", "table", "json")),
        default="text",
        show_default=True,
        help="Output format; table is another name of text.",
    )(function)


def echo_json(value: object) -> None:
    """Print ``value`` as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under an upper-case header, columns padded to their widest cell."""
    lines = [[cell.upper() for cell in header], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_fields(fields: Mapping[str, str]) -> str:
    """Return ``name: value`` lines with the values in one column."""
    width = max((len(name) for name in fields), default=0) + 2
    return "\n".join(f"{name + ':':<{width}}{value}" for name, value in fields.items())


def warn(message: str, hint: str | None = None) -> None:
    """Print a warning line, and its hint, on stderr."""
    click.echo(f"pbkfs: warning: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout.isatty()
