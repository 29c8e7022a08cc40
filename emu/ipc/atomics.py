"""Atomic words on shared memory; the only module that knows which package makes them.

Every operation is a real atomic instruction (10-25 ns from Python), sequentially consistent unless an
order is passed. `cas` returns the *previous* value: it succeeded exactly when that equals the expected one.
Make an AtomicView of the mmap or bytearray itself, never of a memoryview: the interpreter's garbage collector
crashes on a cycle that holds those two.
"""

from __future__ import annotations

from atomicshm import (
    ACQUIRE,
    RELAXED,
    RELEASE,
    AtomicU8,
    AtomicU16,
    AtomicU32,
    AtomicU64,
    AtomicView,
    fence,
)

__all__ = [
    "ACQUIRE",
    "RELAXED",
    "RELEASE",
    "AtomicU8",
    "AtomicU16",
    "AtomicU32",
    "AtomicU64",
    "AtomicView",
    "fence",
]
