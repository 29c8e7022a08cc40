"""A rescind in every phase of a channel's life: who waits is woken, and each relid is released exactly once."""

from __future__ import annotations

import pytest

from emu.wire.hypercalls import HvStatus
from emu.wire.messages import (
    STATUS_UNSUCCESSFUL,
    GpadlCreated,
    GpadlHeader,
    Message,
    MessageType,
    OpenChannelResult,
    RescindChannelOffer,
)
from guestproc.current import Current
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.vmbus.channel import vmbus_close
from guestproc.vmbus.connection import vmbus_connect, vmbus_request_offers
from tests.guestproc.vmbus.sub_callbacks import CALLED, OPEN_SUB, SUB_CREATED, add_subs
from tests.guestproc.world import World

pytestmark = pytest.mark.parametrize("era", ["current", "seed"])

T = MessageType
RESCIND_CALLBACK = 902


@CHANNEL_CALLBACKS.register(RESCIND_CALLBACK)
def on_rescind(current: Current, channel: Channel) -> None:
    """A driver that wants to unregister the device itself."""
    CALLED.append(channel.relid)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Nobody was called yet."""
    CALLED.clear()


def gone(world: World, *relids: int) -> None:
    """Each relid was released once, and nothing of its channel is left."""
    assert sorted(world.host.released) == sorted(relids)
    tables = world.tables
    assert [channel.relid for channel in tables.channels.live() if channel.relid in relids] == []
    assert tables.relids.published() == {
        relid: handle for relid, handle in tables.relids.published().items() if relid not in relids
    }
    assert tables.requests.in_use == 0
    assert tables.damage() == []


# -- the phases of a primary's life ---------------------------------------------------------------------


def test_rescind_before_its_offer_was_handled(booted: World) -> None:
    """Offer and rescind one after the other in the queues: the rescind waits for the offer (races.md A1)."""
    booted.host.device(9)
    booted.host.rescind(9)
    while booted.host.outbox or booted.tables.work_queues.length(booted.era.rescind_queue) == 0:
        booted.host.step()
        if booted.cpus[0].lapic.deliverable():
            booted.turn("vcpu0")
    assert booted.tables.connection.offer_in_progress.load() == 1
    booted.turn(booted.rescind_worker)
    assert booted.host.released == []

    booted.settle()

    gone(booted, 9)
    assert booted.shut_down() == {}


def test_rescind_before_probe(booted: World) -> None:
    """The channel is known, its device is not yet: the handler waits for probe_done, then unregisters it."""
    booted.host.device(9)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn("WORK")
    channel = booted.channel(9)
    booted.host.rescind(9)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn(booted.rescind_worker)
    assert (channel.rescind.load(), channel.probe_done.load() & 1) == (1, 0)
    assert booted.host.released == []

    booted.settle()

    gone(booted, 9)
    assert booted.host.types().count(T.GPADL_HEADER) == 0  # establish saw the flag before it posted
    assert booted.shut_down() == {}


def test_rescinds_in_the_other_order_of_their_probes(booted: World) -> None:
    """A rescind that waited for a probe behind another's would hold up the one that ends that other's wait."""
    booted.host.hold(T.OPENCHANNEL)
    booted.host.device(9)
    booted.host.device(10)
    booted.settle()
    assert (booted.channel(9).state.load(), booted.channel(10).device_obj) == (ChannelState.OPENING_STATE, 0)
    booted.host.rescind(10)
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    gone(booted, 9, 10)
    assert booted.shut_down() == {}


def test_rescind_in_gpadl(booted: World) -> None:
    """Whoever waits for GPADL_CREATED is woken with -ENODEV, before the handler waits for probe (A5)."""
    booted.host.hold(T.GPADL_HEADER, T.GPADL_BODY)
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    gone(booted, 9)
    assert any("(-19)" in line for line in booted.log)
    assert booted.host.types()[-1] == T.RELID_RELEASED
    assert T.GPADL_TEARDOWN not in booted.host.types()
    assert booted.shut_down() == {}


def test_rescind_crosses_a_refused_gpadl(booted: World) -> None:
    """CREATED with a failure, then RESCIND: -EDQUOT, and released once."""

    def refuse(message: Message) -> list[Message]:
        assert isinstance(message, GpadlHeader)
        return [GpadlCreated(9, message.gpadl, STATUS_UNSUCCESSFUL), RescindChannelOffer(9)]

    booted.host.answer[T.GPADL_HEADER] = refuse
    booted.host.answer[T.GPADL_BODY] = lambda message: []
    booted.host.device(9)
    booted.settle()

    gone(booted, 9)
    assert any("(-122)" in line for line in booted.log)


def test_rescind_in_open(booted: World) -> None:
    """OPEN was posted, the host had revoked already: no result ever; the rescind wakes the opener."""
    booted.host.hold(T.OPENCHANNEL)
    booted.host.device(9)
    booted.settle()
    assert booted.channel(9).state.load() == ChannelState.OPENING_STATE

    booted.host.rescind(9)
    booted.settle()

    gone(booted, 9)
    assert booted.host.types()[-1] == T.RELID_RELEASED
    assert T.GPADL_TEARDOWN not in booted.host.types()
    assert booted.shut_down() == {}


def test_rescind_between_enlisting_and_posting(booted: World) -> None:
    """The opener joins the list, then looks at the flag; a rescind that came first is seen there (A4)."""
    booted.host.hold(T.GPADL_HEADER, T.GPADL_BODY)
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(9)
    booted.host.release(T.GPADL_HEADER)
    booted.host.release(T.GPADL_BODY)
    booted.settle()

    gone(booted, 9)
    assert T.OPENCHANNEL not in booted.host.types()


def test_rescind_open_and_idle(booted: World) -> None:
    """CLOSE, which the host ignores, no teardown, then the release: the host drops the GPADL itself."""
    booted.host.device(9)
    booted.settle()
    booted.host.posted.clear()

    booted.host.rescind(9)
    booted.settle()

    assert booted.host.types() == [T.CLOSECHANNEL, T.RELID_RELEASED]
    gone(booted, 9)
    assert booted.shut_down() == {}


def test_rescind_under_traffic(booted: World) -> None:
    """Packets are on their way both ways, the tasklet is scheduled: it finds no callback any more."""
    booted.host.device(9)
    booted.settle()
    channel = booted.channel(9)
    booted.host.write(9, *[b"x" * 100] * 20)
    booted.host.rescind(9)
    booted.settle()

    gone(booted, 9)
    assert not channel.alive()
    assert booted.shut_down() == {}


def test_rescind_in_close(booted: World) -> None:
    """The closer waits for TORNDOWN under channel_mutex; the host answers it before it forgets the channel."""
    booted.host.device(9)
    booted.settle()
    booted.host.hold(T.GPADL_TEARDOWN)
    task = booted.start(lambda current: vmbus_close(current, booted.channel(9)))
    booted.settle()
    assert not task.ended()

    booted.host.rescind(9)
    booted.host.release(T.GPADL_TEARDOWN)
    booted.settle()

    assert task.ended()
    gone(booted, 9)
    assert booted.shut_down() == {}


def test_rescind_in_close_of_a_host_that_forgets_its_answer(booted: World) -> None:
    """As in the kernel the rescind waits for the closer's mutex: behind the deadline both end, the pages are lost."""
    booted.host.device(9)
    booted.settle()
    booted.host.hold(T.GPADL_TEARDOWN)
    task = booted.start(lambda current: vmbus_close(current, booted.channel(9)))
    booted.settle()
    booted.host.rescind(9)
    booted.pass_time(50)

    assert task.ended()
    gone(booted, 9)
    assert list(booted.shut_down().values()) == [32]


