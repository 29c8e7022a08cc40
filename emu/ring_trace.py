"""A recorded ring: the same shared words, with a record at each publish, release, wish and (for a host) mask.

Chosen when a process attaches to a ring; a ring that is not recorded has no trace of this in it. Nothing is recorded
per packet: a publish or a release is one record, however many packets it is for.
"""

from __future__ import annotations

from dataclasses import replace
from struct import pack
from typing import Final

from emu.ring_memory import RingMemory, RingWords
from emu.tracing import (
    E_MASK,
    E_PENDING_SIZE,
    E_RING_ATTACH,
    E_RING_FULL,
    E_RING_PUBLISH,
    E_RING_RELEASE,
    E_RING_ROOM,
    E_UNMASK,
    Recorder,
)
from emu.wire.ring_layout import ALIGNMENT

SNAP_BYTES: Final = 256
"""How much of a publish is kept, where bytes are: the descriptors and first bytes of small packets."""


def recorded(memory: RingMemory, recorder: Recorder, relid: int, side: int, *, masks: bool = False) -> RingWords:
    """The words of this ring, with records; `masks` where nobody else records that the reader masks and unmasks."""
    words, size, record = memory.words, memory.data_size, recorder.record
    store_write, store_read, store_pending, store_mask = (
        words.store_write,
        words.store_read,
        words.store_pending,
        words.store_mask,
    )
    load_write, load_read, load_pending = words.load_write, words.load_read, words.load_pending

    published = recorder.bind_first(E_RING_PUBLISH, relid, side)
    released = recorder.bind_first(E_RING_RELEASE, relid, side)

    def publish(index: int) -> None:
        # Before it can be read: a reader releases at once, and no effect may precede its cause.
        published(index, (index - load_write()) % size)
        store_write(index)

    def publish_bytes(index: int) -> None:
        before = load_write()
        published(index, (index - before) % size)
        recorder.keep(first_bytes(memory, before, (index - before) % size))
        store_write(index)

    def release(index: int) -> None:
        freed = (index - load_read()) % size
        store_read(index)
        released(index, freed)
        if wanted := load_pending() & -ALIGNMENT:
            room = (index - load_write() - ALIGNMENT) % size
            if room - freed < wanted <= room:
                record(E_RING_ROOM, relid, side, room, wanted)

    def wish(wanted: int) -> None:
        store_pending(wanted)
        record(E_PENDING_SIZE, relid, side, wanted)
        if wanted:
            record(E_RING_FULL, relid, side, wanted, (load_read() - load_write() - ALIGNMENT) % size)

    masked, unmasked = recorder.bind(E_MASK, relid, side), recorder.bind(E_UNMASK, relid, side, 0)

    def mask(value: int) -> None:
        store_mask(value)
        if value:
            masked()
        elif left := (load_write() - load_read()) % size:
            record(E_UNMASK, relid, side, left)
        else:
            unmasked()

    record(E_RING_ATTACH, relid, side, size, load_write(), load_read())
    store = publish_bytes if recorder.keeps_bytes else publish
    changed = replace(words, store_write=store, store_read=release, store_pending=wish)
    return replace(changed, store_mask=mask) if masks else changed


def first_bytes(memory: RingMemory, index: int, published: int) -> bytes:
    """The first bytes of what was published from `index` on, `SNAP_BYTES` at most."""
    first, words = index >> 3, min(published, SNAP_BYTES) >> 3
    return pack(f"<{words}Q", *[memory.headers[first + word] for word in range(words)])
