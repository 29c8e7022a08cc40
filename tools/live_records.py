"""The records of a running machine that records, as they come, without a file.

`take` empties every actor's ring as a recording's writer would: one reader a machine, or each misses the other's.
Rings are read one after the other, and what an actor records meanwhile may follow from what another one did behind
our look at its ring. So each look ends at the moment when it began: no record is given without its causes.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from typing import Final

from emu.control import ActorRow, ActorState
from emu.event_fields import decoder_of
from emu.machine import Machine
from emu.recording import RecordedActor, TraceRecord
from emu.tracing import BY_NUMBER, NO_VP, RECORD, Context, Drain

_DECODERS: Final = {number: decoder_of(spec) for number, spec in BY_NUMBER.items()}


class LiveRecords:
    """What the actors of one machine recorded since the last look; `dropped` counts what was overwritten before."""

    def __init__(self, machine: Machine) -> None:
        self._control: Final = machine.control
        self._drain: Final = Drain(machine.trace)
        self._later: list[TraceRecord] = []

    @property
    def dropped(self) -> int:
        """Records that came and went between two looks."""
        return self._drain.dropped

    def take(self) -> list[TraceRecord]:
        """New records of all actors, by time: all that were made before this call."""
        began_ns = time.monotonic_ns()
        taken = self._later
        for row in list(self._control.rows()):
            if row.state != ActorState.STARTING:
                taken += records_of(row, self._drain.take(row.slot))
        taken.sort(key=_time_of)
        count = bisect_right(taken, began_ns, key=_time_of)
        self._later = taken[count:]
        return taken[:count]


def records_of(row: ActorRow, raw: bytes) -> list[TraceRecord]:
    """A piece of one actor's ring, decoded: `raw` is whole records (`emu.tracing.RECORD`), oldest first."""
    actor = RecordedActor(row.slot, row.name, row.kind.name, row.pid, row.cpu)
    return [
        TraceRecord(
            t_ns,
            seq,
            actor,
            None if vp == NO_VP else vp,
            Context(context).name,
            BY_NUMBER[number],
            _DECODERS[number](words),
        )
        for t_ns, seq, number, vp, context, *words in RECORD.iter_unpack(raw)
    ]


def _time_of(record: TraceRecord) -> int:
    return record.t_ns
