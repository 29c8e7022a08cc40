"""A back end that calls its guest's channels in turn, for `bench doorbell`: loaded as a plugin into that machine only.

A program in the guest (`guestproc.listen`) invites it on each channel; when all have, it rings the first, waits for
the answer, rings the next, and so on round the channels. A packet carries the time at which the *former* ring of its
channel was rung, so that the guest can set it against the time at which its interrupt routine began.
"""

from __future__ import annotations

import time
from struct import Struct
from typing import ClassVar

from emu import plugin
from hostproc.devices.backend import Backend
from hostproc.devices.channel import HostChannel
from hostproc.loop import TaskBody

INVITATION = Struct("<QQ")
"""From the guest: how many channels take part, how often each is rung."""
CALL = Struct("<QQ")
"""To the guest: calls that are still to come behind this one, and when (ns) the former one was rung (0: unknown)."""


class Party:
    """The channels that are rung in turn, and whose turn it is."""

    def __init__(self) -> None:
        self.channels: list[HostChannel] = []
        self._rang: list[int] = []
        self._left: list[int] = []
        self._turn = 0

    def invited(self, channel: HostChannel, guests: int, rings: int) -> None:
        """One more takes part; the last one begins it."""
        self.channels.append(channel)
        self._rang.append(0)
        # The last call rings for nobody: it only carries the time of the one before.
        self._left.append(rings)
        if len(self.channels) >= guests:
            self.call()

    def answered(self) -> None:
        """The one that was called has answered: the next one's turn."""
        self._turn = (self._turn + 1) % len(self.channels)
        self.call()

    def call(self) -> None:
        """Write the packet, note the time, ring."""
        turn = self._turn
        if not self.channels or self._left[turn] < 0:
            return
        channel = self.channels[turn]
        must_signal = channel.outgoing.write(CALL.pack(self._left[turn], self._rang[turn]))
        self._left[turn] -= 1
        now = time.monotonic_ns()
        channel.signal()
        # A reader that masks its ring looks by itself: how soon it was interrupted says nothing then.
        self._rang[turn] = now if must_signal else 0


@plugin.backend
class Caller(Backend):
    """Calls whoever invites it."""

    name = "caller"
    party: ClassVar[Party] = Party()

    def open(self, channel: HostChannel) -> TaskBody:
        """Take invitations and answers."""
        return self._serve(channel)

    def _serve(self, channel: HostChannel) -> TaskBody:
        while True:
            packets = channel.take()
            if not packets:
                yield from channel.wait_for_packets()
                continue
            for packet in packets:
                payload = packet[3]
                if len(payload) == INVITATION.size:
                    if channel in Caller.party.channels:
                        Caller.party = Party()  # the round before is over
                    Caller.party.invited(channel, *INVITATION.unpack(payload))
                else:
                    Caller.party.answered()
            yield from channel.rest()

    def close(self, channel: HostChannel) -> bool:
        """Nobody is called any more."""
        Caller.party = Party()
        return True
