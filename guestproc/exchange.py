"""EXCHANGE: a program that keeps every channel of its processor busy with the same batch, over and over.

Each round sends one batch into each channel and takes all of it back, so that all channels are active and none runs
ahead. What a packet costs then, with one channel or with hundreds, is what `bench scale` asks.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING, Final

from guestproc.drivers.echo import claim_channels, release_channel
from guestproc.echo_session import EchoSession
from guestproc.tally import ChannelGone, Stalled, Tally, write_report

if TYPE_CHECKING:
    from emu.task_board import TaskRow
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

DEFAULT_BATCH: Final = 32


def exchange(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """For `wanted` ns, batches of `rate` packets of `size` bytes; packets and ns (two u64) go into the file `path`."""
    tally = Tally()
    channels = claim_channels(current, row.cpu, row.relid)
    sessions = [EchoSession(current, vcpu, channel) for channel in channels]
    batch = [bytes(row.size)] * (row.rate or DEFAULT_BATCH)
    began = now = time.monotonic_ns()
    try:
        while sessions and now < began + row.wanted:
            _round(sessions, batch)
            now = time.monotonic_ns()
    except (ChannelGone, Stalled):
        tally.errors += 1
    finally:
        for channel in channels:
            release_channel(current, channel)
    tally.packets = sum(session.received for session in sessions)
    tally.nbytes = sum(session.nbytes for session in sessions)
    tally.errors += not tally.packets
    write_report(row.path, array("Q", (tally.packets, now - began)).tobytes())
    return tally


def _round(sessions: list[EchoSession], batch: list[bytes]) -> None:
    """One batch through each channel, and all of them back.

    What is back is taken while the others are sent to, as it comes: the packets of hundreds of channels, kept until
    the end, would not stay in any cache.
    """
    answered = 0
    for session in sessions:
        while sessions[answered].inbox and _is_back(sessions[answered]):
            answered += 1
        sent = session.send(batch)
        while sent < len(batch):  # the ring was full
            session.take()
            sent += session.send(batch[sent:])
    waiting = sessions[answered:]
    while waiting:
        for session in waiting:
            session.take()
        waiting = [session for session in waiting if session.received < session.sent]
        if waiting:
            waiting[0].wait()


def _is_back(session: EchoSession) -> bool:
    """Take what has come; whether that is all."""
    session.take()
    return session.received == session.sent
