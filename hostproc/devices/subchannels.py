"""A device grants sub-channels: judges the request, answers it, and has them offered.

The guest must take the offers in any order, before the completion or after it, so both are drawn from the machine's
seed. What was granted is forgotten when the primary closes: the server revokes the sub-channels then, and whoever
opens it again asks again.
"""

from __future__ import annotations

import random
from typing import Final

from emu.errors import ProtocolViolation
from emu.ring import Packet
from emu.wire.packets import VM_PKT_COMP
from emu.wire.subchannel_request import MAX_SUBCHANNELS, SubchannelStatus, pack_completion, parse_request
from hostproc.devices.channel import HostChannel
from hostproc.loop import TaskBody


class SubchannelGrants:
    """What one opening of a channel may be given: at most `most` sub-channels, as the guest has room for, once."""

    def __init__(self, channel: HostChannel, most: int, seed: int) -> None:
        self._channel: Final = channel
        self._most: Final = 0 if channel.sub_channel_index else min(most, MAX_SUBCHANNELS)
        self._random: Final = random.Random(f"{seed}/{channel.key}")
        self._granted = False

    def answer(self, packet: Packet) -> TaskBody:
        """Answer a request by its completion; offer what it grants."""
        channel, trans_id = self._channel, packet[2]
        status, count = self.judge(packet[3])
        order = self._random.sample(range(1, count + 1), count)
        early = self._random.random() < 0.5
        if early:
            channel.offer_subchannels(order)
        yield from channel.send_all([pack_completion(status, count)], trans_id, packet_type=VM_PKT_COMP)
        if not early:
            channel.offer_subchannels(order)

    def judge(self, payload: bytes) -> tuple[SubchannelStatus, int]:
        """What to say to a request, and how many it gets; it counts as granted from now on."""
        try:
            asked = parse_request(payload)
        except ProtocolViolation as violation:
            self._channel.violation(violation)
            return SubchannelStatus.INVALID, 0
        if not 1 <= asked <= MAX_SUBCHANNELS:
            text = f"{asked} sub-channels are asked for, 1 to {MAX_SUBCHANNELS} may be"
            self._channel.violation(
                ProtocolViolation(text, rule="subchannel-count", field="num_subchannels", value=asked)
            )
            return SubchannelStatus.INVALID, 0
        most = min(self._most, self._channel.subchannel_room())
        if not most:
            return SubchannelStatus.UNSUPPORTED, 0
        if self._granted:
            text = "sub-channels are asked for a second time"
            self._channel.violation(
                ProtocolViolation(text, rule="subchannels-twice", field="num_subchannels", value=asked)
            )
            return SubchannelStatus.ALREADY, 0
        self._granted = True
        return SubchannelStatus.SUCCESS, min(asked, most)
