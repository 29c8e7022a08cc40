"""The echo device on rings in memory: everything comes back in order, whatever the rings do."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import ProtocolViolation
from emu.ring import Packet
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND, ring_bytes
from emu.wire.ring_layout import INTERRUPT_MASK, PENDING_SEND_SZ, READ_INDEX
from hostproc.devices.channel import BATCH_PACKETS
from hostproc.devices.echo import Echo
from tests.hostproc.devices.ring_bench import PAGE, OpenChannel


def word(memory: bytearray, offset: int) -> int:
    """Return a shared word of a ring."""
    return int.from_bytes(memory[offset : offset + 4], "little")


@pytest.mark.parametrize(
    ("flags", "trans_id", "answer"),
    [
        (0, 0, VM_PKT_DATA_INBAND),
        (0, 7, VM_PKT_DATA_INBAND),
        (COMPLETION_REQUESTED, 0, VM_PKT_DATA_INBAND),
        (COMPLETION_REQUESTED, 7, VM_PKT_COMP),
        (COMPLETION_REQUESTED, (1 << 64) - 3, VM_PKT_COMP),
    ],
)
def test_a_packet_comes_back(flags: int, trans_id: int, answer: int) -> None:
    """With its payload and id; as a completion if it asked for one and has an id to be told by."""
    bench = OpenChannel(Echo())

    bench.send(b"sixteen bytes...", trans_id=trans_id, flags=flags)
    bench.run()

    assert bench.received() == [(answer, 0, trans_id, b"sixteen bytes...")]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64, 1000, 4056])
def test_every_length_comes_back(length: int) -> None:
    """Nothing at all up to the largest packet that the ring takes; padding is part of what is seen."""
    bench = OpenChannel(Echo())
    payload = bytes(index % 251 for index in range(length))

    bench.send(payload)
    bench.run()

    ((_type, _flags, _id, echoed),) = bench.received()
    assert echoed == payload.ljust(-(-length // 8) * 8, b"\0")


def test_device_that_sleeps_for_room_wants_it() -> None:
    """From the answer that does not fit until there is room for it: signals that come meanwhile have a cause."""
    bench = OpenChannel(Echo())
    wanted = [bench.channel.wants_room()]
    for _ in range(5):  # four answers fill the ring
        bench.send(bytes(1_000))
        bench.run()
    wanted.append(bench.channel.wants_room())
    bench.received()
    bench.run()
    wanted.append(bench.channel.wants_room())

    assert wanted == [False, True, False]


@pytest.mark.parametrize("index", [4, PAGE, PAGE + 8])
def test_send_refuses_an_index_that_cannot_be_at_once(index: int) -> None:
    """Also where the ring has room, so that the write itself would not have looked at it."""
    bench = OpenChannel(Echo())
    assert bench.channel.send(b"first")
    bench.to_guest[READ_INDEX : READ_INDEX + 4] = index.to_bytes(4, "little")

    with pytest.raises(ProtocolViolation, match="read_index"):
        bench.channel.send(b"second")


def test_mixed_packets_stay_in_order() -> None:
    """Completions and in-band packets are not sorted by kind."""
    bench = OpenChannel(Echo(), to_host_pages=8, to_guest_pages=8)
    sent = [(flags, number) for number in range(1, 100) for flags in (0, 1, 1)][:200]

    for flags, number in sent:
        bench.send(number.to_bytes(8, "little"), trans_id=number, flags=flags)
    bench.run()

    expected = [
        (VM_PKT_COMP if flags else VM_PKT_DATA_INBAND, 0, number, number.to_bytes(8, "little"))
        for flags, number in sent
    ]
    assert bench.received() == expected


def test_other_packet_types_come_back_in_band() -> None:
    """The device echoes payloads, whatever kind of packet brought them."""
    bench = OpenChannel(Echo())
    bench.guest_out.write_with_header(bytes(16), b"payload!", packet_type=9)
    bench.ring()

    bench.run()

    assert bench.received() == [(VM_PKT_DATA_INBAND, 0, 0, b"payload!")]


def test_the_ring_is_masked_while_the_device_works() -> None:
    """Interrupts are wanted only while it sleeps; a packet to a working device rings nobody."""
    bench = OpenChannel(Echo())
    assert word(bench.to_host, INTERRUPT_MASK) == 1

    bench.run()
    assert word(bench.to_host, INTERRUPT_MASK) == 0
    bench.send(*[b""] * (BATCH_PACKETS + 1))
    assert bench.rung
    bench.step()
    masked = word(bench.to_host, INTERRUPT_MASK)
    bench.run()

    assert masked == 1
    assert word(bench.to_host, INTERRUPT_MASK) == 0


def test_the_guest_is_interrupted_once_a_batch() -> None:
    """Empty to not empty is one interrupt, however many packets."""
    bench = OpenChannel(Echo(), to_host_pages=4, to_guest_pages=4)

    bench.send(*[b"12345678"] * 50)
    bench.run()

    assert bench.interrupts == 1
    assert len(bench.received()) == 50


def test_a_step_is_bounded() -> None:
    """One resume takes at most a batch, so that other tasks have their turn."""
    bench = OpenChannel(Echo(), to_host_pages=16, to_guest_pages=16)
    bench.send(*[b""] * (3 * BATCH_PACKETS))

    bench.step()

    assert len(bench.received()) == BATCH_PACKETS
    assert bench.rung


def test_a_full_ring_stops_the_device_and_nothing_is_lost() -> None:
    """It says what it waits for, sleeps, and goes on when the guest has made just that room."""
    bench = OpenChannel(Echo(), to_host_pages=4, to_guest_pages=2)
    payloads = [bytes([number]) * 1000 for number in range(11)]

    bench.send(*payloads)
    bench.run()
    assert bench.run() == 0
    assert word(bench.to_guest, PENDING_SEND_SZ) == ring_bytes(1000)
    got = bench.received(1)
    while bench.run():
        got += bench.received()

    assert [packet[3] for packet in got] == payloads
    assert word(bench.to_guest, PENDING_SEND_SZ) == 0
    assert bench.channel.outgoing.out_full_total > 0


def test_a_device_that_waits_for_room_leaves_the_guests_ring_masked() -> None:
    """New packets are no reason to wake it: it could not return them."""
    bench = OpenChannel(Echo(), to_host_pages=4, to_guest_pages=2)
    bench.send(*[bytes(1000)] * 5)
    bench.run()

    bench.send(b"more")

    assert not bench.rung
    assert word(bench.to_host, INTERRUPT_MASK) == 1


def test_a_packet_that_never_fits_back_is_counted_and_dropped() -> None:
    """A guest whose receive ring is smaller than its packets loses those, and only those."""
    bench = OpenChannel(Echo(), to_host_pages=4, to_guest_pages=2)

    bench.send(b"before", bytes(6000), b"behind", bytes(4065))
    bench.run()

    assert [packet[3] for packet in bench.received()] == [b"before\0\0", b"behind\0\0"]
    assert [violation.rule for violation in bench.violations] == ["echo-too-long"] * 2


def test_nonsense_in_the_ring_ends_the_task_after_what_made_sense() -> None:
    """Packets before the fault come back; then the violation comes out of the task."""
    bench = OpenChannel(Echo())
    bench.send(b"one", b"two")
    at = 4096 + bench.guest_out.bytes
    bench.send(b"bad")
    bench.to_host[at + 4 : at + 6] = (0xFFFF).to_bytes(2, "little")

    bench.step()
    assert [packet[3] for packet in bench.received()] == [b"one\0\0\0\0\0", b"two\0\0\0\0\0"]
    with pytest.raises(ProtocolViolation):
        bench.run()


def test_nonsense_is_not_forgiven_when_it_is_taken_back() -> None:
    """A guest that repairs its ring after it was seen has broken it all the same."""
    bench = OpenChannel(Echo())
    bench.send(b"one")
    at = 4096 + bench.guest_out.bytes
    bench.send(b"bad")
    good = bytes(bench.to_host)
    bench.to_host[at + 4 : at + 6] = (0xFFFF).to_bytes(2, "little")
    bench.step()

    bench.to_host[4096:] = good[4096:]

    with pytest.raises(ProtocolViolation):
        bench.run()


def test_a_guest_that_waits_for_room_is_signalled() -> None:
    """Reading is what makes room; the guest hears of it exactly when there is enough."""
    bench = OpenChannel(Echo(), to_host_pages=2, to_guest_pages=4)
    bench.run()
    bench.send(*[bytes(1000)] * 3)
    assert not bench.guest_out.want_room(ring_bytes(2000))

    bench.run()

    # One for the room, one for the packets that came back.
    assert bench.interrupts == 2
    assert bench.guest_out.free_bytes >= ring_bytes(2000)


@pytest.mark.parametrize("index", [1, 4096, 0xFFFFFFF8])
def test_impossible_indices_end_the_task(index: int) -> None:
    """A guest that stores nonsense into an index gets nothing more."""
    for ring, offset in (("to_host", 0), ("to_guest", 4)):
        bench = OpenChannel(Echo())
        bench.send(b"one")
        getattr(bench, ring)[offset : offset + 4] = index.to_bytes(4, "little")

        with pytest.raises(ProtocolViolation, match="_index"):
            bench.run()


def test_closing_the_task_anywhere_leaves_the_rings_to_be_closed() -> None:
    """A suspended device holds nothing of the rings' memory."""
    for steps in range(4):
        bench = OpenChannel(Echo(), to_host_pages=4, to_guest_pages=2)
        bench.send(*[bytes(1000)] * 8)
        for _ in range(steps):
            bench.step()

        bench.body.close()
        bench.channel.close()

        with pytest.raises(ValueError, match="closed"):
            bench.channel.incoming.read()


