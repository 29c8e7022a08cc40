"""The fault plan of a running machine: 64 rows in `control`, turned on and off by one hand, looked up by many.

Whoever plans (the launcher, a director, the guest's user space for `ctl fail`) takes a row by compare-and-swap,
writes the fault's text into it, turns it on and raises the generation; a row that was turned off keeps its text
and its counts for the reports until somebody needs it. Whoever carries faults out holds a `Faults`: at each look
it compares the generation, and reads the rows again only when that rose, so a look costs one load. Its counts are
atomic: several processes may look at the same row at the same time, and each occasion has one number.

    generation u32, letters u32, to 64; then rows of 256: word u64 (serial over state), seen u64, hits u64,
    length u32, text
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final
from uuid import UUID

from emu.control import FAULT_ROW, FAULT_ROWS, Control
from emu.errors import UserError
from emu.faults import MAX_FAULTS, Fault, FaultKind, parse
from emu.ipc.atomics import AtomicU64
from emu.tracing import E_FAULT_HIT
from emu.values import valueclass

_SEEN: Final = 8
_HITS: Final = 16
_LENGTH: Final = 24
_TEXT: Final = 28
_STATE_MASK: Final = 0xFFFF_FFFF
assert FAULT_ROWS == MAX_FAULTS

Record = Callable[..., None]
Identity = Callable[[], tuple[str, UUID] | None]
"""Class name and instance of the device that an occasion is about; None when nobody knows."""


class RowState(IntEnum):
    """State of a row."""

    FREE = 0
    FILLING = 1
    ON = 2
    OFF = 3


@valueclass()
class PlannedFault:
    """A row as a report shows it: how often something passed the filters (`seen`), how often it struck (`hits`)."""

    index: int
    serial: int
    on: bool
    fault: Fault
    seen: int
    hits: int

    @property
    def left(self) -> int | None:
        """How often it will still strike; None: without end."""
        last = self.fault.last
        return None if last is None else max(0, last - max(self.seen, self.fault.first - 1))

    @property
    def spent(self) -> bool:
        """Whether it strikes no more."""
        return self.left == 0

    def report(self) -> dict[str, object]:
        """The row as `--json` prints it."""
        return {"fault": self.fault.text, "on": self.on, "seen": self.seen, "hits": self.hits}


class FaultPlan:
    """The rows, for whoever plans and whoever reports."""

    def __init__(self, control: Control) -> None:
        self._view: Final = control.view
        self._memory: Final = control.memory
        self._at: Final = control.faults_offset
        self.generation: Final = self._view.cell_u32(self._at)
        """Rises at every change."""
        self._serials: Final = self._view.cell_u32(self._at + 4)

    def row_offset(self, index: int) -> int:
        """Where a row begins."""
        return self._at + 64 + index * FAULT_ROW

    def add(self, fault: Fault, *, on: bool = True) -> PlannedFault:
        """Turn a fault on, or only put it down (`on=False`: `turn_on` does the rest).

        UserError when all rows are taken by faults that may still strike.
        """
        while True:
            index, word = self._row_to_take()
            at = self.row_offset(index)
            serial = self._serials.fetch_add(1) + 1
            filling = serial << 32 | RowState.FILLING
            if self._view.cas_u64(at, word, filling) != word:
                continue
            text = fault.text.encode()
            self._view.store_u64(at + _SEEN, 0)
            self._view.store_u64(at + _HITS, 0)
            self._memory[at + _TEXT : at + _TEXT + len(text)] = text
            self._view.store_u32(at + _LENGTH, len(text))
            self._view.store_u64(at, serial << 32 | (RowState.ON if on else RowState.OFF))
            self.generation.fetch_add(1)
            return PlannedFault(index, serial, on, fault, 0, 0)

    def turn_on(self, index: int, serial: int) -> bool:
        """Turn on what was put down in this row; False: its row is another's by now, or it is on."""
        off = serial << 32 | RowState.OFF
        done = self._view.cas_u64(self.row_offset(index), off, serial << 32 | RowState.ON) == off
        if done:
            self.generation.fetch_add(1)
        return done

    def off(self, planned: PlannedFault) -> bool:
        """Turn a fault off; what it holds back is let go. False: it was off already, or its row is another's."""
        on = planned.serial << 32 | RowState.ON
        done = self._view.cas_u64(self.row_offset(planned.index), on, planned.serial << 32 | RowState.OFF) == on
        if done:
            self.generation.fetch_add(1)
        return done

    def rows(self) -> list[PlannedFault]:
        """Every fault that is on, or was and is still in its row; in the order in which they were added."""
        found = (self.row(index) for index in range(FAULT_ROWS))
        return sorted((row for row in found if row is not None), key=lambda row: row.serial)

    def row(self, index: int) -> PlannedFault | None:
        """One row copied out; None when it is free, or being written."""
        at = self.row_offset(index)
        word = self._view.load_u64(at)
        if word & _STATE_MASK not in (RowState.ON, RowState.OFF):
            return None
        length = self._view.load_u32(at + _LENGTH)
        text = bytes(self._memory[at + _TEXT : at + _TEXT + min(length, FAULT_ROW - _TEXT)])
        seen, hits = self._view.load_u64(at + _SEEN), self._view.load_u64(at + _HITS)
        if self._view.load_u64(at) >> 32 != word >> 32:
            return None
        fault = parse(text.decode(), source="fault plan")
        return PlannedFault(index, word >> 32, word & _STATE_MASK == RowState.ON, fault, seen, hits)

    def report(self) -> list[dict[str, object]]:
        """All rows as `--json` prints them."""
        return [row.report() for row in self.rows()]

    def _row_to_take(self) -> tuple[int, int]:
        """A free row and its word; else the oldest one whose fault strikes no more."""
        for index in range(FAULT_ROWS):
            if self._view.load_u64(self.row_offset(index)) & _STATE_MASK == RowState.FREE:
                return index, self._view.load_u64(self.row_offset(index))
        for row in self.rows():
            if not row.on or row.spent:
                return row.index, row.serial << 32 | (RowState.ON if row.on else RowState.OFF)
        raise UserError(f"all {FAULT_ROWS} faults of this machine are on; turn some off")


