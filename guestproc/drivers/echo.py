"""The echo driver: opens the channels of any device that answers with what it got.

Batched mode: the ISR masks the ring and schedules the tasklet, the callback (`echo_inbox`) drains. Packets are for
who sends: a program on the channel's CPU claims the channel, which gives it an inbox, and `remove` waits until nobody
has a claim any more. What arrives while nobody waits for it is counted and dropped.

Driver state words in guest RAM: 0 to 2 what was taken (`echo_inbox`), 3 the claims, 4 to 7 the sub-channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import TYPE_CHECKING, Final

from emu.wire.device_classes import CLASSES, NETLIKE
from emu.wire.guids import guid_to_wire
from emu.wire.subchannel_request import ECHO_USERDATA
from guestproc.drivers import claims
from guestproc.drivers.echo_inbox import INBOXES
from guestproc.drivers.settings import Settings
from guestproc.drivers.steering import LEFT, begin_reading, end_reading
from guestproc.drivers.subchannels import add_subchannel, ask_for_subchannels, wait_for_callbacks
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, Device
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.channel import vmbus_close, vmbus_open, vmbus_set_sc_create_callback

if TYPE_CHECKING:
    from guestproc.current import Current

SETTINGS: Final = Settings()


class EchoDriver:
    """`hv_driver` of the echo device; it takes every class but that of `hv_netlike`: any may have this back end."""

    number: int = 1
    name: str = "hv_echo"
    id_table: frozenset[bytes] = frozenset(guid_to_wire(one.guid) for one in CLASSES if one is not NETLIKE)

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel, and as many sub-channels as the scenario gives this device."""
        claims.reset_state(device)
        settings = SETTINGS.of(current, device)
        channel = current.channel(device.channel)
        # A sub-channel whose primary nobody knows is a device, too, but not one that has sub-channels.
        asks = settings.subchannels > 0 and not channel.sub_channel_index
        if asks:
            vmbus_set_sc_create_callback(current, channel, Callbacks.ECHO_SC_OPEN)
        size, userdata = settings.ring_bytes, ECHO_USERDATA if asks else b""
        result = vmbus_open(current, channel, size, size, userdata, Callbacks.ECHO_ONCHANNELCALLBACK, device.handle)
        if result == 0 and asks:
            ask_for_subchannels(current, device, channel, settings.subchannels, self.name)
        return result

    def remove(self, current: Current, device: Device) -> None:
        """Let the claimants leave, then close all channels and free their rings."""
        channel = current.channel(device.channel)
        claims.begin_removal(current, device, self.name)
        vmbus_close(current, channel)
        wait_for_callbacks(current, device, channel, self.name)


@CHANNEL_CALLBACKS.register(Callbacks.ECHO_SC_OPEN)
def echo_sc_open(current: Current, channel: Channel) -> None:
    """A new sub-channel: open it, with rings like the primary's."""
    add_subchannel(current, channel, _Opening(current, channel))


class _Opening:
    """A channel needs nothing besides (`subchannels.Opening`)."""

    def __init__(self, current: Current, channel: Channel) -> None:
        self._current = current
        self._channel = channel

    def open(self, device: Device) -> int:
        size = SETTINGS.of(self._current, device).ring_bytes
        callback = Callbacks.ECHO_ONCHANNELCALLBACK
        return vmbus_open(self._current, self._channel, size, size, b"", callback, device.handle)

    def keep(self) -> None:
        pass

    def undo(self) -> None:
        pass


# -- for who sends ----------------------------------------------------------------------------------------


def claim_channels(current: Current, cpu: int, relid: int = 0, but_not: Container[int] = ()) -> list[Channel]:
    """Claim open echo channels (`claims.claim_channels`); each has an inbox until it is released.

    What comes back lands in the inboxes of those of the calling CPU, even after the channel was moved; one that
    is still read by another CPU is passed over.
    """
    claimed = claims.claim_channels(current, EchoDriver.number, cpu, relid, but_not)
    if cpu == current.cpu:
        for channel in [one for one in claimed if not begin_reading(current, one)]:
            claims.release_claim(current, channel)
            claimed.remove(channel)
    for channel in claimed:
        INBOXES[channel.handle] = deque()
    return claimed


def release_channel(current: Current, channel: Channel) -> None:
    """Give a claim back; its inbox is gone with it."""
    if channel.reader.load() & ~LEFT == current.cpu + 1:
        end_reading(current, channel)
    INBOXES.pop(channel.handle, None)
    claims.release_claim(current, channel)
