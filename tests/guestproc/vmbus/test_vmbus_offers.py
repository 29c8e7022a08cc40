"""Offers that do not end in a device: every error exit, and offers that should not have been made."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest

from emu.wire.device_classes import BY_NAME
from emu.wire.messages import AllOffersDelivered, MessageType, OfferChannel
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import ChannelState
from guestproc.kernel.records import Record, Table
from guestproc.protocol.offers import primary_of
from tests.guestproc.world import World

pytestmark = pytest.mark.parametrize("era", ["current", "seed"])

T = MessageType
SUB_CREATED = 910


@CHANNEL_CALLBACKS.register(SUB_CREATED)
def never_called(current: object, channel: object) -> None:
    """A driver that must not hear of a sub-channel that failed."""
    raise AssertionError("called for a sub-channel that could not be added")


@pytest.fixture
def hoard() -> Iterator[object]:
    """Takes every record of a table, and gives them back at the end."""
    taken: list[tuple[Table[Record], Record]] = []

    def take(table: Table[Record]) -> None:
        while (record := table.alloc()) is not None:
            taken.append((table, record))

    yield take
    for table, record in taken:
        table.free(record)


def offer(world: World, relid: int, *, instance: int | None = None, index: int = 0, class_name: str = "echo") -> None:
    """Offer and let it be handled."""
    world.host.device(relid, instance, index=index, class_id=BY_NAME[class_name].guid)
    world.settle()


# -- error exits ----------------------------------------------------------------------------------------


def test_no_record_for_the_channel(booted: World, hoard) -> None:  # type: ignore[no-untyped-def]
    """RELID_RELEASED once, no offer in progress, the kernel's line in the log, and no work left behind."""
    hoard(booted.tables.channels)
    offer(booted, 9)

    assert booted.host.released == [9]
    assert booted.tables.connection.offer_in_progress.load() == 0
    assert "Unable to allocate channel object" in booted.log
    assert booted.tables.work.in_use == 0


def test_no_record_for_the_second_half(booted: World, hoard) -> None:  # type: ignore[no-untyped-def]
    """The work record that the kernel's channel has inside it: the same end, and no channel left behind."""
    booted.host.device(9)
    booted.host.step()
    booted.turn("vcpu0")
    hoard(booted.tables.work)
    booted.settle()

    assert booted.host.released == [9]
    assert booted.tables.channels.in_use == 0
    assert booted.tables.connection.offer_in_progress.load() == 0


def test_no_record_for_the_device(booted: World, hoard) -> None:  # type: ignore[no-untyped-def]
    """err_deq_chan: unlinked, unmapped, released once, freed."""
    hoard(booted.tables.devices)
    offer(booted, 9)

    assert booted.host.released == [9]
    assert booted.tables.channels.in_use == 0
    assert booted.tables.relids.published() == {}
    assert booted.tables.chn_list.empty


def test_name_that_is_taken(booted: World) -> None:
    """A second device of the same instance cannot be registered: -EEXIST, released once, the first one stays."""
    offer(booted, 9, instance=5)
    offer(booted, 10, instance=5, class_name="nic")

    assert booted.host.released == [10]
    assert "unable to add child device object (relid 10)" in booted.log
    assert (booted.tables.channels.in_use, booted.tables.devices.in_use) == (1, 1)
    offer(booted, 10, instance=6, class_name="nic")
    assert booted.channel(10).state.load() == ChannelState.OPENED_STATE


def test_sub_channel_without_a_directory(booted: World) -> None:
    """vmbus_add_channel_kobj fails when the primary has no device: released once, the driver does not hear of it."""
    offer(booted, 9)
    primary = booted.channel(9)
    primary.sc_creation_callback = SUB_CREATED
    device, primary.device_obj = primary.device_obj, 0
    offer(booted, 10, instance=9, index=1)

    assert booted.host.released == [10]
    assert booted.tables.sc_list(primary).empty
    assert booted.tables.connection.nr_chan_close_on_suspend.load() == 0
    primary.device_obj = device


