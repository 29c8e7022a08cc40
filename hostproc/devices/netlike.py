"""The netlike device: a source and a sink of frames, with sub-channels, as a NIC's host side has them.

Each channel answers the guest's requests (`emu.wire.netlike_protocol`) in their order: frames that it is asked for
go out in batches, frames that come in are counted and checked. What a guest gets wrong is counted as a violation, and
the channel goes on. A guest that does not read stops its own channel, and no other.
"""

from __future__ import annotations

import random
from typing import ClassVar, Final

from emu.errors import ProtocolViolation
from emu.ring import Packet
from emu.wire.netlike_protocol import (
    FRAME,
    GET_COUNTERS,
    MAX_FRAME,
    MIN_FRAME,
    START_FRAMES,
    Counters,
    NetlikeStatus,
    pack_counters,
    pack_frame,
    pack_reply,
    parse_frame,
    parse_start,
    type_of,
)
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from emu.wire.subchannel_request import SUBCHANNEL
from hostproc.devices.backend import Backend
from hostproc.devices.channel import HostChannel
from hostproc.devices.subchannels import SubchannelGrants
from hostproc.loop import AGAIN, TaskBody

BATCH: Final = 32
"""Frames that are made and written in one piece of work."""


class Netlike(Backend):
    """Sends frames when it is asked to; counts those that come."""

    name: ClassVar[str] = "netlike"

    def __init__(self) -> None:
        self._ports: dict[int, _Port] = {}

    def open(self, channel: HostChannel) -> TaskBody:
        """Serve one channel for as long as it is open; its counters begin at 0."""
        port = _Port(channel, SubchannelGrants(channel, self.subchannels, self.seed))
        self._ports[channel.key] = port
        return port.serve()

    def close(self, channel: HostChannel) -> bool:
        """Nobody is served there any more."""
        self._ports.pop(channel.key, None)
        return True

    def unasked(self, channel: HostChannel, count: int, size: int) -> list[bytes]:
        """Frames, whose sequence goes on from those before."""
        return self._ports[channel.key].next_frames([bytes(max(size, MIN_FRAME))] * count)


class _Port:
    """One open channel."""

    def __init__(self, channel: HostChannel, grants: SubchannelGrants) -> None:
        self._channel = channel
        self._grants = grants
        self._sent = 0
        self._frames = self._gaps = self._checksum_errors = self._nbytes = 0
        self._expected = 0

    def serve(self) -> TaskBody:
        """Take packets, do what they say."""
        channel = self._channel
        while True:
            packets = channel.take()
            if not packets:
                yield from channel.wait_for_packets()
                continue
            for packet in packets:
                if packet[0] == VM_PKT_COMP:
                    continue  # of a frame that asked for it: nothing waits for that
                try:
                    kind = type_of(packet[3])
                    if kind == FRAME:
                        self._count(packet[3])
                        if packet[1] & COMPLETION_REQUESTED and packet[2]:
                            yield from self._complete(packet, pack_reply(FRAME, NetlikeStatus.SUCCESS))
                        continue
                    _must_be_answerable(packet, kind)
                except ProtocolViolation as violation:
                    channel.violation(violation)
                    continue
                yield from self._answer(packet, kind)
            yield AGAIN

    def _count(self, payload: bytes) -> None:
        """A frame came."""
        sequence, length, intact = parse_frame(payload)
        self._frames += 1
        self._nbytes += length
        self._gaps += sequence != self._expected & 0xFFFFFFFF
        self._checksum_errors += not intact
        self._expected = sequence + 1

    def _answer(self, packet: Packet, kind: int) -> TaskBody:
        """A request came."""
        if kind == SUBCHANNEL:
            yield from self._grants.answer(packet)
        elif kind == START_FRAMES:
            yield from self._start(packet)
        elif kind == GET_COUNTERS:
            counters = Counters(self._frames, self._gaps, self._checksum_errors, self._nbytes)
            yield from self._complete(packet, pack_counters(counters))
        else:
            text = f"netlike: a request of type {kind}"
            self._channel.violation(ProtocolViolation(text, rule="netlike-packet", field="type", value=kind))
            yield from self._complete(packet, pack_reply(kind, NetlikeStatus.INVALID))

    def _start(self, packet: Packet) -> TaskBody:
        """Complete first, then send, a batch at a time."""
        try:
            left, seed = parse_start(packet[3])
        except ProtocolViolation as violation:
            self._channel.violation(violation)
            yield from self._complete(packet, pack_reply(START_FRAMES, NetlikeStatus.INVALID))
            return
        yield from self._complete(packet, pack_reply(START_FRAMES, NetlikeStatus.SUCCESS))
        rng = random.Random(seed)
        while left:
            count = min(left, BATCH)
            datas = [rng.randbytes(rng.randint(MIN_FRAME, MAX_FRAME)) for _ in range(count)]
            yield from self._channel.send_all(self.next_frames(datas))
            left -= count
            yield AGAIN

    def next_frames(self, datas: list[bytes]) -> list[bytes]:
        """These data as frames, which are now to be sent."""
        frames = [pack_frame(self._sent + n, data) for n, data in enumerate(datas)]
        self._sent += len(frames)
        return frames

    def _complete(self, packet: Packet, payload: bytes) -> TaskBody:
        yield from self._channel.send_all([payload], packet[2], packet_type=VM_PKT_COMP)


def _must_be_answerable(packet: Packet, kind: int) -> None:
    """A request that asks for no completion, or has no id to be told by, is none."""
    if not (packet[1] & COMPLETION_REQUESTED and packet[2]):
        text = f"netlike: a request of type {kind} that wants no completion"
        raise ProtocolViolation(text, rule="netlike-packet", field="flags", value=packet[1])
