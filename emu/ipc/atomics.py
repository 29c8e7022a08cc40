"""Atomic words on shared memory; the only module that knows which package makes them.

Every operation is a real atomic instruction (10-25 ns from Python), sequentially consistent unless an
order is passed. `cas` returns the *previous* value: it succeeded exactly when that equals the expected one.
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
