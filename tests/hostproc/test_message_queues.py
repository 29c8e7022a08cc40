"""Message queues: FIFO into one slot, and a handshake of which neither half can miss the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from emu.memory import GuestMemory
from emu.switches import ALL_FIXED, Fix
from emu.syncpoint import NOT_ARMED
from emu.synic import Synic
from emu.tracing import E_MESSAGE_POST, E_PENDING_SET, E_SLOT_WRITE, Recorder
from emu.wire.hv_message import HvMessage
from emu.wire.synic import (
    HV_MESSAGE_FLAG_PENDING,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    page_register,
    sint_value,
)
from hostproc.message_queues import MessageQueues, QueuedMessage
from hostproc.points import NoPoints
from tests.interleaving import Actor, Check, SteppedMemory, SteppedWakeup, Stuck, Turns, explore

SIMP_GPA = 0x1000
SINT = 2
SLOT = SIMP_GPA + 0x200
VECTOR = 0xF3


class FakeRecorder:
    """Keeps what is recorded, and bytes where that is asked for."""

    def __init__(self) -> None:
        self.records: list[tuple[int, ...]] = []
        self.keeps_bytes = False
        self.kept: list[bytes] = []

    def keep(self, data: bytes) -> None:
        """Bytes of the last record."""
        self.kept.append(data)

    def record(self, *values: int) -> None:
        """One record."""
        self.records.append(values)


class Delivery:
    """One VP's SynIC with its page placed, queues over it, and what they asked for."""

    def __init__(
        self,
        memory: GuestMemory | None = None,
        *,
        enabled: bool = True,
        synic: type[Synic] = Synic,
        points: NoPoints | None = None,
        fix: Fix = ALL_FIXED,
    ) -> None:
        self.memory = memory or GuestMemory.on(bytearray(0x4000))
        self.synic = synic(self.memory)
        self.on_release: Callable[[int], None] = lambda _number: None
        self.interrupts: list[tuple[int, int]] = []
        self.serials: list[tuple[int, int, int]] = []
        self.released: list[int] = []
        self.trace = FakeRecorder()
        self.queues = MessageQueues(
            [self.synic],
            lambda position, vector: self.interrupts.append((position, vector)),
            lambda *serial: self.serials.append(serial),
            cast(Recorder, self.trace),
            points,
            fix,
        )
        self.synic.write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR))
        if enabled:
            self.enable()

    def enable(self) -> None:
        """Page placed, SynIC on."""
        self.synic.write_msr(HV_X64_MSR_SIMP, page_register(SIMP_GPA))
        self.synic.write_msr(HV_X64_MSR_SCONTROL, 1)

    def post(self, number: int, sint: int = SINT) -> None:
        """A message that carries its number, also as its serial."""
        data = HvMessage(1, number.to_bytes(8, "little")).pack()

        def release() -> None:
            self.released.append(number)
            self.on_release(number)

        self.queues.post(0, sint, QueuedMessage(data, number, release))

    @property
    def resident(self) -> int | None:
        """Number of the message in the slot."""
        message = HvMessage.unpack(self.memory.read(SLOT, 256))
        return int.from_bytes(message.payload, "little") if message.message_type else None

    @property
    def pending(self) -> bool:
        """msg_pending of the slot."""
        return bool(self.memory.read(SLOT + 5, 1)[0] & HV_MESSAGE_FLAG_PENDING)

    def take(self) -> int | None:
        """Copy the resident message and empty the slot, without EOM."""
        number = self.resident
        self.memory.write(SLOT, bytes(4))
        return number


# -- one slot -------------------------------------------------------------------------------------


def test_empty_slot_takes_a_message_at_once() -> None:
    """Message in the slot, pending clear, one interrupt, buffer free, serial noted for its (VP, SINT)."""
    delivery = Delivery()
    delivery.post(1)

    assert (delivery.resident, delivery.pending) == (1, False)
    assert delivery.interrupts == [(0, VECTOR)]
    assert (delivery.released, delivery.serials) == ([1], [(0, SINT, 1)])
    assert delivery.queues.total_waiting == 0


