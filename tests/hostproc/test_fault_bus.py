"""A bus that is told what is to go wrong: each fault's effect on the guest's messages and rings."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.errors import ProtocolViolation
from emu.fault_plan import FaultPlan, Faults, PlannedFault
from emu.faults import STATUS_UNSUCCESSFUL, parse
from emu.gpadl import MapBudget
from emu.memory import PAGE_SIZE
from emu.wire.messages import (
    CloseChannel,
    GpadlCreated,
    OfferChannel,
    OpenChannelResult,
    RescindChannelOffer,
    gpadl_messages,
)
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from emu.wire.ring_layout import WRITE_INDEX
from hostproc.bus import Bus
from hostproc.devices.channel import HostChannel
from hostproc.devices.fault_channel import EARLY_DATA, UNUSED_ID, FaultyChannel
from hostproc.fault_bus import LOOK_AGAIN_NS, FaultyBus
from hostproc.protocol.server import Server
from tests.emu.bare_control import bare_control
from tests.hostproc.test_bus import HALF, RING, RING_PFN, Guest

MS = 1_000_000
OPENED = OpenChannelResult(1, 1, 0)


class FaultyGuest(Guest):
    """A guest of a host with faults, and the host's timers, which `pass_time` lets come."""

    def __init__(self, *faults: str, packets: bool = True) -> None:
        self.plan = FaultPlan(control := bare_control())
        for fault in faults:
            self.plan.add(parse(fault))
        self.faults = Faults(control)
        self.now_ns = 0
        self.packets = packets
        self.timers: list[tuple[int, Callable[[], None]]] = []
        super().__init__()

    def make_bus(self, server: Server, budget: MapBudget | None) -> Bus:
        """Make the bus that has faults."""
        self.faulty = FaultyBus(server, self.partition, self.partition, self.memory, budget=budget)
        self.faulty.arm(
            self.faults,
            call_later=lambda ns, action: self.timers.append((self.now_ns + ns, action)),
            now=lambda: self.now_ns,
            packets=self.packets,
        )
        return self.faulty

    def turn_on(self, text: str) -> PlannedFault:
        """Turn a fault on now."""
        return self.plan.add(parse(text))

    def pass_time(self, ns: int) -> None:
        """Let machine time pass: timers, then tasks."""
        self.now_ns += ns
        due = [action for at, action in self.timers if at <= self.now_ns]
        self.timers = [(at, action) for at, action in self.timers if at > self.now_ns]
        for action in due:
            action()
        self.partition.run()

    def hits(self) -> list[int]:
        """How often each fault struck."""
        return [row.hits for row in self.plan.rows()]

    def ask(self, *payloads: bytes) -> list[tuple[int, int]]:
        """Send packets that ask for completions; type and transaction id of what comes back."""
        for number, payload in enumerate(payloads, 1):
            if self.out.write(payload, number, COMPLETION_REQUESTED):
                self.doorbell()
        self.partition.run()
        return [(packet[0], packet[2]) for packet in self.inbound.drain()]


# -- replies ----------------------------------------------------------------------------------------------


def test_dropped_reply_never_comes() -> None:
    """The host is open, the guest is told nothing; the next one is told."""
    guest = FaultyGuest("reply.drop@kind=openchannel_result,times=1")
    guest.boot()

    assert guest.open() == []
    assert guest.bus.channel(guest.keys[0]) is not None
    assert guest.post(CloseChannel(1)) == []
    assert guest.open()[-1] == OPENED
    assert guest.hits() == [1]


def test_doubled_reply_comes_twice() -> None:
    """The same message, one behind the other."""
    guest = FaultyGuest("reply.dup@kind=openchannel_result,relid=1")
    guest.boot()

    assert guest.open() == [OPENED, OPENED]


def test_held_reply_comes_when_its_time_has_passed() -> None:
    """Not before, and others overtake it."""
    guest = FaultyGuest("reply.hold=5ms@kind=openchannel_result")
    guest.boot()
    assert guest.open() == [] and guest.faulty.held == 1
    guest.pass_time(4 * MS)
    assert guest.sent() == []
    guest.pass_time(1 * MS)

    assert guest.sent() == [OPENED] and guest.faulty.held == 0


