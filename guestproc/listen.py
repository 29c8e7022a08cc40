"""LISTEN: a program that is called by the host, in whatever state its processor is, and times the interrupts.

The host's back end (`tools/bench_caller.py`) rings this channel as often as it was invited to. While the program
runs, the gate of vector 0xF3 notes the time before anything else: that is the first line of the interrupt routine.
Each call brings the time at which the one before it was rung; the two times together are a sample.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final

from emu.wire.synic import HYPERVISOR_CALLBACK_VECTOR
from guestproc.drivers.echo import claim_channels, release_channel
from guestproc.echo_session import EchoSession
from guestproc.tally import ChannelGone, Stalled, Tally, write_report

if TYPE_CHECKING:
    from emu.task_board import TaskRow
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

_INVITATION: Final = Struct("<QQ")
_CALL: Final = Struct("<QQ")
ANSWER: Final = b"here"
PIECE: Final = 20_000
"""Turns of the pre-emptible loop between two looks at whether there is any sense in going on (about a millisecond)."""


class Listening(IntEnum):
    """What the processor does meanwhile; `size` of the task's row."""

    HALTED = 0
    SAFE_POINTS = 1
    """Busy, with a call into the guest kernel every few lines."""
    COMPUTING = 2
    """Busy without one: the interrupt comes by signal, between two bytecodes."""


def listen(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """Be called `wanted` times, `rate` channels taking part; pairs of u64 (rung, ISR began) go into the file `path`."""
    tally = Tally()
    samples = array("Q")
    channels = claim_channels(current, row.cpu, row.relid)
    try:
        for channel in channels[:1]:
            session = EchoSession(current, vcpu, channel)
            with stamped(vcpu) as stamps:
                try:
                    _listen(session, row, stamps, samples)
                except (ChannelGone, Stalled):
                    tally.errors += 1
            tally.packets += session.received
    finally:
        for channel in channels:
            release_channel(current, channel)
    write_report(row.path, samples.tobytes())
    tally.errors += not samples
    return tally


@contextmanager
def stamped(vcpu: Vcpu) -> Iterator[list[int]]:
    """Note when each interrupt of the hypervisor's began, for as long as the block runs."""
    stamps: list[int] = []
    note, now = stamps.append, time.monotonic_ns
    gate = vcpu.vectors[HYPERVISOR_CALLBACK_VECTOR]

    def noted() -> None:
        note(now())
        gate()

    vcpu.vectors[HYPERVISOR_CALLBACK_VECTOR] = noted
    try:
        yield stamps
    finally:
        vcpu.vectors[HYPERVISOR_CALLBACK_VECTOR] = gate


def _listen(session: EchoSession, row: TaskRow, stamps: list[int], samples: array[int]) -> None:
    """Invite, then wait, note and answer until the last call has come."""
    wait = _WAITS[Listening(row.size)]
    session.send([_INVITATION.pack(row.rate, row.wanted)])
    began = 0
    while True:
        wait(session)
        for packet in session.take():
            left, rang = _CALL.unpack(packet[3])
            if began and rang:
                samples.append(rang)
                samples.append(began)
            began = stamps[0] if stamps else 0
            stamps.clear()
            if not left:
                session.send([ANSWER])  # the others' last calls come behind ours
                return
            session.send([ANSWER])


def _halted(session: EchoSession) -> None:
    session.wait()


def _at_safe_points(session: EchoSession) -> None:
    inbox, safe_point = session.inbox, session.vcpu.safe_point
    for _ in range(PIECE):
        safe_point()
        if inbox:
            return
    session.check()


def _computing(session: EchoSession) -> None:
    inbox = session.inbox

    def compute() -> None:
        total = 0
        for number in range(PIECE):
            if inbox:
                return
            total += number

    session.vcpu.compute(compute)
    if not inbox:
        session.check()


_WAITS: Final[dict[Listening, Callable[[EchoSession], None]]] = {
    Listening.HALTED: _halted,
    Listening.SAFE_POINTS: _at_safe_points,
    Listening.COMPUTING: _computing,
}
