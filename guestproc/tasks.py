"""The guest's user space: programs that the harness orders on a CPU, between whose lines interrupts come.

ECHO_CHECK and STREAM have safe points: every call into the guest kernel is one. CRUNCH computes, and is
interrupted by signal between two bytecodes. Each counts what it sent, got back, and found wrong.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from emu.task_board import Program, TaskBoard, TaskRow, TaskState
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from guestproc.drivers.echo import INBOXES, Packet
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.vmbus.channel import vmbus_sendpackets, vmbus_wait_for_room

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

BATCH: Final = 32
STALL_NS: Final = 10_000_000_000
"""A program gives up when nothing moves for this long."""


class EchoSession:
    """One channel as a program uses it: sends batches, takes what comes back, knows what is outstanding."""

    def __init__(self, current: Current, vcpu: Vcpu, channel: Channel) -> None:
        self.current = current
        self.vcpu = vcpu
        self.channel = channel
        self.inbox: deque[Packet] = INBOXES.setdefault(channel.handle, deque())
        self.sent = 0
        self.received = 0
        self.nbytes = 0

    def send(self, payloads: list[bytes], *, first_trans_id: int = 0, flags: int = 0) -> int:
        """Send as many as fit; asks for room and waits when nothing does. How many were sent."""
        count = vmbus_sendpackets(self.current, self.channel, payloads, first_trans_id, flags)
        if count < 0:
            return count
        if count == 0 and payloads:
            # descriptor, payload up to the next 8 bytes, trailer
            needed = 16 + (len(payloads[0]) + 7 & ~7) + 8
            if not vmbus_wait_for_room(self.current, self.channel, needed):
                self.vcpu.idle(50_000_000)
        self.sent += count
        self.nbytes += sum(map(len, payloads[:count]))
        return count

    def take(self) -> list[Packet]:
        """What has come back since the last time."""
        self.vcpu.safe_point()
        packets = [self.inbox.popleft() for _ in range(len(self.inbox))]
        self.received += len(packets)
        return packets

    def wait(self) -> None:
        """Halt until something comes, interrupts included."""
        if not self.inbox:
            self.vcpu.idle(50_000_000)

    def close(self) -> None:
        """Nobody waits on this channel here any more."""
        INBOXES.pop(self.channel.handle, None)


def channels_of(current: Current, cpu: int, relid: int = 0) -> list[Channel]:
    """Open channels whose interrupts this CPU takes, or the one that `relid` names."""
    return [
        channel
        for channel in current.tables.channels.live()
        if channel.state.load() == ChannelState.OPENED_STATE
        and channel.target_cpu.load() == cpu
        and relid in (0, channel.relid)
    ]


class Stalled(Exception):
    """Nothing came back for `STALL_NS`."""


def _until(session: EchoSession, done: Callable[[], bool], handle: Callable[[Packet], None]) -> None:
    """Take packets until `done`, waiting in between; Stalled when nothing moves."""
    last = session.vcpu.now()
    while True:
        for packet in session.take():
            handle(packet)
            last = session.vcpu.now()
        if done():
            return
        if session.vcpu.now() - last > STALL_NS or session.vcpu.stopping():
            raise Stalled
        session.wait()


def echo_check(current: Current, vcpu: Vcpu, row: TaskRow) -> tuple[int, int, int, bytes]:
    """Send `wanted` random packets on each channel, half of them with a completion; each must come back."""
    rng = random.Random(current.machine.config["seed"] * 1_000 + row.cpu)
    packets = nbytes = errors = 0
    for channel in channels_of(current, row.cpu, row.relid):
        session = EchoSession(current, vcpu, channel)
        expected: deque[tuple[int, bytes]] = deque()

        def check(packet: Packet, expected: deque[tuple[int, bytes]] = expected) -> None:
            nonlocal errors
            packet_type, _flags, trans_id, payload = packet
            wanted_id, wanted = expected.popleft()
            completes = packet_type == VM_PKT_COMP
            if completes != bool(wanted_id) or (completes and trans_id != wanted_id) or not payload.startswith(wanted):
                errors += 1

        try:
            left = row.wanted
            while left:
                batch = [rng.randbytes(rng.choice((8, 64, 200, 1_500))) for _ in range(min(BATCH, left))]
                first_id = row.wanted - left + 1 if rng.random() < 0.5 else 0
                flags = COMPLETION_REQUESTED if first_id else 0
                sent = max(0, session.send(batch, first_trans_id=first_id, flags=flags))
                expected.extend((first_id + n if first_id else 0, one) for n, one in enumerate(batch[:sent]))
                left -= sent
                for packet in session.take():
                    check(packet)
            _until(session, lambda expected=expected: not expected, check)  # type: ignore[misc]
        except Stalled:
            errors += len(expected)
        finally:
            session.close()
        packets += session.received
        nbytes += session.nbytes
    return packets, nbytes, errors, b""


def crunch(current: Current, vcpu: Vcpu, row: TaskRow) -> tuple[int, int, int, bytes]:
    """Send a burst on every channel, then compute while the answers interrupt by signal; check the result."""
    sessions = [EchoSession(current, vcpu, channel) for channel in channels_of(current, row.cpu, row.relid)]
    for session in sessions:
        session.send([bytes([n]) * 64 for n in range(8)])
    result: list[int] = []
    vcpu.compute(lambda: result.append(_collatz(row.wanted)))
    # Computed a second time without interruptions: an ISR must leave the task it interrupts alone.
    errors = int(result != [_collatz(row.wanted)])
    try:
        for session in sessions:
            _until(session, lambda s=session: s.received >= s.sent, lambda packet: None)  # type: ignore[misc]
    except Stalled:
        errors += 1
    finally:
        for session in sessions:
            session.close()
    return sum(s.received for s in sessions), sum(s.nbytes for s in sessions), errors, b""


def _collatz(limit: int) -> int:
    """Steps of all Collatz sequences from 1 to `limit`: plain bytecodes, about 6 us a start number."""
    total = 0
    for start in range(1, limit + 1):
        n = start
        while n != 1:
            n = 3 * n + 1 if n & 1 else n >> 1
            total += 1
    return total


def stream(current: Current, vcpu: Vcpu, row: TaskRow) -> tuple[int, int, int, bytes]:
    """Send a file through one channel, take it back, hash what came; `errors` counts length mismatches."""
    channel = next(iter(channels_of(current, row.cpu, row.relid)), None)
    if channel is None:
        return 0, 0, 1, b""
    session = EchoSession(current, vcpu, channel)
    ring_bytes = (channel.ring_send_pages - 1) * 4096
    size = min(16_384, max(64, ring_bytes // 8 - 64 & ~7))
    digest = hashlib.sha256()
    lengths: deque[int] = deque()
    errors = 0

    def handle(packet: Packet) -> None:
        nonlocal errors
        length = lengths.popleft()
        payload = packet[3]
        if len(payload) < length:
            errors += 1
        digest.update(payload[:length])

    try:
        with Path(row.path).open("rb") as source:
            chunks: list[bytes] = []
            ended = False
            while not ended or chunks:
                while len(chunks) < BATCH and not ended:
                    chunk = source.read(size)
                    ended = not chunk
                    if chunk:
                        chunks.append(chunk)
                sent = max(0, session.send(chunks)) if chunks else 0
                lengths.extend(map(len, chunks[:sent]))
                del chunks[:sent]
                for packet in session.take():
                    handle(packet)
                if vcpu.stopping():
                    raise Stalled
        _until(session, lambda: not lengths, handle)
    except Stalled:
        errors += 1
    except OSError:
        errors += 1
    finally:
        session.close()
    return session.received, session.nbytes, errors, digest.digest()


PROGRAMS: Final[dict[Program, Callable[[Current, Vcpu, TaskRow], tuple[int, int, int, bytes]]]] = {
    Program.ECHO_CHECK: echo_check,
    Program.CRUNCH: crunch,
    Program.STREAM: stream,
}


def run_task(current: Current, vcpu: Vcpu, board: TaskBoard, row: TaskRow) -> None:
    """Run one ordered program to its end and report on the board."""
    packets, nbytes, errors, digest = PROGRAMS[row.program](current, vcpu, row)
    vcpu.counters.flush()
    state = TaskState.FAILED if errors else TaskState.DONE
    board.report(row, state, packets=packets, nbytes=nbytes, errors=errors, digest=digest)
