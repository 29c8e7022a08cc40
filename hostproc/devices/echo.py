"""The echo device: every packet comes back, in order, none lost.

A packet that asks for a completion (and has a transaction id to answer to) is answered by one, with its own
payload; any other comes back as an in-band packet with its own id. A guest that does not read makes the
device stop reading: what it holds then is one batch, and the guest's ring fills up.

The one exception is the first packet of a primary whose user data announce it: a request for sub-channels
(`emu.wire.subchannel_request`).
"""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar

from emu.errors import ProtocolViolation
from emu.ring import Packet
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND, ring_bytes
from emu.wire.subchannel_request import ECHO_USERDATA
from hostproc.devices.backend import Backend
from hostproc.devices.channel import HostChannel
from hostproc.devices.subchannels import SubchannelGrants
from hostproc.loop import TaskBody


class Echo(Backend):
    """Returns every packet."""

    name: ClassVar[str] = "echo"

    def open(self, channel: HostChannel) -> TaskBody:
        """Serve one channel for as long as it is open."""
        return self._serve(channel)

    def _serve(self, channel: HostChannel) -> TaskBody:
        if channel.userdata.startswith(ECHO_USERDATA) and not channel.sub_channel_index:
            while not (request := channel.take(1)):
                yield from channel.wait_for_packets()
            yield from SubchannelGrants(channel, self.subchannels, self.seed).answer(request[0])
        # A packet that came through a ring no larger than the one back fits that, too.
        may_not_fit = channel.may_not_fit
        while True:
            packets = channel.take()
            if not packets:
                yield from channel.wait_for_packets()
                continue
            if may_not_fit:
                packets = _fitting(channel, packets)
            if len(packets) > 1 or not _answered(channel, packets):
                for answer_type, run in groupby(packets, _answer_type):
                    batch = list(run)
                    payloads = [packet[3] for packet in batch]
                    trans_ids = [packet[2] for packet in batch]
                    yield from channel.send_all(payloads, trans_ids, packet_type=answer_type)
            yield from channel.rest()


def _answered(channel: HostChannel, packets: list[Packet]) -> bool:
    """Answer a single packet, if there is room for it now: most round trips are nothing else."""
    return all(channel.send(one[3], one[2], packet_type=_answer_type(one)) for one in packets)


def _answer_type(packet: Packet) -> int:
    """Return the type of the packet that answers this one; id 0 never gets a completion (reference 4.3)."""
    return VM_PKT_COMP if packet[1] & COMPLETION_REQUESTED and packet[2] else VM_PKT_DATA_INBAND


def _fitting(channel: HostChannel, packets: list[Packet]) -> list[Packet]:
    """Return the packets that the ring back can ever take; the guest made it too small for the others."""
    fitting = []
    for packet in packets:
        size = ring_bytes(len(packet[3]))
        if size <= channel.outgoing.capacity:
            fitting.append(packet)
        else:
            text = f"a packet that needs {size} bytes of a ring of {channel.outgoing.capacity} to come back"
            channel.violation(ProtocolViolation(text, rule="echo-too-long", field="len8", value=size))
    return fitting
