"""The echo driver's callback: what the device sent back, counted and put into the inbox of whoever claimed the channel.

Driver state words in guest RAM: 0 packets taken, 1 completions among them, 2 payload bytes, of all its channels
(atomic: they are taken on several CPUs).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from emu.ring import Packet
from emu.wire.packets import VM_PKT_COMP
from guestproc.drivers import claims
from guestproc.drivers.steering import NOBODY, leave_to_reader
from guestproc.drivers.subchannels import ANSWER, PENDING, take_answer
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, Device
from guestproc.kernel.records import Record
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.chan_sched import LEFT_TO_ANOTHER
from guestproc.vmbus.event_lane import CALLBACK_CONTEXT, EventLane
from guestproc.vmbus.packets import vmbus_drain

if TYPE_CHECKING:
    from guestproc.current import Current

PACKETS: Final = 0
COMPLETIONS: Final = 1
BYTES: Final = 2
DRAIN_LIMIT: Final = 512
"""Packets that one callback takes; the bus calls again while there are more."""

INBOXES: Final[dict[int, deque[Packet]]] = {}
"""Channel handle → what arrived for a claimant in this process."""


class _Totals:
    """The device of a channel, and what counts in the words of its driver's state."""

    __slots__ = ("add_bytes", "add_completions", "add_packets", "asked", "context", "device", "words")

    def __init__(self, current: Current, channel: Channel) -> None:
        self.context: Final[int] = channel.channel_callback_context
        device: Device = current.tables.devices.from_handle(self.context)
        self.device: Final = device
        self.words: Final = device.words
        self.add_packets: Final = claims.state_word(current, device, PACKETS).fetch_add
        self.add_completions: Final = claims.state_word(current, device, COMPLETIONS).fetch_add
        self.add_bytes: Final = claims.state_word(current, device, BYTES).fetch_add
        self.asked: Final = None if channel.primary_channel else claims.state_word(current, device, ANSWER).load
        """Of a primary: whether sub-channels were asked for, and how many."""


def _totals_of(current: Current, channel: Channel, lane: EventLane | None) -> _Totals:
    """Kept with the channel's lane, where this processor's SynIC is up."""
    if lane is None:
        return _Totals(current, channel)
    totals: _Totals | None = lane.drvdata
    if totals is None or totals.context != lane.quads[CALLBACK_CONTEXT]:
        totals = lane.drvdata = _Totals(current, channel)
    elif totals.words[0] != totals.device.generation:
        raise totals.device.stale()
    return totals


@CHANNEL_CALLBACKS.register(Callbacks.ECHO_ONCHANNELCALLBACK)
def echo_onchannelcallback(current: Current, channel: Channel) -> object:
    """Take what the device sent back, on the processor that reads the channel."""
    record: Record = channel
    lane = None if current.percpu is None else current.percpu.lanes.get(record.handle)
    # Nobody reads it, or this processor, nearly always; who else may is `leave_to_reader`'s affair.
    if (lane is None or lane.reader() not in (NOBODY, current.cpu + 1)) and leave_to_reader(current, channel):
        return LEFT_TO_ANOTHER
    packets = vmbus_drain(current, channel, DRAIN_LIMIT)
    if not packets:
        return None
    totals = _totals_of(current, channel, lane)
    if totals.asked is not None and totals.asked() & PENDING:
        take_answer(current, totals.device, packets)
    if len(packets) == 1:
        totals.add_packets(1)
        totals.add_completions(packets[0][0] == VM_PKT_COMP)
        totals.add_bytes(len(packets[0][3]))
    else:
        totals.add_packets(len(packets))
        totals.add_completions([packet[0] for packet in packets].count(VM_PKT_COMP))
        totals.add_bytes(sum([len(packet[3]) for packet in packets]))
    inbox = INBOXES.get(record.handle)
    if inbox is not None:
        inbox.extend(packets)
    return None
