"""Sending and receiving on an open channel (reference 4.4 to 4.7; the packet half of drivers/hv/channel.c).

A sender holds the ring's lock and looks at the channel's state under it: a closer changes the state, then
takes the lock once, so that nobody writes to rings that are given back. What the host wrote into a ring is
checked by `emu.ring`; a channel whose inbound ring breaks a rule loses its callback and stays masked, as
nobody reads it any more, until it is closed.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from emu.errors import OutOfMemory, ProtocolViolation, RingFull
from emu.ring import Packet, PacketTooLong, RingProducer
from emu.ring_memory import Payload
from emu.wire.packets import VM_PKT_DATA_INBAND
from guestproc.kernel.layout import Channel
from guestproc.kernel.records import Record
from guestproc.protocol import opening
from guestproc.protocol.opening import OPENED
from guestproc.vmbus.connection import vmbus_setevent
from guestproc.vmbus.event_lane import INTR_OUT_EMPTY, MOST_LANES, SendLane

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vmbus.ring_buffer import ChannelRings


def vmbus_sendpacket(
    current: Current,
    channel: Channel,
    payload: Payload,
    trans_id: int = 0,
    packet_type: int = VM_PKT_DATA_INBAND,
    flags: int = 0,
) -> int:
    """Write one packet and signal the host if the rules say so.

    0; -EAGAIN: the ring is full; -ENODEV: rescinded or closed; -EIO: the host's read_index cannot be;
    -EMSGSIZE: longer than the ring (for which the kernel says -EAGAIN for ever).
    """
    record: Record = channel
    lane = current.senders.get(record.handle) or _sender(current, channel)
    if record.words[0] != record.generation:
        raise channel.stale()
    try:
        with lane.held:
            if lane.rescind() or lane.state() != OPENED:
                return -errno.ENODEV
            outbound = current.rings.of(channel).outbound
            full = outbound.out_full_total, outbound.out_full_first
            try:
                signal = outbound.write(payload, trans_id, flags, packet_type)
            except RingFull:
                _note_full(channel, outbound, *full)
                return -errno.EAGAIN
            if signal:
                lane.quads[INTR_OUT_EMPTY] += 1
    except PacketTooLong:
        return -errno.EMSGSIZE
    except ProtocolViolation as violation:
        return _refuse_outbound(current, channel, violation)
    if signal:
        vmbus_setevent(current, channel)
    current.counters.packets += 1
    current.counters.bytes += len(payload)
    return 0


def vmbus_sendpackets(
    current: Current, channel: Channel, payloads: Sequence[Payload], first_trans_id: int = 0, flags: int = 0
) -> int:
    """Write as many in-band packets as fit, as one batch with one signal at most.

    How many, or a negative errno as `vmbus_sendpacket` (a full ring is 0).
    """
    record: Record = channel
    lane = current.senders.get(record.handle) or _sender(current, channel)
    if record.words[0] != record.generation:
        raise channel.stale()
    try:
        with lane.held:
            if lane.rescind() or lane.state() != OPENED:
                return -errno.ENODEV
            outbound = current.rings.of(channel).outbound
            full = outbound.out_full_total, outbound.out_full_first
            count, signal = outbound.write_many(payloads, first_trans_id, flags)
            nbytes = outbound.batch_bytes
            if signal:
                lane.quads[INTR_OUT_EMPTY] += 1
            if count < len(payloads):
                _note_full(channel, outbound, *full)
    except PacketTooLong:
        return -errno.EMSGSIZE
    except ProtocolViolation as violation:
        return _refuse_outbound(current, channel, violation)
    if signal:
        vmbus_setevent(current, channel)
    current.counters.packets += count
    current.counters.bytes += nbytes
    return count


def _sender(current: Current, channel: Channel) -> SendLane:
    """What this thread sends on a channel by; made at the first packet of each life of its record."""
    if len(current.senders) >= MOST_LANES:
        current.senders.clear()  # most are of lives that are over
    lane = current.senders[channel.handle] = SendLane(channel, current.actor)
    return lane


def vmbus_wait_for_room(current: Current, channel: Channel, size: int) -> int:
    """Publish that `size` bytes are waited for (reference 4.7): 1 when they are there already, 0: wait.

    Negative as `vmbus_sendpacket`. After the wait and a successful send: `vmbus_cancel_room`.
    """
    try:
        with channel.outbound_ring_lock.hold(current.actor):
            if channel.rescind.load() or not opening.is_open(channel):
                return -errno.ENODEV
            return int(current.rings.of(channel).outbound.want_room(size))
    except PacketTooLong:
        return -errno.EMSGSIZE
    except ProtocolViolation as violation:
        return _refuse_outbound(current, channel, violation)


def set_channel_pending_send_size(current: Current, channel: Channel, size: int) -> None:
    """Say that `size` bytes are waited for (0: none), without a look at whether they are there."""
    with channel.outbound_ring_lock.hold(current.actor):
        if opening.is_open(channel):
            current.rings.of(channel).outbound.words.store_pending(size)


def vmbus_cancel_room(current: Current, channel: Channel) -> None:
    """Nobody waits for room any more: a wish that is left standing brings signals for nothing."""
    with channel.outbound_ring_lock.hold(current.actor):
        if opening.is_open(channel):
            current.rings.of(channel).outbound.cancel_room()


def vmbus_drain(current: Current, channel: Channel, limit: int | None = None) -> list[Packet]:
    """Take packets (type, flags, trans_id, payload with padding); signal the host if it waited for the room.

    In the channel's callback. What came before a broken rule is returned; nothing is read after it.
    """
    rings = inbound_rings(current, channel)
    if rings is None:
        return []
    inbound = rings.inbound
    # An answer mostly comes alone. Behind it is looked again: the host signals nobody for what it adds meanwhile.
    packet = inbound.read_lone()
    packets = [] if packet is None else [packet]
    try:
        if packet is None or not inbound.emptied():
            while more := inbound.read_many(None if limit is None else limit - len(packets)):
                packets += more
                if len(packets) == limit or inbound.emptied():
                    break
        if inbound.fault is not None:
            stop_reading(current, channel, inbound.fault)
    except ProtocolViolation as violation:
        stop_reading(current, channel, violation)
    if inbound.signal_owed and inbound.take_signal():
        channel.intr_in_full += 1
        vmbus_setevent(current, channel)
    return packets


def inbound_rings(current: Current, channel: Channel) -> ChannelRings | None:
    """A channel's rings for its reader, mapped if need be; None when they cannot be what they should."""
    try:
        return current.rings.of(channel)
    except ProtocolViolation as violation:
        stop_reading(current, channel, violation)
    except OutOfMemory as error:
        current.log(f"relid {channel.relid}: {error}")
    return None


def stop_reading(current: Current, channel: Channel, violation: ProtocolViolation) -> None:
    """The host broke a rule of the inbound ring: no callback any more; the mask stays as it is."""
    current.refuse(violation, f"relid {channel.relid}, inbound")
    lock = channel.sched_lock
    if lock.is_held_by(current.actor):  # a callback in ISR mode
        opening.take_callback(channel)
        return
    with lock.hold(current.actor):
        opening.take_callback(channel)


def _note_full(channel: Channel, outbound: RingProducer, total: int, first: int) -> None:
    """`out_full_total` and `out_full_first` of sysfs, by what this producer counted since; under the ring's lock."""
    channel.out_full_total += outbound.out_full_total - total
    channel.out_full_first += outbound.out_full_first - first


def _refuse_outbound(current: Current, channel: Channel, violation: ProtocolViolation) -> int:
    current.refuse(violation, f"relid {channel.relid}, outbound")
    return -errno.EIO
