"""Spans of time out of records: an interrupt, a tasklet, work, a probe, a message in the host's hands, a mutex, a wait.

`PAIRS` is the one table: the event that begins a span, the one that ends it, what it is called. A span that nobody
ends lasts until its thread begins another of its kind, or for ever; where it ended is then the last record that the
thread made in the same context. Spans of one thread and context lie one in another, or one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from emu.recording import RecordedActor, TraceRecord
from tools.event_names import name_of


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
    first: TraceRecord
    last_ns: int

    def ended(self, end_ns: int) -> Span:
        first = self.first
        return Span(first.actor, first.context, PAIRS[first.event.name][1](first), first.t_ns, end_ns, first)


def _vector(record: TraceRecord) -> str:
    return f"hyperv_vector_handler {record.values[0]:#x}"


def _named(argument: str, what: str) -> Callable[[TraceRecord], str]:
    """The name of a number: the kernel's for a function, lower case; one of a plugin's has only the number."""

    def name(record: TraceRecord) -> str:
        for field, value in record.event.pairs(record.values):
            if field.name == argument:
                known = name_of(field, value)
                return (known.lower() if what else known) or f"{what or argument} {value}"
        return what

    return name


def _object(what: str) -> Callable[[TraceRecord], str]:
    """A mutex or a wait, by the name of its object."""
    return lambda record: f"{what} {record.shown.get('name', '')}"


def _about(what: str) -> Callable[[TraceRecord], str]:
    return lambda record: f"{what} relid {record.arguments.get('relid', 0)}"


PAIRS: Final[Mapping[str, tuple[str, Callable[[TraceRecord], str]]]] = {
    "isr_enter": ("isr_exit", _vector),
    "tasklet_run": ("tasklet_done", _named("tasklet", "tasklet")),
    "work_run": ("work_done", _named("function", "work")),
    "probe_start": ("probe", _about("probe")),
    "remove_start": ("remove", _about("remove")),
    "message_take": ("message_done", _named("msgtype", "")),
    "task_run": ("task_done", _named("program", "task")),
    "halt": ("halt_end", lambda _record: "halt"),
    "lock": ("unlock", _object("holds")),
    "wait": ("wait_done", _object("waits for")),
}
"""By the event that begins a span: the event that ends it, and how the span is called."""

_NESTING: Final = frozenset(("isr_enter", "lock"))
"""What may be begun again inside itself; of anything else a second one means that the end of the first is lost."""
_BEGINS: Final = {end: begin for begin, (end, _name) in PAIRS.items()}


class Spans:
    """Feed it records in the order of time; it gives each span when that is over."""

    def __init__(self) -> None:
        self._open: dict[RecordedActor, list[_Open]] = {}

    def feed(self, record: TraceRecord) -> Iterator[Span]:
        """Take one record; the spans that it ends, inner ones first."""
        name, opened = record.event.name, self._open.setdefault(record.actor, [])
        if name in PAIRS:
            if name not in _NESTING:
                yield from self._close(opened, name, None)
            opened.append(_Open(record, record.t_ns))
        elif name in _BEGINS:
            lock = record.values[0] if name == "unlock" else None
            yield from self._close(opened, _BEGINS[name], record.t_ns, lock)
        for one in opened:
            if one.first.context == record.context:
                one.last_ns = record.t_ns

    def close(self) -> Iterator[Span]:
        """The spans that nothing ended."""
        for opened in self._open.values():
            yield from (one.ended(one.last_ns) for one in reversed(opened))

    def _close(self, opened: list[_Open], begin: str, end_ns: int | None, lock: int | None = None) -> Iterator[Span]:
        """End the innermost span that an event began (of this mutex), and what was begun inside it and never ended."""
        begun = (at for at in reversed(range(len(opened))) if opened[at].first.event.name == begin)
        at = next((at for at in begun if lock in (None, opened[at].first.values[0])), None)
        if at is None:
            return
        inner, outer = opened[at + 1 :], opened[at]
        del opened[at:]
        yield from (one.ended(one.last_ns) for one in reversed(inner))
        yield outer.ended(outer.last_ns if end_ns is None else end_ns)