def test_busy_slot_keeps_its_message() -> None:
    """The second message waits: old payload, pending set, no interrupt, buffer still taken."""
    delivery = Delivery()
    delivery.post(1)
    delivery.post(2)

    assert (delivery.resident, delivery.pending) == (1, True)
    assert delivery.interrupts == [(0, VECTOR)]
    assert (delivery.released, delivery.queues.waiting(0, SINT)) == ([1], 1)


def test_messages_arrive_in_order_one_by_one() -> None:
    """However many wait, each EOM delivers the next one, with its own interrupt and pending bit."""
    delivery = Delivery()
    for message in range(1, 6):
        delivery.post(message)
    taken = []
    while (number := delivery.take()) is not None:
        taken.append((number, delivery.pending, len(delivery.interrupts)))
        delivery.queues.pump_vp(0)

    assert taken == [(1, True, 1), (2, True, 2), (3, True, 3), (4, True, 4), (5, False, 5)]
    assert delivery.released == [1, 2, 3, 4, 5]


def test_slot_that_was_emptied_without_eom_is_found_by_the_next_post() -> None:
    """The queue's head goes in, not the message just posted."""
    delivery = Delivery()
    for number in (1, 2):
        delivery.post(number)
    delivery.take()
    delivery.post(3)

    assert (delivery.resident, delivery.pending) == (2, True)


def test_end_of_message_with_nothing_waiting_does_nothing() -> None:
    """No message, no interrupt, no pending bit; a resident message stays."""
    delivery = Delivery()
    before = delivery.queues.pump_vp(0)
    delivery.post(1)

    assert (before, delivery.queues.pump_vp(0)) == (0, 0)
    assert (delivery.resident, delivery.pending, len(delivery.interrupts)) == (1, False, 1)


def test_message_waits_for_the_page() -> None:
    """Nothing is written while SynIC or page are off; what waited goes when they are on."""
    delivery = Delivery(enabled=False)
    delivery.post(1)
    before = bytes(delivery.memory.read(0, 0x4000))
    delivery.enable()
    delivered = delivery.queues.pump_vp(0)

    assert before == bytes(0x4000)
    assert (delivered, delivery.resident) == (1, 1)


def test_masked_sint_gets_its_message_without_an_interrupt() -> None:
    """The interrupt is lost, the message is not; unmasking raises nothing by itself."""
    delivery = Delivery()
    delivery.synic.write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR, masked=True))
    delivery.post(1)
    delivery.synic.write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR))
    delivery.queues.pump_vp(0)

    assert (delivery.resident, delivery.interrupts) == (1, [])


def test_sints_do_not_wait_for_each_other() -> None:
    """A full slot of one SINT holds back its own messages only; one EOM looks at all sixteen."""
    delivery = Delivery()
    for sint in range(16):
        delivery.synic.write_msr(HV_X64_MSR_SINT0 + sint, sint_value(0x20 + sint))
        delivery.post(sint + 1, sint)
        delivery.post(sint + 101, sint)
    first = len(delivery.interrupts)
    for sint in range(0, 16, 2):
        delivery.memory.write(SIMP_GPA + sint * 256, bytes(4))

    assert first == 16
    assert delivery.queues.pump_vp(0) == 8
    assert [vector for _vp, vector in delivery.interrupts[16:]] == [0x20 + sint for sint in range(0, 16, 2)]


def test_reset_gives_all_buffers_back() -> None:
    """Dropped messages never arrive, and their buffers are free; what is posted meanwhile is kept."""
    delivery = Delivery()
    for number in (1, 2, 3):
        delivery.post(number)
    delivery.on_release = lambda number: delivery.post(9) if number == 2 else None
    delivery.queues.clear()
    delivery.take()
    delivery.queues.pump_vp(0)

    assert (delivery.queues.total_waiting, delivery.resident) == (0, 9)
    assert delivery.released == [1, 2, 3, 9]


def test_buffer_freed_by_a_delivery_may_be_used_inside_it() -> None:
    """Whoever waited for a buffer posts from within the release: nothing is lost, order is kept."""
    delivery = Delivery()
    delivery.on_release = lambda number: delivery.post(number + 10) if number < 3 else None
    for number in (1, 2, 3):
        delivery.post(number)
    taken = []
    while (resident := delivery.take()) is not None:
        taken.append(resident)
        delivery.queues.pump_vp(0)

    assert taken == [1, 11, 2, 3, 12]


