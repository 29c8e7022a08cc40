"""Records with the bytes that were recorded behind them.

Bytes are recorded only where that was asked for: as `bytes` records right behind the record that they belong to, by
the same actor. Each says how many are left, its own included, and holds as many as fit. Bytes of which a part is
missing (overwritten before it was drained) are dropped: none are better than wrong ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from emu.recording import RecordedActor, TraceRecord

BYTES: Final = "bytes"
"""The event whose records continue the one before them."""


@dataclass(slots=True)
class Capture:
    """A record, and its bytes when they were recorded and are whole."""

    record: TraceRecord
    data: bytes | None = None
    done: bool = False
    """Whether its actor went on to something else: nothing more comes."""


class _Parts:
    """The bytes of one capture, as its records bring them."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._data = b""
        self._left: int | None = None
        self._next_seq = capture.record.seq + 1

    def take(self, record: TraceRecord) -> None:
        """Append what one record holds, if it goes on where the last one ended."""
        left, part = record.values
        if record.seq != self._next_seq or self._left not in (None, left):
            self._left = -1
            return
        self._next_seq += 1
        content = record.event.fields[1].content(part)[:left]
        self._data += content
        self._left = left - len(content)
        if not self._left:
            self.capture.data = self._data


def captures(records: Iterable[TraceRecord], wanted: Collection[str]) -> Iterator[Capture]:
    """The records of the wanted events, in the order of time, each with its bytes."""
    waiting: deque[Capture] = deque()
    latest: dict[RecordedActor, _Parts] = {}
    for record in records:
        if record.event.name == BYTES:
            if (before := latest.get(record.actor)) is not None:
                before.take(record)
            continue
        if (before := latest.pop(record.actor, None)) is not None:
            before.capture.done = True
        if record.event.name in wanted:
            latest[record.actor] = parts = _Parts(Capture(record))
            waiting.append(parts.capture)
        while waiting and waiting[0].done:
            yield waiting.popleft()
    yield from waiting