class Hit:
    """A fault that strikes here and now."""

    __slots__ = ("_word", "_word_at", "fault")

    def __init__(self, fault: Fault, word: AtomicU64, at: int) -> None:
        self.fault = fault
        self._word = word
        self._word_at = at

    @property
    def over(self) -> bool:
        """Whether it was turned off meanwhile: what lasts until then ends."""
        return self._word.load() != self._word_at


class _Row:
    """A fault that is on, as one who carries it out keeps it."""

    __slots__ = ("fault", "hits", "seen", "serial", "word", "word_on")

    def __init__(self, fault: Fault, word: AtomicU64, word_on: int, seen: AtomicU64, hits: AtomicU64) -> None:
        self.fault = fault
        self.word = word
        self.word_on = word_on
        self.seen = seen
        self.hits = hits
        self.serial = word_on >> 32


class Faults:
    """What one thread carries out: `hit` says whether a fault strikes here and now, counts it and records it."""

    def __init__(self, control: Control, record: Record | None = None) -> None:
        self.plan: Final = FaultPlan(control)
        self._view: Final = control.view
        self.generation: Final = self.plan.generation.load
        """Loads the plan's generation: while it is `known`, `rows` are those that are on."""
        self._record = record
        self.known = 0
        self.rows: dict[FaultKind, list[_Row]] = {}

    @property
    def changed(self) -> bool:
        """Whether something was turned on or off since the last look; a look takes it in."""
        return self.generation() != self.known

    def hit(
        self,
        kind: FaultKind,
        word: str = "",
        *,
        relid: int = 0,
        message: int = 0,
        vp: int | None = None,
        sint: int | None = None,
        identity: Identity | None = None,
        most: int | None = None,
    ) -> Hit | None:
        """Whether a fault of this kind strikes now, of this place, channel, message, VP; the first that does.

        `most`: one whose number (a time) is larger is left alone.
        """
        if self.generation() != self.known:
            self._read()
        rows = self.rows.get(kind)
        if not rows:
            return None
        for row in rows:
            fault = row.fault
            if (
                (fault.word and fault.word != word)
                or (fault.relid is not None and fault.relid != relid)
                or (fault.kind is not None and fault.kind != message)
                or (fault.vp is not None and fault.vp != vp)
                or (fault.sint is not None and fault.sint != sint)
                or (most is not None and fault.number > most)
                or not _is_of(fault, identity)
            ):
                continue
            if row.word.load() == row.word_on and fault.strikes(row.seen.fetch_add(1) + 1):
                hits = row.hits.fetch_add(1) + 1
                if self._record is not None:
                    self._record(E_FAULT_HIT, kind, relid, fault.number & 0xFFFF_FFFF_FFFF_FFFF, hits)
                return Hit(fault, row.word, row.word_on)
        return None

    @property
    def quiet(self) -> bool:
        """Whether nothing at all is on: one cheap look instead of many."""
        if self.generation() != self.known:
            self._read()
        return not self.rows

    def on(self, kind: FaultKind) -> list[Fault]:
        """Those of this kind that are on and may still strike."""
        if self.generation() != self.known:
            self._read()
        rows = self.rows.get(kind, ())
        return [row.fault for row in rows if row.fault.last is None or row.seen.load() < row.fault.last]

    def take_new(self, since: int) -> tuple[list[FaultKind], int]:
        """Kinds of what was turned on since serial `since`, and the newest serial now."""
        if self.generation() != self.known:
            self._read()
        rows = [row for rows in self.rows.values() for row in rows]
        kinds = {row.fault.spec.kind: None for row in rows if row.serial > since}
        return list(kinds), max([since, *(row.serial for row in rows)])

    def _read(self) -> None:
        # The generation first: what changes while we read is seen at the next look.
        self.known = self.generation()
        self.rows = {}
        for planned in self.plan.rows():
            if planned.on and not planned.spent:
                at = self.plan.row_offset(planned.index)
                cell = self._view.cell_u64
                word_on = planned.serial << 32 | RowState.ON
                row = _Row(planned.fault, cell(at), word_on, cell(at + _SEEN), cell(at + _HITS))
                self.rows.setdefault(planned.fault.spec.kind, []).append(row)


def _is_of(fault: Fault, identity: Identity | None) -> bool:
    """Whether the device is the one that a fault is about."""
    if fault.class_name is None and fault.device is None:
        return True
    found = None if identity is None else identity()
    if found is None:
        return False
    class_name, instance = found
    return fault.class_name in (None, class_name) and fault.device in (None, instance)
