"""`bench ring`: packets a second through one ring, writer and reader on two cores.

Both ends only write and read: one call a packet, in batches (of 32; small packets also of 64), or as views; the
reader has masked its interrupts, as a polling reader does, and who finds the ring full or empty looks again at
once. In turn with ours, since only the ratio of figures taken in turns means anything: the C ring of the kernel's
`tools/hv`, a C ring of the same format that also publishes in batches (the limit), the same ring over scattered
pages, and with `--peers` what Python programs use otherwise. Then the same for a whole channel (`tools.bench_path`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from statistics import median
from typing import Final

from emu.errors import MissingPrerequisite, RingFull
from emu.gpadl import map_ring
from emu.ipc.heap import keep_freed_memory
from emu.memory import PAGE_SIZE, GuestMemory
from emu.ring import RingConsumer, RingMemory, RingProducer
from tools import hv_ring, peers
from tools.anchors import Against, Anchor
from tools.two_ends import Cpus, Marks, run_both, two_cpus

DATA_PAGES: Final = 256
RING_BYTES: Final = (DATA_PAGES + 1) * PAGE_SIZE
BATCH: Final = 32
NAPI_WEIGHT: Final = 64
"""The kernel's own batch: what a driver takes in one poll, and what it may well send in one."""
AT_ONCE: Final = 1 << 17
SMALL: Final = 64
PACKETS: Final[Mapping[int, int]] = {64: 2_000_000, 1500: 1_000_000, 4096: 500_000, 65536: 60_000}
"""Packets of a run by their payload, so that each takes a tenth of a second or more, also on a fast machine."""
SHORTER: Final = 100
FOR_A_PEER: Final = 50
"""A peer sends so many times less."""
_DEADLINE_S: Final = 60.0

Send = Callable[[RingProducer, bytes, int], None]
Receive = Callable[[RingConsumer, int], bytes]


@dataclass(frozen=True, slots=True)
class Way:
    """How packets go in and come out, and what is asked of it: {size: (goal, floor)} as ratios to the C ring."""

    name: str
    send: Send
    receive: Receive
    asked: Mapping[int, tuple[float | None, float | None]]
    scattered: bool = False


@dataclass(slots=True)
class Figures:
    """The runs of everything that is measured in turn, by size: ours by way, then the others by name."""

    ours: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    c_ring: dict[int, list[float]] = field(default_factory=dict)
    limit: dict[int, list[float]] = field(default_factory=dict)
    peers: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    reasons: dict[tuple[int, str], str] = field(default_factory=dict)
    """Why a peer was left out."""


def send_one_by_one(producer: RingProducer, payload: bytes, packets: int) -> None:
    """One call a packet, each published at once."""
    write = producer.write
    for _ in repeat(None, packets):
        try:
            write(payload)
        except RingFull as full:
            while producer.free_bytes < full.needed:
                pass
            write(payload)


def send_in_batches(producer: RingProducer, payload: bytes, packets: int, batch: int = BATCH) -> None:
    """One call for each 32 packets."""
    payloads = [payload] * batch
    write_many = producer.write_many
    while packets >= batch:
        written, _ = write_many(payloads)
        packets -= written
    while packets > 0:
        written, _ = write_many(payloads[:packets])
        packets -= written


def send_in_larger_batches(producer: RingProducer, payload: bytes, packets: int) -> None:
    """One call for each 64 packets."""
    send_in_batches(producer, payload, packets, NAPI_WEIGHT)


def drain_all(consumer: RingConsumer, packets: int) -> bytes:
    """Packet by packet."""
    payload = b""
    while consumer.packets < packets:
        for _, _, _, payload in consumer.drain():  # noqa: B007
            pass
    return payload


def read_all(consumer: RingConsumer, packets: int) -> bytes:
    """Whatever there is, as runs, up to so many bytes at once."""
    payload = b""
    read_runs = consumer.read_runs
    while consumer.packets < packets:
        for _, _, _, payloads in read_runs(None, AT_ONCE):
            payload = payloads[-1]
    return payload


def hold_all(consumer: RingConsumer, packets: int) -> bytes:
    """As views, each looked at in its first and last byte and then given back; the last one copied."""
    payload = b""
    while consumer.packets < packets:
        with consumer.hold(limit=4) as held:
            for _, _, _, view in held.packets:
                assert view[0] == view[-1]
            if held.packets and consumer.packets + len(held.packets) == packets:
                payload = bytes(held.packets[-1][3])
    return payload


