"""The daemon's bookkeeping between a request and its operation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from pbkfs.branch.errors import UnknownHeadError
from pbkfs.branch.service import Service
from pbkfs.errors import NotFoundError
from pbkfs.server.control import Control
from pbkfs.server.hands import Event, Hands


class FailingHands:
    """Operations that fail a moment after they have begun, and leave nothing."""

    async def run(self, operation: str, arguments: dict[str, Any], on_event: Any) -> Any:
        event: Event = {"event": "begun"}
        on_event(event)
        await trio.sleep(0.05)
        raise NotFoundError(f"{operation} of {arguments['name']} has no source")


def no_heads() -> Service:
    store = SimpleNamespace(find=lambda _name: None, heads=list)
    life = SimpleNamespace(view=lambda *_a, **_k: [], sizes=lambda _heads: {})
    overview = SimpleNamespace(storage_used_bytes=0, shared_bytes=0)
    return cast(
        Service,
        SimpleNamespace(settings=None, store=store, life=life, overview=lambda: overview),
    )


def test_creation_that_fails_before_it_is_shown_says_why() -> None:
    """Its head is gone when the answer is made: that it does not exist would be no answer."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            control = Control(no_heads(), cast(Hands, FailingHands()), nursery)
            with pytest.raises(NotFoundError, match="has no source"):
                await control.create("trunk", {"name": "x"}, wait_s=0)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(UnknownHeadError, match=r"its creation failed: .* has no source"):
                await control.show("x", "trunk")

    trio.run(main)
