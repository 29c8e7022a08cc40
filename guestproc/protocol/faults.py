"""Faults that a user asked for: which step shall fail, how often, for which relid.

The real kernel has its error exits for allocations and registrations that hardly ever fail; here they fail when
they are told to. A word for each fault: how often it is still to happen, and for which relid (0: any). Nothing
is drawn by lot, so a test that says "the next one" means it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from emu.ipc.atomics import AtomicU64
from guestproc.kernel.layout import MAX_FAULTS, KernelTables

MOST_TIMES: Final = (1 << 32) - 1
_HANGS_ENDED: Final = MAX_FAULTS - 1
"""Word that counts how often hanging probes were let go."""


class Fault(IntEnum):
    """Where; the value is its word."""

    ALLOC_CHANNEL = 0
    WORK_ALLOC = 1
    DEVICE_CREATE = 2
    DEVICE_REGISTER = 3
    ADD_KOBJ = 4
    PROBE = 5
    PROBE_HANG = 6


def plan(tables: KernelTables, fault: Fault, times: int, relid: int = 0) -> None:
    """Let it happen the next `times` times, for this relid only unless that is 0; replaces what was planned."""
    assert 0 <= times <= MOST_TIMES, f"{times} times"
    _word(tables, fault).store(relid << 32 | times if times else 0)


def planned(tables: KernelTables) -> dict[Fault, tuple[int, int]]:
    """What is still to happen: how often, and for which relid."""
    words = {fault: _word(tables, fault).load() for fault in Fault}
    return {fault: (word & MOST_TIMES, word >> 32) for fault, word in words.items() if word}


def strikes(tables: KernelTables, fault: Fault, relid: int) -> bool:
    """Whether it happens here and now: then it is one time less."""
    word = tables.faults[fault]
    while seen := word.load():
        if seen >> 32 not in (0, relid):
            return False
        left = seen - 1 if (seen - 1) & MOST_TIMES else 0
        if word.cas(seen, left) == seen:
            return True
    return False


def hangs_ended(tables: KernelTables) -> int:
    """How often hanging probes were let go; one that hangs waits for the next time."""
    return _word(tables, _HANGS_ENDED).load()


def end_hangs(tables: KernelTables) -> None:
    """Let every probe that hangs go on; the caller wakes state_wait."""
    _word(tables, _HANGS_ENDED).fetch_add(1)


def forget_all(tables: KernelTables) -> None:
    """Nothing fails any more."""
    for fault in Fault:
        plan(tables, fault, 0)
    end_hangs(tables)


def _word(tables: KernelTables, number: int) -> AtomicU64:
    return tables.faults[number]
