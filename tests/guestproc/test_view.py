"""The look from outside: what goes between two looks is gone, never half of something else."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestproc.view import ATTEMPTS, INBOUND, OUTBOUND, GuestView, RingFigures, settled
from tests.tools.sysfs_records import new_guest

U32 = st.integers(0, 0xFFFFFFFF)


def test_look_is_made_again_while_records_go() -> None:
    """A stale name is met by another look, and one that is stale every time is our mistake."""
    failures = iter(range(3))

    def stale_at_first() -> str:
        assert next(failures, None) is None, "stale"
        return "seen"

    assert settled(stale_at_first) == "seen"
    failures = iter(range(ATTEMPTS + 1))
    with pytest.raises(AssertionError, match="stale"):
        settled(stale_at_first)


def test_device_is_found_again_under_a_new_record() -> None:
    """A device that went and came back with its instance is the new one, not the record known before."""
    guest = new_guest()
    view = GuestView(guest.tables)
    old, _ = guest.device(3, 7)
    assert view.device(UUID(int=7).bytes_le) == old
    guest.remove(old)
    assert view.device(UUID(int=7).bytes_le) is None
    new, _ = guest.device(4, 7)

    found = view.device(UUID(int=7).bytes_le)

    assert found is not None
    assert found.handle == new.handle != old.handle


def test_device_without_its_channel_is_not_there() -> None:
    """Between the two ends of a removal the device is listed nowhere, so that nobody reads half of it."""
    guest = new_guest()
    view = GuestView(guest.tables)
    device, channel = guest.device(3, 7)
    guest.device(4, 8)
    guest.tables.channels.free(channel)

    assert [one.dev_instance for one in view.devices()] == [UUID(int=8).bytes_le]
    assert view.device(device.dev_instance) is None


def test_sub_channels_come_in_the_order_of_their_list() -> None:
    """The primary first, then the list as it is, not as the records lie."""
    guest = new_guest()
    _, primary = guest.device(3, 7)
    second = guest.sub_channel(primary, 9, 2)
    first = guest.sub_channel(primary, 4, 1)
    listed = guest.tables.sc_list(primary)
    listed.remove(second)
    listed.append(second)

    assert GuestView(guest.tables).channels(primary) == [primary, first, second]


def test_walk_along_a_list_that_changes_ends() -> None:
    """A link that leads back, as one may be caught in the middle of a change, does not hold the look up."""
    guest = new_guest()
    _, primary = guest.device(3, 7)
    only = guest.sub_channel(primary, 4, 1)
    listed = guest.tables.sc_list(primary)
    links = listed._links(only)
    links[listed._word] = only.index + 1

    assert GuestView(guest.tables).channels(primary) == [primary, only]


@given(U32, U32, st.integers(1, 64))
def test_ring_figures_are_the_kernels_whatever_the_indices(write: int, read: int, pages: int) -> None:
    """Free and used bytes are u32 and add up to the ring, also for indices that the peer made up."""
    figures = RingFigures(0, read, write, pages * 4096)

    assert 0 <= figures.bytes_to_read <= 0xFFFFFFFF
    assert 0 <= figures.bytes_to_write <= 0xFFFFFFFF
    assert (figures.bytes_to_read + figures.bytes_to_write) & 0xFFFFFFFF == pages * 4096


@pytest.mark.parametrize("scattered", [False, True])
def test_both_rings_are_found_where_their_pages_lie(scattered: bool) -> None:
    """Contiguous rings lie behind each other; of scattered ones the page list says where each begins."""
    guest = new_guest()
    _, channel = guest.device(3, 7)
    view = GuestView(guest.tables)
    assert view.ring(channel, OUTBOUND) is None
    outbound, inbound = guest.rings(channel, scattered=scattered)
    guest.ring_words(outbound, write=64, read=24, mask=1)
    guest.ring_words(inbound, write=8, read=16, mask=0)

    assert view.ring(channel, OUTBOUND) == RingFigures(1, 24, 64, 3 * 4096)
    assert view.ring(channel, INBOUND) == RingFigures(0, 16, 8, 3 * 4096)


@pytest.mark.parametrize("scattered", [False, True])
def test_ring_outside_of_ram_is_no_ring(scattered: bool) -> None:
    """An address that RAM does not have, in the record or in the page list, is never followed."""
    guest = new_guest()
    _, channel = guest.device(3, 7)
    view = GuestView(guest.tables)
    guest.rings(channel, scattered=scattered)
    if scattered:
        guest.store(channel.ring_pfns_gpa, guest.tables.ram.size >> 12, 8)
    else:
        channel.ring_gpa = guest.tables.ram.size
    assert view.ring(channel, OUTBOUND) is None
    channel.ring_pfns_gpa = guest.tables.ram.size

    assert view.ring(channel, INBOUND) is None
