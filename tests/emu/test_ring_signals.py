"""Who must be signalled, and when: data arrived, room again, and the looks that keep either from being lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import ProtocolViolation, RingFull
from emu.memory import PAGE_SIZE
from emu.ring import PacketTooLong, RingConsumer, RingMemory, RingProducer, RingWords
from emu.wire.packets import ring_bytes
from tests.interleaving import Check, SteppedWakeup, Stuck, Turns, explore, stepped_view

DATA_SIZE = PAGE_SIZE


def new_ring() -> RingMemory:
    """A ring of one data page."""
    memory = RingMemory.on(bytearray(PAGE_SIZE + DATA_SIZE))
    memory.init()
    return memory


def ends() -> tuple[RingProducer, RingConsumer]:
    """Both ends of a new ring."""
    memory = new_ring()
    return RingProducer(memory), RingConsumer(memory)


# -- data arrived ---------------------------------------------------------------------------------


def test_signal_exactly_once_when_the_ring_stops_being_empty() -> None:
    """The first packet into an empty ring signals; those behind it do not; the next first one does."""
    producer, consumer = ends()
    signals = []
    for _ in range(3):
        signals.append([producer.write(b"x" * 16) for _ in range(4)])
        list(consumer.drain())

    assert signals == [[True, False, False, False]] * 3


def test_signal_depends_on_the_old_position_alone() -> None:
    """A reader that has read all but one packet is not waiting, however full or empty the ring is."""
    producer, consumer = ends()
    producer.write(b"one")
    producer.write(b"two")
    consumer.read()

    assert producer.write(b"three") is False
    list(consumer.drain())
    assert producer.write(b"four") is True


def test_masked_reader_is_never_signalled() -> None:
    """A reader that polls has set its interrupt mask and is left alone, by writes and by batches."""
    producer, consumer = ends()
    consumer.begin_read()
    for _ in range(3):
        assert producer.write(b"x") is False
        assert producer.write_many([b"x", b"y"]) == (2, False)
        list(consumer.drain())


def test_unmasking_looks_again() -> None:
    """A packet that came under the mask brings no signal, so unmasking reports it."""
    producer, consumer = ends()
    consumer.begin_read()
    assert consumer.end_read() == 0
    consumer.begin_read()
    assert producer.write(b"x" * 16) is False

    assert consumer.end_read() == ring_bytes(16)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_batch_is_one_transition(count: int) -> None:
    """However many packets and publishes it has, a batch into an empty ring signals once."""
    producer, consumer = ends()

    assert producer.write_many([b"x" * 64] * count) == (count, True)
    assert producer.write_many([b"x"]) == (1, False)
    list(consumer.drain())
    assert producer.write_many([]) == (0, False)


def test_batch_signals_a_reader_that_catches_up_between_its_publishes() -> None:
    """The rule is looked at for each publish: one of them may find the reader waiting again."""
    memory = new_ring()
    consumer = RingConsumer(memory)
    words = memory.words

    def store_write(index: int) -> None:
        words.store_write(index)
        if index > 1500:
            return
        consumer.begin_read()
        list(consumer.drain())
        consumer.end_read()

    producer = RingProducer(memory, words=replace(words, store_write=store_write))
    producer.write(b"not empty")

    assert producer.write_many([b"x" * 400] * 5) == (5, True)


# -- room again -----------------------------------------------------------------------------------


def fill(producer: RingProducer, size: int) -> int:
    """Write packets that take `size` bytes each until none fits; return how many went in."""
    packets = 0
    while True:
        try:
            producer.write(b"f" * (size - 24))
        except RingFull:
            return packets
        packets += 1


def test_writer_is_signalled_exactly_when_the_space_appears() -> None:
    """It asks for N bytes; the release that makes N free owes the signal, those before and after do not."""
    producer, consumer = ends()
    packets = fill(producer, 64)
    assert producer.want_room(200) is False
    signals = []
    for _ in range(packets):
        consumer.read()
        signals.append(consumer.take_signal())

    # 4088 bytes hold 63 packets of 64, and 56 bytes are free: 3 more packets make 248.
    assert signals == [False, False, True] + [False] * (packets - 3)
    assert consumer.intr_in_full == 1


def test_signal_that_room_came_is_taken_once() -> None:
    """`take_signal` forgets: the caller that asked is the one that signals."""
    producer, consumer = ends()
    fill(producer, 512)
    producer.want_room(1000)
    list(consumer.drain())

    assert [consumer.take_signal(), consumer.take_signal()] == [True, False]


def test_large_drain_owes_one_signal() -> None:
    """A drain releases in several steps; only the step that crosses the wish owes the signal."""
    producer, consumer = ends()
    fill(producer, 64)
    producer.want_room(2000)
    list(consumer.drain())

    assert consumer.releases > 4
    assert (consumer.take_signal(), consumer.intr_in_full) == (True, 1)


def test_mask_plays_no_role_for_room() -> None:
    """The interrupt mask answers another question; the blocked writer is signalled all the same."""
    producer, consumer = ends()
    fill(producer, 512)
    producer.want_room(1000)
    consumer.begin_read()
    list(consumer.drain())

    assert consumer.take_signal() is True


def test_writer_without_the_feature_bit_is_not_signalled() -> None:
    """Who does not promise to publish its wishes polls; what stands in the word then means nothing."""
    producer, consumer = ends()
    fill(producer, 512)
    producer.words.store_features(0)
    producer.want_room(1000)
    list(consumer.drain())

    assert consumer.take_signal() is False


def test_withdrawn_wish_brings_no_signal() -> None:
    """`cancel_room` clears the word."""
    producer, consumer = ends()
    fill(producer, 512)
    producer.want_room(1000)
    producer.cancel_room()
    list(consumer.drain())

    assert consumer.take_signal() is False


def test_wish_that_is_met_already_is_withdrawn() -> None:
    """The look behind the wish finds the room: nobody waits, and no signal comes for it later."""
    producer, consumer = ends()
    producer.write(b"x" * 1000)

    assert producer.want_room(producer.free_bytes) is True
    assert producer.words.load_pending() == 0
    list(consumer.drain())
    assert consumer.take_signal() is False


@pytest.mark.parametrize("low_bits", range(8))
def test_low_bits_of_a_wish_are_ignored(low_bits: int) -> None:
    """The wish counts in units of 8 bytes, as the ring does."""
    producer, consumer = ends()
    packets = fill(producer, 64)
    producer.words.store_pending(248 + low_bits)
    signals = []
    for _ in range(packets):
        consumer.read()
        signals.append(consumer.take_signal())

    assert signals.index(True) == 2
    assert sum(signals) == 1


def test_wish_of_less_than_a_unit_is_none() -> None:
    """1 to 7 bytes are always free when anything is: no signal."""
    producer, consumer = ends()
    fill(producer, 512)
    producer.words.store_pending(7)
    list(consumer.drain())

    assert consumer.take_signal() is False


def test_wish_that_can_never_be_met_is_refused() -> None:
    """The writer is told at once; a reader that is asked for it refuses, once it has read everything."""
    producer, consumer = ends()
    with pytest.raises(PacketTooLong):
        producer.want_room(DATA_SIZE)
    assert producer.words.load_pending() == 0
    assert producer.want_room(DATA_SIZE - 8) is True

    producer.write(b"x")
    producer.words.store_pending(DATA_SIZE)
    drain = consumer.drain()
    assert next(drain)[3] == b"x".ljust(8, b"\0")
    with pytest.raises(ProtocolViolation) as caught:
        next(drain)
    assert (caught.value.rule, caught.value.field, caught.value.value) == (
        "pending-send-size",
        "pending_send_sz",
        DATA_SIZE,
    )
    assert consumer.take_signal() is False
    assert producer.bytes_to_read == 0


def test_sensible_wish_after_an_impossible_one_is_honoured() -> None:
    """Refusing one wish breaks nothing."""
    producer, consumer = ends()
    fill(producer, 512)
    producer.words.store_pending(0xFFFF_FFFF)
    with pytest.raises(ProtocolViolation):
        list(consumer.drain())
    fill(producer, 512)
    producer.want_room(1000)

    assert len(list(consumer.drain())) == 7
    assert consumer.take_signal() is True


@given(
    wish=st.integers(0, DATA_SIZE - 8),
    drained=st.lists(st.integers(1, 12), max_size=12),
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=30),
)
def test_room_rule_is_the_kernels(wish: int, drained: list[int], sizes: list[int]) -> None:
    """For any wish and any batches read: a signal exactly where the free bytes go from <= p to > p."""
    memory = new_ring()
    producer, consumer = RingProducer(memory), RingConsumer(memory)
    for size in sizes * 3:
        try:
            producer.write(bytes(8 * size))
        except RingFull:
            break
    memory.words.store_pending(wish)
    for count in drained:
        before = kernel_bytes_to_write(memory)
        wrong_chunks = consumer.releases
        taken = list(consumer.drain(count))
        now = kernel_bytes_to_write(memory)
        crossed = bool(taken) and before <= wish < now

        assert consumer.take_signal() == (crossed and wish > 0), (wish, before, now)
        assert consumer.releases - wrong_chunks <= 1 + (now - before) // (DATA_SIZE // 8)


TAKERS: dict[str, Callable[[RingConsumer, int], bool]] = {
    "drain": lambda consumer, count: bool(list(consumer.drain(count))),
    "read_many": lambda consumer, count: bool(consumer.read_many(count)),
    "read_runs": lambda consumer, count: bool(consumer.read_runs(count)),
    # As a channel's callback: a packet that came alone first.
    "read_lone": lambda consumer, _count: consumer.read_lone() is not None or bool(consumer.read_many(1)),
}
"""Ways to take packets: up to so many, and whether there were any."""


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
@given(
    wish=st.integers(1, DATA_SIZE - 8),
    counts=st.lists(st.integers(1, 40), max_size=20),
    alike=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=8),
)
def test_room_rule_holds_however_packets_are_taken(
    take: Callable[[RingConsumer, int], bool], wish: int, counts: list[int], alike: list[tuple[int, int]]
) -> None:
    """Also of packets alike, which are taken together, wherever in the ring they begin."""
    memory = new_ring()
    producer, consumer = RingProducer(memory), RingConsumer(memory)
    for size, repeats in alike:
        with suppress(RingFull):
            for _ in range(repeats):
                producer.write(bytes(8 * size))
    memory.words.store_pending(wish)
    for count in counts:
        before = kernel_bytes_to_write(memory)
        took = take(consumer, count)
        now = kernel_bytes_to_write(memory)

        assert consumer.take_signal() == (took and before <= wish < now), (wish, before, now)


def test_room_rule_holds_behind_a_lone_packet() -> None:
    """For every wish: the packet that was alone in the ring makes the room, or it was there before."""
    for wish in range(8, DATA_SIZE - 7, 8):
        memory = new_ring()
        producer, consumer = RingProducer(memory), RingConsumer(memory)
        producer.write(bytes(64))
        consumer.read()  # a descriptor that was seen before is one that `read_lone` takes
        producer.write(bytes(64))
        memory.words.store_pending(wish)
        before = kernel_bytes_to_write(memory)
        assert consumer.read_lone() is not None

        assert consumer.take_signal() == (before <= wish), wish


def kernel_bytes_to_write(memory: RingMemory) -> int:
    """Bytes to write as the kernel counts them: with the 8 that are never used."""
    write, read = memory.words.load_write(), memory.words.load_read()
    return memory.data_size - (write - read) if write >= read else read - write


# -- every order of steps -------------------------------------------------------------------------

Reader = Callable[[RingConsumer, SteppedWakeup, list[bytes]], None]
PACKETS = (b"first".ljust(8, b"\0"), b"second".ljust(8, b"\0"))


def careful_reader(consumer: RingConsumer, wakeup: SteppedWakeup, read: list[bytes]) -> None:
    """Mask, drain, unmask, look again; block only when nothing is there."""
    while len(read) < len(PACKETS):
        consumer.begin_read()
        read += [packet[3] for packet in consumer.drain()]
        if not consumer.end_read() and len(read) < len(PACKETS):
            wakeup.block()


def careless_reader(consumer: RingConsumer, wakeup: SteppedWakeup, read: list[bytes]) -> None:
    """The same without the second look (exhibit unmask-without-recheck)."""
    while len(read) < len(PACKETS):
        consumer.begin_read()
        read += [packet[3] for packet in consumer.drain()]
        consumer.end_read()
        if len(read) < len(PACKETS):
            wakeup.block()


def two_packets(reader: Reader) -> Callable[[Turns], tuple[list[Callable[[], None]], Check]]:
    """A writer of two packets, and a reader of both, over stepped words."""

    def scenario(turns: Turns) -> tuple[list[Callable[[], None]], Check]:
        buffer = bytearray(PAGE_SIZE + DATA_SIZE)
        memory = RingMemory.on(buffer)
        memory.init()
        words = RingWords.on(stepped_view(turns, buffer), 0)
        producer, consumer = RingProducer(memory, words=words), RingConsumer(memory, words=words)
        wakeup = SteppedWakeup(turns)
        read: list[bytes] = []

        def write() -> None:
            for payload in PACKETS:
                if producer.write(payload):
                    wakeup.post()

        def check() -> None:
            assert read == list(PACKETS)

        return [write, lambda: reader(consumer, wakeup, read)], check

    return scenario


def test_no_order_of_steps_loses_a_packet() -> None:
    """Whatever the order of a writer's and a reader's accesses, every packet is read."""
    assert explore(two_packets(careful_reader), preemptions=3) > 500


def test_reader_that_does_not_look_again_is_caught() -> None:
    """The exploration sees the packet stranded in the gap before the unmask."""
    with pytest.raises(Stuck):
        explore(two_packets(careless_reader), preemptions=2)


def blocked_writer(*, look_again: bool) -> Callable[[Turns], tuple[list[Callable[[], None]], Check]]:
    """A full ring, a writer that waits for room, and a reader that makes it in two releases."""

    def scenario(turns: Turns) -> tuple[list[Callable[[], None]], Check]:
        buffer = bytearray(PAGE_SIZE + DATA_SIZE)
        memory = RingMemory.on(buffer)
        memory.init()
        RingProducer(memory).write_many([b"f" * 2000] * 2)
        words = RingWords.on(stepped_view(turns, buffer), 0)
        producer, consumer = RingProducer(memory, words=words), RingConsumer(memory, words=words)
        wakeup = SteppedWakeup(turns)
        written: list[int] = []

        def write() -> None:
            while not written:
                try:
                    producer.write(b"w" * 3000)
                    written.append(1)
                except RingFull as full:
                    if look_again:
                        if not producer.want_room(full.needed):
                            wakeup.block()
                    else:
                        producer.words.store_pending(full.needed)
                        wakeup.block()

        def read() -> None:
            for _ in range(2):
                consumer.read()
                if consumer.take_signal():
                    wakeup.post()

        def check() -> None:
            assert written == [1]

        return [write, read], check

    return scenario


def test_no_order_of_steps_forgets_a_blocked_writer() -> None:
    """Whatever the order of the wish, the releases and the looks, the writer goes on."""
    assert explore(blocked_writer(look_again=True), preemptions=3) > 200


@pytest.mark.soak
def test_really_no_order_of_steps_forgets_a_blocked_writer() -> None:
    """The same with any number of preemptions."""
    assert explore(blocked_writer(look_again=True)) > 10_000


def test_writer_that_does_not_look_again_is_caught() -> None:
    """The exploration sees the wish that came just after the last release (exhibit stale-pending-size)."""
    with pytest.raises(Stuck):
        explore(blocked_writer(look_again=False), preemptions=2)
