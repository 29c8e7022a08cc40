"""Who reads a channel whose interrupts come to another processor: the mark, the kick, and who takes the mark away."""

from __future__ import annotations

from collections import deque

import pytest

from guestproc.drivers.echo_inbox import INBOXES
from guestproc.drivers.steering import LEFT, NOBODY, begin_reading, end_reading, leave_to_reader, take_what_was_left
from guestproc.kernel.layout import Channel
from tests.guestproc.world import World

RELID = 9


@pytest.fixture
def channel(booted: World) -> Channel:
    """An open channel that nobody reads."""
    booted.host.device(RELID)
    booted.settle()
    return booted.channel(RELID)


def tasklets_run(world: World) -> int:
    """How often a channel's tasklet has run."""
    return world.event_names().count("tasklet_run")


@pytest.mark.parametrize("reader", [NOBODY, 1, 1 | LEFT, LEFT])
def test_ring_is_left_to_nobody_and_not_to_oneself(booted: World, channel: Channel, reader: int) -> None:
    """CPU 0 is interrupted: nobody reads it, or CPU 0 itself, whether it was told of something or not."""
    channel.reader.store(reader)

    assert not booted.call(lambda current: leave_to_reader(current, channel))
    assert channel.reader.load() == reader


def test_reader_takes_what_another_left(booted: World, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU 1 is interrupted and tells CPU 0, which reads: in its interrupt the tasklet is scheduled there, once."""
    monkeypatch.setitem(INBOXES, channel.handle, deque())
    assert booted.call(lambda current: begin_reading(current, channel))
    assert not booted.call(lambda current: begin_reading(current, channel), cpu=1)
    before = tasklets_run(booted)

    assert booted.call(lambda current: leave_to_reader(current, channel), cpu=1)

    assert (channel.reader.load(), tasklets_run(booted) - before) == (1, 1)
    booted.call(lambda current: take_what_was_left(current, [channel.handle]))
    assert tasklets_run(booted) - before == 1


@pytest.mark.parametrize("mark", [0, LEFT], ids=["nothing left", "left"])
def test_who_stops_reading_reads_what_was_left(booted: World, channel: Channel, mark: int) -> None:
    """The mark goes with its number; the ring that it stood for is read, which nobody else would do."""
    channel.reader.store(1 | mark)
    before = tasklets_run(booted)

    booted.call(lambda current: end_reading(current, channel))

    assert (channel.reader.load(), tasklets_run(booted) - before) == (NOBODY, bool(mark))
