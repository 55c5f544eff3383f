"""Removes branches whose time to live is over.

Run by the daemon every ``PBKFS_REAPER_INTERVAL``, and without one at the begin of every command
on trunks and branches.
"""

from __future__ import annotations

import logging

from pbkfs.branch.branches import Branches
from pbkfs.branch.store import Store, now
from pbkfs.errors import BusyError, PbkfsError

logger = logging.getLogger(__name__)


def reap(store: Store, branches: Branches) -> list[str]:
    """Destroy all branches that have expired; returns their names.

    One that others were branched from stays until those are gone, and one that is being worked on
    until the next time.
    """
    moment = now()
    gone: list[str] = []
    for head in reversed(store.heads("branch")):  # children before what they were made of
        if not head.is_expired(moment):
            continue
        try:
            if branches.expire(head.id):
                gone.append(head.name)
        except BusyError:
            continue
        except PbkfsError as error:
            logger.error("branch %s has expired and can't be removed: %s", head.name, error.message)
    return gone