@pytest.mark.parametrize("what", ["device", "name", "sub"])
def test_rescind_of_an_offer_that_fails(booted: World, what: str, hoard) -> None:  # type: ignore[no-untyped-def]
    """The rescind has claimed the channel when its second half fails: one release, by one of the two."""
    offer(booted, 9, instance=5)
    primary = booted.channel(9)
    device = primary.device_obj
    if what == "device":
        hoard(booted.tables.devices)
        booted.host.device(10)
    elif what == "name":
        booted.host.device(10, instance=5, class_id=BY_NAME["nic"].guid)
    else:
        primary.device_obj = 0
        booted.host.device(10, instance=5, index=1)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn("WORK")
    booted.host.rescind(10)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn(booted.rescind_worker)  # claims it, and waits for probe_done
    booted.settle()

    assert booted.host.released == [10]
    assert booted.tables.channels.in_use == 1
    assert booted.tables.connection.nr_chan_close_on_suspend.load() == 0
    primary.device_obj = device


# -- offers that should not have been made --------------------------------------------------------------


@pytest.mark.parametrize("relid", [0, 2048, 0xFFFFFFFF])
def test_relid_that_cannot_be(booted: World, relid: int) -> None:
    """Ignored and counted; there is nothing to release."""
    booted.host.offer(
        OfferChannel(if_type=BY_NAME["echo"].guid, if_instance=UUID(int=1), child_relid=relid, connection_id=0x2001)
    )
    booted.settle()

    assert booted.refused()["offer-relid"] == 1
    assert booted.host.released == []
    assert booted.tables.connection.offer_in_progress.load() == 0
    assert booted.shut_down() == {}


def test_relid_in_use(booted: World) -> None:
    """The first channel keeps it, and is not released by the refusal of the second (races.md I4)."""
    offer(booted, 9)
    first = booted.channel(9)
    offer(booted, 9, instance=77)

    assert booted.channel(9) == first
    assert booted.refused()["offer-relid-taken"] == 1
    assert booted.host.released == []
    assert booted.shut_down() == {}
    assert booted.host.released == [9]


def test_same_primary_twice(booted: World) -> None:
    """As in the kernel: refused, and its id is not released; the first one goes on."""
    offer(booted, 9, instance=5)
    offer(booted, 10, instance=5)

    assert booted.refused()["offer-duplicate"] == 1
    assert list(booted.tables.relids.published()) == [9]
    assert booted.host.released == []
    assert booted.shut_down() == {}


def test_sub_channel_without_a_primary(booted: World) -> None:
    """It becomes a device of its own: nobody looks at the index of a new GUID."""
    offer(booted, 10, instance=9, index=1)

    assert booted.channel(10).state.load() == ChannelState.OPENED_STATE
    assert primary_of(booted.tables, booted.channel(10)) == booted.channel(10)
    booted.host.rescind(10)
    booted.settle()
    assert booted.host.released == [10]
    assert booted.tables.connection.nr_chan_close_on_suspend.load() == 0


def test_class_that_nobody_knows(booted: World) -> None:
    """Logged, registered, and without a driver."""
    booted.host.device(9, class_id=UUID(int=0xABC))
    booted.settle()

    assert "Unknown GUID: 00000000-0000-0000-0000-000000000abc" in booted.log
    device = booted.tables.devices.from_handle(booted.channel(9).device_obj)
    assert device.driver == 0
    assert booted.shut_down() == {}


def test_offers_in_a_flood_of_the_same(booted: World) -> None:
    """A thousand times the same offer: refused and counted, the log has a few lines of it, nothing is lost."""
    for _ in range(1_000):
        booted.host.device(9)
    booted.settle()

    assert booted.refused()["offer-relid-taken"] == 999
    assert sum("offer-relid-taken" in line for line in booted.log) == 3
    assert booted.shut_down() == {}


def test_all_offers_of_a_full_table(booted: World) -> None:
    """Relids 1 to 2,047, of devices that nobody drives: all entered, all released."""
    for relid in range(1, 2_048):
        booted.host.device(relid, class_id=UUID(int=0xABC))
    booted.host.send(AllOffersDelivered())
    booted.settle()

    assert len(booted.tables.relids.published()) == 2_047
    assert booted.shut_down() == {}
    assert booted.host.released == list(range(1, 2_048))
