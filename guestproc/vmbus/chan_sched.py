"""`vmbus_chan_sched` and `vmbus_on_event`: from an event flag to a channel's callback (reference 3.4, 3.5).

Each flag is cleared by an atomic operation *before* its ring is looked at: a flag that is set again later
means data that this look may miss. The channel is found without a lock, in the relid table or (era `seed`) on
this processor's chan_list; one that is being rescinded, or whose callback is gone, is passed over.

    ISR       the callback right here; masking is the driver's
    BATCHED   mask the ring, then the tasklet; the tasklet unmasks and looks again
    DIRECT    the tasklet alone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from emu.bits import BITS
from emu.errors import ProtocolViolation
from emu.tracing import (
    E_MASK,
    E_TASKLET_RUN,
    E_TASKLET_SCHED,
    E_UNMASK,
    E_VMBUS_ON_EVENT,
)
from guestproc.kernel.functions import CHANNEL_CALLBACKS, TASKLET_FUNCTIONS
from guestproc.kernel.layout import CallbackMode, Channel
from guestproc.protocol.numbers import Tasklets
from guestproc.vmbus.event_lane import CALLBACK_MODE, INTERRUPTS, ONCHANNEL_CALLBACK, EventLane
from guestproc.vmbus.packets import inbound_rings, stop_reading

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vmbus.event_lane import LaneRecords
    from guestproc.vmbus.percpu import FlagWord, PerCpuContext

_ISR: Final = int(CallbackMode.ISR)
_BATCHED: Final = int(CallbackMode.BATCHED)
LEFT_TO_ANOTHER: Final = object()
"""What a callback returns that has left the ring to another processor, which schedules the tasklet there."""
INBOUND: Final = 1
"""The `side` of a trace record for the host-to-guest ring."""
_ALL: Final = (1 << 64) - 1
_FIRST: Final[tuple[int, ...]] = (0,)
_NO_FLAG: Final = bytes(8)


def sync_test_and_clear_bit(number: int, words: tuple[FlagWord, ...]) -> bool:
    """Clear one bit by a locked operation (also on one processor: the host is the other); whether it was set."""
    bit = 1 << (number & 63)
    return bool(words[number >> 6].fetch_and(_ALL ^ bit) & bit)


def vmbus_chan_sched(current: Current, hv_cpu: PerCpuContext) -> None:
    """Schedule every channel whose event flag is set on this processor."""
    page = hv_cpu.channel_flags() if hv_cpu.may_share else hv_cpu.event_flags
    if page is None:
        return
    words, cleared = page.words, hv_cpu.flag_cleared
    # One look at each flag; whatever is set after it brings an interrupt of its own. The first word is exchanged
    # without a look before: a flag is nearly always in there, and a look would bring the host's cache line twice.
    found = _FIRST
    behind = hv_cpu.buffer[page.behind]
    if behind != page.none_behind:
        found = (*_FIRST, *words_with_flags(behind, 1))
    for word in found:
        # The bits of one word are cleared together, by one locked operation, before any of their rings is looked at.
        for bit in BITS[words[word].exchange(0)]:
            relid = word << 6 | bit
            if cleared is not None:
                cleared(relid)
            # Relid 0 is the legacy shared flag, never a channel.
            if relid and (lane := hv_cpu.find(current, hv_cpu, relid)) is not None and not lane.rescind():
                hv_cpu.schedule(current, hv_cpu, lane)


def words_with_flags(flags: bytes, first: int = 0) -> list[int]:
    """Which words have any flag; `first` is the number of the first."""
    return [first + (at >> 3) for at in range(0, len(flags), 8) if flags[at : at + 8] != _NO_FLAG]


def find_in_table(current: Current, hv_cpu: PerCpuContext, relid: int) -> EventLane | None:
    """The channel of a flag."""
    lane = hv_cpu.known.get(relid)
    # What the table has is a living record: before that is freed, it is taken out, and this ISR is waited for.
    if lane is not None and lane.published() == lane.handle:
        return lane
    channel = current.tables.relids.lookup(relid)
    if channel is None:
        return None
    lane = hv_cpu.known[relid] = hv_cpu.lane_of(channel)
    return lane


def find_on_list(current: Current, hv_cpu: PerCpuContext, relid: int) -> EventLane | None:
    """Era `seed`: the channel of a flag, if its interrupts come to this processor."""
    for channel in current.tables.chan_list(current.cpu_record()):
        if channel.relid == relid and not channel.rescind.load():
            return hv_cpu.lane_of(channel)
    return None


def schedule(current: Current, hv_cpu: PerCpuContext, lane: EventLane) -> None:
    """In the ISR, which has interrupts off already: what one channel's flag means."""
    lock, actor = lane.sched_lock, current.actor
    lock.lock(actor)
    try:
        schedule_locked(current, hv_cpu, lane)
    finally:
        lock.unlock(actor)


