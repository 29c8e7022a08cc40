"""Who waits for what in the guest kernel, read from where each waiter announced itself.

Completions, wait queues and mutexes are words of records, each with a chain of waiters (`guestproc.kernel.wait`). So
the chains of all live records say of each actor which object it waits for. One that is in no chain has been woken,
or waits for a word that lies in a driver's own state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from emu.tracing import WaitedFor
from guestproc.kernel.layout import Device, KernelTables
from guestproc.kernel.locks import Mutex
from guestproc.kernel.records import INDEX_MASK, Part, Record, Table, field_of
from guestproc.kernel.smp import CallRecord
from guestproc.kernel.wait import Completion, WaitQueue
from guestproc.kernel.waiters import Waiter, WaiterState
from guestproc.kernel.work_records import Queue

CALL_WAIT: Final = 16
"""Offset of the wait queue in a CallRecord."""

WaitFields = tuple[tuple[str, int, WaitedFor], ...]
_FIELDS: Final[dict[str, WaitFields]] = {}
"""By table, found out once."""


@dataclass(frozen=True, slots=True)
class WaitObject:
    """A word that actors wait for: `record.field`; `owner` is the actor that holds a mutex, else 0."""

    kind: WaitedFor
    record: Record
    field: str
    owner: int = 0

    @property
    def name(self) -> str:
        """As a lock is called in reports: `connection[0].channel_mutex`."""
        return f"{self.record.table.name}[{self.record.index}].{self.field}"


@dataclass(frozen=True, slots=True)
class Wait:
    """One actor's wait. `subject` is the GPA of the record whose change it waits for, where it said so."""

    actor: int
    waited: WaitObject
    subject: int = 0

    @property
    def idle(self) -> bool:
        """Whether a worker waits for work."""
        return isinstance(self.waited.record, Queue) and self.waited.field == "workers"


def tables_with_waits(tables: KernelTables) -> tuple[Table[Record], ...]:
    """The tables whose records anybody can wait for."""
    return (
        tables.connections,
        tables.cpus,
        tables.queues,
        tables.channels,
        tables.requests,
        tables.devices,
    )  # type: ignore[return-value]


def wait_fields(record_class: type[Record]) -> WaitFields:
    """The words of a record that are waited for: name, offset, kind."""
    found = []
    for field in record_class.FIELDS:
        if not isinstance(field, Part):
            continue
        if field.build is Completion:
            found.append((field.name, field.offset, WaitedFor.COMPLETION))
        elif field.build is WaitQueue:
            found.append((field.name, field.offset, WaitedFor.WAIT_QUEUE))
        elif field.build is CallRecord:
            found.append((field.name, field.offset + CALL_WAIT, WaitedFor.WAIT_QUEUE))
        elif field.size == Mutex.SIZE and field.name.endswith(("mutex", "lock")):
            found.append((field.name, field.offset, WaitedFor.MUTEX))
    return tuple(found)


def objects(tables: KernelTables) -> Iterator[tuple[WaitObject, int]]:
    """Every object that somebody waits for or holds, and its word."""
    load = tables.ram.atomics.load_u64
    for table in tables_with_waits(tables):
        fields = _FIELDS.get(table.name)
        if fields is None:
            fields = _FIELDS[table.name] = wait_fields(table.record_class)
        for record in table.live():
            for name, offset, kind in fields:
                word = load(record.gpa + offset)
                mutex = kind == WaitedFor.MUTEX
                if word & INDEX_MASK or (mutex and word):
                    yield WaitObject(kind, record, name, word >> 32 if mutex else 0), word


def chain(tables: KernelTables, newest: int) -> list[Waiter]:
    """The waiters of a chain that still sleep; one that changes meanwhile is cut short."""
    found: list[Waiter] = []
    try:
        for _ in range(tables.waiters.capacity):
            # A record that was freed between two looks holds poison, which is no index.
            if not 0 < newest <= tables.waiters.capacity:
                break
            waiter = tables.waiters.at(newest - 1)
            if waiter.state.load() == WaiterState.WAITING:
                found.append(waiter)
            newest = waiter.next
    except AssertionError:
        pass
    return found


def waits(tables: KernelTables) -> dict[int, Wait]:
    """By actor number: what each one waits for that has announced itself and was not woken."""
    found: dict[int, Wait] = {}
    for waited, word in objects(tables):
        for waiter in chain(tables, word & INDEX_MASK):
            found[waiter.actor] = Wait(waiter.actor, waited, waiter.subject)
    for waiter in tables.waiters.live():
        if waiter.state.load() == WaiterState.WAITING and waiter.actor and waiter.actor not in found:
            waited_for = _in_driver_state(tables, waiter)
            if waited_for is not None:
                found[waiter.actor] = Wait(waiter.actor, waited_for, waiter.subject)
    return found


def owned(tables: KernelTables) -> dict[int, list[WaitObject]]:
    """By actor number: the mutexes that it holds."""
    found: dict[int, list[WaitObject]] = {}
    for waited, _word in objects(tables):
        if waited.owner:
            found.setdefault(waited.owner, []).append(waited)
    return found


def woken(tables: KernelTables) -> set[int]:
    """Numbers of the actors that were woken and have not gone on yet."""
    return {waiter.actor for waiter in tables.waiters.live() if waiter.state.load() == WaiterState.WOKEN}


def over(tables: KernelTables, now_ns: int) -> set[int]:
    """Numbers of the actors whose wait is over by its own deadline (machine time) and who have not gone on yet."""
    return {
        waiter.actor
        for waiter in tables.waiters.live()
        if waiter.state.load() == WaiterState.WAITING and 0 < waiter.until_ns <= now_ns
    }


def _in_driver_state(tables: KernelTables, waiter: Waiter) -> WaitObject | None:
    """A word of a driver's own state whose chain this waiter is in: a mutex there has its owner above."""
    first = field_of(Device, "driver_state").offset
    for device in tables.devices.live():
        for number, word in enumerate(device.driver_state):
            newest = word & INDEX_MASK
            if not newest or newest > tables.waiters.capacity or waiter not in chain(tables, newest):
                continue
            owner = word >> 32
            kind = WaitedFor.MUTEX if owner else WaitedFor.WAIT_QUEUE
            return WaitObject(kind, device, f"driver_state[{number}]+{first + 8 * number:#x}", owner)
    return None