@pytest.mark.parametrize("watched", [True, False])
def test_held_reply_comes_when_its_fault_is_turned_off(watched: bool) -> None:
    """At once where the loop watches the plan; else soon."""
    guest = FaultyGuest()
    hold = guest.turn_on("reply.hold@kind=openchannel_result")
    guest.boot()
    guest.open()
    guest.pass_time(10 * LOOK_AGAIN_NS)
    assert guest.sent() == []
    guest.plan.off(hold)
    if watched:
        guest.faulty.plan_changed()
    else:
        guest.pass_time(LOOK_AGAIN_NS)

    assert guest.sent() == [OPENED]


def test_what_is_held_for_a_guest_that_is_gone_is_dropped() -> None:
    """Its successor gets none of it."""
    guest = FaultyGuest("reply.hold=5ms@kind=openchannel_result")
    guest.boot()
    guest.open()
    guest.bus.guest_gone()
    guest.pass_time(5 * MS)

    assert guest.sent() == []


# -- refusals and offers ----------------------------------------------------------------------------------


def test_gpadl_is_refused_with_the_status_that_was_asked_for() -> None:
    """Only that one; its pages are the guest's again."""
    guest = FaultyGuest("host.refuse=gpadl@status=0xc000009a,nth=1")
    guest.boot()

    created = guest.post(*gpadl_messages(1, RING, range(RING_PFN, RING_PFN + 4)))

    assert created == [GpadlCreated(1, RING, 0xC000_009A)]
    assert guest.bus.server.summary().gpadls == 0
    assert guest.open() == [OPENED]


def test_opening_is_refused() -> None:
    """By class: the guest is told no, the channel can be opened again."""
    guest = FaultyGuest("host.refuse=open@class=echo,times=1")
    guest.boot()

    assert guest.open() == [OpenChannelResult(1, 1, STATUS_UNSUCCESSFUL)]
    assert guest.bus.channel(guest.keys[0]) is None
    assert guest.hits() == [1]


def test_rescind_comes_twice() -> None:
    """Two messages for one relid."""
    guest = FaultyGuest("host.dup_rescind")
    guest.boot()
    guest.bus.remove(guest.keys[0])

    assert guest.sent() == [RescindChannelOffer(1), RescindChannelOffer(1)]


def test_relid_is_offered_to_two_devices() -> None:
    """The second offer differs in its instance alone."""
    guest = FaultyGuest("host.dup_relid")
    first, second = [one for one in guest.boot() if isinstance(one, OfferChannel)]

    assert first.child_relid == second.child_relid == 1
    assert first.if_type == second.if_type and first.if_instance != second.if_instance


# -- devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "forged"),
    [
        ("vsp.complete_twice@nth=2", [(VM_PKT_COMP, 2)]),
        ("vsp.complete_zero@nth=1", [(VM_PKT_COMP, 0)]),
        ("vsp.complete_unsent@nth=1", [(VM_PKT_COMP, UNUSED_ID)]),
        ("vsp.complete_unsent=0x77@nth=1,times=2", [(VM_PKT_COMP, 0x77)] * 2),
    ],
)
def test_completions_are_forged(fault: str, forged: list[tuple[int, int]]) -> None:
    """Beside the honest ones, which all come."""
    guest = FaultyGuest(fault)
    guest.boot()
    guest.open()
    came = guest.ask(b"one", b"two")

    for one in forged:
        came.remove(one)
    assert came == [(VM_PKT_COMP, 1), (VM_PKT_COMP, 2)]


def test_answers_that_are_no_completions_are_not_forged() -> None:
    """A fault of completions has no occasion there."""
    guest = FaultyGuest("vsp.complete_twice", "vsp.complete_zero")
    guest.boot()
    guest.open()

    assert guest.echo(b"12345678") == [b"12345678"]
    assert guest.hits() == [0, 0]


def test_forgotten_packet_is_never_answered() -> None:
    """The others are."""
    guest = FaultyGuest("vsp.forget_inflight@nth=2")
    guest.boot()
    guest.open()

    assert guest.ask(b"one", b"two", b"three") == [(VM_PKT_COMP, 1), (VM_PKT_COMP, 3)]


def test_device_writes_before_it_is_open() -> None:
    """A packet is in the ring when OPENCHANNEL_RESULT comes, and its signal was given."""
    guest = FaultyGuest("vsp.early_data")
    guest.boot()

    assert guest.open() == [OPENED]
    assert guest.partition.events[0].signals == 1
    assert [packet[3][: len(EARLY_DATA)] for packet in guest.inbound.drain()] == [EARLY_DATA]