CALL: Final = Way("call", send_one_by_one, drain_all, {64: (0.5, 0.3)})
BATCHED: Final = Way(
    "batch", send_in_batches, read_all, {64: (1.2, 0.7), 1500: (1.0, 0.7), 4096: (1.3, 1.0), 65536: (1.1, 1.0)}
)
LARGER: Final = Way(f"batch-of-{NAPI_WEIGHT}", send_in_larger_batches, read_all, {64: (1.2, 0.7)})
VIEWS: Final = Way("view", send_in_batches, hold_all, {65536: (2.0, None)})
SCATTERED: Final = Way("scattered", send_in_batches, read_all, {64: (None, None), 4096: (None, None)}, scattered=True)
WAYS: Final = (CALL, BATCHED, LARGER, VIEWS, SCATTERED)
LIMITS: Final = {64: (0.07, 0.05), 1500: (0.26, 0.2), 4096: (0.52, 0.4), 65536: (None, None)}
"""What part of the limit batches are asked to reach: what prototypes did, and the floor."""
PEER_GOAL: Final = 2.5
PEER_FLOOR: Final = 1.3


def measure(runs: int, *, short: bool = False, with_peers: bool = False) -> list[Anchor]:
    """Measure `runs` times, everything in turn: the C rings if they can be built, the peers too if `with_peers`."""
    from tools import bench_path

    keep_freed_memory()  # as the processes of a machine do; the peers' ends have it, too
    cpus = two_cpus()
    if cpus is None:
        return [Anchor.of("ring", [], "packets/s", better="higher", reason="writer and reader need a core each")]
    figures, path = Figures(), bench_path.PathFigures()
    shorter = SHORTER if short else 1
    # The kernel's source is downloaded for who asks for all that there is to compare with.
    c_rings, reason = _c_rings(cpus, fetch=with_peers)
    for _ in range(runs):
        for size, packets in PACKETS.items():
            _measure_size(figures, size, packets // shorter, cpus, c_rings, with_peers)
        path.measure(cpus)
    c_ring = Against(hv_ring.NAME, _median(figures.c_ring, SMALL))
    anchors = [_anchor(figures, size, way, reason) for size in PACKETS for way in WAYS if size in way.asked]
    anchors += [_limit(figures, size, reason) for size in PACKETS]
    if with_peers:
        anchors += _peer_anchors(figures)
    unasked = None if with_peers else "peers were not asked for (--peers)"
    return anchors + path.anchors(best_peer(figures, SMALL), c_ring, unasked, reason)


def _measure_size(
    figures: Figures,
    size: int,
    packets: int,
    cpus: Cpus,
    c_rings: Mapping[int, tuple[Callable[[int], float], Callable[[int], float]]],
    with_peers: bool,
) -> None:
    """One run of everything at one size."""
    for way in WAYS:
        if size in way.asked:
            figures.ours.setdefault((size, way.name), []).append(exchange(way, size, packets, cpus))
            if size in c_rings:
                figures.c_ring.setdefault(size, []).append(c_rings[size][0](packets))
    if size in c_rings:
        figures.limit.setdefault(size, []).append(c_rings[size][1](packets))
    for name in peers.PEERS if with_peers else ():
        if (size, name) in figures.reasons:
            continue
        try:
            rate = peers.messages_per_second(name, size, max(100, packets // FOR_A_PEER), cpus)
            figures.peers.setdefault((size, name), []).append(rate)
        except peers.LeftOut as left_out:
            figures.reasons[size, name] = left_out.reason


def exchange(way: Way, size: int, packets: int, cpus: Cpus) -> float:
    """Send packets from a process on the first core to one on the second; return packets a second.

    Raises VmbusError when either end fails, or is not done in time.
    """
    payload = bytes(range(1, 256)) * (size // 255) + bytes(range(1, 1 + size % 255))
    payload = payload[:-1] + payload[:1]
    pages = range(1, DATA_PAGES + 2)
    # Every other page, backwards: no two that follow each other.
    pfns = range(2 * DATA_PAGES + 2, 0, -2) if way.scattered else pages
    ram_bytes = (2 * DATA_PAGES + 3) * PAGE_SIZE
    fd = os.memfd_create("bench-ring")
    try:
        os.ftruncate(fd, ram_bytes)
        memory = GuestMemory.map(fd, ram_bytes)
        ring = map_ring(memory, pfns, 0, DATA_PAGES + 1)
        ring.init()
        try:
            return _timed(way, payload, packets, ring, cpus)
        finally:
            ring.close()
            memory.close()
    finally:
        os.close(fd)


def _timed(way: Way, payload: bytes, packets: int, ring: RingMemory, cpus: Cpus) -> float:
    warm = 2 * RING_BYTES // len(payload)
    with Marks() as marks:

        def write() -> None:
            producer = RingProducer(ring)
            marks.wait_until_ready()
            # Both ends have touched every page, and run every line, before the clock runs.
            way.send(producer, payload, warm)
            marks.wait_until_warm()
            marks.begin()
            way.send(producer, payload, packets)

        def read() -> None:
            consumer = RingConsumer(ring)
            consumer.begin_read()
            marks.ready()
            way.receive(consumer, warm)
            marks.warm()
            last = way.receive(consumer, warm + packets)
            marks.end()
            assert last.startswith(payload), last
            assert consumer.packets == warm + packets, consumer.packets

        run_both(f"bench ring, {way.name} of {len(payload)} bytes", write, read, cpus, _DEADLINE_S)
        return packets * 1e9 / marks.elapsed_ns


def _c_rings(
    cpus: Cpus, *, fetch: bool
) -> tuple[dict[int, tuple[Callable[[int], float], Callable[[int], float]]], str | None]:
    """By size, what runs the kernel's C ring and what runs the limit; or why there are none."""
    try:
        # The kernel's sender breaks on payloads that are not a multiple of 8.
        return {
            size: (
                hv_ring.runner((size + 7) & ~7, RING_BYTES, cpus, fetch=fetch),
                hv_ring.limit_runner(size, RING_BYTES, BATCH, cpus),
            )
            for size in PACKETS
        }, None
    except MissingPrerequisite as error:
        cure = "" if fetch else ", or --peers, which downloads it"
        return {}, f"{error}{cure}"


def best_peer(figures: Figures, size: int) -> Against:
    """The peer with the best median at a size."""
    rates = {name: median(runs) for (its_size, name), runs in figures.peers.items() if its_size == size}
    if not rates:
        return Against("best peer", None)
    best = max(rates, key=rates.__getitem__)
    return Against(f"{best} (best peer)", rates[best])


def _median(runs: Mapping[int, list[float]], size: int) -> float | None:
    return median(runs[size]) if size in runs else None


def _anchor(figures: Figures, size: int, way: Way, reason: str | None) -> Anchor:
    """One way of sending at one size, against the C ring; scattered pages against contiguous ones."""
    goal, floor = way.asked[size]
    against = Against(hv_ring.NAME, _median(figures.c_ring, size))
    if way.scattered:
        against, reason = Against("contiguous pages", median(figures.ours[size, BATCHED.name])), None
    runs = figures.ours[size, way.name]
    name = f"ring-{size}B-{way.name}"
    return Anchor.of(name, runs, "packets/s", better="higher", against=against, goal=goal, floor=floor, reason=reason)


def _limit(figures: Figures, size: int, reason: str | None) -> Anchor:
    """Batches against the limit."""
    goal, floor = LIMITS[size]
    against = Against(hv_ring.LIMIT, _median(figures.limit, size))
    runs = figures.ours[size, BATCHED.name]
    name = f"ring-{size}B-limit"
    return Anchor.of(name, runs, "packets/s", better="higher", against=against, goal=goal, floor=floor, reason=reason)


def _peer_anchors(figures: Figures) -> list[Anchor]:
    """Batches against the best peer, then each peer's own figures or why it has none."""
    anchors = []
    for size in PACKETS:
        best = best_peer(figures, size)
        goal, floor = (PEER_GOAL, PEER_FLOOR) if size == SMALL else (None, None)
        anchors.append(
            Anchor.of(
                f"ring-{size}B-peers",
                figures.ours[size, BATCHED.name],
                "packets/s",
                better="higher",
                against=best,
                goal=goal,
                floor=floor,
                reason=None if best.value else "no peer could be measured",
            )
        )
    for size in PACKETS:
        for name in peers.PEERS:
            runs = figures.peers.get((size, name), [])
            reason = figures.reasons.get((size, name))
            anchors.append(Anchor.of(f"peer-{size}B-{name}", runs, "messages/s", better="higher", reason=reason))
    return anchors