@given(data=st.data(), pages=st.tuples(st.integers(2, 3), st.integers(2, 3)))
def test_any_traffic_comes_back_in_order(data: st.DataObject, pages: tuple[int, int]) -> None:
    """Random sizes, a guest that reads when it likes, and rings that run full in both directions."""
    bench = OpenChannel(Echo(), to_host_pages=pages[0], to_guest_pages=pages[1])
    most = (min(pages) - 1) * 4096 - 32
    sent: deque[Packet] = deque()
    got: list[Packet] = []
    number = 0
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["send", "send", "step", "run", "read", "read all"]))
        if action == "send":
            number += 1
            length = data.draw(st.one_of(st.integers(0, most), st.integers(0, 64)))
            flags = data.draw(st.integers(0, 1))
            payload = bytes([number % 256]) * length
            if ring_bytes(length) <= bench.guest_out.free_bytes:
                bench.send(payload, trans_id=number, flags=flags)
                answer = VM_PKT_COMP if flags else VM_PKT_DATA_INBAND
                sent.append((answer, 0, number, payload.ljust(-(-length // 8) * 8, b"\0")))
        elif action == "step":
            bench.step()
        elif action == "run":
            bench.run()
        else:
            got += bench.received(1 if action == "read" else None)
    more = True
    while more:
        bench.run()
        more = bool(batch := bench.received()) or bench.rung
        got += batch

    assert got == list(sent)
    assert word(bench.to_guest, PENDING_SEND_SZ) == 0
    assert bench.channel.incoming.bytes_to_read == 0
