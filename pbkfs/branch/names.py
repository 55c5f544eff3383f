"""Names of trunks and branches: what is allowed, and one that is made up. Pure."""

from __future__ import annotations

import re
import secrets

from pbkfs.branch.errors import InvalidNameError, InvalidRequestError

# Safe in a URL's path, a file name, a shell word and, but for the underscore, a host name.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TAG = re.compile(r"[^\s,]{1,128}")


def check_name(name: str) -> str:
    """Return ``name`` if a trunk or branch can have it. Raises InvalidNameError."""
    if not _NAME.fullmatch(name):
        raise InvalidNameError(f"{name!r} is no name for a trunk or branch")
    return name


def make_name() -> str:
    """Return a new name like ``branch-a1b2c3d4``."""
    return f"branch-{secrets.token_hex(4)}"


def check_tag(tag: str) -> str:
    """Return ``tag`` if it is one. Raises InvalidRequestError."""
    if not _TAG.fullmatch(tag):
        raise InvalidRequestError(
            f"tag {tag!r} is not understood",
            hint="A tag is up to 128 characters without spaces and commas.",
        )
    return tag
