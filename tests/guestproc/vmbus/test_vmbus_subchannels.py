"""Sub-channels from asking to release: offers in any order, hosts that break their word, removal at any moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from uuid import UUID

import pytest

from emu.ring import Packet
from emu.wire.device_classes import ECHO, NETLIKE
from emu.wire.messages import CloseChannel, Message, MessageType
from emu.wire.packets import VM_PKT_COMP, VM_PKT_DATA_INBAND
from emu.wire.subchannel_request import (
    ECHO_USERDATA,
    SubchannelStatus,
    pack_completion,
    pack_request,
    parse_request,
)
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver
from guestproc.drivers.subchannels import wait_for_subchannels
from guestproc.kernel.layout import ChannelState
from guestproc.vmbus.device import vmbus_driver_register, vmbus_driver_unregister
from guestproc.vmbus.packets import vmbus_sendpacket
from tests.guestproc.conftest import HOST_VERSIONS
from tests.guestproc.world import Task, World, new_world

T = MessageType
PRIMARY = 9
FIRST_SUB = 20
CLASSES = {"echo": ECHO.guid, "netlike": NETLIKE.guid}


class Device:
    """The host's side of one device with sub-channels; `order` are the indices that it offers when it is asked."""

    def __init__(
        self,
        world: World,
        *,
        order: Iterable[int] = (1, 2, 3),
        early: bool = False,
        granted: int | None = None,
        status: SubchannelStatus = SubchannelStatus.SUCCESS,
        silent: bool = False,
        class_name: str = "echo",
    ) -> None:
        self.world = world
        self.order = list(order)
        self.early = early
        self.completion = pack_completion(status, len(self.order) if granted is None else granted)
        self.silent = silent
        self.class_id = CLASSES[class_name]
        self.asked: list[int] = []
        self.subs: list[int] = []
        self.next_relid = FIRST_SUB
        world.host.on_packet[PRIMARY] = self._on_packet
        world.host.answer[T.CLOSECHANNEL] = self._on_close

    def appear(self) -> None:
        """Offer the primary."""
        self.world.host.device(PRIMARY, class_id=self.class_id)
        self.world.settle()

    def rescind(self) -> None:
        """Take the device back as a host does: sub-channels first."""
        for relid in [*self.subs, PRIMARY]:
            self.world.host.rescind(relid)
        self.subs = []

    def offer(self, *indices: int) -> list[int]:
        """Offer sub-channels; their relids."""
        relids = range(self.next_relid, self.next_relid + len(indices))
        self.next_relid += len(indices)
        for relid, index in zip(relids, indices, strict=True):
            self.world.host.device(relid, instance=PRIMARY, index=index, class_id=self.class_id)
        self.subs += relids
        return list(relids)

    def _on_packet(self, packet: Packet) -> list[Packet]:
        _kind, flags, trans_id, payload = packet
        if payload[:4] != pack_request(1)[:4]:
            return [(VM_PKT_COMP if flags and trans_id else VM_PKT_DATA_INBAND, 0, trans_id, payload)]
        self.asked.append(parse_request(payload))
        if self.silent:
            return []
        self.offer(*self.order)
        if self.early:
            # The offers are on their way before the completion is written.
            while self.world.host.outbox:
                self.world.host.step()
        return [(VM_PKT_COMP, 0, trans_id, self.completion)]

    def _on_close(self, message: Message) -> list[Message]:
        """What the host does by itself when a primary closes: it takes the sub-channels back."""
        assert isinstance(message, CloseChannel)
        host = self.world.host
        if host.channels[message.child_relid].revoked:
            return []
        host._close(host.channels[message.child_relid])
        if message.child_relid == PRIMARY:
            for relid in self.subs:
                host.rescind(relid)
            self.subs = []
        return []


def world_with(class_name: str, subchannels: int, era: str) -> Iterator[World]:
    """A booted guest whose scenario gives the device of instance 9 so many sub-channels."""
    with new_world(era=era, versions=HOST_VERSIONS[era]) as world:
        world.machine.config["device"] = [
            {"class": class_name, "instance": str(UUID(int=PRIMARY)), "subchannels": subchannels, "ring_pages": 2}
        ]
        world.boot()
        yield world


