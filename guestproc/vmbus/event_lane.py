"""A channel as interrupts, tasklets and senders use it: what they need of its record at hand, and bound once.

A field of a record costs 100 ns by its name, and a way through two rings has dozens of them. A lane holds the words
themselves, for as long as the record lives; who uses it looks at the generation once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from emu.tracing import (
    E_MASK,
    E_TASKLET_RUN,
    E_TASKLET_SCHED,
    E_UNMASK,
    E_VMBUS_CHAN_SCHED,
    E_VMBUS_ON_EVENT,
    BoundPair,
    Recorder,
    Side,
)
from guestproc.kernel.actors import Actor
from guestproc.kernel.layout import Channel
from guestproc.kernel.records import position_of
from guestproc.protocol.numbers import Tasklets

_INBOUND: Final = int(Side.TO_GUEST)
EVENT_WORDS: Final = 32
"""2,048 flags of one SINT."""
CALLBACK_MODE: Final = position_of(Channel, "callback_mode")
ONCHANNEL_CALLBACK: Final = position_of(Channel, "onchannel_callback")
INTERRUPTS: Final = position_of(Channel, "interrupts")
CALLBACK_CONTEXT: Final = position_of(Channel, "channel_callback_context")
INTR_OUT_EMPTY: Final = position_of(Channel, "intr_out_empty")
"""Where these fields are, the first two in `words`, the others in `quads`."""
MOST_LANES: Final = 4_096


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
        "drvdata",
        "published",
        "quads",
        "reader",
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
        self.reader: Final = channel.reader.load
        self.drvdata: Any = None
        """What the driver's callback keeps with it (`hv_get_drvdata`); it looks whether that is still right."""


class SendLane:
    """A channel as one thread sends on it; whoever uses it looks at the generation first."""

    __slots__ = ("held", "quads", "rescind", "state")

    def __init__(self, channel: Channel, actor: Actor) -> None:
        self.held: Final = channel.outbound_ring_lock.hold(actor)
        """`with lane.held:` has outbound_ring_lock for the block."""
        self.rescind: Final = channel.rescind.load
        self.state: Final = channel.state.load
        self.quads: Final = channel.quads


class Bell:
    """How a channel signals the host, worked out once for each life of its record."""

    __slots__ = ("connection_id", "count", "record", "ring", "shared")

    def __init__(
        self,
        connection_id: int,
        count: Callable[[int], int],
        ring: Callable[[], None] | None,
        record: BoundPair | None,
        *,
        shared: bool,
    ) -> None:
        """`count` adds to the channel's signals, `ring` rings it (None: the hypercall does), `record` records it;
        `shared`: by a bit of the interrupt page, too."""
        self.connection_id: Final = connection_id
        self.count: Final = count
        self.ring: Final = ring
        self.record: Final = record
        self.shared: Final = shared
