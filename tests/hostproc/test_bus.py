"""The bus with a fake partition and loop: effects carried out, devices run, room waited for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from uuid import UUID

import pytest

from emu.control import POINT_BYTES
from emu.errors import OutOfMemory, ProtocolViolation
from emu.gpadl import MapBudget
from emu.memory import PAGE_SIZE, GuestMemory
from emu.mirror import Left
from emu.ring import RingConsumer, RingMemory, RingProducer
from emu.switches import ALL_FIXED, Fix
from emu.syncpoint import Point
from emu.tracing import E_GPADL_ADD, OneByOne
from emu.wire.gpa_range import GpaRange, pack_gpa_ranges
from emu.wire.messages import (
    STATUS_UNSUCCESSFUL,
    VP_INDEX_DISABLE_INTERRUPT,
    CloseChannel,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    TlConnectRequest,
    TlConnectResult,
    Unload,
    gpadl_messages,
    parse,
)
from emu.wire.versions import VERSION_COPPER, VERSION_WIN7, VERSION_WIN10_V5_3, VERSION_WS2008, version_text
from hostproc.bus import ROOM_AHEAD, Bus
from hostproc.devices.backend import Backend, DeviceRefused
from hostproc.devices.channel import HostChannel
from hostproc.devices.echo import Echo
from hostproc.devices.table import offer_of
from hostproc.loop import WAIT, AnyBody, Task, TaskBody
from hostproc.points import NoPoints
from hostproc.protocol.server import Server
from hostproc.protocol.versions import Limits

RING = 0xE1E10
RAM_PAGES = 1024
RING_PFN = 100
HALF = 3
"""Pages of each ring of a test channel."""


class FakeEvent:
    """An event port: how often it was signalled, for which VP, and whether it is still there."""

    def __init__(self, vp_index: int, flag: int) -> None:
        self.vp_index = vp_index
        self.flag = flag
        self.signals = 0
        self.closed = False

    def signal(self) -> None:
        """Count."""
        assert not self.closed
        self.signals += 1

    def retarget(self, vp_index: int) -> None:
        """Move."""
        self.vp_index = vp_index

    def close(self) -> None:
        """Go, once."""
        assert not self.closed
        self.closed = True


class FakePartition:
    """Takes messages while it has buffers, rings doorbells, and runs the tasks that were woken."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.buffers = 1 << 30
        self.events: list[FakeEvent] = []
        self.doorbells: dict[int, Callable[[], None]] = {}
        self.tasks: deque[Task] = deque()
        self.started: list[Task] = []  # kept, as a loop may: closing a task is more than forgetting it

    def post_message(self, vp_index: int, sint: int, payload: bytes) -> bool:
        """Take a message if there is a buffer."""
        assert sint == 2 and vp_index in (0, 1)
        if not self.buffers:
            return False
        self.buffers -= 1
        self.messages.append(parse(payload))
        return True

    def bind_event(self, vp_index: int, sint: int, flag: int) -> FakeEvent:
        """Make an event."""
        assert sint == 2
        self.events.append(FakeEvent(vp_index, flag))
        return self.events[-1]

    def open_doorbell(self, connection_id: int, wake: Callable[[], None]) -> None:
        """Connect."""
        assert connection_id not in self.doorbells
        self.doorbells[connection_id] = wake

    def close_doorbell(self, connection_id: int) -> None:
        """Disconnect."""
        del self.doorbells[connection_id]

    def task(self, name: str, body: AnyBody) -> Task:
        """Add a task, to be run."""
        task = Task(name, body, self.tasks)
        self.started.append(task)
        task.wake()
        return task

    def run(self) -> None:
        """Run tasks until all of them wait."""
        while self.tasks:
            self.tasks.popleft().step()


