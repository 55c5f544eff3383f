"""What a PGDATA's configuration files say, read without a server.

Needed because some settings of the source must be looked at before its copy starts: libraries that
this host may lack, certificates, files outside of PGDATA. PostgreSQL stays the judge of the rest:
lines that are not understood here are left to its own messages. Pure reads; any thread.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pbkfs.errors import PostgresError

# Source: src/backend/utils/misc/guc-file.l: NAME [=] VALUE, where VALUE is quoted with doubled or
# escaped quotes, or a bare token; "#" starts a comment.
_LINE = re.compile(
    r"""\s*(?P<name>[A-Za-z_\x80-\uffff][\w$.\x80-\uffff]*)
        (?:\s*=\s*|\s+|(?='))
        (?:'(?P<quoted>(?:[^'\\\n]|\\.|'')*)'|(?P<bare>[^\s'\#]+))
        \s*(?:\#.*)?$""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"''|\\([0-7]{1,3}|.)")
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_MAX_DEPTH = 10  # Source: guc-file.l, CONF_FILE_MAX_DEPTH

# Source: src/backend/utils/misc/guc.c, memory_unit_conversion_table.
_MEMORY = {"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_TRUE = ("on", "true", "yes", "1")


@dataclass(frozen=True, slots=True)
class MissingInclude:
    """An include directive whose file is not there; PostgreSQL refuses to start with it."""

    file: Path
    line_number: int
    target: Path


# (file, line number from 1)
Line = tuple[Path, int]


@dataclass(slots=True)
class Configuration:
    """The values that the files set, by lower-case name; the last one wins, as in PostgreSQL.

    ``lines`` says of each name all lines that set it.
    """

    values: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    missing: list[MissingInclude] = field(default_factory=list)
    has_main_file: bool = False

    def get(self, name: str, default: str = "") -> str:
        """Return a value, or ``default`` where no file sets it."""
        return self.values.get(name, default)

    def is_on(self, name: str, default: bool = False) -> bool:
        """Return a boolean setting. Unambiguous prefixes count, as in PostgreSQL's parse_bool."""
        value = self.values.get(name)
        if value is None:
            return default
        value = value.lower()
        return value != "" and value != "o" and any(word.startswith(value) for word in _TRUE)

    def libraries(self, name: str) -> list[str]:
        """Return a list setting such as shared_preload_libraries."""
        return split_list(self.get(name))


def read_configuration(data_dir: Path) -> Configuration:
    """Read postgresql.conf with its includes, then postgresql.auto.conf. Raises PostgresError."""
    found = Configuration()
    main = data_dir / "postgresql.conf"
    if main.exists():
        found.has_main_file = True
        _read_file(main, found, 0)
    auto = data_dir / "postgresql.auto.conf"
    if auto.exists():
        _read_file(auto, found, 0)
    return found


def _read_file(path: Path, found: Configuration, depth: int) -> None:
    if depth > _MAX_DEPTH:
        return  # PostgreSQL's own message about the nesting is the better one
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise PostgresError(
            f"cannot read {path}: {error.strerror}",
            hint="PostgreSQL needs to read it too; check the file and its owner.",
        ) from error
    for line_number, line in enumerate(text.split("\n"), 1):
        pair = parse_line(line)
        if pair is None:
            continue
        name, value = pair
        if name not in ("include", "include_if_exists", "include_dir"):
            found.values[name] = value
            found.lines.setdefault(name, []).append((path, line_number))
            continue
        # Source: guc-file.l, AbsoluteConfigLocation: relative to the file that includes.
        target = path.parent / value
        if name == "include_dir":
            _read_directory(target, MissingInclude(path, line_number, target), found, depth)
        elif target.exists():
            _read_file(target, found, depth + 1)
        elif name == "include":
            found.missing.append(MissingInclude(path, line_number, target))


def _read_directory(
    target: Path, missing: MissingInclude, found: Configuration, depth: int
) -> None:
    if not target.is_dir():
        found.missing.append(missing)
        return
    for entry in sorted(os.listdir(target)):
        if entry.endswith(".conf") and not entry.startswith(".") and (target / entry).is_file():
            _read_file(target / entry, found, depth + 1)


def parse_line(line: str) -> tuple[str, str] | None:
    """Return (lower-case name, value) of a line, or None if it sets nothing."""
    match = _LINE.match(line.rstrip("\r"))
    if match is None:
        return None
    quoted = match["quoted"]
    return match["name"].lower(), match["bare"] if quoted is None else _unescape(quoted)


def _unescape(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        escaped: str | None = match[1]
        if escaped is None:
            return "'"
        if escaped[0] in "01234567":
            return chr(int(escaped, 8) & 0xFF)
        return _ESCAPED.get(escaped, escaped)

    return _ESCAPE.sub(replace, text)


def split_list(value: str) -> list[str]:
    """Return the items of a comma-separated list of names or paths.

    Source: src/backend/utils/adt/varlena.c, SplitDirectoriesString: double quotes protect commas.
    """
    items = re.findall(r'\s*(?:"((?:[^"]|"")*)"|([^",]*))\s*(?:,|$)', value)
    return [
        item
        for quoted, bare in items
        if (item := quoted.replace('""', '"') if quoted else bare.strip())
    ]


def join_list(items: list[str]) -> str:
    """Return the list setting that ``split_list`` reads back as ``items``."""
    quote = re.compile(r'[",\s]')
    return ",".join(
        '"' + item.replace('"', '""') + '"' if quote.search(item) else item for item in items
    )


def parse_memory(value: str, unit_bytes: int = 8192) -> int | None:
    """Return the bytes of a memory setting, or None; a bare number counts ``unit_bytes``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*)\s*", value)
    if match is None:
        return None
    factor = _MEMORY.get(match[2]) if match[2] else unit_bytes
    return None if factor is None else int(float(match[1]) * factor)
