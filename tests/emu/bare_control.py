"""A `control` on memory of the test's own, without a name."""

from __future__ import annotations

from typing import cast

from emu.control import CONTROL_BYTES, Control
from emu.ipc.atomics import AtomicView
from emu.ipc.segments import Segment


class _Memory:
    """What a segment is to `Control`."""

    def __init__(self) -> None:
        self.memory = bytearray(CONTROL_BYTES)
        self.view = AtomicView(self.memory)


def bare_control() -> Control:
    """An empty one."""
    return Control(cast(Segment, _Memory()))
