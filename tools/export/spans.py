"""Spans of time out of records: an interrupt, a tasklet, a work item, each on its thread's track.

An interrupt lasts from its entry to its exit. A tasklet or a work item lasts until its thread records the next
one or something in another context; where it ended is then the last thing it recorded, since nobody says more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from emu.recording import RecordedActor, TraceRecord
from guestproc.protocol.numbers import Tasklets, Works


@dataclass(frozen=True, slots=True)
class Span:
    """Something that lasted: who did it, in which context, what, from when to when, and the record that began it."""

    actor: RecordedActor
    context: str
    name: str
    begin_ns: int
    end_ns: int
    first: TraceRecord


@dataclass(slots=True)
class _Open:
    name: str
    context: str
    first: TraceRecord
    last_ns: int


_INTERRUPT: Final = "ISR"


class Spans:
    """Feed it records in the order of time; it gives each span when that is over."""

    def __init__(self) -> None:
        self._interrupts: dict[RecordedActor, list[_Open]] = {}
        self._bodies: dict[RecordedActor, _Open] = {}

    def feed(self, record: TraceRecord) -> Iterator[Span]:
        """Take one record; the spans that it ends."""
        name = record.event.name
        if name == "isr_enter":
            vector = record.values[0]
            opened = _Open(f"hyperv_vector_handler {vector:#x}", _INTERRUPT, record, record.t_ns)
            self._interrupts.setdefault(record.actor, []).append(opened)
        elif name == "isr_exit":
            if begun := self._interrupts.get(record.actor):
                yield _ended(record.actor, begun.pop(), record.t_ns)
        elif record.context != _INTERRUPT:
            yield from self._body(record)

    def close(self) -> Iterator[Span]:
        """The spans that nothing ended."""
        for actor, begun in self._interrupts.items():
            yield from (_ended(actor, one, one.last_ns) for one in reversed(begun))
        for actor, body in self._bodies.items():
            yield _ended(actor, body, body.last_ns)

    def _body(self, record: TraceRecord) -> Iterator[Span]:
        """A record outside interrupts begins, prolongs or ends a tasklet or a work item."""
        begins = _begins(record)
        body = self._bodies.get(record.actor)
        if body is not None and (begins or record.context != body.context):
            del self._bodies[record.actor]
            yield _ended(record.actor, body, body.last_ns)
            body = None
        if begins:
            self._bodies[record.actor] = _Open(begins, record.context, record, record.t_ns)
        elif body is not None:
            body.last_ns = record.t_ns


def _begins(record: TraceRecord) -> str:
    """What a record begins; "" when nothing."""
    if record.event.name == "tasklet_run":
        return _named(Tasklets, record.values[0], "tasklet")
    if record.event.name == "work_run":
        return _named(Works, record.arguments.get("function", 0), "work")
    return ""


def _named(numbers: type[Tasklets] | type[Works], value: int, what: str) -> str:
    """The kernel's name of a function; one that a plugin registered has a number only."""
    try:
        return numbers(value).name.lower()
    except ValueError:
        return f"{what} {value}"


def _ended(actor: RecordedActor, opened: _Open, end_ns: int) -> Span:
    return Span(actor, opened.context, opened.name, opened.first.t_ns, end_ns, opened.first)
