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
    E_RING_ROOM,
    E_UNMASK,
    Recorder,
)
from emu.wire.ring_layout import ALIGNMENT

SNAP_BYTES: Final = 256
"""How much of a publish is kept, where bytes are: the descriptors and first bytes of small packets."""


def recorded(
    memory: RingMemory, recorder: Recorder, relid: int, side: int, *, masks: bool = False, sole: bool = False
) -> RingWords:
    """The words of this ring, with records; `masks` where nobody else records that the reader masks and unmasks.

    `sole`: nobody else stores the index that this end stores.
    """
    words, size, record = memory.words, memory.data_size, recorder.record
    store_write, store_read, store_pending, store_mask = (
        words.store_write,
        words.store_read,
        words.store_pending,
        words.store_mask,
    )
    load_write, load_read, load_pending = words.load_write, words.load_read, words.load_pending

    side_words = relid, side
    published = recorder.bind_first(E_RING_PUBLISH, relid, side)

    def publish_bytes(index: int) -> None:
        before = load_write()
        published(index, (index - before) % size)
        recorder.keep(first_bytes(memory, before, (index - before) % size))
        store_write(index)

    def room(index: int, freed: int) -> None:
        if wanted := load_pending() & -ALIGNMENT:
            free = (index - load_write() - ALIGNMENT) % size
            if free - freed < wanted <= free:
                record(E_RING_ROOM, relid, side, free, wanted)

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
    release = recorder.bind_release(side_words, size, store_read, load_read, load_pending, room, sole=sole)
    # Who writes alone, always in the same context (a host), records its batches itself.
    alone = sole and not masks and not recorder.keeps_bytes
    publishes = recorder.bind_publishes(side_words, size, store_write, load_write) if alone else None
    publish = (
        publishes.publish if publishes else recorder.bind_publish(side_words, size, store_write, load_write, sole=sole)
    )
    changed = replace(
        words,
        store_write=publish_bytes if recorder.keeps_bytes else publish,
        store_read=release,
        store_pending=wish,
        publishes=publishes,
    )
    return replace(changed, store_mask=mask) if masks else changed


def first_bytes(memory: RingMemory, index: int, published: int) -> bytes:
    """The first bytes of what was published from `index` on, `SNAP_BYTES` at most."""
    first, words = index >> 3, min(published, SNAP_BYTES) >> 3
    return pack(f"<{words}Q", *[memory.headers[first + word] for word in range(words)])