def test_stalled_device_does_nothing_for_its_time() -> None:
    """Whoever rings; then it works off what came."""
    guest = FaultyGuest()
    guest.boot()
    guest.open()
    guest.partition.run()
    guest.turn_on("vsp.stall=5ms@times=1")

    assert guest.ask(b"one") == []
    guest.doorbell()
    guest.pass_time(4 * MS)
    assert list(guest.inbound.drain()) == []
    guest.pass_time(1 * MS)

    assert [packet[2] for packet in guest.inbound.drain()] == [1]


def test_stalled_device_goes_on_when_it_is_let() -> None:
    """Without a time it stalls until the fault is turned off; a close ends it, too."""
    guest = FaultyGuest()
    stall = guest.turn_on("vsp.stall")
    guest.boot()
    guest.open()
    assert guest.ask(b"one") == []
    guest.plan.off(stall)
    guest.faulty.plan_changed()
    guest.partition.run()
    assert [packet[2] for packet in guest.inbound.drain()] == [1]
    guest.turn_on("vsp.stall")
    guest.ask(b"two")

    assert guest.post(CloseChannel(1)) == []
    assert guest.bus.channel(guest.keys[0]) is None


def test_turned_on_later_a_forged_completion_comes_at_once() -> None:
    """On a channel on which nothing happens."""
    guest = FaultyGuest()
    guest.boot()
    guest.open()
    guest.partition.run()
    guest.turn_on("vsp.complete_unsent=5")
    for channel in guest.faulty.faulty_channels():
        channel.send_unasked()

    assert [(packet[0], packet[2]) for packet in guest.inbound.drain()] == [(VM_PKT_COMP, 5)]


# -- rings ------------------------------------------------------------------------------------------------


def test_packet_changes_in_the_ring() -> None:
    """The byte at this offset of the newest packet, its descriptor included, wherever in the ring that lies."""
    guest = FaultyGuest()
    guest.boot()
    guest.open()
    size = (HALF - 1) * PAGE_SIZE
    for _ in range(size // 4_096 + 1):
        assert guest.echo(bytes(4_064)) == [bytes(4_064)]
    guest.turn_on("host.mutate_pkt=17:0xee")

    assert guest.echo(b"12345678") == [b"1\xee345678"]
    assert guest.hits() == [1]


def test_change_of_a_packet_waits_for_one() -> None:
    """Turned on while the host has written nothing into a ring that is in use, it is not used up by that."""
    guest = FaultyGuest("vsp.forget_inflight@times=1")
    guest.boot()
    guest.open()
    assert guest.echo(b"is taken") == []
    guest.turn_on("host.mutate_pkt=17:0xee@times=1")
    for channel in guest.faulty.faulty_channels():
        channel.mutate()
    assert guest.hits() == [1, 0]

    assert guest.echo(b"12345678") == [b"1\xee345678"]
    assert guest.echo(b"12345678") == [b"12345678"]
    assert guest.hits() == [1, 1]


def test_index_changes_in_the_ring() -> None:
    """An impossible one is found by the guest; the device's next packet puts it right."""
    guest = FaultyGuest()
    guest.boot()
    guest.open()
    guest.echo(b"12345678")
    guest.turn_on("host.mutate_index=0xffff0@times=1")
    with pytest.raises(ProtocolViolation):
        guest.echo(b"12345678")

    at = (RING_PFN + HALF) * PAGE_SIZE + WRITE_INDEX
    assert guest.memory.atomics.load_u32(at) == 0xFFFF0
    guest.out.write(b"abcdefgh")
    guest.doorbell()
    guest.partition.run()
    assert guest.memory.atomics.load_u32(at) == 3 * 32


# -- what it costs ----------------------------------------------------------------------------------------


def test_machine_without_faults_has_plain_channels() -> None:
    """Their task is the plain one, too: nothing is looked for where packets pass."""
    guest = FaultyGuest("vsp.complete_twice", packets=False)
    guest.boot()
    guest.open()
    channel = guest.bus.channel(guest.keys[0])

    assert type(channel) is HostChannel and not isinstance(channel, FaultyChannel)
    assert guest.ask(b"one") == [(VM_PKT_COMP, 1)]
    assert guest.partition.started[0]._body.gi_code.co_qualname == "Bus._run"  # type: ignore[attr-defined]
