"""`hv_polling`: a driver whose probe asks its device something and waits for reply or rescind (exhibit A7).

It is what pci-hyperv does: the reply record lies on the prober's stack, its address is the request's transaction id,
and `wait_for_response` leaves as soon as it sees the channel's rescind flag. So whoever sets that flag must have
stopped the callback before, which stores through that address. It takes what `driver_override` gives to it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from emu.errors import ProtocolViolation
from emu.syncpoint import Point
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from guestproc.drivers.settings import Settings
from guestproc.kernel.frames import Frame, frame_of, on_stack, store_reply
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, Device
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.channel import vmbus_close, vmbus_open, vmbus_reset_channel_cb
from guestproc.vmbus.packets import vmbus_drain, vmbus_sendpacket

if TYPE_CHECKING:
    from guestproc.current import Current

REQUEST: Final = b"which version do you speak?"
REPLY_TIMEOUT_NS: Final = 30 * SECOND_NS
DRAIN_LIMIT: Final = 64
SETTINGS: Final = Settings()
_REPLY_FOUND: Final = int(Point.CHAN_REPLY_FOUND)


class PollingDriver:
    """`hv_driver` of whatever it is told to take."""

    number: int = 50
    name: str = "hv_polling"
    id_table: frozenset[bytes] = frozenset()

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel, ask, wait for the reply."""
        channel = current.channel(device.channel)
        size = SETTINGS.of(current, device).ring_bytes
        result = vmbus_open(current, channel, size, size, b"", Callbacks.POLLING_CHANNEL_CB, device.handle)
        if result:
            return result
        with on_stack(current.tables.frames, current.actor) as frame:
            result = vmbus_sendpacket(current, channel, REQUEST, frame.handle, flags=COMPLETION_REQUESTED)
            result = result or wait_for_response(current, channel, frame)
        if result:
            vmbus_close(current, channel)
        return result

    def remove(self, current: Current, device: Device) -> None:
        """Close the channel."""
        vmbus_close(current, current.channel(device.channel))


def wait_for_response(current: Current, channel: Channel, frame: Frame) -> int:
    """0: the reply is there; -ENODEV: the host took the channel back; -ETIMEDOUT. The frame is quiet in every case."""
    came = current.connection.state_wait.wait_until_timeout(
        current.actor, lambda: channel.rescind.load() != 0 or frame.done.load() != 0, REPLY_TIMEOUT_NS
    )
    if channel.rescind.load():
        return -errno.ENODEV  # and the callback was stopped before that could be seen
    if not came:
        vmbus_reset_channel_cb(current, channel)
        return -errno.ETIMEDOUT
    return 0


@CHANNEL_CALLBACKS.register(Callbacks.POLLING_CHANNEL_CB)
def polling_channel_cb(current: Current, channel: Channel) -> None:
    """Store each reply where its asker said."""
    for packet_type, _flags, trans_id, payload in vmbus_drain(current, channel, DRAIN_LIMIT):
        if packet_type != VM_PKT_COMP:
            continue
        frame = frame_of(current.tables.frames, trans_id)
        if frame is None:
            text = f"relid {channel.relid}: a reply to {trans_id:#x}, which nobody asked"
            current.refuse(ProtocolViolation(text, rule="reply-to-nobody", field="trans_id", value=trans_id))
            continue
        if current.armed[_REPLY_FOUND]:
            current.reach(_REPLY_FOUND, channel.relid)
        store_reply(current.tables.ram, frame, payload)
        current.connection.state_wait.wake_all(current.actor)
