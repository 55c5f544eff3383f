"""Removes branches whose time to live is over.

Run by the daemon every ``PBKFS_REAPER_INTERVAL``, and without one at the begin of every command
on trunks and branches.
"""

from __future__ import annotations

import logging

from pbkfs.branch.branches import Branches
from pbkfs.branch.errors import HasChildrenError, UnknownHeadError
from pbkfs.branch.store import Store, now
from pbkfs.errors import PbkfsError

logger = logging.getLogger(__name__)


def reap(store: Store, branches: Branches) -> list[str]:
    """Destroy all branches that have expired; returns their names.

    One that others were branched from stays until those are gone.
    """
    moment = now()
    expired = [
        head
        for head in store.heads("branch")
        if head.expires_at is not None and head.expires_at <= moment
    ]
    gone: list[str] = []
    for head in reversed(expired):  # children before what they were made of
        try:
            gone += branches.destroy(head.name)
        except (HasChildrenError, UnknownHeadError):
            continue
        except PbkfsError as error:
            logger.error("branch %s has expired and can't be removed: %s", head.name, error.message)
    return gone
