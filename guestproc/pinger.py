"""The program PING's work: round trips on one channel, each with when it was due and when its answer was taken."""

from __future__ import annotations

from array import array
from collections import deque
from time import monotonic_ns
from typing import Final

from emu.ring import Packet
from emu.tracing import CAPACITY, E_REQUEST_END, E_REQUEST_START, E_TASK_TAKE
from emu.wire.packets import COMPLETION_REQUESTED
from guestproc.echo_session import EchoSession

LOOK_EVERY: Final = 64
"""Round trips between two looks at how far the drain of a recording is behind: a thousandth of a ring."""
MOST_BEHIND: Final = CAPACITY // 2
DRAIN_NS: Final = 30_000_000
"""How long to wait for it; where nobody drains, in vain."""
TURN_NS: Final = 1_000_000
now_ns: Final = monotonic_ns
"""At hand: a name of another module is looked for each time."""


class Pinger:
    """One channel's round trips: which are under way, and when each was due."""

    def __init__(self, session: EchoSession, payload: bytes, samples: array[int]) -> None:
        self.session = session
        self.trace = session.current.trace
        self.relid = session.channel.relid
        self.payload = [payload]
        self.samples = samples
        self.due: deque[int] = deque()
        # Bound once, as each is used in every round trip.
        self.note: Final = samples.append
        self.oldest: Final = self.due.popleft

    def run(self, wanted_ns: int, every_ns: int) -> None:
        """Send until the time is over, then take what is still under way."""
        next_due = now_ns()
        end = next_due + wanted_ns
        left = LOOK_EVERY
        while next_due < end:
            # At a rate the next one is due when it is due, whatever became of the ones before: a round trip that is
            # sent late has waited, and that is part of how long it took (no coordinated omission).
            while every_ns and now_ns() < next_due and not self.due:
                self.session.vcpu.safe_point()
            if not every_ns:
                next_due = now_ns()
            self.send(next_due)
            next_due += every_ns
            if every_ns:
                # Who is behind his time waits for nothing; but an answer that was left lying would seem late itself.
                self.taken(self.session.take())
            while self.due and (not every_ns or now_ns() < next_due):
                self.take()
            left -= 1
            if not left:
                left = LOOK_EVERY
                if self.trace and not self.due and self.trace.behind() > MOST_BEHIND:
                    next_due += self.let_drain()
        while self.due:
            self.take()

    def let_drain(self) -> int:
        """Halt until half of what waits is drained; how long that took (ns), which is no part of any round trip."""
        assert self.trace is not None
        began = now_ns()
        while self.trace.behind() > MOST_BEHIND // 2 and now_ns() - began < DRAIN_NS:
            self.session.vcpu.idle(TURN_NS)
        return now_ns() - began

    def send(self, due_ns: int) -> None:
        """One packet that asks for a completion; a full ring is waited for."""
        while not self.session.send(self.payload, first_trans_id=1, flags=COMPLETION_REQUESTED):
            self.take()
        self.due.append(due_ns)
        if self.trace:
            self.trace.record(E_REQUEST_START, self.relid, 1)

    def take(self) -> None:
        """Answers that have come; a halt if there are none."""
        packets = self.session.take()
        if not packets:
            self.session.pause()
            packets = self.session.collect()
        self.taken(packets)

    def taken(self, packets: list[Packet]) -> None:
        """Note when these answers were taken; they come in the order of what was sent."""
        if not packets:
            return
        done_ns = now_ns()
        if self.trace:
            self.trace.record(E_TASK_TAKE, self.relid, len(packets))
            self.trace.record(E_REQUEST_END, self.relid, 1, len(packets))
        for _ in packets:
            if self.due:
                self.note(self.oldest())
                self.note(done_ns)
