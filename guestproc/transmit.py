"""TRANSMIT: a program that sends frames into one netlike channel as a network stack does, until its queue is stopped.

It waits for nothing: neither for room, nor for the completions, which the driver's poll takes.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.wire.netlike_protocol import MIN_FRAME
from guestproc.drivers.claims import claim_channels, release_claim
from guestproc.drivers.netlike import NetlikeDriver, net_channel
from guestproc.drivers.netlike_tx import netvsc_start_xmit
from guestproc.tally import Tally

if TYPE_CHECKING:
    from emu.task_board import TaskRow
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu


def transmit(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """At most `wanted` frames of `size` bytes, `rate` a second (0: as fast as it goes), into the channel `relid`."""
    tally = Tally()
    data = bytes(max(row.size, MIN_FRAME))
    for channel in claim_channels(current, NetlikeDriver.number, _reader_of(current, row.relid), row.relid):
        try:
            nvchan = net_channel(current, channel)
            for _ in range(row.wanted):
                result = netvsc_start_xmit(current, channel, nvchan, data)
                if result:
                    tally.errors += result not in (-errno.EBUSY, -errno.EAGAIN)
                    break
                tally.packets += 1
                tally.nbytes += len(data)
                if row.rate:
                    end = vcpu.now() + 1_000_000_000 // row.rate
                    while vcpu.now() < end:
                        vcpu.idle(end - vcpu.now())
                vcpu.safe_point()
        finally:
            release_claim(current, channel)
    return tally


def _reader_of(current: Current, relid: int) -> int:
    """The processor that takes a channel's interrupts; this one may be another."""
    channel = current.tables.channels.find(current.tables.relids.load(relid)) if relid else None
    return current.cpu if channel is None else channel.target_cpu.load()
