"""`uio_hv_generic`: the driver for devices that no kernel driver wants, handed to a program of a user's.

Its table is empty: it takes what `new_id` or `driver_override` gives to it. The channel is in direct mode: the
tasklet's callback masks the ring and counts an event, and whoever serves the device unmasks it again (`write(fd, 1)`
to /dev/uioN on a real machine). The rings are opened by probe, as there is no /dev/uioN here whose open would do it.

Driver state words in guest RAM: 0 events counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import CallbackMode, Channel, Device
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.channel import vmbus_close, vmbus_open
from guestproc.vmbus.device import vmbus_device_unregister
from guestproc.vmbus.packets import inbound_rings

if TYPE_CHECKING:
    from guestproc.current import Current

EVENTS: Final = 0
HV_RING_SIZE: Final = 64 << 10
"""The kernel's is 2 MiB, a module parameter."""


class UioHvGeneric:
    """`hv_driver` of whatever it is told to take."""

    number: int = 3
    name: str = "uio_hv_generic"
    id_table: frozenset[bytes] = frozenset()

    def probe(self, current: Current, device: Device) -> int:
        """`hv_uio_probe` and `hv_uio_open`: direct mode, a rescind callback of its own, rings, open."""
        channel = current.channel(device.channel)
        device.driver_state[EVENTS] = 0
        _set(current, channel, CallbackMode.DIRECT, Callbacks.HV_UIO_RESCIND)
        callback = Callbacks.HV_UIO_CHANNEL_CB
        result = vmbus_open(current, channel, HV_RING_SIZE, HV_RING_SIZE, b"", callback, device.handle)
        if result:
            _set(current, channel, CallbackMode.BATCHED, 0)
        return result

    def remove(self, current: Current, device: Device) -> None:
        """`hv_uio_remove`: the next driver finds the channel as it was."""
        channel = current.channel(device.channel)
        vmbus_close(current, channel)
        _set(current, channel, CallbackMode.BATCHED, 0)


def _set(current: Current, channel: Channel, mode: CallbackMode, rescind_callback: int) -> None:
    """`set_channel_read_mode` and `vmbus_set_chn_rescind_callback`."""
    with channel.sched_lock.hold(current.actor):
        channel.callback_mode = mode
    with current.connection.channel_mutex.hold(current.actor):
        channel.rescind_callback = rescind_callback


@CHANNEL_CALLBACKS.register(Callbacks.HV_UIO_CHANNEL_CB)
def hv_uio_channel_cb(current: Current, channel: Channel) -> None:
    """Mask, and count an event for who waits."""
    rings = inbound_rings(current, channel)
    if rings is None:
        return
    rings.inbound.begin_read()
    state = current.tables.devices.from_handle(channel.channel_callback_context).driver_state
    state[EVENTS] += 1


@CHANNEL_CALLBACKS.register(Callbacks.HV_UIO_RESCIND)
def hv_uio_rescind(current: Current, channel: Channel) -> None:
    """The host took the device back: a driver with a rescind callback unregisters it itself."""
    vmbus_device_unregister(current, current.tables.devices.from_handle(channel.device_obj))
