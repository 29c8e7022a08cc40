"""A channel as interrupts and tasklets use it: what they need of its record at hand, and bound once.

A field of a record costs 100 ns by its name, and a way through two rings has dozens of them. A lane holds the words
themselves, for as long as the record lives; who uses it looks at the generation once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.tracing import (
    E_MASK,
    E_TASKLET_RUN,
    E_TASKLET_SCHED,
    E_UNMASK,
    E_VMBUS_CHAN_SCHED,
    E_VMBUS_ON_EVENT,
    Recorder,
    Side,
)
from guestproc.kernel.layout import Channel
from guestproc.kernel.records import position_of
from guestproc.protocol.numbers import Tasklets

_INBOUND: Final = int(Side.TO_GUEST)
EVENT_WORDS: Final = 32
"""2,048 flags of one SINT."""
CALLBACK_MODE: Final = position_of(Channel, "callback_mode")
ONCHANNEL_CALLBACK: Final = position_of(Channel, "onchannel_callback")
INTERRUPTS: Final = position_of(Channel, "interrupts")
"""Where these fields are in `EventLane.words`, the last in `quads`."""


class LaneRecords:
    """What is recorded of each interrupt of one channel, bound once: the words are the same each time."""

    __slots__ = ("chan_sched", "masked", "masked_and_scheduled", "now_ns", "run", "unmasked")

    def __init__(self, trace: Recorder, relid: int) -> None:
        self.now_ns: Final = trace.now_ns
        event = int(Tasklets.VMBUS_ON_EVENT)
        mask = E_MASK, relid, _INBOUND
        self.chan_sched: Final = trace.bind(E_VMBUS_CHAN_SCHED, relid)
        self.masked: Final = trace.bind(*mask)
        self.masked_and_scheduled: Final = trace.bind_pair(mask, (E_TASKLET_SCHED, event, relid))
        self.run: Final = trace.bind_pair((E_TASKLET_RUN, event, relid), (E_VMBUS_ON_EVENT, relid))
        self.unmasked: Final = trace.bind(E_UNMASK, relid, _INBOUND, 0)


class EventLane:
    """A channel as ISR and tasklet use it: the parts of its record at hand, for as long as the record lives.

    That it does is asked once in either: `words[0]` is the record's generation. An ISR is waited for before a record
    is freed (`kernel.rcu`), a tasklet before its channel's callback is taken away for good.
    """

    __slots__ = (
        "callback_event",
        "channel",
        "generation",
        "handle",
        "published",
        "quads",
        "records",
        "rescind",
        "sched_lock",
        "words",
    )

    def __init__(self, channel: Channel, published: Callable[[], int], trace: Recorder | None = None) -> None:
        """`published` loads the handle that the relid table has for the channel's relid."""
        self.records: Final = None if trace is None else LaneRecords(trace, channel.relid)
        self.channel: Final = channel
        self.handle: Final = channel.handle
        self.published: Final = published
        self.generation: Final = channel.generation
        self.words: Final = channel.words
        self.quads: Final = channel.quads
        self.rescind: Final = channel.rescind.load
        self.sched_lock: Final = channel.sched_lock
        self.callback_event: Final = channel.callback_event