def test_deliveries_and_pending_bits_are_recorded() -> None:
    """The trace says what went into a slot, and when a busy slot was marked."""
    delivery = Delivery()
    delivery.post(0x0A)
    delivery.post(0x0B)

    assert delivery.trace.records == [
        (E_MESSAGE_POST, 0, SINT, 0x0A, 0x0A, 0, 0),
        (E_SLOT_WRITE, 0, SINT, 1, 0x0A, 0x0A, 0),
        (E_MESSAGE_POST, 0, SINT, 0x0B, 0x0B, 0, 0),
        (E_PENDING_SET, 0, SINT, 1),
    ]


def test_delivery_is_recorded_before_it_can_be_read() -> None:
    """A processor that is awake reads the slot at once and records that; the write has the earlier time."""
    recorded: list[int] = []

    class Watched(Synic):
        """A SynIC that notes what has been recorded when its slot is filled."""

        __slots__ = ()

        def write_slot(self, sint: int, message: bytes) -> None:
            """Fill the slot."""
            recorded.extend(record[0] for record in delivery.trace.records)
            super().write_slot(sint, message)

    delivery = Delivery(synic=Watched)
    delivery.post(0x0A)

    assert recorded == [E_MESSAGE_POST, E_SLOT_WRITE]


def test_bytes_of_a_delivery_are_kept_where_that_is_asked_for() -> None:
    """The payload as it stands in the slot, without the SynIC's header."""
    delivery = Delivery()
    delivery.trace.keeps_bytes = True
    delivery.post(0x0A)

    assert delivery.trace.kept == [(0x0A).to_bytes(8, "little")]


class Toggling(Synic):
    """A SynIC whose guest fills and empties the slot between any two looks."""

    __slots__ = ("looks",)

    def slot_type(self, sint: int) -> int:
        """Busy, empty, busy, empty, ..."""
        self.looks: int = getattr(self, "looks", 0) + 1
        return self.looks % 2


def test_guest_that_toggles_its_slot_holds_nobody_up() -> None:
    """Whatever a guest stores into its slot while the host looks, each turn delivers or ends."""
    delivery = Delivery(synic=Toggling)
    for number in range(1, 11):
        delivery.post(number)

    assert delivery.queues.total_waiting == 0
    assert isinstance(delivery.synic, Toggling)
    assert delivery.synic.looks == 20


# -- the handshake, step by step ------------------------------------------------------------------


def guest_and_host(
    messages: int,
    *,
    guest_order: str = "clear, look, eom",
    pump: Callable[[MessageQueues], Any] = lambda queues: queues.pump_vp(0),
) -> Callable[[Turns], tuple[list[Actor], Check]]:
    """A host that posts `messages`, and a guest that takes each when its interrupt comes.

    The guest's EOM is answered by the host, as an exit is: the host serves between two of its posts, and then
    waits for bells until all messages have arrived.
    """

    def scenario(turns: Turns) -> tuple[list[Actor], Check]:
        memory = SteppedMemory(turns, 0x4000)
        interrupts, bells = SteppedWakeup(turns), SteppedWakeup(turns)
        delivery = Delivery(memory)
        delivery.queues._request_interrupt = lambda _position, _vector: interrupts.post()
        words = memory.atomics
        taken: list[int] = []

        def guest() -> None:
            while len(taken) < messages:
                interrupts.block()
                if words.load_u32(SLOT) == 0:
                    continue
                number = delivery.resident
                assert number is not None
                taken.append(number)
                if guest_order == "look, clear, eom":
                    pending = words.load_u8(SLOT + 5)
                    words.cas_u32(SLOT, 1, 0)
                else:
                    words.cas_u32(SLOT, 1, 0)
                    pending = words.load_u8(SLOT + 5)
                if pending & HV_MESSAGE_FLAG_PENDING:
                    bells.post()

        def host() -> None:
            for number in range(1, messages + 1):
                delivery.queues._queues[SINT].append(
                    QueuedMessage(HvMessage(1, number.to_bytes(8, "little")).pack(), number, lambda: None)
                )
                pump(delivery.queues)
            while delivery.queues.total_waiting:
                bells.block()
                pump(delivery.queues)

        def check() -> None:
            assert taken == list(range(1, messages + 1))
            assert delivery.queues.total_waiting == 0

        return [guest, host], check

    return scenario


