"""The `vcd` format (IEEE 1364 value change dump): the words of the protocol as signals of a logic analyser.

    vpN.sintS       message (msgtype in the slot, 0 empty), pending, queued
    vpN             isr (vector in service, 0 none)
    channelR        flag, and for each ring write_index, read_index, fill, mask, pending_send_sz
    events          one event a name, fired once a record

Time is ns since the first record. A signal is x until a record says what it is. `pending` is the slot's own bit: it
stays as it was when the guest empties the slot, and the next message overwrites it. What a guest left in its slots, its
flags and its interrupts is x from the first record on that shows that it died: a processor starts that has not stopped,
or another guest attaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import digits
from typing import Final

from emu.control import ActorKind
from emu.recording import Recording, TraceRecord
from tools.export.rings import Rings
from tools.invariants import begins_a_guest

RING_SCOPES: Final = ("to_host", "to_guest")
"""Names of the two rings of a channel, by the `side` of a record."""
_FIRST_CODE, _CODES = 33, 94
"""Identifier codes are the printable characters of ASCII, one or more of them."""

Scope = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal: where it stands, its name, its bits (0: an event)."""

    scope: Scope
    name: str
    bits: int

    @property
    def place(self) -> tuple[list[tuple[str, int]], str]:
        """By which signals are sorted: a scope is one piece, and channel 10 is behind channel 2."""
        names = [(name.rstrip(digits), name) for name in self.scope]
        return [(stem, int(name[len(stem) :] or 0)) for stem, name in names], self.name


Change = tuple[Signal, int | None]
"""A new value; None is x."""


def vcd(recording: Recording) -> Iterator[bytes]:
    """The whole dump. The recording is read twice: signals are declared before their first change."""
    vp_indices = list(recording.head.get("vp_indices", ()))
    finder = Changes(vp_indices)
    found = {signal for record in recording.records() for signal, _value in finder.feed(record)}
    signals = sorted(found, key=lambda signal: signal.place)
    first_ns = next((record.t_ns for record in recording.records()), 0)
    codes = {signal: _code(number) for number, signal in enumerate(signals)}
    yield _head(signals, codes, recording.machine, first_ns).encode()
    yield from _body(recording.records(), Changes(vp_indices), codes, first_ns)


class Changes:
    """What each record changes; feed it records in the order of time."""

    def __init__(self, vp_indices: Sequence[int]) -> None:
        self._vp_indices = vp_indices
        self._rings = Rings()
        self._guests: dict[Signal, None] = {}
        """What a guest that dies leaves as it is: slots, flags, interrupts."""
        self._running: set[int] = set()
        """Processors that have started, and not stopped."""

    def feed(self, record: TraceRecord) -> list[Change]:
        """The new values that one record tells, its own event first."""
        event: Change = (Signal(("events",), record.event.name, 0), 1)
        guests = self._of_guest(record)
        self._guests |= dict.fromkeys(signal for signal, _value in guests)
        if self._shows_a_death(record):
            left, self._guests = self._guests, {}
            return [event, *((signal, None) for signal in left)]
        return [event, *guests, *self._ring(record, record.arguments)]

    def _of_guest(self, record: TraceRecord) -> list[Change]:
        """What becomes of a slot, an interrupt or a flag."""
        arguments = record.arguments
        slot = _SLOT.get(record.event.name)
        if slot:
            scope = (self._vp(record), f"sint{arguments.get('sint', 0)}")
            return [
                (Signal(scope, name, bits), arguments.get(value, 0) if isinstance(value, str) else value)
                for name, bits, value in slot
            ]
        if record.event.name in ("isr_enter", "isr_exit"):
            vector = arguments["vector"] if record.event.name == "isr_enter" else 0
            return [(Signal((self._vp(record),), "isr", 8), vector)]
        if record.event.name in ("flag_set", "flag_clear"):
            flag = Signal((f"channel{arguments['flag']}",), "flag", 1)
            return [(flag, int(record.event.name == "flag_set"))]
        return []

    def _shows_a_death(self, record: TraceRecord) -> bool:
        """Whether there was a guest before this record that is no more, and had no time for anything."""
        cpu = record.actor.cpu
        if record.event.name == "process_stop" and record.actor.kind == ActorKind.VCPU.name:
            self._running.discard(cpu)
        if record.event.name == "process_start" and record.actor.kind == ActorKind.VCPU.name:
            if cpu in self._running:
                self._running = {cpu}
                return True
            self._running.add(cpu)
        return begins_a_guest(record)

    def _ring(self, record: TraceRecord, arguments: dict[str, int]) -> Iterator[Change]:
        """Indices and fill of the rings that a record moves, the mask or the wish that it stores."""
        for key in self._rings.feed(record):
            scope, ring = _ring_scope(*key), self._rings.rings[key]
            yield Signal(scope, "write_index", 32), ring.write_index
            yield Signal(scope, "read_index", 32), ring.read_index
            yield Signal(scope, "fill", 32), ring.fill
        name = record.event.name
        if name in ("mask", "unmask"):
            yield Signal(_ring_scope(arguments["relid"], arguments["side"]), "mask", 1), int(name == "mask")
        elif name == "pending_size":
            yield Signal(_ring_scope(arguments["relid"], arguments["side"]), "pending_send_sz", 32), arguments["size"]

    def _vp(self, record: TraceRecord) -> str:
        """The processor of a record: by the position that it names, else the one that recorded it."""
        position = record.arguments.get("position")
        if position is not None and position < len(self._vp_indices):
            return f"vp{self._vp_indices[position]}"
        return f"vp{record.vp}" if record.vp is not None else "vp_unknown"


