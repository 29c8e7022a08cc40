"""The echo driver: opens the channel of any device that answers with what it got.

Batched mode: the ISR masks the ring and schedules the tasklet, the callback drains. Driver state words in
guest RAM: 0 packets taken, 1 completions among them, 2 payload bytes. Whoever sends on a channel from this
process registers an inbox for it; packets that nobody waits for are counted and dropped.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final
from uuid import UUID

from emu.scenario import Scenario
from emu.wire.device_classes import CLASSES
from emu.wire.guids import guid_to_wire
from emu.wire.packets import VM_PKT_COMP
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, Device
from guestproc.vmbus.channel import vmbus_close, vmbus_drain, vmbus_open
from guestproc.vmbus.numbers import Callbacks

if TYPE_CHECKING:
    from guestproc.current import Current

PACKETS: Final = 0
COMPLETIONS: Final = 1
BYTES: Final = 2
PAGE_SIZE: Final = 4096
DRAIN_LIMIT: Final = 512
"""Packets that one callback takes; the bus calls again while there are more."""

Packet = tuple[int, int, int, bytes]
INBOXES: Final[dict[int, deque[Packet]]] = {}
"""Channel handle → what arrived for a sender in this process."""


class EchoDriver:
    """`hv_driver` of the echo device; it takes every class, as a device's back end may be `echo` for any."""

    number: int = 1
    name: str = "hv_echo"
    id_table: frozenset[bytes] = frozenset(guid_to_wire(one.guid) for one in CLASSES)

    def __init__(self) -> None:
        self._ring_pages: dict[UUID, int] | None = None

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel with the ring size that the scenario gives this device."""
        channel = current.channel(device.channel)
        size = self._pages_of(current, device) * PAGE_SIZE
        return vmbus_open(current, channel, size, size, b"", Callbacks.ECHO_ONCHANNELCALLBACK, device.handle)

    def remove(self, current: Current, device: Device) -> None:
        """Close the channel and free its rings."""
        vmbus_close(current, current.channel(device.channel))

    def _pages_of(self, current: Current, device: Device) -> int:
        if self._ring_pages is None:
            scenario = Scenario.from_config({key: current.machine.config[key] for key in ("machine", "device")})
            self._ring_pages = {one.instance: one.ring_pages for one in scenario.devices()}
        return self._ring_pages.get(UUID(bytes_le=device.dev_instance), 16)


@CHANNEL_CALLBACKS.register(Callbacks.ECHO_ONCHANNELCALLBACK)
def echo_onchannelcallback(current: Current, channel: Channel) -> None:
    """Take what the device sent back (in the channel's tasklet)."""
    packets = vmbus_drain(current, channel, DRAIN_LIMIT)
    if not packets:
        return
    state = current.tables.devices.from_handle(channel.channel_callback_context).driver_state
    state[PACKETS] += len(packets)
    state[COMPLETIONS] += sum(1 for packet in packets if packet[0] == VM_PKT_COMP)
    state[BYTES] += sum(len(packet[3]) for packet in packets)
    inbox = INBOXES.get(channel.handle)
    if inbox is not None:
        inbox.extend(packets)
