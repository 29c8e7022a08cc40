"""Who is inside a wait: a word in each thread's row of the process table, for who asks whether a machine is settled.

A thread says so only in a machine that runs schedules (`Machine.races`), chosen when it attaches: elsewhere its waits
are what they always were. What it waits for is in the guest's records, where it announced itself.

    BLOCKED   on its semaphore, by a wait of the guest kernel, or for a letter
    IDLE      for a call to make: no wait of the machine's
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

from emu.control import Control

T = TypeVar("T")


class Blocked(IntEnum):
    """What a thread does now, in its own words."""

    RUNS = 0
    BLOCKED = 1
    IDLE = 2


def told(control: Control, slot: int, wait: Callable[[float], T]) -> Callable[[float], T]:
    """`wait(timeout_s)` of the actor in `slot`, with its word BLOCKED meanwhile."""
    store = control.blocked_word(slot).store
    store(Blocked.RUNS)

    def wait_and_tell(timeout_s: float) -> T:
        store(Blocked.BLOCKED)
        result = wait(timeout_s)
        store(Blocked.RUNS)
        return result

    return wait_and_tell


def idle(control: Control, slot: int, wait: Callable[[], T]) -> Callable[[], T]:
    """A wait for something outside the machine, with the word IDLE meanwhile."""
    store = control.blocked_word(slot).store

    def wait_and_tell() -> T:
        store(Blocked.IDLE)
        result = wait()
        store(Blocked.RUNS)
        return result

    return wait_and_tell
