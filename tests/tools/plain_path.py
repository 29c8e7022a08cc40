"""A plugin that says which objects the packet path of its processor is made of: 1 for each that is a plain one."""

from __future__ import annotations

from typing import Final

from emu import plugin
from emu.interrupts import Halt
from emu.ring import RingConsumer
from emu.ring_producer import RingProducer
from emu.syncpoint import NOT_ARMED, unreachable
from guestproc.current import Current
from guestproc.kernel.layout import Channel, Device
from guestproc.vcpu import Vcpu
from guestproc.vmbus.channel import vmbus_close, vmbus_open
from guestproc.vmbus.packets import vmbus_drain, vmbus_sendpacket

CLASS: Final = plugin.device_class("plain-path", guid="7c1f2a90-3b52-4e0f-8a6d-51c0f2a7be44")
PARTS: Final = ("armed", "reach", "halt", "consumer", "producer", "event words", "maker of rings")
"""What is looked at, in the order of the driver's words; the word behind them says that it was done."""


@plugin.channel_callback
def plain_path_callback(current: Current, channel: Channel) -> None:
    """Look at everything once a packet has come this way."""
    if not vmbus_drain(current, channel, 16):
        return
    state = current.tables.devices.from_handle(channel.channel_callback_context).driver_state
    hooks, percpu = current.hooks, current.percpu
    assert isinstance(hooks, Vcpu) and percpu is not None
    rings = current.rings.of(channel)
    words = percpu.event_words
    plain = type(current.machine.control.view.cell_u64(0))
    for number, fits in enumerate(
        (
            current.armed is NOT_ARMED and hooks.armed is NOT_ARMED,
            current.reach is unreachable and hooks.reach is unreachable,
            type(hooks._halt) is Halt,
            type(rings.inbound) is RingConsumer,
            type(rings.outbound) is RingProducer,
            bool(words) and all(type(word) is plain for word in words),
            current.rings.reader is None,
        )
    ):
        state[number] = int(fits)
    state[len(PARTS)] = 1


@plugin.driver
class PlainPathDriver:
    """Opens the channel and sends one packet, which an echo device sends back."""

    name = "hv_plain_path"
    id_table = plugin.ids(CLASS)

    def probe(self, current: Current, device: Device) -> int:
        """Open, and send."""
        for number in range(len(PARTS) + 1):
            device.driver_state[number] = 0
        channel = current.channel(device.channel)
        result = vmbus_open(current, channel, 8192, 8192, b"", plain_path_callback.number, device.handle)
        return result or vmbus_sendpacket(current, channel, b"there and back")

    def remove(self, current: Current, device: Device) -> None:
        """Close."""
        vmbus_close(current, current.channel(device.channel))