def test_rescind_after_close(booted: World) -> None:
    """A channel that its driver closed goes without a word but the release."""
    booted.host.device(9)
    booted.settle()
    booted.call(lambda current: vmbus_close(current, booted.channel(9)))
    booted.host.posted.clear()

    booted.host.rescind(9)
    booted.settle()

    assert booted.host.types() == [T.RELID_RELEASED]
    gone(booted, 9)


def test_rescind_of_a_device_without_a_driver(booted: World) -> None:
    """Its probe failed; it is unregistered like any other."""
    booted.host.answer[T.OPENCHANNEL] = lambda message: [OpenChannelResult(9, 9, 1)]
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    gone(booted, 9)
    assert booted.tables.devices.in_use == 0


def test_rescind_that_the_driver_handles(booted: World) -> None:
    """With chn_rescind_callback the device stays until the driver unregisters it (hv_sock, uio)."""
    booted.host.device(9)
    booted.settle()
    booted.channel(9).rescind_callback = RESCIND_CALLBACK

    booted.host.rescind(9)
    booted.settle()

    assert CALLED == [9]
    assert booted.host.released == []
    assert booted.shut_down() == {}


# -- twice, for nothing, out of place -------------------------------------------------------------------


def test_rescind_twice(booted: World) -> None:
    """The second one finds the channel claimed, or gone: one release (races.md A6)."""
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(9)
    booted.host.rescind(9)
    booted.settle()

    gone(booted, 9)