def pump_without_a_second_look(queues: MessageQueues) -> None:
    """The wrong host: it sees the slot busy, sets pending, and leaves it at that."""
    queue, synic = queues._queues[SINT], queues._synics[0]
    while queue:
        if synic.slot_type(SINT) != 0:
            synic.set_pending(SINT)
            return
        queues._deliver(0, SINT, queue.popleft(), len(queue))


@pytest.mark.parametrize("messages", [1, 2])
def test_no_order_of_steps_stalls_the_queue(messages: int) -> None:
    """Every order of the steps of host and guest: all messages arrive, in order."""
    assert explore(guest_and_host(messages)) >= 5


def test_three_messages_arrive_in_any_order_of_steps() -> None:
    """Queue depth above one, with at most two preemptions."""
    assert explore(guest_and_host(3), preemptions=2) > 100


@pytest.mark.soak
def test_four_messages_arrive_in_any_order_of_steps() -> None:
    """The same, deeper."""
    explore(guest_and_host(4), preemptions=3)


def test_host_that_does_not_look_again_stalls() -> None:
    """Without the second look the guest empties the slot between the host's two steps, and nobody moves."""
    with pytest.raises(Stuck):
        explore(guest_and_host(2, pump=pump_without_a_second_look))


def test_guest_that_looks_before_it_clears_stalls() -> None:
    """The guest's half: pending must be read behind the clear."""
    with pytest.raises(Stuck):
        explore(guest_and_host(2, guest_order="look, clear, eom"))


class Interrupted(Synic):
    """A SynIC whose guest acts just before, or just behind, the host's setting of the pending bit."""

    __slots__ = ("before", "behind")

    before: Callable[[], object]
    behind: Callable[[], object]

    def set_pending(self, sint: int) -> None:
        """The host's step, with the guest's around it."""
        self.before()
        super().set_pending(sint)
        self.behind()


@pytest.mark.parametrize("moment", ["before", "behind"])
def test_slot_emptied_around_the_pending_bit_is_found_by_the_host(moment: str) -> None:
    """The guest clears between look and bit, or between bit and second look: no EOM comes, none is needed."""
    delivery = Delivery(synic=Interrupted)
    synic = delivery.synic
    assert isinstance(synic, Interrupted)
    delivery.post(1)
    synic.before = delivery.take if moment == "before" else int
    synic.behind = delivery.take if moment == "behind" else int
    delivery.post(2)

    assert (delivery.resident, delivery.pending, len(delivery.interrupts)) == (2, False, 2)


def test_slot_emptied_behind_the_second_look_is_refilled_by_the_eom() -> None:
    """The bit is there when the guest looks: its EOM moves the queue."""
    delivery = Delivery()
    delivery.post(1)
    delivery.post(2)
    delivery.take()

    assert delivery.pending is True
    assert delivery.queues.pump_vp(0) == 1
    assert (delivery.resident, len(delivery.interrupts)) == (2, 2)


class HoldsOnce(NoPoints):
    """Points of which each is armed until somebody was held at one."""

    def __init__(self) -> None:
        self.armed = bytes([1]) * len(NOT_ARMED)
        self.rest: Callable[[], object] = lambda: None

    def hold(self, point: int, relid: int, rest: Callable[[], object]) -> bool:
        """Keep the rest."""
        self.armed = NOT_ARMED
        self.rest = rest
        return True


@pytest.mark.parametrize("right", [True, False])
def test_a_slot_that_is_emptied_before_its_pending_bit_is_set(right: bool) -> None:
    """The second look delivers; without it the bit stands in an empty slot, and the message waits for no EOM (B2)."""
    points = HoldsOnce()
    delivery = Delivery(points=points, fix=Fix(host_pending_first=right))
    delivery.post(1)
    delivery.post(2)
    delivery.memory.write(SLOT, bytes(4))  # the guest empties the slot, and finds no pending bit
    points.rest()

    assert delivery.queues.waiting(0, SINT) == (0 if right else 1)
    assert delivery.released == ([1, 2] if right else [1])