@pytest.fixture(params=["echo", "netlike"])
def class_name(request: pytest.FixtureRequest) -> str:
    """Both drivers do it in the same way."""
    name: str = request.param
    return name


@pytest.fixture(params=["current", "seed"])
def era(request: pytest.FixtureRequest) -> str:
    """And in both kernels."""
    name: str = request.param
    return name


@pytest.fixture
def three(class_name: str, era: str) -> Iterator[World]:
    """The device asks for three."""
    yield from world_with(class_name, 3, era)


@pytest.fixture
def echo(era: str) -> Iterator[World]:
    """The same, an echo device."""
    yield from world_with("echo", 3, era)


def driver_of(class_name: str) -> HvDriver:
    """The driver that takes devices of the class."""
    return DRIVER_OBJECTS[{"echo": 1, "netlike": 2}[class_name]]


def opened(world: World) -> dict[int, int]:
    """Relid of each open sub-channel by index (the newest of an index)."""
    primary = world.channel(PRIMARY)
    return {
        sub.sub_channel_index: sub.relid
        for sub in world.tables.sc_list(primary)
        if sub.state.load() == ChannelState.OPENED_STATE
    }


def nothing_left(world: World, *relids: int) -> None:
    """Each relid was released once, and every record went."""
    assert sorted(world.host.released) == sorted(relids)
    assert world.tables.net_channels.in_use == world.tables.devices.in_use == world.tables.channels.in_use == 0
    assert world.refused() == {}
    assert world.shut_down() == {}


def echo_all(world: World) -> None:
    """A packet through every open channel of the device reaches the host and brings an interrupt back."""
    channels = [world.channel(relid) for relid in (PRIMARY, *opened(world).values())]
    before = [channel.interrupts for channel in channels]
    for channel in channels:
        assert world.call(lambda current, c=channel: vmbus_sendpacket(current, c, bytes(64))) == 0  # type: ignore[misc]
    assert all(channel.interrupts > count for channel, count in zip(channels, before, strict=True))


# -- the ordinary way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["offers after", "offers before"])
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)], ids=str)
def test_offers_in_any_order(three: World, class_name: str, order: tuple[int, ...], early: bool) -> None:
    """Before or after the completion, whatever index first: each is opened, and all of them carry packets."""
    device = Device(three, order=order, early=early, class_name=class_name)
    device.appear()

    assert device.asked == [3]
    assert opened(three) == {index: FIRST_SUB + place for place, index in enumerate(order)}
    assert three.channel(PRIMARY).probe_done.load() == 1
    if class_name == "echo":
        echo_all(three)
    device.rescind()
    three.settle()
    nothing_left(three, PRIMARY, *range(FIRST_SUB, FIRST_SUB + 3))


def test_the_request_is_announced_and_first(echo: World) -> None:
    """The user data of the primary's OPENCHANNEL say so; a sub-channel's say nothing."""
    Device(echo).appear()

    primary, sub = echo.host.channels[PRIMARY].opened, echo.host.channels[FIRST_SUB].opened
    assert primary is not None and primary.userdata.startswith(ECHO_USERDATA)
    assert sub is not None and sub.userdata == bytes(120)


def test_channels_of_one_device_are_spread_over_the_processors(three: World, class_name: str) -> None:
    """Two processors, four channels: each takes the interrupts of some."""
    Device(three, class_name=class_name).appear()

    channels = [three.channel(relid) for relid in (PRIMARY, *opened(three).values())]
    assert {channel.target_cpu.load() for channel in channels} == {0, 1}


def test_five_channels_opened_and_closed_five_times_reuse_their_flags(class_name: str, era: str) -> None:
    """The driver comes and goes; the host gives the same relids again, and nothing piles up."""
    for world in world_with(class_name, 4, era):
        device = Device(world, order=(4, 2, 1, 3), class_name=class_name)
        device.appear()
        pages = world.tables.pages.in_use_by_owner()
        for life in range(1, 6):
            assert len(opened(world)) == 4
            assert device.asked == [4] * life
            if life == 5:
                break
            world.call(lambda current: vmbus_driver_unregister(current, driver_of(class_name)))
            assert sorted(world.host.released) == sorted([*range(FIRST_SUB, FIRST_SUB + 4)] * life)
            device.next_relid = FIRST_SUB
            for relid in range(FIRST_SUB, FIRST_SUB + 4):
                del world.host.channels[relid]
            world.call(lambda current: vmbus_driver_register(current, driver_of(class_name)))
            world.settle()
        assert world.tables.pages.in_use_by_owner() == pages
        device.rescind()
        world.settle()
        nothing_left(world, *[*range(FIRST_SUB, FIRST_SUB + 4)] * 5, PRIMARY)


