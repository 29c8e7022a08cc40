"""A host's end of an open channel: both rings, the signal to the guest, and the waits of a device's task.

A device is a task, a generator that the host's loop resumes: when its doorbell rings, or in the next round if
it yielded AGAIN. It masks the guest's ring while it works, since it reads anyway, and asks for interrupts
only when it is about to sleep, looking once more afterwards: whoever wrote in between has seen the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from emu.errors import ProtocolViolation
from emu.ring import Packet, RingConsumer, RingProducer
from emu.ring_memory import Payload
from emu.wire.packets import VM_PKT_DATA_INBAND, ring_bytes
from hostproc.loop import WAIT, TaskBody

BATCH_PACKETS: Final = 128
BATCH_BYTES: Final = 256 << 10


class HostChannel:
    """What a back end is given for each open channel.

    `incoming` is the guest's ring, `outgoing` the host's. `signal` sets the guest's event flag (it does
    nothing for a guest that polls). `violation` counts what the guest did wrong. After `close` the rings are
    gone.
    """

    __slots__ = (
        "_fault",
        "_signal",
        "closed",
        "incoming",
        "key",
        "outgoing",
        "relid",
        "signals",
        "sub_channel_index",
        "userdata",
        "violation",
    )

    def __init__(
        self,
        *,
        key: int,
        relid: int,
        sub_channel_index: int,
        userdata: bytes,
        incoming: RingConsumer,
        outgoing: RingProducer,
        signal: Callable[[], object],
        violation: Callable[[ProtocolViolation], None],
        closed: Callable[[], None],
    ) -> None:
        self.key = key
        self.relid = relid
        self.sub_channel_index = sub_channel_index
        self.userdata = userdata
        self.incoming = incoming
        self.outgoing = outgoing
        self.violation = violation
        self.closed = closed  # for a back end whose `close` said that it needs longer
        self.signals = 0  # to the guest
        self._signal = signal
        self._fault: ProtocolViolation | None = None

    def attach(self) -> None:
        """Take both rings into use: mask the guest's, promise to honour pending_send_sz in ours."""
        self.incoming.begin_read()
        self.outgoing.announce()

    def signal(self) -> None:
        """Interrupt the guest."""
        self.signals += 1
        self._signal()

    def take(self, limit: int = BATCH_PACKETS, most_bytes: int = BATCH_BYTES) -> list[Packet]:
        """Take packets from the guest, as many as a bounded piece of work allows; none: there are none.

        Raises the ProtocolViolation of a ring that makes no sense, after all packets before the fault were
        returned.
        """
        if self._fault is not None:
            raise self._fault
        packets: list[Packet] = []
        left = most_bytes
        drain = self.incoming.drain(limit)
        try:
            for packet in drain:
                packets.append(packet)
                left -= len(packet[3])
                if left <= 0:
                    break
        except ProtocolViolation as violation:
            if not packets:
                raise
            self._fault = violation
        finally:
            drain.close()
        if self.incoming.take_signal():
            self.signal()
        return packets

    def wait_for_packets(self) -> TaskBody:
        """Sleep until the guest has written something."""
        while not self.incoming.end_read():
            yield WAIT
        self.incoming.begin_read()

    def wait_for_room(self, size: int) -> TaskBody:
        """Sleep until `size` bytes are free in our ring. PacketTooLong if they never are."""
        while not self.outgoing.want_room(size):
            yield WAIT

    def send_all(
        self,
        payloads: Sequence[Payload],
        trans_ids: Iterable[int] | int = 0,
        flags: int = 0,
        packet_type: int = VM_PKT_DATA_INBAND,
    ) -> TaskBody:
        """Write packets of one kind, in order, all of them, sleeping whenever the ring is full.

        PacketTooLong when the next one can never be written; those before it are.
        """
        ids = trans_ids if isinstance(trans_ids, int) else list(trans_ids)
        done = 0
        while True:
            rest, rest_ids = payloads, ids
            if done:
                rest = payloads[done:]
                rest_ids = ids and (ids + done if isinstance(ids, int) else ids[done:])
            written, must_signal = self.outgoing.write_many(rest, rest_ids, flags, packet_type)
            if must_signal:
                self.signal()
            done += written
            if done == len(payloads):
                return
            yield from self.wait_for_room(ring_bytes(len(payloads[done])))

    def close(self) -> None:
        """Give both rings' memory back."""
        self.incoming.memory.close()
        self.outgoing.memory.close()