class Guest:
    """A guest with RAM on a `bytearray`, a bus, and its own ends of channel 1's rings once it is open."""

    def __init__(self, *backends: Backend, memory: GuestMemory | None = None, budget: MapBudget | None = None) -> None:
        self.memory = memory or GuestMemory.on(bytearray(RAM_PAGES * PAGE_SIZE))
        limits = Limits(vp_count=2, ram_bytes=RAM_PAGES * PAGE_SIZE, max_version=VERSION_COPPER)
        self.partition = FakePartition()
        self.bus = self.make_bus(Server(limits), budget)
        self.keys = [
            self.bus.add(offer_of("echo", UUID(int=number)), backend)
            for number, backend in enumerate(backends or (Echo(),), 1)
        ]

    def make_bus(self, server: Server, budget: MapBudget | None) -> Bus:
        """Make the bus."""
        return Bus(server, self.partition, self.partition, self.memory, budget=budget)

    def post(self, *messages: Message) -> list[Message]:
        """Post messages; return what the host has sent since the last call."""
        for message in messages:
            self.bus.deliver(message.pack(), 4 if isinstance(message, InitiateContact) else 1)
        return self.sent()

    def sent(self) -> list[Message]:
        """Return what the host has sent since the last call."""
        messages, self.partition.messages = self.partition.messages, []
        return messages

    def boot(self) -> list[Message]:
        """Connect and ask for the offers."""
        self.post(InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, msg_sint=2))
        return self.post(RequestOffers())

    def ring(self, first_pfn: int) -> RingMemory:
        """Look at a ring of HALF pages in RAM."""
        gpas = [(first_pfn + page) * PAGE_SIZE for page in range(HALF)]
        return RingMemory.of_pages(self.memory, gpas)

    def open(self, relid: int = 1, target_vp: int = 0) -> list[Message]:
        """Lend rings, initialise them, and post OPENCHANNEL."""
        first = RING_PFN + 2 * HALF * (relid - 1)
        self.post(*gpadl_messages(relid, RING + relid, range(first, first + 2 * HALF)))
        for pfn in (first, first + HALF):
            self.ring(pfn).init()
        self.out = RingProducer(self.ring(first))
        self.inbound = RingConsumer(self.ring(first + HALF))
        return self.post(OpenChannel(relid, relid, RING + relid, target_vp, HALF))

    def doorbell(self, relid: int = 1) -> None:
        """Signal the host, as the guest does."""
        self.partition.doorbells[relid | 0x2000]()

    def doorbells(self, *relids: int) -> None:
        """Signal the host as a guest below 2.4 does: in 0.13 by bits of the interrupt page and connection 2."""
        if 2 not in self.partition.doorbells:
            self.doorbell(relids[0])
            return
        for relid in relids:
            word = INTERRUPT_PAGE + 2048 + 8 * (relid >> 6)
            self.memory.atomics.cell_u64(word).fetch_or(1 << (relid & 63))
        self.partition.doorbells[2]()

    def echo(self, *payloads: bytes) -> list[bytes]:
        """Send through channel 1 and take back what came."""
        for payload in payloads:
            if self.out.write(payload):
                self.doorbell()
        self.partition.run()
        return [packet[3] for packet in self.inbound.drain()]


def test_packets_come_back_through_a_whole_bus() -> None:
    """Contact, offer, GPADL, open, a packet there and back, an interrupt."""
    guest = Guest()

    offer, _delivered = guest.boot()
    result = guest.open()
    assert isinstance(offer, OfferChannel) and offer.connection_id == 0x2001
    assert result == [OpenChannelResult(1, 1, 0)]
    assert guest.echo(b"12345678", b"abcdefgh") == [b"12345678", b"abcdefgh"]

    assert guest.partition.events[0].signals == 1
    assert guest.partition.events[0].flag == 1
    assert not guest.bus.refusals.refused


def test_what_was_written_before_the_open_is_found() -> None:
    """The device looks once without being rung for."""
    guest = Guest()
    guest.boot()
    guest.open()
    guest.out.write(b"early bird")

    guest.partition.run()

    assert guest.echo() == [b"early bird".ljust(16, b"\0")]


def test_close_gives_everything_back() -> None:
    """Event, doorbell and task are gone, TORNDOWN comes, and the channel opens again."""
    guest = Guest()
    guest.boot()
    guest.open()
    guest.partition.run()

    assert guest.post(CloseChannel(1), GpadlTeardown(1, RING + 1)) == [GpadlTorndown(RING + 1)]
    assert guest.partition.doorbells == {} and guest.partition.events[0].closed
    assert guest.bus.channel(guest.keys[0]) is None
    assert guest.open() == [OpenChannelResult(1, 1, 0)]

    assert guest.echo(b"again...") == [b"again..."]


def test_the_guest_may_poll() -> None:
    """Without interrupts the device works all the same, and signals nobody."""
    guest = Guest()
    guest.boot()

    guest.open(target_vp=VP_INDEX_DISABLE_INTERRUPT)

    assert guest.echo(b"12345678") == [b"12345678"]
    assert guest.partition.events == []


def test_retarget_moves_the_event() -> None:
    """The port is at its new VP when the response is posted."""
    guest = Guest()
    guest.boot()
    guest.open()

    assert guest.post(ModifyChannel(1, 1)) == [ModifyChannelResponse(1, 0)]

    assert guest.partition.events[0].vp_index == 1


class OnModify(NoPoints):
    """Points of which that of MODIFYCHANNEL is armed; what is put aside lies here."""

    def __init__(self) -> None:
        self.armed = bytes(number == Point.HOST_ON_MODIFY for number in range(POINT_BYTES))
        self.rests: list[Callable[[], object]] = []

    def hold(self, point: int, relid: int, rest: Callable[[], object]) -> bool:
        """Put it aside."""
        assert (point, relid) == (Point.HOST_ON_MODIFY, 1)
        self.rests.append(rest)
        return True


def test_a_modify_that_is_held() -> None:
    """Only its own handling waits at the sync point; the channel is interrupted where it was until then."""
    guest, points = Guest(), OnModify()
    guest.bus._points = points
    guest.boot()
    guest.open()

    assert guest.post(ModifyChannel(1, 1)) == []
    assert guest.echo(b"12345678") == [b"12345678"]
    assert guest.partition.events[0].vp_index == 0
    points.rests.pop()()

    assert (guest.sent(), guest.partition.events[0].vp_index) == ([ModifyChannelResponse(1, 0)], 1)


def test_a_full_port_makes_the_bus_wait() -> None:
    """No message is lost or overtaken; meanwhile the guest's next one is not to be delivered."""
    guest = Guest(*[Echo() for _ in range(5)])
    guest.partition.buffers = 3

    guest.boot()
    assert guest.bus.outgoing == 4
    guest.partition.buffers = 2
    guest.bus.flush()
    assert guest.bus.outgoing == 2 and not guest.bus.ready
    guest.partition.buffers = 9
    guest.bus.flush()

    assert guest.bus.outgoing == 0
    sent = guest.sent()
    assert [m.child_relid for m in sent if isinstance(m, OfferChannel)] == [3, 4, 5]
    assert sent[-1].TYPE is MessageType.ALLOFFERS_DELIVERED