@pytest.mark.parametrize("relid", [0, 5, 2047, 2048, 0xFFFFFFFF])
def test_rescind_for_nothing(booted: World, relid: int) -> None:
    """No channel has it: nothing happens, nothing is released."""
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(relid)
    booted.settle()

    assert booted.host.released == []
    assert booted.channel(9).state.load() == ChannelState.OPENED_STATE


def test_rescinds_in_reverse_while_the_first_device_is_opened(booted: World) -> None:
    """9, then 10 offered, 10, then 9 taken back: 10's handler does not keep 9's from waking 9's opener.

    In the kernel it does: it sleeps until 10's probe is done, which is queued behind 9's, which waits for the host.
    """
    booted.host.hold(T.OPENCHANNEL)
    booted.host.device(9)
    booted.host.device(10)
    booted.settle()
    assert booted.channel(9).state.load() == ChannelState.OPENING_STATE
    booted.host.rescind(10)
    booted.settle()
    assert booted.host.released == []
    booted.host.rescind(9)
    booted.settle()

    gone(booted, 9, 10)
    assert booted.shut_down() == {}


def test_reoffer_of_the_same_relid(booted: World) -> None:
    """RESCIND, release, OFFER with the same id: a new channel, not the old one."""
    booted.host.device(9)
    booted.settle()
    old = booted.channel(9)
    for _ in range(3):
        booted.host.rescind(9)
        booted.settle()
        del booted.host.channels[9]
        booted.host.device(9)
        booted.settle()

    new = booted.channel(9)
    assert booted.host.released == [9, 9, 9]
    assert (old.alive(), new.state.load()) == (False, ChannelState.OPENED_STATE)
    assert booted.shut_down() == {}


def test_hot_add_and_hot_remove_of_one_device_a_hundred_times(booted: World) -> None:
    """As often as one likes: each time opened, each time released once."""
    for _ in range(100):
        booted.host.device(9)
        booted.settle()
        assert booted.channel(9).state.load() == ChannelState.OPENED_STATE
        booted.host.rescind(9)
        booted.settle()
        del booted.host.channels[9]

    assert booted.host.released == [9] * 100
    assert booted.shut_down() == {}


def test_offers_and_rescinds_are_ignored_while_suspending(booted: World) -> None:
    """ignore_any_offer_msg: both are dropped in the tasklet, and the offer is not counted."""
    booted.host.device(9)
    booted.settle()
    booted.tables.connection.ignore_any_offer_msg.store(1)
    booted.host.device(10)
    booted.host.rescind(9)
    booted.settle()

    assert booted.tables.connection.offer_in_progress.load() == 0
    assert list(booted.tables.relids.published()) == [9]
    assert booted.tables.work.in_use == 0


