"""Frames of functions: alive while the function runs, poisoned behind it, and a late store is found."""

from __future__ import annotations

import pytest

from guestproc.kernel.frames import REPLY_BYTES, frame_of, on_stack, store_reply
from guestproc.kernel.layout import KernelTables
from tests.guestproc.kernel.fakes import Lone


def test_reply_into_the_frame_of_a_running_function(tables: KernelTables) -> None:
    """Whoever has its address finds it and stores as much as fits; behind the block it is free and untouched."""
    with on_stack(tables.frames, Lone().actor) as frame:
        assert frame_of(tables.frames, frame.handle) == frame
        store_reply(tables.ram, frame, b"x" * 100)

        assert (frame.done.load(), frame.reply_size, frame.reply) == (1, REPLY_BYTES, b"x" * REPLY_BYTES)

    assert (tables.frames.in_use, tables.damage()) == (0, [])


@pytest.mark.parametrize("address", [0, 1 << 32 | 65, 1 << 32 | 0xFFFFFFFF, 3 << 32 | 1])
def test_address_of_no_call(tables: KernelTables, address: int) -> None:
    """0, beyond the arena, an epoch that is not there."""
    assert frame_of(tables.frames, address) is None


def test_store_into_a_dead_frame_is_found(tables: KernelTables) -> None:
    """The function returned, also by an exception; its name is stale, and what is stored there afterwards is damage."""
    with pytest.raises(ValueError), on_stack(tables.frames, Lone().actor) as frame:  # noqa: PT011
        raise ValueError
    assert frame_of(tables.frames, frame.handle) is None
    with pytest.raises(AssertionError, match="stale"):
        _ = frame.reply_size

    store_reply(tables.ram, frame, b"late")

    (line,) = tables.damage()
    assert line.startswith("frames[0]: written while free")
