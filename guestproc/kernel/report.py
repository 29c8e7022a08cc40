"""Who holds what: for the report of a death, read from guest RAM without taking anything."""

from __future__ import annotations

import mmap
from typing import Any

from guestproc.kernel.layout import BOOT_MAGIC, BOOT_RECORD_GPA, KernelTables
from guestproc.kernel.locks import Lock, Mutex, Spinlock
from guestproc.kernel.records import Part, Record, Table


def held_locks(ram: mmap.mmap, actors: list[int]) -> list[str]:
    """Names of all locks in guest RAM that one of these actors holds; none before RAM is laid out."""
    if not actors or int.from_bytes(ram[BOOT_RECORD_GPA : BOOT_RECORD_GPA + 8], "little") != BOOT_MAGIC:
        return []
    tables = KernelTables.attach(ram)
    held: list[str] = []
    for table in (
        tables.connections,
        tables.cpus,
        tables.queues,
        tables.zones,
        tables.channels,
        tables.devices,
        tables.drivers,
    ):
        held += _held_in(table, actors)
    return held


def _held_in(table: Table[Any], actors: list[int]) -> list[str]:
    lock_fields = [
        field.name
        for field in table.record_class.FIELDS
        if isinstance(field, Part)
        and field.size in (Spinlock.SIZE, Mutex.SIZE)
        and field.name.endswith(("lock", "mutex"))
    ]
    return [lock.name for record in table.live() for lock in _locks(record, lock_fields) if lock_owner(lock) in actors]


def _locks(record: Record, names: list[str]) -> list[Lock]:
    return [part for name in names if isinstance(part := getattr(record, name), Lock)]


def lock_owner(lock: Lock) -> int:
    """Actor number in a lock's word, 0 if it is free."""
    assert isinstance(lock, Spinlock | Mutex)
    return lock.owner