def test_messages_that_come_after_the_end_are_ignored(booted: World) -> None:
    """Disconnected: an offer that was queued is not handled, and is not in progress for ever."""
    booted.call(lambda current: current.connection.conn_state.store(0))
    booted.host.device(9)
    booted.host.rescind(9)
    booted.settle()

    assert booted.tables.relids.published() == {}
    assert booted.tables.connection.offer_in_progress.load() == 0
    assert booted.call(vmbus_connect) == 0
    booted.call(vmbus_request_offers)


# -- sub-channels ---------------------------------------------------------------------------------------


@pytest.fixture
def primary(booted: World) -> Channel:
    """An open primary, relid 9, whose driver is told of sub-channels."""
    booted.host.device(9)
    booted.settle()
    channel = booted.channel(9)
    channel.sc_creation_callback = SUB_CREATED
    return channel


def test_sub_channels_are_told_to_the_driver(booted: World, primary: Channel) -> None:
    """In the order of their offers, ready to be opened; they count for a suspend."""
    subs = add_subs(booted)

    assert CALLED == [10, 11]
    assert list(booted.tables.sc_list(primary)) == subs
    assert [sub.state.load() for sub in subs] == [ChannelState.OPEN_STATE] * 2
    assert [sub.probe_done.load() for sub in subs] == [1, 1]
    assert booted.tables.connection.nr_chan_close_on_suspend.load() == 2


def test_closed_sub_channel_is_removed_by_its_rescind(booted: World, primary: Channel) -> None:
    """The primary stays."""
    add_subs(booted)
    booted.host.rescind(11)
    booted.settle()

    gone(booted, 11)
    assert [sub.relid for sub in booted.tables.sc_list(primary)] == [10]
    assert booted.tables.connection.nr_chan_close_on_suspend.load() == 1


def test_open_sub_channel_is_removed_by_its_closer(booted: World, primary: Channel) -> None:
    """Its rescind only says so; when the primary closes, the sub-channel is closed, freed and released."""
    primary.sc_creation_callback = OPEN_SUB
    (sub,) = add_subs(booted, 1)
    assert (CALLED, sub.state.load()) == ([0], ChannelState.OPENED_STATE)
    booted.host.rescind(10)
    booted.settle()
    assert booted.host.released == []
    assert sub.rescind_event.done == 1

    booted.call(lambda current: vmbus_close(current, primary))

    gone(booted, 10)


def test_primary_closes_its_sub_channels(booted: World, primary: Channel) -> None:
    """Subs first, each closed and torn down; they stay known, closed, until the host rescinds them."""
    primary.sc_creation_callback = OPEN_SUB
    subs = add_subs(booted)
    booted.host.posted.clear()

    booted.call(lambda current: vmbus_close(current, primary))

    assert booted.host.types() == [T.CLOSECHANNEL, T.GPADL_TEARDOWN] * 3
    assert [sub.state.load() for sub in subs] == [ChannelState.OPEN_STATE] * 2
    assert list(booted.tables.sc_list(primary)) == subs
    for relid in (10, 11):
        booted.host.rescind(relid)
    booted.settle()
    gone(booted, 10, 11)


def test_device_goes_with_open_sub_channels(booted: World, primary: Channel) -> None:
    """The host rescinds the subs, then the primary: everything is released, each once."""
    primary.sc_creation_callback = OPEN_SUB
    add_subs(booted, 3)
    for relid in (10, 11, 12, 9):
        booted.host.rescind(relid)
    booted.settle()

    gone(booted, 9, 10, 11, 12)
    assert booted.tables.connection.nr_chan_close_on_suspend.load() == 0
    assert booted.shut_down() == {}


