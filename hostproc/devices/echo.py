"""The echo device: every packet comes back, in order, none lost.

A packet that asks for a completion (and has a transaction id to answer to) is answered by one, with its own
payload; any other comes back as an in-band packet with its own id. A guest that does not read makes the
device stop reading: what it holds then is one batch, and the guest's ring fills up.

The one exception is the first packet of a primary whose user data announce it: a request for sub-channels
(`emu.wire.subchannel_request`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import ClassVar

from emu.compile_hints import mypyc_attr
from emu.errors import ProtocolViolation
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND, ring_bytes
from emu.wire.subchannel_request import ECHO_USERDATA
from hostproc.devices.backend import Backend
from hostproc.devices.channel import HostChannel
from hostproc.devices.subchannels import SubchannelGrants
from hostproc.loop import TaskBody


@mypyc_attr(allow_interpreted_subclasses=True)
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
            # Most round trips are a single packet, for which there is room.
            if not may_not_fit and (packet := channel.take_lone()) is not None:
                _packet_type, flags, trans_id, payload = packet
                answer_type = _answer_type(flags, trans_id)
                if not channel.send(payload, trans_id, packet_type=answer_type):
                    yield from channel.send_all([payload], [trans_id], packet_type=answer_type)
                yield from channel.rest()
                continue
            runs = channel.take_runs()
            if not runs:
                yield from channel.wait_for_packets()
                continue
            for _packet_type, flags, trans_ids, payloads in runs:
                if may_not_fit:
                    trans_ids, payloads = _fitting(channel, trans_ids, payloads)
                for answer_type, ids, batch in _answers(flags, trans_ids, payloads):
                    if len(batch) > 1 or not channel.send(batch[0], ids[0], packet_type=answer_type):
                        yield from channel.send_all(batch, ids, packet_type=answer_type)
            yield from channel.rest()


def _answer_type(flags: int, trans_id: int) -> int:
    """A completion for who asked for one; id 0 never gets any (reference 4.3)."""
    return VM_PKT_COMP if flags & COMPLETION_REQUESTED and trans_id else VM_PKT_DATA_INBAND


def _answers(flags: int, trans_ids: list[int], payloads: list[bytes]) -> Iterable[tuple[int, list[int], list[bytes]]]:
    """Return what answers a run, as (packet type, ids, payloads); id 0 never gets a completion (reference 4.3)."""
    if not payloads:
        return ()
    if not flags & COMPLETION_REQUESTED:
        return ((VM_PKT_DATA_INBAND, trans_ids, payloads),)
    if all(trans_ids):
        return ((VM_PKT_COMP, trans_ids, payloads),)
    answers = []
    for with_id, run in groupby(zip(trans_ids, payloads, strict=True), lambda one: one[0] != 0):
        ids, batch = map(list, zip(*run, strict=True))
        answers.append((VM_PKT_COMP if with_id else VM_PKT_DATA_INBAND, ids, batch))
    return answers


def _fitting(channel: HostChannel, trans_ids: list[int], payloads: list[bytes]) -> tuple[list[int], list[bytes]]:
    """Return the packets that the ring back can ever take; the guest made it too small for the others."""
    fitting: tuple[list[int], list[bytes]] = [], []
    for trans_id, payload in zip(trans_ids, payloads, strict=True):
        size = ring_bytes(len(payload))
        if size <= channel.outgoing.capacity:
            fitting[0].append(trans_id)
            fitting[1].append(payload)
        else:
            text = f"a packet that needs {size} bytes of a ring of {channel.outgoing.capacity} to come back"
            channel.violation(ProtocolViolation(text, rule="echo-too-long", field="len8", value=size))
    return fitting
