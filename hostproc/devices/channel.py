"""A host's end of an open channel: both rings, the signal to the guest, and the waits of a device's task.

A device is a task, a generator that the host's loop resumes: when its doorbell rings, or in the next round if
it yielded AGAIN. It masks the guest's ring while it works, since it reads anyway, and asks for interrupts
only when it is about to sleep, looking once more afterwards: whoever wrote in between has seen the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from emu.errors import ProtocolViolation, RingFull
from emu.host_tables import Traffic
from emu.ring import Packet, RingConsumer, RingProducer, Run
from emu.ring_memory import Payload
from emu.wire.packets import VM_PKT_DATA_INBAND, ring_bytes
from hostproc.devices.unmapped import UnmappedRings
from hostproc.loop import AGAIN, WAIT, TaskBody

BATCH_PACKETS: Final = 128
BATCH_BYTES: Final = 256 << 10


class HostChannel:
    """What a back end is given for each open channel.

    `incoming` is the guest's ring, `outgoing` the host's; both are mapped when the first packet comes.
    `signal` sets the guest's event flag (it does nothing for a guest that polls). `violation` counts what the
    guest did wrong. `offer_subchannels`, on a primary, offers sub-channels of these indices in this order, of which
    there may be as many as `subchannel_room` says. After `close` the rings are gone.
    """

    __slots__ = (
        "_alarmed",
        "_incoming",
        "_outgoing",
        "_signal",
        "_unmapped",
        "closed",
        "key",
        "offer_subchannels",
        "relid",
        "signals",
        "subchannel_room",
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
        rings: tuple[RingConsumer, RingProducer] | UnmappedRings,
        signal: Callable[[], object],
        violation: Callable[[ProtocolViolation], None],
        closed: Callable[[], None],
        offer_subchannels: Callable[[Iterable[int]], None] | None = None,
        subchannel_room: Callable[[], int] | None = None,
    ) -> None:
        self.key = key
        self.relid = relid
        self.sub_channel_index = sub_channel_index
        self.userdata = userdata
        self._unmapped: UnmappedRings | None = None
        if isinstance(rings, UnmappedRings):
            self._unmapped = rings
        else:
            self._incoming, self._outgoing = rings
        self.violation = violation
        self.offer_subchannels = offer_subchannels or _none_offered
        self.subchannel_room = subchannel_room or _no_room
        self.closed = closed  # for a back end whose `close` said that it needs longer
        self.signals = 0  # to the guest
        self._signal = signal
        self._alarmed = False  # packets were announced, and none has been seen since

    @property
    def incoming(self) -> RingConsumer:
        """The guest's ring; mapped at the first use. Raises the ProtocolViolation of an index that cannot be."""
        if self._unmapped is not None:
            self._map(self._unmapped)
        return self._incoming

    @property
    def outgoing(self) -> RingProducer:
        """The host's ring; mapped at the first use, as `incoming`."""
        if self._unmapped is not None:
            self._map(self._unmapped)
        return self._outgoing

    @property
    def may_not_fit(self) -> bool:
        """Whether the ring back is smaller than the one that packets come through."""
        if self._unmapped is not None:
            return self._unmapped.outgoing_bytes < self._unmapped.incoming_bytes
        return self._outgoing.memory.data_size < self._incoming.memory.data_size

    def _map(self, unmapped: UnmappedRings) -> None:
        self._incoming, self._outgoing = unmapped.map()
        self._unmapped = None

    def unread(self) -> tuple[int, int]:
        """Bytes of the guest's ring that nobody has taken, and the index from which on."""
        if self._unmapped is not None and self._unmapped.empty():
            return 0, 0
        incoming = self.incoming
        return incoming.bytes_to_read, incoming.words.load_read()

    def left_over(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Bytes that nobody has read, and that ring's interrupt_mask: of the guest's ring, of ours."""
        if self._unmapped is not None:
            incoming, outgoing = self._unmapped.words()
            sizes = self._unmapped.incoming_bytes, self._unmapped.outgoing_bytes
        else:
            one, other = self._incoming.memory, self._outgoing.memory
            # Its own words: those of a recording would tell of this look.
            incoming = one.words.load_write(), one.words.load_read(), one.words.load_mask()
            outgoing = other.words.load_write(), other.words.load_read(), other.words.load_mask()
            sizes = one.data_size, other.data_size
        return (
            ((incoming[0] - incoming[1]) % sizes[0], incoming[2]),
            ((outgoing[0] - outgoing[1]) % sizes[1], outgoing[2]),
        )

    def wants_room(self) -> bool:
        """Whether the device waits for room in its own ring."""
        return self._unmapped is None and self._outgoing.words.load_pending() != 0

    def traffic(self) -> Traffic:
        """What went through since it was opened."""
        if self._unmapped is not None:
            return Traffic(0, 0, self.signals)
        return Traffic(self._incoming.packets, self._outgoing.bytes, self.signals)

    def attach(self) -> None:
        """Take both rings into use: mask the guest's, promise to honour pending_send_sz in ours."""
        if self._unmapped is not None:
            self._unmapped.attach()
            return
        self._incoming.begin_read()
        self._outgoing.announce()

    def signal(self) -> None:
        """Interrupt the guest."""
        self.signals += 1
        self._signal()

    def take(self, limit: int = BATCH_PACKETS, most_bytes: int = BATCH_BYTES) -> list[Packet]:
        """Take packets from the guest, as many as a bounded piece of work allows; none: there are none.

        Raises the ProtocolViolation of a ring that makes no sense, after all packets before the fault were
        returned.
        """
        if self._unmapped is not None and self._unmapped.empty():
            return []
        if limit > 0 and (packet := self.take_lone()) is not None:
            return [packet]
        packets = self.incoming.read_many(limit, most_bytes)
        self._took(bool(packets))
        return packets

    def take_lone(self) -> Packet | None:
        """The packet of a guest that sent a single one, as in a round trip; None: see `take` and `take_runs`."""
        if self._unmapped is not None:
            return None
        packet = self._incoming.read_lone()
        if packet is not None:
            self._took(True)
        return packet

    def take_runs(self, limit: int = BATCH_PACKETS, most_bytes: int = BATCH_BYTES) -> list[Run]:
        """As `take`, in runs: packets of one type and flags as columns, which is how `send_all` takes them."""
        if self._unmapped is not None and self._unmapped.empty():
            return []
        runs = self.incoming.read_runs(limit, most_bytes)
        self._took(bool(runs))
        return runs

    def _took(self, something: bool) -> None:
        """The guest may be owed a signal for the room."""
        if self._incoming.take_signal():
            self.signal()
        if something:
            self._alarmed = False

    def wait_for_packets(self) -> TaskBody:
        """Sleep until the guest has written something."""
        if self._alarmed:
            # A guest that shows a packet and takes it back, over and over, gets one look a round.
            yield AGAIN
        self._alarmed = True
        while self._unmapped is not None:
            if self._unmapped.unmask():
                self._unmapped.mask()
                return
            yield WAIT
        while not self._incoming.end_read():
            yield WAIT
        self._incoming.begin_read()

    def rest(self) -> TaskBody:
        """After a piece of work: AGAIN if the guest has written more meanwhile, else sleep until it signals."""
        incoming = self.incoming
        # What was found wrong behind the last good packet is told now: nobody may ever signal again.
        if incoming.fault is not None or incoming.end_read():
            incoming.begin_read()
            yield AGAIN
            return
        yield WAIT
        incoming.begin_read()

    def wait_for_room(self, size: int) -> TaskBody:
        """Sleep until `size` bytes are free in our ring. PacketTooLong if they never are."""
        while not self.outgoing.want_room(size):
            yield WAIT

    def send(self, payload: Payload, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND) -> bool:
        """Write one packet; False when the ring is full now. PacketTooLong when it can never be written.

        ProtocolViolation when the guest's read_index cannot be: `write` alone looks at it only when it has to.
        """
        outgoing = self._outgoing if self._unmapped is None else self.outgoing
        try:
            signal = outgoing.write(payload, trans_id, flags, packet_type)
        except RingFull:
            return False
        # Behind the write, for which the line with the indices had to come anyway: a look before would bring it twice.
        outgoing.check_read_index()
        if signal:
            self.signals += 1
            self._signal()
        return True

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
        stuck = False
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
            if stuck and not written:
                # There was said to be room, and there was none: the same guest, the same one look a round.
                yield AGAIN
            stuck = not written
            yield from self.wait_for_room(ring_bytes(len(payloads[done])))

    def close(self) -> None:
        """Give both rings' memory back."""
        if self._unmapped is None:
            self._incoming.memory.close()
            self._outgoing.memory.close()


def _none_offered(_indices: Iterable[int]) -> None:
    """A channel of nobody's bus has no sub-channels."""


def _no_room() -> int:
    return 0
