"""A plugin with two back ends that answer as the echo device does: `prompt` at once, `late` 200 us later."""

from __future__ import annotations

import time
from typing import ClassVar

from emu import plugin
from emu.wire.packets import VM_PKT_COMP
from hostproc.devices.backend import Backend
from hostproc.devices.channel import HostChannel
from hostproc.loop import AGAIN, TaskBody

LATE_NS = 200_000


@plugin.backend
class Prompt(Backend):
    """Answers as soon as it has seen a packet."""

    name = "prompt"
    delay_ns: ClassVar[int] = 0

    def open(self, channel: HostChannel) -> TaskBody:
        """Serve one channel."""
        return self._serve(channel)

    def _serve(self, channel: HostChannel) -> TaskBody:
        while True:
            packets = channel.take()
            if not packets:
                yield from channel.wait_for_packets()
                continue
            due = time.monotonic_ns() + self.delay_ns
            while time.monotonic_ns() < due:
                yield AGAIN  # the host does everything else meanwhile
            for _type, _flags, trans_id, payload in packets:
                yield from channel.send_all([payload], trans_id, packet_type=VM_PKT_COMP)


@plugin.backend
class Late(Prompt):
    """Answers 200 us after it has seen a packet."""

    name = "late"
    delay_ns = LATE_NS
