"""The host's mirror: a whole head or the one before, and a row for each channel that the host knows."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest

from emu.control import MIRROR_CHANNEL_ROW, MIRROR_CHANNELS, MIRROR_HEAD, Control
from emu.ipc.segments import object_name
from emu.mirror import Left, Mirror, MirrorChannel
from tests.processes import Forked

TYPE = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
INSTANCE = UUID("6c1f9d1e-0f6b-4b8e-9c55-3f0a6f0f2a11")


@pytest.fixture
def control(machine_name: str) -> Iterator[Control]:
    """A control segment of its own."""
    control = Control.create(object_name(machine_name, "control"), {})
    yield control
    control.close()


def write(mirror: Mirror, number: int) -> None:
    """A head in which every figure follows from one number."""
    mirror.write_head(
        version=number,
        offers=number + 1,
        open_channels=number + 2,
        gpadls=number + 3,
        to_slots=number + 4,
        outgoing=number + 5,
        incoming=number + 6,
        attached_pid=number + 7,
        disconnects=number + 8,
        seen=(number + 9, number + 10, number + 11),
        left=Left.DIED,
    )


def figures(mirror: Mirror) -> list[int]:
    """All figures of the head."""
    head = mirror.head()
    return [
        head.version,
        head.offers,
        head.open,
        head.gpadls,
        head.to_slots,
        head.outgoing,
        head.incoming,
        head.attached_pid,
        head.disconnects,
        head.seen_version,
        head.seen_offers,
        head.seen_open,
    ]


def channel(relid: int, state: int) -> MirrorChannel:
    """A row in which every word is another."""
    return MirrorChannel(relid, state, 2, 3, 4, 5, 6, 7, 8, TYPE, INSTANCE)


def test_head_is_read_back(control: Control) -> None:
    """Every figure under its own name; the sequence is even and rises."""
    mirror = Mirror(control)
    write(mirror, 100)
    first = Mirror(control).head().sequence
    write(mirror, 200)

    assert figures(Mirror(control)) == list(range(200, 212))
    assert (first, Mirror(control).head().sequence, Mirror(control).head().left) == (2, 4, Left.DIED)


def test_unwritten_mirror_says_that_nobody_is_connected(control: Control) -> None:
    """Before the host wrote anything all is zero, and there are no channels."""
    assert figures(Mirror(control)) == [0] * 12 and Mirror(control).head().left == Left.NOBODY
    assert list(Mirror(control).channels()) == []


def test_reader_gets_whole_heads_while_the_host_writes(control: Control) -> None:
    """No reading mixes two heads."""
    done = control.view.cell_u32(2048)

    def host() -> None:
        mirror = Mirror(control)
        number = 0
        while not done.load():
            number = (number + 1) % 1_000_000
            write(mirror, number)

    with Forked(host):
        reader = Mirror(control)
        for _ in range(3_000):
            seen = figures(reader)
            assert seen == list(range(seen[0], seen[0] + 12)) or seen == [0] * 12
        done.store(1)


def test_reader_survives_a_host_that_died_while_it_wrote(control: Control) -> None:
    """A sequence that stays odd is given up on: what is there is better than nothing."""
    mirror = Mirror(control)
    write(mirror, 5)
    control.view.fetch_add_u64(control.mirror_offset, 1)

    assert figures(mirror) == list(range(5, 17))


@pytest.mark.parametrize("relid", [1, 1000, MIRROR_CHANNELS - 1])
def test_channel_is_read_back(control: Control, relid: int) -> None:
    """Every field of a row, also in state 0."""
    mirror = Mirror(control)
    mirror.write_channel(channel(relid, 0))

    assert list(Mirror(control).channels()) == [channel(relid, 0)]


def test_channels_come_by_relid_until_forgotten(control: Control) -> None:
    """A row is replaced by the next state and goes when the host forgets the channel."""
    mirror = Mirror(control)
    for relid in (9, 2, 5):
        mirror.write_channel(channel(relid, 1))
    mirror.write_channel(channel(5, 3))
    mirror.clear_channel(2, 1)

    assert list(mirror.channels()) == [channel(5, 3), channel(9, 1)]


def test_life_of_a_relid_is_over_when_it_was_given_back_or_began_anew(control: Control) -> None:
    """Also one that nobody saw, as offer and release came between two writings; not one that has no row yet."""
    mirror = Mirror(control)
    assert not mirror.is_over(4, 1)
    mirror.clear_channel(4, 1)
    assert mirror.is_over(4, 1) and not mirror.is_over(4, 2) and mirror.channel(4) is None
    mirror.write_channel(channel(4, 0))

    assert mirror.is_over(4, 1) and not mirror.is_over(4, 2)


def test_rows_fit_their_places(control: Control) -> None:
    """The last row ends where the table does, and the head stays in front of the first."""
    mirror = Mirror(control)
    write(mirror, 5)
    mirror.write_channel(channel(MIRROR_CHANNELS - 1, 1))
    end = control.mirror_channel_offset(MIRROR_CHANNELS - 1) + MIRROR_CHANNEL_ROW

    assert control.mirror_channel_offset(0) == control.mirror_offset + MIRROR_HEAD
    assert control.memory[end : end + 64] == bytes(64)
    assert control.mirror_channel_offset(1) == control.mirror_channel_offset(0) + MIRROR_CHANNEL_ROW
