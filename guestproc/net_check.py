"""NET_CHECK: sends frames through each netlike channel of a CPU, has as many sent back, and compares all counts.

What comes is taken by the driver's poll, on this CPU between two lines of this program; the program only sends, halts,
and reads the channel's record. Right is: no gap and no wrong checksum at either end, and neither a frame more nor less.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.errors import ProtocolViolation
from emu.task_board import TaskRow
from emu.wire.netlike_protocol import (
    MAX_FRAME,
    MIN_FRAME,
    START_FRAMES,
    NetlikeStatus,
    pack_frame,
    pack_get_counters,
    pack_start,
    parse_counters,
    parse_reply,
)
from emu.wire.packets import COMPLETION_REQUESTED, ring_bytes
from guestproc.drivers.claims import being_removed, claim_channels, open_relids, release_claim
from guestproc.drivers.netlike import NetlikeDriver, net_channel
from guestproc.kernel.layout import Channel
from guestproc.tally import IDLE_NS, STALL_NS, ChannelGone, Stalled, Tally
from guestproc.vcpu import raise_if_stopping
from guestproc.vmbus.packets import vmbus_cancel_room, vmbus_sendpacket, vmbus_sendpackets, vmbus_wait_for_room

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

BATCH = 32


class NetSession:
    """One claimed channel: frames out, requests and their completions, waits that end."""

    def __init__(self, current: Current, vcpu: Vcpu, channel: Channel) -> None:
        self._current = current
        self._vcpu = vcpu
        self._channel = channel
        self.nvchan = net_channel(current, channel)
        self._requests = 0

    def send_frames(self, datas: list[bytes]) -> None:
        """All of them, in order, waiting for room whenever there is none."""
        frames = [pack_frame(self.nvchan.tx_next + n, data) for n, data in enumerate(datas)]
        done = 0

        def some_sent() -> bool:
            nonlocal done
            count = self._checked(vmbus_sendpackets(self._current, self._channel, frames[done:]))
            self.nvchan.tx_next = self.nvchan.tx_next + count & 0xFFFFFFFF
            done += count
            return done == len(frames) or self._has_room(ring_bytes(len(frames[done])))

        while done < len(frames):
            self.until(some_sent)
        vmbus_cancel_room(self._current, self._channel)

    def ask(self, request: bytes) -> bytes:
        """Send a request and wait for its completion."""
        seen = self.nvchan.replies
        self._requests += 1

        def sent() -> bool:
            result = vmbus_sendpacket(self._current, self._channel, request, self._requests, flags=COMPLETION_REQUESTED)
            if result == -errno.EAGAIN:
                return self._has_room(ring_bytes(len(request))) and sent()
            return self._checked(result) == 0

        self.until(sent)
        vmbus_cancel_room(self._current, self._channel)
        self.until(lambda: self.nvchan.replies != seen)
        return self.nvchan.reply

    def until(self, done: Callable[[], bool]) -> None:
        """Halt until something is so, interrupts and polls included; Stalled, ChannelGone, MachineStopping."""
        end_ns = self._vcpu.now() + STALL_NS
        while not done():
            self._vcpu.idle(IDLE_NS)
            raise_if_stopping(self._vcpu)
            if being_removed(self._current, self._channel):
                raise ChannelGone
            if self._vcpu.now() > end_ns:
                raise Stalled

    def _has_room(self, size: int) -> bool:
        return self._checked(vmbus_wait_for_room(self._current, self._channel, size)) == 1

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            raise ChannelGone if result == -errno.ENODEV else Stalled
        return result


def net_check(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """`wanted` frames each way on every netlike channel of this CPU; `errors` are what does not add up."""
    rng = random.Random(current.machine.config["seed"] * 1_000 + row.cpu)
    tally = Tally()
    # One claim at a time (see `claims`): the wait on one channel does not look whether another is wanted back.
    for relid in [row.relid] if row.relid else open_relids(current, row.cpu):
        for channel in claim_channels(current, NetlikeDriver.number, row.cpu, relid):
            try:
                _check_one(NetSession(current, vcpu, channel), rng, row.wanted, tally)
            except (Stalled, ProtocolViolation):
                tally.errors += 1
            except ChannelGone:
                pass  # taken away, which is nothing wrong
            finally:
                release_claim(current, channel)
    return tally


def _check_one(session: NetSession, rng: random.Random, count: int, tally: Tally) -> None:
    nvchan = session.nvchan
    before = parse_counters(session.ask(pack_get_counters()))
    received, receiving_from = nvchan.rx_packets, nvchan.rx_bytes
    if parse_reply(session.ask(pack_start(count, rng.getrandbits(32)))) != (START_FRAMES, NetlikeStatus.SUCCESS):
        tally.errors += 1
        return
    sent_bytes = 0
    for first in range(0, count, BATCH):
        datas = [rng.randbytes(rng.randint(MIN_FRAME, MAX_FRAME)) for _ in range(min(BATCH, count - first))]
        session.send_frames(datas)
        sent_bytes += sum(map(len, datas))
    session.until(lambda: nvchan.rx_packets - received >= count)
    after = parse_counters(session.ask(pack_get_counters()))
    wrong = (
        nvchan.rx_packets - received != count,
        nvchan.rx_gaps,
        nvchan.rx_checksum_errors,
        after.frames - before.frames != count,
        after.nbytes - before.nbytes != sent_bytes,
        after.gaps,
        after.checksum_errors,
    )
    tally.errors += sum(map(bool, wrong))
    tally.packets += 2 * count
    tally.nbytes += sent_bytes + nvchan.rx_bytes - receiving_from
