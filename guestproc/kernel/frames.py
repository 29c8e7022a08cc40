"""Frames: what a function keeps on its thread's stack and gives others the address of, in guest RAM.

A function takes its frame when it is entered and gives it back on every way out. Then the frame is poisoned and its
epoch rises, as of every record, so "the function has returned" is an event that can be checked: a name that is used
later is an assertion, and a store through an address that was kept is found in the poison (races.md INV-13).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from emu.ipc.atomics import RELEASE
from guestproc.kernel.actors import Actor
from guestproc.kernel.records import INDEX_MASK, Atomic32, Blob, Ram, Record, Table, Word, field_of

REPLY_BYTES: Final = 64


class Frame(Record):
    """One call of a function that waits for a reply."""

    actor = Word(4, "once: number of the thread whose call it is")
    done = Atomic32("atomic: 1 once the reply is there")
    reply_size = Word(4, "whoever has its address, before done: bytes of the reply")
    reply = Blob(REPLY_BYTES, "whoever has its address, before done")


@contextmanager
def on_stack(frames: Table[Frame], actor: Actor) -> Iterator[Frame]:
    """A frame of this thread's for as long as the block lasts."""
    frame = frames.alloc()
    assert frame is not None, f"{actor} calls: all {frames.capacity} frames are used"
    frame.actor = actor.number
    try:
        yield frame
    finally:
        frames.free(frame)


def frame_of(frames: Table[Frame], address: int) -> Frame | None:
    """The frame that a peer names by its handle; None for what names no call that still runs."""
    return frames.find(address) if 0 <= (address & INDEX_MASK) - 1 < frames.capacity else None


def store_reply(ram: Ram, frame: Frame, payload: bytes) -> None:
    """Put a reply into a frame as through a pointer: nothing looks whether its function has returned meanwhile."""
    text = payload[:REPLY_BYTES]
    at = frame.gpa + field_of(Frame, "reply").offset
    ram.octets[at : at + len(text)] = text
    ram.atomics.store_u32(frame.gpa + field_of(Frame, "reply_size").offset, len(text))
    ram.atomics.store_u32(frame.gpa + field_of(Frame, "done").offset, 1, RELEASE)
