"""The sending side of the netlike driver: a queue that stops when its ring is low, and is woken by completions.

Each frame asks for a completion. Who sent the last one that fits well stops the queue; the poll that takes a completion
wakes it once there is room, or nothing is under way any more. Those completions may all have been taken between the
decision to stop and the stop, with nobody left to wake it. So the sender looks again behind its stop, and wakes the
queue itself (`netvsc_send_pkt`, `netvsc_send_tx_complete`).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from emu.ring import RingProducer
from emu.syncpoint import Point
from emu.wire.netlike_protocol import pack_frame
from emu.wire.packets import COMPLETION_REQUESTED
from guestproc.kernel.layout import Channel, NetChannel
from guestproc.vmbus.packets import vmbus_sendpacket

if TYPE_CHECKING:
    from guestproc.current import Current

RING_AVAIL_PERCENT_LOWATER: Final = 10
RING_AVAIL_PERCENT_HIWATER: Final = 20
TX_ID: Final = 1 << 32
"""Set in the transaction id of a frame, beside its sequence: no request of a program has it."""
_BEFORE_TX_STOP: Final = int(Point.DRV_BEFORE_TX_STOP)


def netif_tx_stop_queue(nvchan: NetChannel) -> None:
    """Nobody sends on this queue until it is woken."""
    nvchan.tx_stopped.store(1)


def netif_tx_wake_queue(nvchan: NetChannel) -> None:
    """Whoever wants to send may."""
    nvchan.tx_stopped.store(0)


def netif_tx_queue_stopped(nvchan: NetChannel) -> bool:
    """Whether it is stopped."""
    return nvchan.tx_stopped.load() != 0


def hv_get_avail_to_write_percent(outbound: RingProducer) -> int:
    """How much of a ring is free, in percent."""
    return outbound.free_bytes * 100 // outbound.memory.data_size


def netvsc_start_xmit(current: Current, channel: Channel, nvchan: NetChannel, data: bytes) -> int:
    """Send one frame: 0, -EBUSY while the queue is stopped, or what `vmbus_sendpacket` says."""
    if netif_tx_queue_stopped(nvchan):
        return -errno.EBUSY
    sequence = nvchan.tx_next
    # Counted before it is sent: its completion may come before this thread does another step.
    nvchan.queue_sends.fetch_add(1)
    frame, trans_id = pack_frame(sequence, data), TX_ID | sequence
    result = vmbus_sendpacket(current, channel, frame, trans_id, flags=COMPLETION_REQUESTED)
    if result:
        nvchan.queue_sends.fetch_sub(1)
    else:
        nvchan.tx_next = sequence + 1 & 0xFFFFFFFF
    if result == -errno.EAGAIN or (not result and _is_low(current, channel)):
        _stop(current, channel, nvchan)
    return result


def _is_low(current: Current, channel: Channel) -> bool:
    return hv_get_avail_to_write_percent(current.rings.of(channel).outbound) < RING_AVAIL_PERCENT_LOWATER


def _stop(current: Current, channel: Channel, nvchan: NetChannel) -> None:
    """Stop the queue, then look whether anybody is left who will wake it."""
    if current.armed[_BEFORE_TX_STOP]:
        current.reach(_BEFORE_TX_STOP, channel.relid)
    netif_tx_stop_queue(nvchan)
    if not current.fix.recheck_after_stop and current.fix.variant in ("", "tx_queue"):
        return  # wrong on purpose (races.md D4, tx_queue): all completions may have come before the stop
    if nvchan.queue_sends.load() < 1:
        netif_tx_wake_queue(nvchan)


def netvsc_send_tx_complete(current: Current, channel: Channel, nvchan: NetChannel) -> None:
    """In the poll: a frame's completion has come."""
    left = nvchan.queue_sends.fetch_sub(1) - 1
    if netif_tx_queue_stopped(nvchan):
        outbound = current.rings.of(channel).outbound
        if left < 1 or hv_get_avail_to_write_percent(outbound) > RING_AVAIL_PERCENT_HIWATER:
            netif_tx_wake_queue(nvchan)