def schedule_locked(current: Current, hv_cpu: PerCpuContext, lane: EventLane) -> None:
    """What one channel's flag means, under its sched_lock, which keeps the callback from being taken away."""
    words = lane.words
    if words[0] != lane.generation:
        raise lane.channel.stale()
    callback = words[ONCHANNEL_CALLBACK]
    if not callback:
        return
    records = lane.records
    if records is not None:
        records.chan_sched()
    lane.quads[INTERRUPTS] += 1
    mode = words[CALLBACK_MODE]
    if mode == _ISR:
        CHANNEL_CALLBACKS.lookup(callback)(current, lane.channel)
        return
    if mode == _BATCHED:
        rings = inbound_rings(current, lane.channel)
        if rings is None:
            return
        rings.inbound.begin_read()
        if records is not None:
            # The host sees the mask from here on; it is written down together with what follows at once.
            masked_ns = records.now_ns()
            if hv_cpu.tasklets.schedule(lane.callback_event):
                records.masked_and_scheduled(masked_ns)
            else:
                records.masked()
            return
    if hv_cpu.tasklets.schedule(lane.callback_event) and current.trace:
        current.record(E_TASKLET_SCHED, Tasklets.VMBUS_ON_EVENT, lane.channel.relid)


@TASKLET_FUNCTIONS.register(Tasklets.VMBUS_ON_EVENT)
def vmbus_on_event(current: Current, handle: int) -> None:
    """The channel's tasklet: a callback; in BATCHED mode unmask, look again, and go on if bytes came.

    Going on is the next run's; era `seed` goes on by itself for two jiffies before. A callback that was taken
    away leaves the mask as it is: nobody reads that ring any more.
    """
    lane = None if current.percpu is None else current.percpu.lanes.get(handle)
    if lane is not None and lane.words[0] == lane.generation:
        channel, words = lane.channel, lane.words
    else:
        found = current.tables.channels.find(handle)
        if found is None:
            return
        channel, words = found, found.words
    if not words[ONCHANNEL_CALLBACK]:
        return
    records = None
    if current.trace:
        records = None if current.percpu is None else current.percpu.lane_of(channel).records
        if records is not None:
            records.run(records.now_ns())
        else:  # its SynIC is down already
            current.record(E_TASKLET_RUN, Tasklets.VMBUS_ON_EVENT, channel.relid)
            current.record(E_VMBUS_ON_EVENT, channel.relid)
    current.counters.tasklets += 1
    slice_ns = current.era.event_slice_ns
    end = current.actor.now() + slice_ns if slice_ns else 0
    while callback := words[ONCHANNEL_CALLBACK]:
        function: Callable[..., object] = CHANNEL_CALLBACKS.known.get(callback) or CHANNEL_CALLBACKS.lookup(callback)
        if function(current, channel) is LEFT_TO_ANOTHER:
            return  # masked: another processor runs this tasklet next, for which this one has to end
        # Its callback may have taken a while: whether the channel is still there is asked again.
        if words[0] != channel.generation:
            raise channel.stale()
        if (
            words[CALLBACK_MODE] != _BATCHED
            or not words[ONCHANNEL_CALLBACK]
            or not _bytes_left(current, channel, records)
        ):
            return
        if not end or current.actor.now() >= end:
            assert current.tasklets is not None
            current.tasklets.schedule(channel.callback_event)
            return


def _bytes_left(current: Current, channel: Channel, records: LaneRecords | None) -> bool:
    """Unmask and look again; bytes that slipped in before the unmask bring no interrupt, so mask for them."""
    inbound = current.rings.of(channel).inbound
    try:
        left = inbound.end_read()
    except ProtocolViolation as violation:
        inbound.begin_read()
        stop_reading(current, channel, violation)
        return False
    if records is not None and not left:
        records.unmasked()
    elif current.trace:
        current.record(E_UNMASK, channel.relid, INBOUND, left)
    if left:
        inbound.begin_read()
        current.record(E_MASK, channel.relid, INBOUND)
    return bool(left)
