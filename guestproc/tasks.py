"""The guest's user space: programs that the harness orders on a CPU, between whose lines interrupts come.

ECHO_CHECK and STREAM have safe points: every call into the guest kernel is one. CRUNCH computes, and is
interrupted by signal between two bytecodes. Each counts what it sent, got back, and found wrong. A channel
that is taken away ends a program early, which is nothing wrong; one where nothing moves any more is.
"""

from __future__ import annotations

import errno
import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from emu.ring import Packet
from emu.task_board import Program, TaskBoard, TaskRow, TaskState
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, ring_bytes
from guestproc.drivers.echo import INBOXES, being_removed, claim_channels, open_relids, release_channel
from guestproc.kernel.layout import Channel
from guestproc.vcpu import raise_if_stopping
from guestproc.vmbus.packets import vmbus_cancel_room, vmbus_sendpackets, vmbus_wait_for_room

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

BATCH: Final = 32
STALL_NS: Final = 10_000_000_000
"""A program gives up when nothing moves for this long."""
IDLE_NS: Final = 50_000_000
COMPUTE_PACKETS: Final = 8


class ChannelGone(Exception):
    """The host, or an unload, takes the channel away."""


class Stalled(Exception):
    """Nothing moves, for `STALL_NS` or because the host broke the ring."""


@dataclass(slots=True)
class Tally:
    """What a program has to report."""

    packets: int = 0
    nbytes: int = 0
    errors: int = 0
    digest: bytes = b""


class EchoSession:
    """One claimed channel as a program uses it: sends batches, takes what comes back, waits for either."""

    def __init__(self, current: Current, vcpu: Vcpu, channel: Channel) -> None:
        self.current = current
        self.vcpu = vcpu
        self.channel = channel
        self.inbox: deque[Packet] = INBOXES[channel.handle]
        self.sent = 0
        self.received = 0
        self.nbytes = 0
        self._moved_ns = vcpu.now()
        self._wished = False

    def send(self, payloads: list[bytes], *, first_trans_id: int = 0, flags: int = 0) -> int:
        """Send as many as fit; when nothing does, ask for room and wait a while. How many were sent."""
        if self.sent == self.received and not self._wished:
            self._moved_ns = self.vcpu.now()  # nothing was awaited until now
        self.check()
        count = vmbus_sendpackets(self.current, self.channel, payloads, first_trans_id, flags)
        if count == 0 and payloads:
            count = -self._wait_for_room(ring_bytes(len(payloads[0])))
        if count < 0:
            raise ChannelGone if count == -errno.ENODEV else Stalled
        if count:
            self._moved_ns = self.vcpu.now()
            if self._wished:
                self._wished = False
                vmbus_cancel_room(self.current, self.channel)
        self.sent += count
        self.nbytes += sum(map(len, payloads[:count]))
        return count

    def _wait_for_room(self, size: int) -> int:
        """Publish the wish, then halt; an errno when the channel or its ring is gone, else 0."""
        room = vmbus_wait_for_room(self.current, self.channel, size)
        if room < 0:
            return -room
        self._wished = room == 0
        if room == 0 and not self.inbox:
            self.vcpu.idle(IDLE_NS)
        return 0

    def take(self) -> list[Packet]:
        """What has come back since the last time."""
        self.vcpu.safe_point()
        packets = [self.inbox.popleft() for _ in range(len(self.inbox))]
        if packets:
            self._moved_ns = self.vcpu.now()
            self.received += len(packets)
        return packets

    def wait(self) -> None:
        """Halt until something comes, interrupts included; not for ever."""
        if not self.inbox:
            self.vcpu.idle(IDLE_NS)
        self.check()

    def check(self) -> None:
        """Go on only if there is any sense in it: MachineStopping, ChannelGone, Stalled."""
        raise_if_stopping(self.vcpu)
        if being_removed(self.current, self.channel):
            raise ChannelGone
        if self.vcpu.now() - self._moved_ns > STALL_NS:
            raise Stalled

    def until(self, done: Callable[[], bool], handle: Callable[[Packet], None]) -> None:
        """Take packets until `done`, waiting in between."""
        self._moved_ns = self.vcpu.now()
        while True:
            for packet in self.take():
                handle(packet)
            if done():
                return
            self.wait()


@contextmanager
def claimed(current: Current, vcpu: Vcpu, row: TaskRow, tally: Tally) -> Iterator[list[EchoSession]]:
    """Sessions on the channels that a task is for; given back, and added up, on every way out."""
    sessions = [EchoSession(current, vcpu, channel) for channel in claim_channels(current, row.cpu, row.relid)]
    try:
        yield sessions
    finally:
        for session in sessions:
            release_channel(current, session.channel)
            tally.packets += session.received
            tally.nbytes += session.nbytes


# -- ECHO_CHECK -------------------------------------------------------------------------------------------


def echo_check(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """Send `wanted` random packets on each channel, half of them with a completion; each must come back."""
    rng = random.Random(current.machine.config["seed"] * 1_000 + row.cpu)
    tally = Tally()
    # One claim at a time: a removal that waits for a claim of ours may hold up the rescind that would tell us that
    # the channel we wait on is gone.
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
    """Send a burst on every channel, then compute while the answers interrupt by signal; check the result."""
    tally = Tally()
    with claimed(current, vcpu, row, tally) as sessions:
        for session in sessions:
            try:
                session.send([bytes([n]) * 64 for n in range(COMPUTE_PACKETS)])
            except (ChannelGone, Stalled):
                continue
        result: list[int] = []
        vcpu.compute(lambda: result.append(_collatz(row.wanted)))
        # Computed a second time without interruptions: an ISR must leave the task it interrupts alone.
        tally.errors = int(result != [_collatz(row.wanted)])
        for session in sessions:
            try:
                session.until(lambda s=session: s.received >= s.sent, lambda packet: None)  # type: ignore[misc]
            except Stalled:
                tally.errors += 1
            except ChannelGone:
                continue
    return tally


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


PROGRAMS: Final[dict[Program, Callable[[Current, Vcpu, TaskRow], Tally]]] = {
    Program.ECHO_CHECK: echo_check,
    Program.CRUNCH: crunch,
    Program.STREAM: stream,
}


def run_task(current: Current, vcpu: Vcpu, board: TaskBoard, row: TaskRow) -> None:
    """Run one ordered program to its end and report on the board."""
    tally = PROGRAMS[row.program](current, vcpu, row)
    vcpu.counters.flush()
    state = TaskState.FAILED if tally.errors else TaskState.DONE
    board.report(row, state, packets=tally.packets, nbytes=tally.nbytes, errors=tally.errors, digest=tally.digest)