def test_host_that_takes_the_primary_back_first(booted: World, primary: Channel) -> None:
    """Out of order: the subs are closed with the primary, and go when their rescinds come."""
    primary.sc_creation_callback = OPEN_SUB
    add_subs(booted)
    for relid in (9, 11, 10):
        booted.host.rescind(relid)
    booted.settle()

    gone(booted, 9, 10, 11)
    assert booted.shut_down() == {}


def test_sub_channel_whose_open_is_cut_off(booted: World, primary: Channel) -> None:
    """Its rescind wakes the opener in the callback, waits for the callback, and removes it itself."""
    primary.sc_creation_callback = OPEN_SUB
    booted.host.hold(T.OPENCHANNEL)
    booted.host.device(10, instance=9, index=1)
    booted.settle()
    booted.host.rescind(10)
    booted.settle()

    assert CALLED == [-19]
    gone(booted, 10)


@pytest.mark.parametrize("first", ["rescind", "torn down"])
def test_closer_and_rescind_of_a_sub_channel_meet(booted: World, primary: Channel, first: str) -> None:
    """The closer waits for the sub's TORNDOWN when its rescind comes: one of the two removes it, once."""
    primary.sc_creation_callback = OPEN_SUB
    add_subs(booted)
    booted.host.hold(T.GPADL_TEARDOWN)
    task = booted.start(lambda current: vmbus_close(current, primary))
    booted.settle()
    assert not task.ended()
    if first == "torn down":
        booted.host.release(T.GPADL_TEARDOWN)
    for relid in (10, 11, 9):
        booted.host.rescind(relid)
    if first == "rescind":
        booted.host.release(T.GPADL_TEARDOWN)
    booted.settle()

    assert task.ended()
    gone(booted, 9, 10, 11)
    assert booted.shut_down() == {}


def test_sub_channel_of_a_primary_that_went_is_given_back(booted: World, primary: Channel) -> None:
    """Its offer was queued when the primary was removed: no device to hang it on, released once."""
    booted.host.device(10, instance=9, index=1)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn("WORK")
    booted.host.rescind(9)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn(booted.rescind_worker)
    booted.settle()

    assert sorted(booted.host.released) == [9, 10]
    assert CALLED in ([], [10])
    assert booted.shut_down() == {}


def test_closer_does_not_wait_for_a_sub_channel_that_is_queued(booted: World, primary: Channel) -> None:
    """Its offer is queued behind another device's sub-channel, whose rescind is queued behind this closer."""
    primary.sc_creation_callback = OPEN_SUB
    booted.host.device(8)
    booted.settle()
    booted.channel(8).sc_creation_callback = OPEN_SUB
    booted.host.hold(T.OPENCHANNEL)
    booted.host.device(30, instance=8, index=1)
    booted.host.device(10, instance=9, index=1)
    booted.settle()
    assert booted.channel(30).state.load() == ChannelState.OPENING_STATE
    assert booted.channel(10).state.load() == ChannelState.OFFER_STATE
    for relid in (10, 9, 30, 8):
        booted.host.rescind(relid)
    booted.settle()

    gone(booted, 8, 9, 10, 30)
    assert booted.shut_down() == {}


def test_sub_channels_left_by_the_host_go_at_the_end(booted: World, primary: Channel) -> None:
    """A host that rescinds nothing: module unload removes open and closed ones alike."""
    primary.sc_creation_callback = OPEN_SUB
    add_subs(booted)
    booted.host.statuses.clear()

    assert booted.shut_down() == {}
    gone(booted, 9, 10, 11)


def test_post_that_fails_in_a_removal_changes_nothing(booted: World) -> None:
    """RELID_RELEASED may not get through: the guest has forgotten the channel all the same."""
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(9)
    booted.host.statuses.extend([HvStatus.SUCCESS, HvStatus.ACCESS_DENIED])
    booted.settle()

    assert booted.host.released == []
    assert booted.tables.channels.in_use == 0
