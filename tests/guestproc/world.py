"""A whole guest in one process against a host that a test scripts: `tools.guest_world` with a `ScriptedHost`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.guestproc.scripted_host import ScriptedHost
from tools import guest_world
from tools.guest_world import SECOND_NS, Event, Task

__all__ = ["SECOND_NS", "Event", "Task", "World", "new_world"]


class World(guest_world.World):
    """The machine, its guest, and the scripted host, of which the test says what it answers and what it keeps."""

    host: ScriptedHost

    def __init__(self, *, versions: set[int] | None = None, **options: Any) -> None:
        super().__init__(ScriptedHost, **options)
        if versions is not None:
            self.host.versions = versions


@contextmanager
def new_world(**options: Any) -> Iterator[World]:
    """A world that ends with the block."""
    world = World(**options)
    try:
        yield world
    finally:
        world.close()
