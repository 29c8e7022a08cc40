"""A recorded ring: the same shared words, with a record at each publish, release and wish.

Chosen when a process attaches to a ring; a ring that is not recorded has no trace of this in it.
"""

from __future__ import annotations

from dataclasses import replace

from emu.ring_memory import RingWords
from emu.tracing import E_PENDING_SIZE, E_RING_PUBLISH, E_RING_RELEASE, Recorder


def recorded(words: RingWords, recorder: Recorder, relid: int, side: int) -> RingWords:
    """The same words, with a record at each publish, release and wish."""
    record = recorder.record
    store_write, store_read, store_pending = words.store_write, words.store_read, words.store_pending

    def publish(index: int) -> None:
        store_write(index)
        record(E_RING_PUBLISH, relid, side, index)

    def release(index: int) -> None:
        store_read(index)
        record(E_RING_RELEASE, relid, side, index)

    def wish(size: int) -> None:
        store_pending(size)
        record(E_PENDING_SIZE, relid, side, size)

    return replace(words, store_write=publish, store_read=release, store_pending=wish)
