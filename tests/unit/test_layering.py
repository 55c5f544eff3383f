"""What import-linter can't see: who may use the extension, and which modules have one owner."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pbkfs

PACKAGE = Path(pbkfs.__file__).parent


def _imports() -> Iterator[tuple[str, str]]:
    """(top-level part of pbkfs, imported name) for every import of the package."""
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from ((part, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield part, node.module
                yield from ((part, f"{node.module}.{alias.name}") for alias in node.names)


def test_the_extension_is_used_by_its_three_layers_only() -> None:
    users = {part for part, name in _imports() if name == "pbkfs._native"}
    assert users <= {"overlay", "fuse", "backup"}
    assert users  # else this looks for the wrong name


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "helpers", "common", "manager", "misc"}
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in empty]
