"""One claimed echo channel as a program uses it: sends batches, takes what comes back, waits for either."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.ring import Packet
from emu.wire.packets import ring_bytes
from guestproc.drivers.claims import REMOVING, claims_word
from guestproc.drivers.echo_inbox import INBOXES
from guestproc.kernel.layout import Channel
from guestproc.tally import IDLE_NS, STALL_NS, ChannelGone, Stalled
from guestproc.vcpu import STOPPING, raise_if_stopping
from guestproc.vmbus.packets import vmbus_cancel_room, vmbus_sendpacket, vmbus_sendpackets, vmbus_wait_for_room

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu


class EchoSession:
    """One claimed channel as a program uses it: sends batches, takes what comes back, waits for either."""

    def __init__(self, current: Current, vcpu: Vcpu, channel: Channel) -> None:
        self.current = current
        self.vcpu = vcpu
        self.channel = channel
        self.inbox: deque[Packet] = INBOXES[channel.handle]
        self.sent = 0
        self.received = 0
        self.nbytes = 0
        self._moved = True
        """Whether anything moved since the last look at the clock; what moves needs no clock."""
        self._moved_ns = 0
        self._wished = False
        # What `being_removed` looks at; both words stay while the channel is claimed.
        self._claims = claims_word(current, channel).load
        self._rescind = channel.rescind.load
        self._machine_state = current.machine.control.state_word.load

    def begin(self) -> None:
        """Something new begins: until now nobody waited for anything, however long that was."""
        self._moved = True

    def send(self, payloads: list[bytes], *, first_trans_id: int = 0, flags: int = 0) -> int:
        """Send as many as fit; when nothing does, ask for room and wait a while. How many were sent."""
        if self.sent == self.received and not self._wished:
            self._moved = True  # nothing was awaited until now
        self._check_channel()
        if len(payloads) == 1:  # the shorter way
            result = vmbus_sendpacket(self.current, self.channel, payloads[0], first_trans_id, flags=flags)
            count = 1 if not result else 0 if result == -errno.EAGAIN else result
        else:
            count = vmbus_sendpackets(self.current, self.channel, payloads, first_trans_id, flags)
        if count == 0 and payloads:
            self._check_time()
            count = -self._wait_for_room(ring_bytes(len(payloads[0])))
        if count < 0:
            if count == -errno.ENODEV:
                raise ChannelGone
            raise Stalled(f"a packet of {len(payloads[0])} bytes: -{errno.errorcode[-count]}")
        if count:
            self._moved = True
            if self._wished:
                self._wished = False
                vmbus_cancel_room(self.current, self.channel)
        self.sent += count
        self.nbytes += len(payloads[0]) if count == 1 else sum(map(len, payloads[:count]))
        return count

    def _wait_for_room(self, size: int) -> int:
        """Publish the wish, then halt; an errno when the channel or its ring is gone, else 0."""
        room = vmbus_wait_for_room(self.current, self.channel, size)
        if room < 0:
            return -room
        self._wished = room == 0
        if room == 0 and not self.inbox:
            self.vcpu.idle(IDLE_NS)
        return 0

    def take(self) -> list[Packet]:
        """What has come back since the last time."""
        self.vcpu.safe_point()
        return self.collect()

    def collect(self) -> list[Packet]:
        """The same behind a wait, which has taken interrupts already."""
        inbox = self.inbox
        if not inbox:
            return []
        # No interrupt comes in between: this is a task with safe points, and none of these is one.
        if len(inbox) == 1:  # an answer that was waited for mostly comes alone
            packets = [inbox.popleft()]
        else:
            packets = list(inbox)
            inbox.clear()
        self._moved = True
        self.received += len(packets)
        return packets

    def wait(self) -> None:
        """Halt until something comes, interrupts included; not for ever."""
        if not self.inbox:
            self.vcpu.idle(IDLE_NS)
        self._check_channel()
        if not self.inbox:  # what has come needs no clock
            self._check_time()

    def pause(self) -> None:
        """As `wait`, for who sends again as soon as something has come: sending looks at the channel, too."""
        if not self.inbox:
            self.vcpu.idle(IDLE_NS)
            if not self.inbox:
                self.check()

    def check(self) -> None:
        """Go on only if there is any sense in it: MachineStopping, ChannelGone, Stalled."""
        self._check_channel()
        self._check_time()

    def _check_channel(self) -> None:
        if self._machine_state() == STOPPING:
            raise_if_stopping(self.vcpu)
        if self._claims() & REMOVING or self._rescind():
            raise ChannelGone

    def _check_time(self) -> None:
        now = self.vcpu.now()
        if self._moved:
            self._moved = False
            self._moved_ns = now
        elif now - self._moved_ns > STALL_NS:
            raise Stalled(f"nothing has moved for {STALL_NS // 1_000_000_000} s")

    def until(self, done: Callable[[], bool], handle: Callable[[Packet], None]) -> None:
        """Take packets until `done`, waiting in between."""
        self._moved = True
        while True:
            for packet in self.take():
                handle(packet)
            if done():
                return
            self.wait()
