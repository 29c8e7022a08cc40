"""The guest's user space: programs that the harness orders on a CPU, between whose lines interrupts come.

ECHO_CHECK, STREAM and NET_CHECK have safe points: every call into the guest kernel is one. CRUNCH computes, and is
interrupted by signal between two bytecodes. Each counts what it sent, got back, and found wrong. BIND and UNBIND are an
administrator's shell that happens to run on that CPU: a call of `guestproc.user`. A channel
that is taken away ends a program early, which is nothing wrong; one where nothing moves any more is.
"""

from __future__ import annotations

import hashlib
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from emu.ring import Packet
from emu.task_board import Program, TaskBoard, TaskRow, TaskState
from emu.tracing import E_TASK_DONE, E_TASK_RUN
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from guestproc.drivers.claims import open_relids
from guestproc.drivers.echo import claim_channels, release_channel
from guestproc.echo_session import EchoSession
from guestproc.exchange import exchange
from guestproc.kernel.layout import Channel
from guestproc.listen import listen
from guestproc.net_check import net_check
from guestproc.pinger import Pinger
from guestproc.stress import stress
from guestproc.tally import IDLE_NS, ChannelGone, Stalled, Tally, write_report
from guestproc.transmit import transmit
from guestproc.user import run_call

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

BATCH: Final = 32
COMPUTE_PACKETS: Final = 8
COMPUTE_NS: Final = 30_000_000
"""How long CRUNCH computes at most for an interrupt to come into it: a host that shares its core waits a time slice."""


@contextmanager
def claimed(current: Current, vcpu: Vcpu, row: TaskRow, tally: Tally) -> Iterator[list[EchoSession]]:
    """Sessions on the channels that a task is for; given back, and added up, on every way out."""
    sessions = [EchoSession(current, vcpu, channel) for channel in claim_channels(current, row.cpu, row.relid)]
    try:
        yield sessions
    finally:
        for session in sessions:
            _give_back(current, session, tally)


def _give_back(current: Current, session: EchoSession, tally: Tally) -> None:
    release_channel(current, session.channel)
    tally.packets += session.received
    tally.nbytes += session.nbytes


# -- ECHO_CHECK -------------------------------------------------------------------------------------------


