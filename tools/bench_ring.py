"""`bench ring`: packets a second through one ring, writer and reader on two cores.

Both ends only write and read: the writer makes one call a packet (or batches), and the reader drains a ring
whose interrupts it has masked, as a polling reader does. Who finds the ring full or empty looks again at
once. The C ring of the kernel's `tools/hv` does the same, alternating with ours, since only the ratio of
figures taken in turns means anything.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from itertools import repeat
from multiprocessing import connection
from statistics import median
from typing import Any, Final

from emu.errors import DeadlinePassed, MissingPrerequisite, RingFull, VmbusError
from emu.gpadl import map_ring
from emu.ipc.atomics import AtomicView
from emu.memory import PAGE_SIZE, GuestMemory
from emu.ring import RingConsumer, RingMemory, RingProducer
from tools import hv_ring
from tools.anchors import Against, Anchor

PAYLOAD: Final = b"x" * 64
DATA_PAGES: Final = 256
BATCH: Final = 32
CALL_GOAL: Final = 0.33
CALL_FLOOR: Final = 0.3
_DEADLINE_S: Final = 60.0

Send = Callable[[RingProducer, bytes, int], None]
Run = Callable[[int], float]


def measure(runs: int, packets: int, with_peers: bool) -> list[Anchor]:
    """Measure `runs` times `packets` packets each way of sending; the C ring too, in turn, if `with_peers`."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return [_anchor(name, [], [], "writer and reader need a core each") for name in ("call", "batch")]
    pair = cpus[0], cpus[1]
    c_ring, reason = _c_ring(pair) if with_peers else (None, "peers were not asked for (--peers)")
    figures: dict[str, list[float]] = {"call": [], "batch": [], "C": []}
    for _ in range(runs):
        figures["call"].append(exchange(send_one_by_one, packets, pair))
        if c_ring is not None:
            figures["C"].append(c_ring(packets))
        figures["batch"].append(exchange(send_in_batches, packets, pair))
    return [_anchor(name, figures[name], figures["C"], reason) for name in ("call", "batch")]


def exchange(send: Send, packets: int, cpus: tuple[int, int]) -> float:
    """Send packets from a process on the first core to one on the second; return packets a second.

    Raises VmbusError when either end fails, or is not done in time.
    """
    fd = os.memfd_create("bench-ring")
    try:
        os.ftruncate(fd, (DATA_PAGES + 2) * PAGE_SIZE)
        memory = GuestMemory.map(fd, (DATA_PAGES + 2) * PAGE_SIZE)
        ring = map_ring(memory, range(1, DATA_PAGES + 2), 0, DATA_PAGES + 1)
        ring.init()
        try:
            words = _Words(memory.atomics)
            _run_both((_write, cpus[0], ring, words, send, packets), (_read, cpus[1], ring, words, packets))
            return packets * 1e9 / (words.end.load() - words.begin.load())
        finally:
            ring.close()
            memory.close()
    finally:
        os.close(fd)


class _Words:
    """What the two ends say to each other and to the bench, in the page before the ring: nanoseconds, or flags."""

    def __init__(self, view: AtomicView) -> None:
        self.ready = view.cell_u64(0)
        self.begin = view.cell_u64(64)
        self.end = view.cell_u64(128)


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


def send_in_batches(producer: RingProducer, payload: bytes, packets: int) -> None:
    """One call for each 32 packets."""
    payloads = [payload] * BATCH
    while packets > 0:
        written, _ = producer.write_many(payloads[:packets])
        packets -= written


def _write(cpu: int, ring: RingMemory, words: _Words, send: Send, packets: int) -> None:
    """The writing process."""
    os.sched_setaffinity(0, {cpu})
    producer = RingProducer(ring)
    while not words.ready.load():
        os.sched_yield()
    words.begin.store(time.monotonic_ns())
    send(producer, PAYLOAD, packets)


def _read(cpu: int, ring: RingMemory, words: _Words, packets: int) -> None:
    """The reading process."""
    os.sched_setaffinity(0, {cpu})
    consumer = RingConsumer(ring)
    consumer.begin_read()
    words.ready.store(1)
    payload = b""
    while consumer.packets < packets:
        for _, _, _, payload in consumer.drain():  # noqa: B007
            pass
    words.end.store(time.monotonic_ns())
    assert payload == PAYLOAD, payload
    assert consumer.packets == packets, consumer.packets


def _run_both(writer: tuple[Any, ...], reader: tuple[Any, ...]) -> None:
    """Fork both ends and wait for them; neither outlives a failure of the other."""
    context = multiprocessing.get_context("fork")
    ends = [context.Process(target=what, args=rest, daemon=True) for what, *rest in (writer, reader)]
    deadline = time.monotonic() + _DEADLINE_S
    try:
        for end in ends:
            end.start()
        waiting = list(ends)
        while waiting:
            left = deadline - time.monotonic()
            done = connection.wait([end.sentinel for end in waiting], timeout=max(left, 0))
            if not done:
                raise DeadlinePassed("bench ring", int(_DEADLINE_S * 1e9))
            for end in [end for end in waiting if end.sentinel in done]:
                waiting.remove(end)
                end.join()
                if end.exitcode:
                    raise VmbusError(f"bench ring: an end left with exit status {end.exitcode}")
    finally:
        for end in ends:
            if end.is_alive():
                end.kill()
                end.join()
            end.close()


def _c_ring(cpus: tuple[int, int]) -> tuple[Run | None, str | None]:
    """What runs the C ring, or why there is none."""
    try:
        return hv_ring.runner(len(PAYLOAD), (DATA_PAGES + 1) * PAGE_SIZE, cpus), None
    except MissingPrerequisite as error:
        return None, str(error)


def _anchor(way: str, runs: list[float], c_runs: list[float], reason: str | None) -> Anchor:
    """One way of sending as an anchor; only one call a packet has a goal yet."""
    against = Against(hv_ring.NAME, median(c_runs) if c_runs else None)
    goal, floor = (CALL_GOAL, CALL_FLOOR) if way == "call" else (None, None)
    return Anchor.of(
        f"ring-{len(PAYLOAD)}B-{way}",
        runs,
        "packets/s",
        better="higher",
        against=against,
        goal=goal,
        floor=floor,
        reason=reason,
    )
