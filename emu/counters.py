"""What an actor counts: plain integers of its own, published now and then as one row of `control`."""

from __future__ import annotations

import struct
from typing import Any, Final

COUNTERS: Final = (
    "requested",
    "merged",
    "kicks_semaphore",
    "kicks_signal",
    "kicks_none",
    "interrupts",
    "spurious",
    "blocks",
    "polls_paid",
    "polls_vain",
    "watchdogs",
    "exits",
    "doorbells",
    "messages_posted",
    "messages_taken",
    "events_signaled",
    "tasklets",
    "works",
    "preemptions",
    "packets",
    "bytes",
    "plugin_errors",
    "reschedules",
)
"""Names of the counters an actor may keep, in the order of their words; unused ones stay 0."""

COUNTED_BY_BOTH: Final = frozenset(("exits", "doorbells"))
"""Who makes one counts it, and so does the hypervisor that takes it, whoever the guest is: a total is the latter's."""

COUNTER_ROW: Final = struct.Struct(f"<{len(COUNTERS)}Q")
"""As they lie in `control`."""


class Counters:
    """An actor's own counters: plain integers that `flush` publishes; attributes are named in `COUNTERS`."""

    __slots__ = (*COUNTERS, "_base", "_end", "_memory")

    requested: int
    merged: int
    kicks_semaphore: int
    kicks_signal: int
    kicks_none: int
    interrupts: int
    spurious: int
    blocks: int
    polls_paid: int
    polls_vain: int
    watchdogs: int
    exits: int
    doorbells: int
    messages_posted: int
    messages_taken: int
    events_signaled: int
    tasklets: int
    works: int
    preemptions: int
    packets: int
    bytes: int
    plugin_errors: int
    reschedules: int

    def __init__(self, memory: Any, base: int) -> None:
        self._memory = memory
        self._base = base
        self._end = base + COUNTER_ROW.size
        for name in COUNTERS:
            setattr(self, name, 0)

    def flush(self) -> None:
        """Publish all counters (about 1 us); called before a block and at the end."""
        # Packed aside (emu.ipc.rows says why): no reader finds a count at 0 meanwhile.
        self._memory[self._base : self._end] = COUNTER_ROW.pack(
            self.requested,
            self.merged,
            self.kicks_semaphore,
            self.kicks_signal,
            self.kicks_none,
            self.interrupts,
            self.spurious,
            self.blocks,
            self.polls_paid,
            self.polls_vain,
            self.watchdogs,
            self.exits,
            self.doorbells,
            self.messages_posted,
            self.messages_taken,
            self.events_signaled,
            self.tasklets,
            self.works,
            self.preemptions,
            self.packets,
            self.bytes,
            self.plugin_errors,
            self.reschedules,
        )
