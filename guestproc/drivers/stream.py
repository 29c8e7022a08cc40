"""`hv_stream`: a socket's way with a channel, where who finds no room polls for EPOLLOUT and sleeps (exhibit D4).

The host signals for room only when free room crosses the wish in the ring. So the wish stands at its threshold from
the opening on, and a poll does no more than look: whatever is freed behind the look crosses it. A socket that wishes
only while it is full (and takes its wish back at each poll that finds room) may wish when the room is there already,
or take back what another poll of the same socket sleeps for. Functions have hv_sock's names, as
`net/vmw_vsock/hyperv_transport.c` has them.

A look is behind the count of events, and a sleep ends when that has risen: an event between the two is not lost.
It takes what `driver_override` gives to it. Driver state words: 0 the events, 1 who sleeps (both atomic), 3 the claims.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import pack
from typing import TYPE_CHECKING, Final

from emu.errors import ProtocolViolation
from emu.syncpoint import Point
from emu.wire.packets import ring_bytes
from guestproc.drivers import claims
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, Device
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.channel import vmbus_close, vmbus_open
from guestproc.vmbus.packets import set_channel_pending_send_size, vmbus_drain, vmbus_sendpacket

if TYPE_CHECKING:
    from guestproc.current import Current

STREAM: Final = "hv_stream"
EVENTS: Final = 0
SLEEPERS: Final = 1

VMPIPE_HEADER: Final = 8
"""Bytes of `vmpipe_proto_header`: type, and length of the data."""
VMPIPE_DATA: Final = 1
HVS_SEND_BUF_SIZE: Final = 4096 - VMPIPE_HEADER
RINGBUFFER_HVS_SIZE: Final = 6 * 4096
DRAIN_LIMIT: Final = 64
POLL_TIMEOUT_NS: Final = 60 * SECOND_NS
_BEFORE_TX_STOP: Final = int(Point.DRV_BEFORE_TX_STOP)


def hvs_pkt_len(length: int) -> int:
    """`HVS_PKT_LEN`: what `length` bytes of a stream take in a ring."""
    return ring_bytes(VMPIPE_HEADER + length)


THRESHOLD: Final = hvs_pkt_len(HVS_SEND_BUF_SIZE)
"""Room whose coming the host signals."""


class StreamDriver:
    """`hv_driver` of whatever it is told to take."""

    number: int = 53
    name: str = STREAM
    id_table: frozenset[bytes] = frozenset()

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel and arm the threshold, for as long as it is open (`hvs_open_connection`)."""
        claims.reset_state(device)
        channel = current.channel(device.channel)
        size = RINGBUFFER_HVS_SIZE
        result = vmbus_open(current, channel, size, size, b"", Callbacks.HVS_CHANNEL_CB, device.handle)
        if result == 0 and not _toggles(current):
            hvs_set_channel_pending_send_size(current, channel)
        return result

    def remove(self, current: Current, device: Device) -> None:
        """Who writes leaves; then close the channel."""
        claims.begin_removal(current, device, self.name)
        vmbus_close(current, current.channel(device.channel))


def _toggles(current: Current) -> bool:
    return not current.fix.recheck_after_stop and current.fix.variant == "hvsock_epoll"


def hvs_set_channel_pending_send_size(current: Current, channel: Channel) -> None:
    """From now on the host signals when free room crosses the threshold."""
    set_channel_pending_send_size(current, channel, THRESHOLD)


def hvs_channel_writable_bytes(current: Current, channel: Channel) -> int:
    """How much of a stream fits, a multiple of 8; room for a packet that says that it ends stays free."""
    room = current.rings.of(channel).outbound.free_bytes + 8  # `hv_get_bytes_to_write`
    most = room - hvs_pkt_len(1) - hvs_pkt_len(0)
    return max(0, most) & -8


def hvs_stream_has_space(current: Current, channel: Channel) -> int:
    """What a poll asks, whether it is about reading or about writing: how much fits now."""
    writable = hvs_channel_writable_bytes(current, channel)
    if not writable and current.armed[_BEFORE_TX_STOP]:
        current.reach(_BEFORE_TX_STOP, channel.relid)
    if _toggles(current):
        # Wrong on purpose (races.md D4, hvsock_epoll): the room may have come before this wish, and the wish that
        # goes may be another's who sleeps.
        set_channel_pending_send_size(current, channel, 0 if writable else THRESHOLD)
    return writable


@CHANNEL_CALLBACKS.register(Callbacks.HVS_CHANNEL_CB)
def hvs_channel_cb(current: Current, channel: Channel) -> None:
    """Data came, which nobody here reads, or room: whoever sleeps looks again (`sk_write_space`)."""
    vmbus_drain(current, channel, DRAIN_LIMIT)
    device: Device = current.tables.devices.from_handle(channel.channel_callback_context)
    claims.state_word(current, device, EVENTS).fetch_add(1)
    current.connection.state_wait.wake_all(current.actor)


# -- for who writes ---------------------------------------------------------------------------------------


def hvs_stream_enqueue(current: Current, channel: Channel, wanted: int) -> int:
    """Write what fits of `wanted` bytes as one packet: how many bytes, -EAGAIN, or as `vmbus_sendpacket`."""
    count = min(wanted, HVS_SEND_BUF_SIZE, hvs_channel_writable_bytes(current, channel))
    if not count:
        return -errno.EAGAIN
    return vmbus_sendpacket(current, channel, pack("<II", VMPIPE_DATA, count) + bytes(count)) or count


def write_all(current: Current, channel: Channel, wanted: int, ends: Callable[[], bool]) -> int:
    """Write `wanted` bytes into a claimed channel, asleep until EPOLLOUT whenever nothing fits: how many were written.

    Fewer: the device is being removed, `ends` says so, or no event came for long.
    """
    device: Device = current.tables.devices.from_handle(channel.device_obj)
    events = claims.state_word(current, device, EVENTS)
    seen = done = 0

    def leaves() -> bool:
        return ends() or claims.being_removed(current, channel)

    def woken() -> bool:
        return events.load() != seen or leaves()

    try:
        while done < wanted and not leaves():
            seen = events.load()
            if hvs_stream_has_space(current, channel):
                count = hvs_stream_enqueue(current, channel, wanted - done)
                if count < 0:
                    break
                done += count
            elif not _epoll_wait(current, device, woken):
                break
    except ProtocolViolation as violation:
        current.refuse(violation, f"relid {channel.relid}, outbound")
    return done


def _epoll_wait(current: Current, device: Device, woken: Callable[[], bool]) -> bool:
    """Sleep until then, as one of the device's sleepers; False: it took too long."""
    sleepers = claims.state_word(current, device, SLEEPERS)
    sleepers.fetch_add(1)
    try:
        return current.connection.state_wait.wait_until_timeout(current.actor, woken, POLL_TIMEOUT_NS, device.gpa)
    finally:
        sleepers.fetch_sub(1)
