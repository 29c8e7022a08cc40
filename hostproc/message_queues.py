"""Messages on their way into slots: one FIFO for each (VP, SINT), and the host's half of the handshake.

A message goes into its slot when that is empty; otherwise it waits, the resident message gets its pending
bit, and *then the slot is looked at again*: without that second look a guest that emptied the slot just
before the bit was set would never write EOM, and the queue would stall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from emu.switches import ALL_FIXED, Fix
from emu.syncpoint import Point
from emu.synic import Synic
from emu.tracing import E_MESSAGE_POST, E_PENDING_SET, E_RESET, E_SLOT_WRITE, Recorder
from emu.wire.message_relid import relid_of
from emu.wire.synic import HV_SYNIC_SINT_COUNT as SINT_COUNT
from emu.wire.synic import MESSAGE_HEADER, MESSAGE_PAYLOAD_OFFSET
from hostproc.points import NoPoints

_SLOT_BUSY_SEEN: Final = int(Point.HOST_SLOT_BUSY_SEEN)


class QueuedMessage:
    """One message (type, header, payload as in the slot) and what to call when its buffer is free again."""

    __slots__ = ("cause", "data", "released", "serial")

    def __init__(self, data: bytes, serial: int, released: Callable[[], None], cause: int = 0) -> None:
        self.data = data
        self.cause = cause  # serial of the guest's message that this one answers
        self.serial = serial
        self.released = released

    def taken(self) -> bytes:
        """What is written into the slot, asked for once, when that is found empty."""
        return self.data


class MessageQueues:
    """The queues of all VPs.

    `request_interrupt(position, vector)` and `note_serial(position, sint, serial)` act on a delivery.
    """

    def __init__(
        self,
        synics: list[Synic],
        request_interrupt: Callable[[int, int], None],
        note_serial: Callable[[int, int, int], None],
        trace: Recorder | None = None,
        points: NoPoints | None = None,
        fix: Fix = ALL_FIXED,
    ) -> None:
        self._points = points or NoPoints()
        self._fix = fix
        self._synics = synics
        self._request_interrupt = request_interrupt
        self._note_serial = note_serial
        self._queues: list[deque[QueuedMessage]] = [deque() for _ in range(len(synics) * SINT_COUNT)]
        self._trace = trace
        self.delivered = 0

    def post(self, position: int, sint: int, message: QueuedMessage) -> None:
        """Append to the queue of (VP, SINT) and deliver what can be delivered."""
        if self._trace and _is_channel_message(message.data):
            relid = relid_of(message.data[MESSAGE_PAYLOAD_OFFSET:])
            msgtype = _msgtype(message.data)
            self._trace.record(E_MESSAGE_POST, position, sint, msgtype, message.serial, message.cause, relid)
        self._queues[position * SINT_COUNT + sint].append(message)
        self.pump(position, sint)

    def pump(self, position: int, sint: int) -> int:
        """Deliver to one slot as long as it is empty; how many messages went in (a slot holds one).

        Each turn delivers or ends it, whatever a guest does to the slot meanwhile.
        """
        queue = self._queues[position * SINT_COUNT + sint]
        synic = self._synics[position]
        delivered = 0
        while queue and synic.messages_enabled():
            if (resident := synic.slot_type(sint)) != 0:
                if self._points.armed[_SLOT_BUSY_SEEN] and self._points.hold(
                    _SLOT_BUSY_SEEN, 0, partial(self._held_at_busy_slot, position, sint, resident)
                ):
                    break
                if not self._freed_meanwhile(position, sint, resident):
                    break
            self._deliver(position, sint, queue.popleft(), len(queue))
            delivered += 1
        return delivered

    def _freed_meanwhile(self, position: int, sint: int, resident: int) -> bool:
        """Set the pending bit of a slot that is full; whether it is empty by now."""
        synic = self._synics[position]
        synic.set_pending(sint)
        if self._trace:
            self._trace.record(E_PENDING_SET, position, sint, resident)
        if not self._fix.host_pending_first:
            return False  # wrong on purpose (races.md B2): an EOM is waited for that nobody owes
        # Look again: a guest that emptied the slot before it could see the bit writes no EOM.
        return synic.slot_type(sint) == 0

    def _held_at_busy_slot(self, position: int, sint: int, resident: int) -> None:
        """Go on from the sync point behind the first look."""
        if self._freed_meanwhile(position, sint, resident):
            self.pump(position, sint)

    def _deliver(self, position: int, sint: int, message: QueuedMessage, queued: int) -> None:
        """Write an empty slot, interrupt, give the buffer back (which may post the next message at once)."""
        synic = self._synics[position]
        # The serial before the type: whoever copies the message reads the serial with it.
        self._note_serial(position, sint, message.serial)
        data = message.taken()
        if self._trace:
            # Before it can be read: a processor that is awake reads it at once, and no effect may precede its cause.
            self._record_write(position, sint, data, message.serial, queued)
        synic.write_slot(sint, data)
        self.delivered += 1
        if vector := synic.vector_to_raise(sint):
            self._request_interrupt(position, vector)
        message.released()

    def pump_vp(self, position: int) -> int:
        """Scan all sixteen SINTs of a VP, as an EOM write does."""
        first = position * SINT_COUNT
        return sum(self.pump(position, sint) for sint in range(SINT_COUNT) if self._queues[first + sint])

    def would_wait(self, position: int, sint: int) -> bool:
        """Whether a message posted now could not go into its slot at once."""
        synic = self._synics[position]
        queue = self._queues[position * SINT_COUNT + sint]
        return bool(queue) or not synic.messages_enabled() or synic.slot_type(sint) != 0

    def withdraw(self, position: int, sint: int, message: QueuedMessage) -> None:
        """Take back a message that waits; its buffer is the caller's again, without a call of `released`."""
        self._queues[position * SINT_COUNT + sint].remove(message)

    def waiting(self, position: int, sint: int) -> int:
        """Messages that wait for this slot."""
        return len(self._queues[position * SINT_COUNT + sint])

    @property
    def total_waiting(self) -> int:
        """Messages that wait for any slot."""
        return sum(map(len, self._queues))

    def clear(self) -> None:
        """Partition reset: drop everything, give the buffers back."""
        dropped = [message for queue in self._queues for message in queue]
        for queue in self._queues:
            queue.clear()
        if self._trace:
            self._trace.record(E_RESET, len(dropped))
        # Last: a buffer that is free again may be used at once, for a message behind the reset.
        for message in dropped:
            message.released()

    def _record_write(self, position: int, sint: int, data: bytes, serial: int, queued: int) -> None:
        assert self._trace is not None
        message_type = int.from_bytes(data[:4], "little")
        self._trace.record(E_SLOT_WRITE, position, sint, message_type, _msgtype(data), serial, queued)
        if self._trace.keeps_bytes:
            payload_size: int = MESSAGE_HEADER.unpack_from(data)[1]
            self._trace.keep(data[MESSAGE_PAYLOAD_OFFSET:][:payload_size])


def _is_channel_message(data: bytes) -> bool:
    """Whether a message is VMBus's: nobody but the hypervisor sets bit 31 of the type."""
    return not data[3] & 0x80


def _msgtype(data: bytes) -> int:
    """The type of a channel message; 0 for one of the hypervisor's."""
    return int.from_bytes(data[MESSAGE_PAYLOAD_OFFSET:][:4], "little") if _is_channel_message(data) else 0