def test_a_machine_of_one_processor_asks_for_none() -> None:
    """A NIC has as many channels as processors: one is the primary."""
    with new_world(cpus=1) as world:
        world.boot()
        device = Device(world, class_name="netlike")
        device.appear()

        assert device.asked == []
        assert world.channel(PRIMARY).state.load() == ChannelState.OPENED_STATE


# -- hosts that do not keep their word --------------------------------------------------------------------


@pytest.mark.parametrize("status", [SubchannelStatus.INVALID, SubchannelStatus.UNSUPPORTED])
def test_a_refusal_leaves_one_channel(three: World, class_name: str, status: SubchannelStatus) -> None:
    """It is logged, and the device works."""
    Device(three, order=(), status=status, class_name=class_name).appear()

    assert opened(three) == {}
    assert any(f"refused with status {int(status)}" in line for line in three.log)
    assert three.channel(PRIMARY).probe_done.load() == 1


def test_a_completion_that_makes_no_sense_is_refused(three: World, class_name: str) -> None:
    """More than 64 granted: counted, and the device works with its one channel."""
    device = Device(three, order=(), class_name=class_name)
    device.completion = pack_completion(SubchannelStatus.SUCCESS, 65)
    device.appear()

    assert three.refused() == {"subchannel-request": 1}
    assert three.channel(PRIMARY).probe_done.load() == 1


def boot_wait(world: World) -> Task[None]:
    """Wait as a machine does that boots."""
    task = world.start(wait_for_subchannels)
    world.settle()
    return task


def test_a_host_that_never_answers_holds_up_nobody(three: World, class_name: str) -> None:
    """The probe ends; who waits for a whole machine does so until a deadline."""
    Device(three, silent=True, class_name=class_name).appear()
    assert three.channel(PRIMARY).probe_done.load() == 1
    task = boot_wait(three)
    assert not task.ended()
    three.pass_time(10)

    assert task.ended()
    assert any("1 device has not got the sub-channels" in line for line in three.log)


def test_a_host_that_never_offers_what_it_granted_holds_up_nobody(three: World, class_name: str) -> None:
    """The same; and the sub-channels that came are used."""
    Device(three, order=(2, 1), granted=3, class_name=class_name).appear()
    assert three.channel(PRIMARY).probe_done.load() == 1
    task = boot_wait(three)
    assert not task.ended()
    three.pass_time(10)

    assert task.ended()
    assert any("1 device has not got the sub-channels" in line for line in three.log)
    assert sorted(opened(three)) == [1, 2]


def test_a_booting_machine_waits_for_the_last_sub_channel(three: World, class_name: str) -> None:
    """And no longer; nor for a device that goes meanwhile."""
    device = Device(three, order=(2, 1), granted=3, class_name=class_name)
    device.appear()
    task = boot_wait(three)
    assert not task.ended()
    device.offer(3)
    three.settle()
    assert task.ended() and boot_wait(three).ended()

    device.rescind()
    three.settle()
    assert boot_wait(three).ended()


def test_an_offer_that_comes_late_is_opened_all_the_same(three: World, class_name: str) -> None:
    """The driver's callback is set for as long as the primary is open."""
    device = Device(three, order=(1,), granted=2, class_name=class_name)
    device.appear()
    device.offer(2)
    three.settle()

    assert sorted(opened(three)) == [1, 2]
    device.rescind()
    three.settle()
    nothing_left(three, PRIMARY, FIRST_SUB, FIRST_SUB + 1)