def test_a_new_message_goes_behind_those_that_wait() -> None:
    """A buffer that is free again is for the oldest, not for whoever comes along."""
    guest = Guest()
    guest.boot()
    guest.partition.buffers = 0
    guest.bus.add(offer_of("echo", UUID(int=8)), Echo())
    guest.partition.buffers = 2

    guest.bus.add(offer_of("echo", UUID(int=9)), Echo())
    assert guest.sent() == []
    guest.bus.flush()

    assert [m.child_relid for m in guest.sent() if isinstance(m, OfferChannel)] == [2, 3]


def test_hot_remove_stops_the_device_before_rescind() -> None:
    """Nothing touches the ring after the guest could know; the key is dead, the device may come back."""
    guest = Guest()
    guest.boot()
    guest.open()
    guest.partition.run()

    guest.bus.remove(guest.keys[0])
    assert guest.sent() == [RescindChannelOffer(1)]
    assert guest.partition.doorbells == {} and guest.bus.backends() == {}
    guest.bus.add(offer_of("echo", UUID(int=1)), Echo())
    (offer,) = guest.post(RelidReleased(1))

    assert isinstance(offer, OfferChannel) and offer.child_relid == 1
    assert guest.open() == [OpenChannelResult(1, 1, 0)]
    assert guest.echo(b"12345678") == [b"12345678"]


def test_unload_closes_everything() -> None:
    """Open channels are closed, then answered, and the next guest begins afresh."""
    guest = Guest(Echo(), Echo())
    guest.boot()
    guest.open(2)
    guest.open(1)
    guest.echo(b"12345678")

    (answer,) = guest.post(Unload())

    assert answer.TYPE is MessageType.UNLOAD_RESPONSE
    assert guest.partition.doorbells == {} and all(event.closed for event in guest.partition.events)
    assert guest.bus.server.summary().gpadls == 0
    assert (guest.bus.disconnects, guest.bus.left) == (1, Left.UNLOADED)
    guest.partition.run()
    assert len(guest.boot()) == 3


def test_a_guest_that_connects_anew_has_not_left() -> None:
    """A crash kernel's contact ends the connection that was there; it is no end of a guest, for which `run` waits."""
    guest = Guest(Echo())
    guest.boot()
    guest.open(1)

    assert len(guest.boot()) == 2
    assert (guest.bus.connects, guest.bus.disconnects, guest.bus.left) == (2, 0, Left.NOBODY)

    guest.post(Unload())
    assert guest.bus.disconnects == 1


def test_how_a_guest_left_is_what_it_did_while_it_was_connected() -> None:
    """Who unloads and then detaches, or ends, has unloaded; who detaches at once has not."""
    guest = Guest()
    guest.boot()
    guest.post(Unload())
    guest.bus.guest_gone(Left.DETACHED)
    guest.bus.guest_gone(Left.DIED)
    assert (guest.bus.disconnects, guest.bus.left) == (1, Left.UNLOADED)

    guest.boot()
    guest.bus.guest_gone(Left.DETACHED)
    assert (guest.bus.disconnects, guest.bus.left) == (2, Left.DETACHED)


def test_a_guest_that_died_is_forgotten() -> None:
    """What was to be sent to it is dropped, its channels are closed."""
    guest = Guest()
    guest.boot()
    guest.open()
    guest.partition.buffers = 0
    guest.post(ModifyChannel(1, 1))
    assert guest.bus.outgoing == 1

    guest.bus.guest_gone()

    assert guest.bus.outgoing == 0 and guest.partition.doorbells == {}
    assert (guest.bus.disconnects, guest.bus.left) == (1, Left.DIED)
    guest.partition.buffers = 100
    assert len(guest.boot()) == 2


def test_the_machine_stops_with_channels_open() -> None:
    """Every task ends and every ring is closed."""
    guest = Guest()
    guest.boot()
    guest.open()
    guest.echo(b"12345678")
    channel = guest.bus.channel(guest.keys[0])
    assert channel is not None

    guest.bus.close()

    with pytest.raises(ValueError, match="closed"):
        channel.incoming.read()


def test_nobody_listens_for_sockets() -> None:
    """A connect is refused at once."""
    guest = Guest()
    guest.boot()
    ids = UUID(int=1), UUID(int=2)

    (answer,) = guest.post(TlConnectRequest(*ids))

    assert isinstance(answer, TlConnectResult) and answer.status == 0xC0000236


# -- what guests and machines do wrong -------------------------------------------------------------------


def test_refusals_are_counted_and_the_newest_kept() -> None:
    """By rule; what was legal apart; the last few in full, those that are alike as one with their number."""
    guest = Guest()
    guest.boot()

    for _ in range(50):
        guest.post(CloseChannel(77))
    guest.post(CloseChannel(78), CloseChannel(77), Unload(), RelidReleased(1))

    refusals = guest.bus.refusals
    assert refusals.refused == {"close-unknown-relid": 52}
    assert refusals.ignored == {"released-while-disconnected": 1}
    records = refusals.records()
    assert [(one["value"], one["count"]) for one in records] == [(78, 1), (77, 51), (1, 1)]
    assert records[-1] == {
        "rule": "released-while-disconnected",
        "field": "child_relid",
        "value": 1,
        "text": "RELID_RELEASED for 1 while nobody is connected",
        "legal": True,
        "count": 1,
    }


