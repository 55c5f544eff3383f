"""What can go wrong with trunks and branches, beside what ``pbkfs.errors`` has.

Each slug is the ``type`` of a problem of the REST interface; the exit code is that of the class
above it.
"""

from __future__ import annotations

from pbkfs.errors import BusyError, HostError, NotFoundError, NotRunningError, UsageError


class InvalidRequestError(UsageError):
    """A value of a request cannot be understood, for example a time to live."""

    slug = "invalid_request"


class InvalidNameError(UsageError):
    """A name that no trunk or branch can have."""

    slug = "invalid_name"
    default_hint = (
        "Use up to 63 lower-case letters, digits, '.', '_' and '-', with a letter or digit first."
    )


class UnknownHeadError(NotFoundError):
    """No trunk or branch has this name."""

    slug = "not_found"
    default_hint = "pbkfs branch list and pbkfs trunk list show what there is."


class ParentNotFoundError(NotFoundError):
    """The trunk or branch to branch from does not exist."""

    slug = "parent_not_found"
    default_hint = "pbkfs branch list --tree shows trunks and branches."


class NameConflictError(BusyError):
    """A trunk or branch of this name exists."""

    slug = "name_conflict"
    default_hint = "Choose another name, or destroy the other one first."


class HasChildrenError(BusyError):
    """What is to be destroyed or reset has branches of its own."""

    slug = "has_children"
    default_hint = "Destroy them too with -r, or one by one before."


class WrongStateError(BusyError):
    """The trunk or branch is not in the state that the operation needs."""

    slug = "wrong_state"
    default_hint = "pbkfs branch list shows the states."


class ProtectedError(BusyError):
    """The default trunk can't be destroyed."""

    slug = "protected"
    default_hint = "Destroy its branches one by one, or make another trunk."


class MaxBranchesError(HostError):
    """There are as many branches as the settings allow."""

    slug, http_status = "max_branches_exceeded", 422
    default_hint = "Destroy a branch, or raise PBKFS_MAX_BRANCHES."


class MaxDepthError(HostError):
    """Branches are nested as deep as the settings allow."""

    slug, http_status = "max_depth_exceeded", 422
    default_hint = "Branch from something nearer to the trunk, or raise PBKFS_MAX_DEPTH."


class ParentNotReadyError(NotRunningError):
    """The trunk or branch to branch from is in no state that can be branched."""

    slug, http_status = "parent_not_ready", 422
    default_hint = "Wait until it is ready, or start it."


class InsufficientResourcesError(HostError):
    """No port is left, or another thing that this host has only so many of."""

    slug, http_status = "insufficient_resources", 503
    default_hint = "Stop or destroy a branch, or widen PBKFS_PORT_RANGE_START … _END."