def test_the_same_index_twice_is_two_channels(three: World, class_name: str) -> None:
    """As in the kernel, nobody compares indices: both are opened, and both are released."""
    device = Device(three, order=(1, 1, 2), class_name=class_name)
    device.appear()

    primary = three.channel(PRIMARY)
    assert [sub.sub_channel_index for sub in three.tables.sc_list(primary)] == [1, 1, 2]
    assert {sub.state.load() for sub in three.tables.sc_list(primary)} == {ChannelState.OPENED_STATE}
    device.rescind()
    three.settle()
    nothing_left(three, PRIMARY, *range(FIRST_SUB, FIRST_SUB + 3))


def test_a_sub_channel_without_a_primary_is_a_primary(three: World, class_name: str) -> None:
    """As in the kernel: a device of its own, which is opened, and which asks for nothing."""
    device = Device(three, class_name=class_name)
    device.offer(2)
    three.settle()

    channel = three.channel(FIRST_SUB)
    assert (channel.primary_channel, channel.state.load()) == (0, ChannelState.OPENED_STATE)
    assert device.asked == []
    three.host.rescind(FIRST_SUB)
    three.settle()
    nothing_left(three, FIRST_SUB)


# -- taken away -------------------------------------------------------------------------------------------


def test_a_sub_channel_rescinded_alone_stays_until_its_primary_goes(three: World, class_name: str) -> None:
    """Open, it is left to whoever closes it, as in the kernel; nothing is lost or released twice."""
    device = Device(three, class_name=class_name)
    device.appear()
    three.host.rescind(FIRST_SUB + 1)
    device.subs.remove(FIRST_SUB + 1)
    three.settle()
    assert three.host.released == []

    device.rescind()
    three.settle()

    nothing_left(three, PRIMARY, *range(FIRST_SUB, FIRST_SUB + 3))


@pytest.mark.parametrize("subs_first", [True, False], ids=["subs first", "primary first"])
@pytest.mark.parametrize("held", [T.GPADL_HEADER, T.OPENCHANNEL], ids=["in gpadl", "in open"])
def test_primary_rescinded_while_its_sub_channels_open(
    three: World, class_name: str, held: MessageType, subs_first: bool
) -> None:
    """The host goes silent in the middle of an opening and takes everything back, in either order."""
    device = Device(three, class_name=class_name)

    def hold_back(message: Message) -> list[Message]:
        return [] if getattr(message, "child_relid", 0) >= FIRST_SUB else three.host._default(message)

    three.host.answer[held] = hold_back
    device.appear()
    assert three.channel(FIRST_SUB).state.load() == ChannelState.OPENING_STATE
    relids = [*device.subs, PRIMARY] if subs_first else [PRIMARY, *device.subs]
    for relid in relids:
        three.host.rescind(relid)
    three.settle()

    nothing_left(three, PRIMARY, *range(FIRST_SUB, FIRST_SUB + 3))


@pytest.mark.parametrize("rescinded", [True, False], ids=["rescinded", "opened after all"])
def test_driver_removed_while_a_sub_channel_opens(three: World, class_name: str, rescinded: bool) -> None:
    """Its rescind cuts the opening off; or it opens, and who opened it closes it, as the remover has passed by."""
    device = Device(three, order=(1,), granted=2, class_name=class_name)
    device.appear()
    three.host.hold(T.OPENCHANNEL)
    (late,) = device.offer(2)
    three.settle()
    if not rescinded:
        device.subs.remove(late)
    removed = three.start(lambda current: vmbus_driver_unregister(current, driver_of(class_name)))
    three.settle()
    assert removed.ended() is rescinded
    three.host.release(T.OPENCHANNEL)
    three.settle()

    assert removed.ended()
    assert three.host.channels[late].opens == (0 if rescinded else 1)
    if not rescinded:
        assert three.channel(late).state.load() == ChannelState.OPEN_STATE
        assert three.host.posted[-2:] == [CloseChannel(late), three.host.posted[-1]]
        three.host.rescind(late)
        three.settle()
    assert sorted(three.host.released) == [FIRST_SUB, late]
    assert three.tables.net_channels.in_use == 0
    assert three.channel(PRIMARY).state.load() == ChannelState.OPEN_STATE
    assert three.shut_down() == {}


def test_unload_takes_all_of_them(three: World, class_name: str) -> None:
    """A host that has not yet rescinded them: every record goes, no page is left."""
    Device(three, class_name=class_name).appear()

    assert three.shut_down() == {}