def test_only_the_newest_kinds_of_refusals_are_kept() -> None:
    """The kind that nobody did for the longest time makes room for a new one."""
    guest = Guest()
    guest.boot()

    guest.post(*(CloseChannel(relid) for relid in range(100, 132)), CloseChannel(100), CloseChannel(132))

    assert [one["value"] for one in guest.bus.refusals.records()] == [*range(102, 132), 100, 132]


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("ring", [RING_PFN, RING_PFN + HALF])
def test_a_ring_with_impossible_indices_does_not_open(offset: int, ring: int) -> None:
    """What the guest left in a control page is looked at before the device is."""
    guest = Guest()
    guest.boot()
    guest.memory.write(ring * PAGE_SIZE + offset, (0x7FFFFFFF).to_bytes(4, "little"))

    first = RING_PFN
    guest.post(*gpadl_messages(1, RING, range(first, first + 2 * HALF)))
    (result,) = guest.post(OpenChannel(1, 1, RING, 0, HALF))

    assert result == OpenChannelResult(1, 1, STATUS_UNSUCCESSFUL)
    assert guest.bus.refusals.refused == {"ring-index": 1}
    assert guest.partition.doorbells == {} and guest.partition.events[0].closed


def test_a_guest_that_breaks_its_ring_stops_that_channel_only() -> None:
    """Nonsense in a ring in use is counted; other channels go on, and this one can be opened again."""
    guest = Guest(Echo(), Echo())
    guest.boot()
    guest.open(2)
    guest.open(1)
    guest.echo(b"12345678")

    guest.memory.write(RING_PFN * PAGE_SIZE, (12345).to_bytes(4, "little"))
    guest.doorbell()
    guest.partition.run()
    assert guest.bus.refusals.refused == {"ring-index": 1}
    guest.doorbell(1)
    guest.doorbell(2)
    guest.partition.run()
    guest.post(CloseChannel(1), GpadlTeardown(1, RING + 1))

    assert guest.open() == [OpenChannelResult(1, 1, 0)]
    assert guest.echo(b"12345678") == [b"12345678"]


class FullMemory(GuestMemory):
    """RAM on a tmpfs that is full."""

    def reserve(self, gpa: int, length: int) -> None:
        """There is no page left."""
        raise OutOfMemory(f"no pages behind {gpa:#x}")


def test_a_full_tmpfs_is_a_status() -> None:
    """Pages that cannot be had are refused before anything touches them."""
    guest = Guest(memory=FullMemory(None, bytearray(RAM_PAGES * PAGE_SIZE)))
    guest.boot()

    assert guest.post(*gpadl_messages(1, RING, range(8))) == [GpadlCreated(1, RING, STATUS_UNSUCCESSFUL)]

    assert guest.bus.refusals.refused == {"out-of-memory": 1}
    assert guest.bus.server.summary().gpadls == 0


