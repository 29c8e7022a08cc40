"""Interrupts and messages of a host that is told what is to go wrong with them: late, spurious, changed.

Made only where a machine may have such faults (`hypervisor_main`): elsewhere ports and queues are the plain ones.
A late interrupt is a timer of the host's loop; what it was for lies in the slot or the flag all the while.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.fault_plan import Faults
from emu.faults import FaultKind
from emu.memory import GuestMemory
from emu.switches import ALL_FIXED, Fix
from emu.synic import Synic
from emu.tracing import Recorder
from emu.wire.message_relid import relid_of
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, MESSAGE_PAYLOAD_OFFSET, VMBUS_MESSAGE_SINT, message_slot
from hostproc.message_queues import MessageQueues, QueuedMessage
from hostproc.points import NoPoints

MOST_LATE: Final = 4_096
"""So many interrupts may be on their way; one more is not late."""

CallLater = Callable[[int, Callable[[], None]], None]
"""`call_later(ns, action)`: once, when so much machine time has passed."""
RequestInterrupt = Callable[[int, int], None]
"""`request(position, vector)`."""


class FaultyInterrupts:
    """What requests interrupts, some of them late, and some for nothing."""

    def __init__(self, faults: Faults, vp_indices: list[int], request: RequestInterrupt, call_later: CallLater) -> None:
        self._faults = faults
        self._vp_indices = vp_indices
        self._request = request
        self._call_later = call_later
        self._late = 0
        self._ticking = False

    def of_event(self, sint: int, flag: int) -> RequestInterrupt:
        """What requests the interrupts of one event; its flag is its channel's relid, below 2.4 always 0."""

        def request(position: int, vector: int) -> None:
            self.request(position, vector, sint, flag)

        return request

    def request(self, position: int, vector: int, sint: int, relid: int) -> None:
        """Request an interrupt, now or later."""
        vp = self._vp_indices[position]
        hit = None
        if self._late < MOST_LATE:
            hit = self._faults.hit(FaultKind.DELAY_IRQ, relid=relid, vp=vp, sint=sint)
        if hit is None:
            self._request(position, vector)
            return
        self._late += 1
        self._call_later(hit.fault.number, lambda: self._arrive(position, vector))

    def _arrive(self, position: int, vector: int) -> None:
        self._late -= 1
        self._request(position, vector)

    # -- for nothing ----------------------------------------------------------------------------------

    def begin_spurious(self, synics: list[Synic]) -> None:
        """Interrupt the VPs for nothing, as long as a fault says so; does nothing where that goes on already."""
        if self._ticking:
            return
        period_ns = min((fault.number for fault in self._faults.on(FaultKind.IRQ_SPURIOUS)), default=0)
        if not period_ns:
            return
        self._ticking = True
        self._call_later(period_ns, lambda: self._tick(synics))

    def _tick(self, synics: list[Synic]) -> None:
        self._ticking = False
        for position, synic in enumerate(synics):
            vector = synic.vector_to_raise(VMBUS_MESSAGE_SINT)
            if vector and self._faults.hit(FaultKind.IRQ_SPURIOUS, vp=self._vp_indices[position]):
                self._request(position, vector)
        self.begin_spurious(synics)


class FaultyQueues(MessageQueues):
    """Message queues whose interrupts may be late, and whose messages may change in their slots."""

    def __init__(
        self,
        faults: Faults,
        interrupts: FaultyInterrupts,
        memory: GuestMemory,
        vp_indices: list[int],
        synics: list[Synic],
        request_interrupt: RequestInterrupt,
        note_serial: Callable[[int, int, int], None],
        trace: Recorder | None = None,
        points: NoPoints | None = None,
        fix: Fix = ALL_FIXED,
    ) -> None:
        super().__init__(synics, self._request_late, note_serial, trace, points, fix)
        self._faults = faults
        self._interrupts = interrupts
        self._memory = memory
        self._vp_indices = vp_indices
        # What is being delivered now: SINT and relid.
        self._delivering = 0, 0

    def _request_late(self, position: int, vector: int) -> None:
        self._interrupts.request(position, vector, *self._delivering)

    def _deliver(self, position: int, sint: int, message: QueuedMessage, queued: int) -> None:
        payload = message.data[MESSAGE_PAYLOAD_OFFSET:]
        self._delivering = sint, relid_of(payload)
        super()._deliver(position, sint, message, queued)
        self._mutate(position, sint, payload)

    def mutate_residents(self) -> None:
        """The fault was turned on: it may strike the messages that lie in their slots now."""
        for position, synic in enumerate(self._synics):
            sint = VMBUS_MESSAGE_SINT
            if synic.messages_enabled() and synic.slot_type(sint) == HVMSG_CHANNEL_MESSAGE:
                at = self._payload_at(synic, sint)
                self._mutate(position, sint, self._memory.read(at, 240))

    def _mutate(self, position: int, sint: int, payload: bytes) -> None:
        vp, msgtype = self._vp_indices[position], int.from_bytes(payload[:4], "little")
        hit = self._faults.hit(FaultKind.HOST_MUTATE_SLOT, relid=relid_of(payload), message=msgtype, vp=vp, sint=sint)
        if hit is not None and self._synics[position].messages_enabled():
            at = self._payload_at(self._synics[position], sint) + (hit.fault.number >> 8)
            self._memory.write(at, bytes([hit.fault.number & 0xFF]))

    @staticmethod
    def _payload_at(synic: Synic, sint: int) -> int:
        assert synic.simp.gpa is not None
        return synic.simp.gpa + message_slot(sint) + MESSAGE_PAYLOAD_OFFSET