_SLOT: Final[dict[str, tuple[tuple[str, int, int | str], ...]]] = {
    "slot_write": (("message", 32, "msgtype"), ("pending", 1, 0), ("queued", 16, "queued")),
    "slot_free": (("message", 32, 0),),
    "pending_set": (("pending", 1, 1),),
}
"""What an event makes of a slot: signal, bits, and the value or the argument that is it."""


def _ring_scope(relid: int, side: int) -> Scope:
    return f"channel{relid}", RING_SCOPES[side & 1]


def _code(number: int) -> str:
    """The identifier of a signal, as short as it can be."""
    code = ""
    while True:
        code += chr(_FIRST_CODE + number % _CODES)
        number //= _CODES
        if not number:
            return code


def _head(signals: Iterable[Signal], codes: dict[Signal, str], machine: str, first_ns: int) -> str:
    """The declarations, scope by scope; `signals` are sorted, so that a scope is one piece."""
    lines = [
        "$version vmbus-emu $end",
        f"$comment machine {machine or 'unknown'}, 0 is CLOCK_MONOTONIC {first_ns} ns $end",
        "$timescale 1 ns $end",
    ]
    at: Scope = ()
    for signal in signals:
        lines += _moves(at, signal.scope)
        at = signal.scope
        kind = f"wire {signal.bits}" if signal.bits else "event 1"
        lines.append(f"$var {kind} {codes[signal]} {signal.name} $end")
    lines += [*_moves(at, ()), "$enddefinitions $end", "$dumpvars"]
    lines += [_value(codes[signal], signal.bits, None) for signal in signals if signal.bits]
    return "\n".join([*lines, "$end\n"])


def _moves(at: Scope, to: Scope) -> list[str]:
    """The way from one scope into another."""
    shared = 0
    while shared < min(len(at), len(to)) and at[shared] == to[shared]:
        shared += 1
    return ["$upscope $end"] * (len(at) - shared) + [f"$scope module {name} $end" for name in to[shared:]]


def _body(records: Iterable[TraceRecord], changes: Changes, codes: dict[Signal, str], first_ns: int) -> Iterator[bytes]:
    """The changes, below the time of each record that is later than the one before it."""
    values: dict[Signal, int | None] = {}
    now = -1
    for record in records:
        lines = []
        if record.t_ns != now:
            now = record.t_ns
            lines.append(f"#{now - first_ns}")
        for signal, value in changes.feed(record):
            if not signal.bits or values.get(signal) != value:
                values[signal] = value
                lines.append(_value(codes[signal], signal.bits, value))
        yield ("\n".join(lines) + "\n").encode()


def _value(code: str, bits: int, value: int | None) -> str:
    """A change: a bit stands before its code, more of them after a b and before a space."""
    if bits <= 1:
        return f"{'x' if value is None else value & 1}{code}"
    return f"b{'x' if value is None else format(value & (1 << bits) - 1, 'b')} {code}"