class WatchedMemory(GuestMemory):
    """RAM that notes what is reserved, and has no memory behind its last pages."""

    def __init__(self, pages: int) -> None:
        super().__init__(None, bytearray(RAM_PAGES * PAGE_SIZE))
        self.there = pages * PAGE_SIZE
        self.free = ROOM_AHEAD
        self.reserved: list[tuple[int, int]] = []

    def room(self) -> int:
        """Plenty, unless it is said otherwise."""
        return self.free

    def reserve(self, gpa: int, length: int) -> None:
        """Note it."""
        if gpa + length > self.there:
            raise OutOfMemory(f"no pages behind {gpa:#x}")
        self.reserved.append((gpa // PAGE_SIZE, length // PAGE_SIZE))


def test_the_last_of_a_tmpfs_is_not_reserved_ahead() -> None:
    """Where less than 64 MiB are free, pages are reserved when somebody asks."""
    memory = WatchedMemory(RAM_PAGES)
    memory.free -= 1
    guest = Guest(memory=memory)
    guest.boot()
    guest.post(*gpadl_messages(1, RING, range(100, 108)))

    guest.bus.reserve_ahead()

    assert memory.reserved == [(100, 8)]


@pytest.mark.parametrize(
    ("there", "first", "count", "ahead"),
    [
        (RAM_PAGES, 100, 8, [(108, 8)]),
        (RAM_PAGES, 100, 64, [(164, 64)]),
        (RAM_PAGES, 100, 65, []),
        (108, 100, 8, []),
        (RAM_PAGES, RAM_PAGES - 8, 8, []),
    ],
    ids=["as-much-again", "at-most-256-KiB", "no-more", "full-tmpfs", "end-of-RAM"],
)
def test_pages_of_the_next_gpadl_are_reserved_ahead(
    there: int, first: int, count: int, ahead: list[tuple[int, int]]
) -> None:
    """Who has nothing to do reserves as much again behind a GPADL's pages, once; what cannot be had is left."""
    memory = WatchedMemory(there)
    guest = Guest(memory=memory)
    guest.boot()
    assert not guest.bus.likely[1]
    assert guest.post(*gpadl_messages(1, RING, range(first, first + count))) == [GpadlCreated(1, RING, 0)]
    memory.reserved.clear()

    guest.bus.reserve_ahead()

    assert memory.reserved == ahead
    assert not guest.bus.likely[1]
    assert guest.bus.refusals.refused == {}


def test_pages_that_have_memory_since_the_launch_are_not_reserved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a GPADL of them nor what is likely to come behind it costs a system call; one beyond them does."""
    memory = WatchedMemory(RAM_PAGES)
    monkeypatch.setattr(memory, "is_there", lambda gpa, length: gpa + length <= 120 * PAGE_SIZE)
    guest = Guest(memory=memory)
    guest.boot()
    memory.reserved.clear()

    assert guest.post(*gpadl_messages(1, RING, range(100, 108))) == [GpadlCreated(1, RING, 0)]
    assert (memory.reserved, guest.bus.likely) == ([], (0, 0))
    assert guest.post(*gpadl_messages(1, RING + 1, range(120, 128))) == [GpadlCreated(1, RING + 1, 0)]
    assert memory.reserved == [(120, 8)] and guest.bus.likely[1]


INTERRUPT_PAGE = 50 * PAGE_SIZE


def connected_below_2_4(version: int, page: int = INTERRUPT_PAGE, memory: GuestMemory | None = None) -> Guest:
    """Two echo devices for a guest of an old version, both open."""
    guest = Guest(Echo(), Echo(), memory=memory)
    guest.post(InitiateContact(vmbus_version_requested=version, interrupt_page=page))
    guest.post(RequestOffers())
    for relid in (2, 1):
        assert guest.open(relid) == [OpenChannelResult(relid, relid, 0)]
    return guest


def page_bits(guest: Guest, half: int) -> list[int]:
    """Bits that are set in one half (0 the host's, 1 the guest's) of the interrupt page."""
    bits = int.from_bytes(guest.memory.read(INTERRUPT_PAGE + 2048 * half, 2048), "little")
    return [relid for relid in range(2048) if bits >> relid & 1]


@pytest.mark.parametrize("version", [VERSION_WS2008, VERSION_WIN7], ids=version_text)
def test_interrupt_of_an_old_version_is_a_bit_and_flag_0(version: int) -> None:
    """The channel's bit in the host's half, then flag 0 of VP 0, for every channel, whatever VP it names."""
    guest = connected_below_2_4(version)
    guest.partition.run()

    assert guest.partition.events[1].signals == 0
    assert guest.out.write(b"12345678")
    guest.doorbells(1)
    guest.partition.run()

    assert [packet[3] for packet in guest.inbound.drain()] == [b"12345678"]
    assert [(event.vp_index, event.flag) for event in guest.partition.events] == [(0, 0), (0, 0)]
    assert [event.signals for event in guest.partition.events] == [0, 1]
    assert page_bits(guest, 0) == [1]


def test_one_doorbell_is_everybodys_in_0_13() -> None:
    """Connection 2; the guest's bit says which device is meant, and the host clears it, and bits of nobody."""
    guest = connected_below_2_4(VERSION_WS2008)
    assert list(guest.partition.doorbells) == [2]
    guest.partition.run()
    assert guest.out.write(b"12345678")

    guest.partition.doorbells[2]()
    assert not guest.partition.tasks  # no bit, so nobody is meant
    guest.doorbells(1, 99)
    assert len(guest.partition.tasks) == 1
    guest.partition.run()

    assert page_bits(guest, 1) == []
    assert [packet[3] for packet in guest.inbound.drain()] == [b"12345678"]
    assert guest.bus.refusals.ignored == {"interrupt-page-bit": 1}


def test_shared_doorbell_goes_with_its_last_channel() -> None:
    """Closing one leaves the other's; a bit of the closed one leads to nothing."""
    guest = connected_below_2_4(VERSION_WS2008)
    guest.post(CloseChannel(2))
    assert list(guest.partition.doorbells) == [2]
    guest.partition.run()

    guest.doorbells(2)
    assert not guest.partition.tasks
    guest.post(CloseChannel(1))
    assert guest.partition.doorbells == {}


def test_dedicated_doorbells_from_1_1_on() -> None:
    """1.1 has a connection for each channel; only its interrupts are shared."""
    guest = connected_below_2_4(VERSION_WIN7)

    assert sorted(guest.partition.doorbells) == [0x2001, 0x2002]


def test_old_guest_without_an_interrupt_page() -> None:
    """It may give none: flag 0 is all that it gets, and its one doorbell means all devices."""
    guest = connected_below_2_4(VERSION_WS2008, page=0)
    guest.partition.run()
    assert guest.out.write(b"12345678")

    guest.partition.doorbells[2]()
    assert len(guest.partition.tasks) == 2
    guest.partition.run()

    assert guest.partition.events[1].signals == 1


def test_interrupt_page_on_a_full_tmpfs() -> None:
    """No memory behind the page: counted, and the guest is served as one without a page."""

    class NoPage(GuestMemory):
        """That one page cannot be had."""

        def reserve(self, gpa: int, length: int) -> None:
            if gpa == INTERRUPT_PAGE:
                raise OutOfMemory(f"no page behind {gpa:#x}")

    guest = connected_below_2_4(VERSION_WS2008, memory=NoPage(None, bytearray(RAM_PAGES * PAGE_SIZE)))

    assert guest.bus.refusals.refused == {"out-of-memory": 1}
    guest.partition.run()
    guest.partition.doorbells[2]()
    assert len(guest.partition.tasks) == 2


def test_next_connection_has_pages_of_its_own() -> None:
    """A guest that went leaves nothing behind: the next one's channels have flags, and connections each."""
    guest = connected_below_2_4(VERSION_WS2008)
    guest.bus.guest_gone()
    guest.boot()
    guest.open()

    assert list(guest.partition.doorbells) == [0x2001]
    assert guest.echo(b"12345678") == [b"12345678"]
    assert page_bits(guest, 0) == []


class Noted(OneByOne):
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.records: list[tuple[int, ...]] = []

    def record(self, *what: int) -> None:
        """Remember a record."""
        self.records.append(what)


class RecordedGuest(Guest):
    """A guest of a host that records."""

    def make_bus(self, server: Server, budget: MapBudget | None) -> Bus:
        """With a recorder."""
        self.noted = Noted()
        return Bus(server, self.partition, self.partition, self.memory, trace=self.noted)  # type: ignore[arg-type]


NEIGHBOURS, TURNED, APART = (4, 5, 6, 7, 8, 9), (9, 8, 7, 6, 5, 4), (4, 5, 6, 8, 9, 10)


@pytest.mark.parametrize(
    ("ranges", "pfn"),
    [([NEIGHBOURS], 4), ([TURNED], 0), ([APART], 0), ([(4, 5, 6), (7, 8)], 4), ([(4, 5), (7, 8)], 0), ([(7,)], 7)],
)
def test_first_page_of_a_gpadl_is_recorded_where_its_pages_are_neighbours(
    ranges: list[tuple[int, ...]], pfn: int
) -> None:
    """The host's record says the first PFN of one run of pages, be it in several ranges; of any others 0."""
    guest = RecordedGuest()
    guest.boot()
    body = pack_gpa_ranges(GpaRange(len(pfns) * PAGE_SIZE, 0, pfns) for pfns in ranges)

    guest.post(GpadlHeader(1, RING, len(body), len(ranges), body))

    pages = sum(map(len, ranges))
    assert [words for event, *words in guest.noted.records if event == E_GPADL_ADD] == [[1, RING, pages, pfn]]


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("budget", [0, 100])
def test_rings_in_shared_memory(scattered: bool, budget: int) -> None:
    """RAM of a real machine, contiguous or scattered PFNs, mapped or (beyond the budget) page by page."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, RAM_PAGES * PAGE_SIZE)
    memory = GuestMemory.map(fd, RAM_PAGES * PAGE_SIZE)
    runs = MapBudget(budget)
    guest = Guest(memory=memory, budget=runs)
    guest.boot()
    pfns = list(range(RING_PFN, RING_PFN + 2 * HALF))
    if scattered:
        pfns = [pfn * 3 for pfn in pfns]
    rings = [[pfn * PAGE_SIZE for pfn in half] for half in (pfns[:HALF], pfns[HALF:])]
    ends = [RingMemory.of_pages(memory, gpas) for gpas in rings]
    for end in ends:
        end.init()
    guest.out, guest.inbound = RingProducer(ends[0]), RingConsumer(ends[1])
    guest.post(*gpadl_messages(1, RING, pfns), OpenChannel(1, 1, RING, 0, HALF))

    payloads = [bytes([number]) * 2000 for number in range(12)]
    got = [packet for payload in payloads for packet in guest.echo(payload)]
    guest.post(CloseChannel(1))

    assert got == payloads
    assert runs.left == budget
    for end in ends:
        end.close()
    memory.close()
    os.close(fd)


# -- back ends -----------------------------------------------------------------------------------------


class Fussy(Backend):
    """A device that opens when it is told so, and closes when it likes."""

    name = "fussy"

    def __init__(self, *, opens: bool = True, closes: bool = True) -> None:
        self.opens = opens
        self.closes = closes
        self.channels: list[HostChannel] = []
        self.closed = 0
        self.ended = 0

    def open(self, channel: HostChannel) -> TaskBody:
        """Open or refuse."""
        if not self.opens:
            raise DeviceRefused("not today", 0xC000_0022)
        self.channels.append(channel)
        return self._serve(channel)

    def _serve(self, channel: HostChannel) -> TaskBody:
        try:
            yield from channel.wait_for_packets()
            raise ProtocolViolation("I do not like it", rule="fussy")
        finally:
            channel.take()
            self.ended += 1

    def close(self, channel: HostChannel) -> bool:
        """Close at once or later."""
        self.closed += 1
        return self.closes


@pytest.mark.parametrize("ending", ["close", "remove", "stop"])
def test_a_task_is_ended_before_its_rings(ending: str) -> None:
    """What a device does last, it does with rings that are still there."""
    backend = Fussy()
    guest = Guest(backend)
    guest.boot()
    guest.open()
    guest.partition.run()
    assert backend.ended == 0

    if ending == "close":
        guest.post(CloseChannel(1))
    elif ending == "remove":
        guest.bus.remove(guest.keys[0])
    else:
        guest.bus.close()

    assert (backend.ended, backend.closed) == (1, 1)


def test_a_back_end_may_refuse_with_its_own_status() -> None:
    """The guest is told, nothing is held, and it may ask again."""
    backend = Fussy(opens=False)
    guest = Guest(backend)
    guest.boot()

    assert guest.open() == [OpenChannelResult(1, 1, 0xC000_0022)]
    assert guest.partition.doorbells == {} and not guest.partition.tasks
    backend.opens = True

    assert guest.post(OpenChannel(1, 1, RING + 1, 0, HALF)) == [OpenChannelResult(1, 1, 0)]


def test_a_back_end_may_close_later() -> None:
    """TORNDOWN, and a reopen that was asked for meanwhile, wait for it."""
    backend = Fussy(closes=False)
    guest = Guest(backend)
    guest.boot()
    guest.open()
    (channel,) = backend.channels

    assert guest.post(CloseChannel(1), GpadlTeardown(1, RING + 1)) == []
    channel.closed()

    assert guest.sent() == [GpadlTorndown(RING + 1)]
    channel.closed()
    assert guest.open() == [OpenChannelResult(1, 1, 0)]
    channel.closed()
    assert guest.bus.channel(guest.keys[0]) is backend.channels[1]


def test_a_device_removed_while_it_closes_ends_at_once() -> None:
    """Its late word comes to nothing."""
    backend = Fussy(closes=False)
    guest = Guest(backend)
    guest.boot()
    guest.open()
    guest.post(CloseChannel(1))

    guest.bus.remove(guest.keys[0])
    backend.channels[0].closed()

    assert guest.sent() == [RescindChannelOffer(1)]
    assert backend.closed == 1
    assert not guest.bus.refusals.refused


def test_a_violation_that_a_device_finds_is_counted() -> None:
    """The device's own rules are the guest's to keep."""
    guest = Guest(Fussy())
    guest.boot()
    guest.open()
    guest.partition.run()

    if guest.out.write(b"something"):
        guest.doorbell()
    guest.partition.run()

    assert guest.bus.refusals.refused == {"fussy": 1}


# -- back ends whose author made a mistake ------------------------------------------------------------------


class Faulty(Backend):
    """Raises where it is told to, in every life of its channel."""

    name = "faulty"

    def __init__(self, where: str) -> None:
        self.where = where

    def open(self, channel: HostChannel) -> TaskBody:
        """Open."""
        self._fail("open")
        return self._serve(channel) if self.where != "no generator" else None  # type: ignore[return-value]

    def _serve(self, channel: HostChannel) -> TaskBody:
        try:
            while True:
                if channel.take():
                    self._fail("serve")
                yield from channel.wait_for_packets()
        finally:
            if self.where == "leave":
                self.where = ""  # not once more, when nobody is left to see it
                raise ValueError("in leave")

    def close(self, channel: HostChannel) -> bool:
        """Close."""
        self._fail("close")
        return None if self.where == "close says nothing" else True  # type: ignore[return-value]

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise ValueError(f"in {where}")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("open", "ValueError: in open"),
        ("no generator", "TypeError: it returned None, which is no generator; `return` what serves the channel"),
    ],
)
def test_a_back_end_that_raises_in_open_refuses_the_channel(where: str, error: str) -> None:
    """The guest is told so, it is counted, and the other device works; also of an `open` without a generator."""
    guest = Guest(Echo(), Faulty(where))
    guest.boot()

    assert guest.open(2) == [OpenChannelResult(2, 2, STATUS_UNSUCCESSFUL)]

    assert guest.bus.refusals.refused == {"backend-error": 1}
    assert guest.bus.refusals.records()[-1]["text"] == f"faulty: open of channel 2: {error}"
    guest.open(1)
    assert guest.echo(b"12345678") == [b"12345678"]


class Vague(Echo):
    """Says nothing of what its task yields, or something that is no step."""

    name = "vague"

    def __init__(self, said: object) -> None:
        self.said = said

    def open(self, channel: HostChannel) -> TaskBody:
        """The same task."""
        body = super().open(channel)

        def vaguely() -> Generator[object, None, None]:
            for step in body:
                yield self.said if step is WAIT else step

        return vaguely()  # type: ignore[return-value]


@pytest.mark.parametrize("said", [None, 5])
def test_a_back_end_that_yields_no_step_waits(said: object) -> None:
    """As after WAIT; its packets come back, and the others' do, and nothing is counted."""
    guest = Guest(Vague(said))
    guest.boot()
    guest.open(1)

    assert guest.echo(b"12345678") == [b"12345678"]
    assert guest.echo(b"87654321") == [b"87654321"]
    assert guest.bus.refusals.refused == {}


class Fromless(Echo):
    """Forgets the `from`, so that what would wait never runs."""

    name = "fromless"

    def open(self, channel: HostChannel) -> TaskBody:
        """A task that seems to wait for packets."""
        return self._serve_nobody(channel)

    def _serve_nobody(self, channel: HostChannel) -> TaskBody:
        yield channel.wait_for_packets()  # type: ignore[misc]


def test_a_back_end_that_forgets_the_from_of_a_yield_is_told_so() -> None:
    """What it yielded would have waited: that is an error at its line, where it would be a device that is silent."""
    said: list[str] = []
    guest = Guest(Echo(), Fromless())
    guest.bus._log = said.append
    guest.boot()
    guest.open(2)
    guest.doorbell(2)
    guest.partition.run()

    assert guest.bus.refusals.refused == {"backend-error": 1}
    assert "wait_for_packets" in guest.bus.refusals.records()[-1]["text"]
    assert "yield channel.wait_for_packets()" in said[0] and "`yield from`" in said[0]
    guest.open(1)
    assert guest.echo(b"12345678") == [b"12345678"]


@pytest.mark.parametrize("where", ["serve", "leave", "close", "close says nothing"])
def test_a_back_end_that_raises_stops_its_channel_alone(where: str) -> None:
    """It is counted once; the channel closes and opens again, and the other device goes on."""
    guest = Guest(Echo(), Faulty(where))
    guest.boot()
    guest.open(2)
    guest.out.write(b"12345678")
    guest.doorbell(2)
    guest.partition.run()
    guest.doorbell(2)
    guest.partition.run()

    assert guest.post(CloseChannel(2), GpadlTeardown(2, RING + 2)) == [GpadlTorndown(RING + 2)]

    assert guest.bus.refusals.refused.total() == (where != "close says nothing")
    assert guest.open(2) == [OpenChannelResult(2, 2, 0)]
    guest.open(1)
    assert guest.echo(b"12345678") == [b"12345678"]


def test_back_end_errors_are_logged_with_their_traceback_and_do_not_flood() -> None:
    """The first is said, then the tenth: a guest that opens and opens must not fill the log."""
    lines: list[str] = []
    guest = Guest(Faulty("open"))
    guest.bus._log = lines.append
    guest.boot()

    guest.open()
    for _ in range(10):
        guest.post(OpenChannel(1, 1, RING + 1, 0, HALF))

    assert guest.bus.refusals.refused["backend-error"] == 11
    assert [line.splitlines()[0] for line in lines] == [
        "back end faulty, open of channel 1:",
        "back end faulty, open of channel 1 (10 back-end errors so far):",
    ]
    assert lines[0].endswith("ValueError: in open") and "test_bus.py" in lines[0]


class HeldClose(NoPoints):
    """Whoever comes to the end of a device's requests is held until the test says go."""

    def __init__(self) -> None:
        self.armed = bytes(point == Point.HOST_STREAM_CLOSED for point in range(64))
        self.rests: list[Callable[[], object]] = []

    def hold(self, point: int, relid: int, rest: Callable[[], object]) -> bool:
        """Put it aside."""
        assert (point, relid) == (Point.HOST_STREAM_CLOSED, 1)
        self.rests.append(rest)
        return True


class HeldGuest(Guest):
    """A guest of such a host."""

    def __init__(self, fix: Fix) -> None:
        self.fix = fix
        self.points = HeldClose()
        super().__init__()

    def make_bus(self, server: Server, budget: MapBudget | None) -> Bus:
        """With points and switches."""
        partition = self.partition
        return Bus(server, partition, partition, self.memory, budget=budget, points=self.points, fix=self.fix)


@pytest.mark.parametrize(("fix", "taken"), [(ALL_FIXED, []), (Fix(revoke_seq=False), [RescindChannelOffer(1)])])
def test_late_end_of_a_devices_requests(fix: Fix, taken: list[Message]) -> None:
    """It takes nothing back that was offered since under the same relid, unless it is named by that alone (A8)."""
    guest = HeldGuest(fix)
    guest.boot()
    guest.bus.remove(guest.keys[0])
    guest.post(RelidReleased(1))
    guest.bus.add(offer_of("echo", UUID(int=7)), Echo())
    assert [message.child_relid for message in guest.sent() if isinstance(message, OfferChannel)] == [1]

    (rest,) = guest.points.rests
    rest()

    assert guest.sent() == taken


class HeldAnswers(NoPoints):
    """A host in which what devices answer is held."""

    def __init__(self) -> None:
        self.armed = bytes(point == Point.HOST_BEFORE_ANSWER for point in range(64))
        self.rests: list[Callable[[], object]] = []

    def hold(self, point: int, relid: int, rest: Callable[[], object]) -> bool:
        """Put it aside."""
        assert (point, relid) == (Point.HOST_BEFORE_ANSWER, 1)
        self.rests.append(rest)
        return True


class SlowGuest(Guest):
    """A guest of such a host."""

    def make_bus(self, server: Server, budget: MapBudget | None) -> Bus:
        """With points."""
        self.points = HeldAnswers()
        return Bus(server, self.partition, self.partition, self.memory, budget=budget, points=self.points)


@pytest.mark.parametrize("gone", [False, True])
def test_an_answer_that_was_held(gone: bool) -> None:
    """It is told to the guest when it is let go; that of a device which is gone by then is nobody's."""
    guest = SlowGuest()
    guest.boot()
    assert guest.post(*gpadl_messages(1, RING, range(RING_PFN, RING_PFN + 2 * HALF))) == []
    if gone:
        guest.bus.remove(guest.keys[0])
        guest.sent()

    (rest,) = guest.points.rests
    rest()

    assert [type(message) for message in guest.sent()] == ([] if gone else [GpadlCreated])


def test_a_rescind_is_said_again() -> None:
    """The same message once more, for a relid that the guest has not given back."""
    guest = Guest()
    guest.boot()
    guest.bus.remove(guest.keys[0])

    guest.bus.rescind_again(1)

    assert guest.sent() == [RescindChannelOffer(1), RescindChannelOffer(1)]
