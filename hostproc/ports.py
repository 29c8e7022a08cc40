"""Ports and connections: where a posted message or a signalled event goes.

A connection id (24 bits) names a port. A message port has 16 buffers, given back when a message has left
for its slot or was read by the host; an event port has a base flag and a number of flags. Ports of the host
itself hand over to a callable. (TLFS "Inter-Partition Communication", reference 1.6 and 1.7.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from emu.compile_hints import mypyc_attr
from emu.wire.hypercalls import PORT_MESSAGE_BUFFERS, HvStatus
from emu.wire.synic import MESSAGE_HEADER
from hostproc.event_ports import EventPort, HostEventPort
from hostproc.message_queues import MessageQueues, QueuedMessage
from hostproc.posted import PostedMessage


class MessagePort:
    """A port that feeds one slot of one VP of the guest; at most 16 messages are on their way."""

    def __init__(self, queues: MessageQueues, port_id: int, position: int, sint: int) -> None:
        self._queues = queues
        self.port_id = port_id
        self.position = position
        self.sint = sint
        self.in_use = 0
        self.on_buffer_free: Callable[[], None] = _nothing

    def retarget(self, position: int, sint: int) -> None:
        """Deliver to another VP from now on (the connection's target VP is chosen at contact)."""
        self.position = position
        self.sint = sint

    def post(self, message_type: int, payload: bytes, serial: int = 0, cause: int = 0) -> HvStatus:
        """Queue one message; INSUFFICIENT_BUFFERS when all 16 buffers are taken."""
        if self.in_use >= PORT_MESSAGE_BUFFERS:
            return HvStatus.INSUFFICIENT_BUFFERS
        self.in_use += 1
        data = MESSAGE_HEADER.pack(message_type, len(payload), 0, self.port_id) + payload
        self._queues.post(self.position, self.sint, QueuedMessage(data, serial, self._release, cause))
        return HvStatus.SUCCESS

    def _release(self) -> None:
        self.in_use -= 1
        self.on_buffer_free()


def _nothing() -> None:
    """No one waits for a buffer of this port."""


@mypyc_attr(allow_interpreted_subclasses=True)
class HostMessagePort:
    """A port that the host reads: at most 16 messages wait in `queue`; `wake` tells its reader."""

    def __init__(self, connection_id: int, wake: Callable[[], None]) -> None:
        self.connection_id = connection_id
        self.queue: deque[PostedMessage] = deque()
        self._wake = wake

    def post(self, message_type: int, payload: bytes, serial: int = 0) -> HvStatus:
        """Take a message in; INSUFFICIENT_BUFFERS while the host has 16 unread ones."""
        if len(self.queue) >= PORT_MESSAGE_BUFFERS:
            return HvStatus.INSUFFICIENT_BUFFERS
        self.queue.append(PostedMessage(self.connection_id, message_type, payload, serial))
        self._wake()
        return HvStatus.SUCCESS


class Connections:
    """Connection ids of the partition: id -> port, messages and events apart."""

    def __init__(self) -> None:
        self.messages: dict[int, MessagePort | HostMessagePort] = {}
        self.events: dict[int, EventPort | HostEventPort] = {}