def echo_check(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """Send `wanted` random packets on each channel, half of them with a completion; each must come back."""
    rng = random.Random(current.machine.config["seed"] * 1_000 + row.cpu)
    tally = Tally()
    # One claim at a time (see `claims`): the wait on one channel does not look whether another is wanted back.
    for relid in [row.relid] if row.relid else open_relids(current, row.cpu):
        with claimed(current, vcpu, replace(row, relid=relid), tally) as sessions:
            for session in sessions:
                expected: deque[tuple[int, bytes]] = deque()
                try:
                    tally.errors += _check_one(session, rng, row.wanted, expected)
                except Stalled:
                    tally.errors += len(expected) or 1
                except ChannelGone:
                    continue
    return tally


def _check_one(session: EchoSession, rng: random.Random, left: int, expected: deque[tuple[int, bytes]]) -> int:
    """Exchange `left` packets; how many came back wrong. `expected` holds what is on its way."""
    errors = 0

    def check(packet: Packet) -> None:
        nonlocal errors
        packet_type, _flags, trans_id, payload = packet
        if not expected:
            errors += 1  # nobody asked for this one
            return
        wanted_id, wanted = expected.popleft()
        completes = packet_type == VM_PKT_COMP
        if completes != bool(wanted_id) or (completes and trans_id != wanted_id) or not payload.startswith(wanted):
            errors += 1

    next_id = 1
    while left:
        batch = [rng.randbytes(rng.choice((8, 64, 200, 1_500))) for _ in range(min(BATCH, left))]
        first_id = next_id if rng.random() < 0.5 else 0
        sent = session.send(batch, first_trans_id=first_id, flags=COMPLETION_REQUESTED if first_id else 0)
        expected.extend((first_id + n if first_id else 0, one) for n, one in enumerate(batch[:sent]))
        next_id += sent
        left -= sent
        for packet in session.take():
            check(packet)
    session.until(lambda: not expected, check)
    return errors


# -- CRUNCH -----------------------------------------------------------------------------------------------


def crunch(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """Send a burst on every channel, then compute until answers have interrupted by signal; check every result."""
    tally = Tally()
    with claimed(current, vcpu, row, tally) as sessions:
        for session in sessions:
            try:
                session.send([bytes([n]) * 64 for n in range(COMPUTE_PACKETS)])
            except (ChannelGone, Stalled):
                continue
        results: list[int] = []

        def compute() -> None:
            # Counted from here: what was due already is taken before the first line of this.
            before, end = vcpu.counters.preemptions, time.monotonic_ns() + COMPUTE_NS
            results.append(_collatz(row.wanted))
            while sessions and vcpu.counters.preemptions == before and time.monotonic_ns() < end:
                results.append(_collatz(row.wanted))

        vcpu.compute(compute)
        # Computed once more without interruptions: an ISR must leave the task it interrupts alone.
        tally.errors = int(set(results) != {_collatz(row.wanted)})
        for session in sessions:
            session.begin()
        while sessions:
            for session in list(sessions):
                if _is_over(session, tally):
                    sessions.remove(session)
                    _give_back(current, session, tally)
            if sessions and not any(session.inbox for session in sessions):
                vcpu.idle(IDLE_NS)
    return tally


def _is_over(session: EchoSession, tally: Tally) -> bool:
    """Whether all answers have come, or none will come any more."""
    session.take()
    if session.received >= session.sent:
        return True
    try:
        session.check()
    except Stalled:
        tally.errors += 1
    except ChannelGone:
        pass
    else:
        return False
    return True


def _collatz(limit: int) -> int:
    """Steps of all Collatz sequences from 1 to `limit`: plain bytecodes, about 6 us a start number."""
    total = 0
    for start in range(1, limit + 1):
        n = start
        while n != 1:
            n = 3 * n + 1 if n & 1 else n >> 1
            total += 1
    return total


# -- STREAM -----------------------------------------------------------------------------------------------


def stream(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """Send a file through one channel, take it back, hash what came; `errors` counts length mismatches."""
    tally = Tally()
    digest = hashlib.sha256()
    with claimed(current, vcpu, row, tally) as sessions:
        try:
            if not sessions:
                raise ChannelGone
            chunks = read_chunks(Path(row.path), _chunk_size(sessions[0].channel))
            tally.errors += _stream_one(sessions[0], chunks, digest.update)
        except (ChannelGone, Stalled, OSError):
            tally.errors += 1
    tally.digest = digest.digest()
    return tally


def _chunk_size(channel: Channel) -> int:
    """Bytes a packet: eight of them and more fit into the ring."""
    return min(16_384, max(64, (channel.ring_send_pages - 1) * 4096 // 8 - 64 & ~7))


def read_chunks(path: Path, size: int) -> Iterator[bytes]:
    """A file in pieces; OSError as soon as it cannot be read."""
    with path.open("rb") as source:
        while chunk := source.read(size):
            yield chunk


def _stream_one(session: EchoSession, chunks: Iterator[bytes], update: Callable[[bytes], None]) -> int:
    """Send all chunks, hand what comes back to `update`; how many came back with another length."""
    lengths: deque[int] = deque()
    errors = 0

    def handle(packet: Packet) -> None:
        nonlocal errors
        if not lengths:
            errors += 1  # nobody asked for this one
            return
        length = lengths.popleft()
        payload = packet[3]
        if len(payload) < length:
            errors += 1
        update(payload[:length])

    waiting: list[bytes] = []
    while True:
        waiting.extend(islice(chunks, BATCH - len(waiting)))
        if not waiting:
            break
        sent = session.send(waiting)
        lengths.extend(map(len, waiting[:sent]))
        del waiting[:sent]
        for packet in session.take():
            handle(packet)
    session.until(lambda: not lengths, handle)
    return errors


# -- PING -------------------------------------------------------------------------------------------------


def ping(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """Round trips of `size` bytes on one channel for `wanted` ns, `rate` a second or (0) one after the other.

    Each round trip is two u64 in the file `path`: when it was due, and when its answer was taken (CLOCK_MONOTONIC
    ns). `errors` counts answers that never came, or that nobody asked for. A machine that records waits for its drain
    before that loses anything, and else goes on at its pace: one that pauses measures how it wakes up.
    """
    tally = Tally()
    samples = array("Q")
    with claimed(current, vcpu, row, tally) as sessions:
        if sessions:
            pinger = Pinger(sessions[0], bytes(row.size), samples)
            with suppress(ChannelGone, Stalled):
                pinger.run(row.wanted, 1_000_000_000 // row.rate if row.rate else 0)
            # An answer too many is as wrong as one that never came, and a host may send one.
            tally.errors = abs(sessions[0].sent - sessions[0].received)
    write_report(row.path, samples.tobytes())
    tally.errors += not samples
    return tally


# -- BIND, UNBIND -----------------------------------------------------------------------------------------


def bind(current: Current, _vcpu: Vcpu, row: TaskRow) -> Tally:
    """`echo DEVICE >drivers_probe`, on this processor: a driver that fits probes it, and opens its channel."""
    return _call(current, "drivers_probe", row.relid)


def unbind(current: Current, _vcpu: Vcpu, row: TaskRow) -> Tally:
    """`echo DEVICE >drivers/DRIVER/unbind`, on this processor: the driver closes the channel."""
    return _call(current, "unbind", row.relid)


def _call(current: Current, name: str, relid: int) -> Tally:
    answer = run_call(current, name, {"device": str(relid)})
    wrong = answer.get("error") or (name == "drivers_probe" and not answer["driver"] and "no driver took it")
    if wrong:
        current.log(f"{name} of relid {relid}: {wrong}")
    return Tally(errors=int(bool(wrong)))


CALLERS: Final = frozenset({Program.BIND, Program.UNBIND})
"""Programs that only call into the kernel, so that a processor may run several at a time: those that read a channel
take turns, as what arrives lies in their process."""

PROGRAMS: Final[dict[Program, Callable[[Current, Vcpu, TaskRow], Tally]]] = {
    Program.ECHO_CHECK: echo_check,
    Program.CRUNCH: crunch,
    Program.STREAM: stream,
    Program.NET_CHECK: net_check,
    Program.PING: ping,
    Program.STRESS: stress,
    Program.LISTEN: listen,
    Program.EXCHANGE: exchange,
    Program.TRANSMIT: transmit,
    Program.BIND: bind,
    Program.UNBIND: unbind,
}


def run_task(current: Current, vcpu: Vcpu, board: TaskBoard, row: TaskRow) -> None:
    """Run one ordered program to its end and report on the board."""
    current.record(E_TASK_RUN, row.program, row.cpu, row.relid)
    tally = PROGRAMS[row.program](current, vcpu, row)
    current.counters.flush()
    state = TaskState.FAILED if tally.errors else TaskState.DONE
    current.record(E_TASK_DONE, row.program, row.cpu, state)
    board.report(row, state, packets=tally.packets, nbytes=tally.nbytes, errors=tally.errors, digest=tally.digest)
