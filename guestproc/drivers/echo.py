"""The echo driver: opens the channel of any device that answers with what it got.

Batched mode: the ISR masks the ring and schedules the tasklet, the callback drains. Packets are for who sends:
a program on the channel's CPU claims the channel, which gives it an inbox, and `remove` waits until nobody
has a claim any more. What arrives while nobody waits for it is counted and dropped.

Driver state words in guest RAM: 0 packets taken, 1 completions among them, 2 payload bytes; 3 the claims: how
many, and the bit REMOVING (atomic).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final
from uuid import UUID

from emu.ipc.atomics import AtomicU64
from emu.ring import Packet
from emu.scenario import Scenario
from emu.wire.device_classes import CLASSES
from emu.wire.guids import guid_to_wire
from emu.wire.packets import VM_PKT_COMP
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, Device
from guestproc.kernel.records import field_of
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import opening
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.channel import vmbus_close, vmbus_open
from guestproc.vmbus.packets import vmbus_drain

if TYPE_CHECKING:
    from guestproc.current import Current

PACKETS: Final = 0
COMPLETIONS: Final = 1
BYTES: Final = 2
CLAIMS: Final = 3
REMOVING: Final = 1 << 63
PAGE_SIZE: Final = 4096
DRAIN_LIMIT: Final = 512
"""Packets that one callback takes; the bus calls again while there are more."""
CLAIMS_TIMEOUT_NS: Final = 30 * SECOND_NS
DEFAULT_RING_PAGES: Final = 16

_CLAIMS_OFFSET: Final = field_of(Device, "driver_state").offset + 8 * CLAIMS

INBOXES: Final[dict[int, deque[Packet]]] = {}
"""Channel handle → what arrived for a claimant in this process."""


class EchoDriver:
    """`hv_driver` of the echo device; it takes every class, as a device's back end may be `echo` for any."""

    number: int = 1
    name: str = "hv_echo"
    id_table: frozenset[bytes] = frozenset(guid_to_wire(one.guid) for one in CLASSES)

    def __init__(self) -> None:
        self._ring_pages: dict[UUID, int] | None = None

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel with the ring size that the scenario gives this device."""
        device.driver_state[PACKETS : CLAIMS + 1] = memoryview(bytes(8 * (CLAIMS + 1))).cast("Q")
        size = self._pages_of(current, device) * PAGE_SIZE
        channel = current.channel(device.channel)
        return vmbus_open(current, channel, size, size, b"", Callbacks.ECHO_ONCHANNELCALLBACK, device.handle)

    def remove(self, current: Current, device: Device) -> None:
        """Let the claimants leave, then close the channel and free its rings."""
        claims = _claims(current, device)
        claims.fetch_or(REMOVING)
        if not current.connection.state_wait.wait_until_timeout(
            current.actor, lambda: claims.load() == REMOVING, CLAIMS_TIMEOUT_NS
        ):
            # It is closed all the same: who sends then is told so, and gets nothing any more.
            current.log(f"{self.name}: {claims.load() & ~REMOVING} claimants do not leave")
        vmbus_close(current, current.channel(device.channel))

    def _pages_of(self, current: Current, device: Device) -> int:
        if self._ring_pages is None:
            scenario = Scenario.from_config({key: current.machine.config[key] for key in ("machine", "device")})
            self._ring_pages = {one.instance: one.ring_pages for one in scenario.devices()}
        return self._ring_pages.get(UUID(bytes_le=device.dev_instance), DEFAULT_RING_PAGES)


# -- for who sends ----------------------------------------------------------------------------------------


def open_relids(current: Current, cpu: int) -> list[int]:
    """Relids of the open channels whose interrupts a CPU takes."""
    with current.connection.channel_mutex.hold(current.actor):
        channels = (one for primary in current.tables.chn_list for one in (primary, *current.tables.sc_list(primary)))
        return [one.relid for one in channels if opening.is_open(one) and one.target_cpu.load() == cpu]


def claim_channels(current: Current, cpu: int, relid: int = 0) -> list[Channel]:
    """Claim the open channels whose interrupts a CPU takes (the calling one), or the one that `relid` names.

    A claimed channel and its device stay until `release_channel`; `being_removed` says when that is wanted.
    """
    claimed = []
    with current.connection.channel_mutex.hold(current.actor):
        for primary in current.tables.chn_list:
            for channel in (primary, *current.tables.sc_list(primary)):
                if (
                    opening.is_open(channel)
                    and channel.target_cpu.load() == cpu
                    and relid in (0, channel.relid)
                    and _claim(current, primary)
                ):
                    INBOXES[channel.handle] = deque()
                    claimed.append(channel)
    return claimed


def _claim(current: Current, primary: Channel) -> bool:
    """Under channel_mutex, so that the device is there: one claim more, unless it is being removed."""
    device = current.tables.devices.find(primary.device_obj)
    if device is None or device.driver != EchoDriver.number:
        return False
    claims = _claims(current, device)
    while not (seen := claims.load()) & REMOVING:
        if claims.cas(seen, seen + 1) == seen:
            return True
    return False


def being_removed(current: Current, channel: Channel) -> bool:
    """Whether who has claimed this channel is asked to let go of it."""
    return bool(_claims(current, _device_of(current, channel)).load() & REMOVING) or channel.rescind.load() != 0


def release_channel(current: Current, channel: Channel) -> None:
    """Give a claim back; its inbox is gone with it."""
    INBOXES.pop(channel.handle, None)
    _claims(current, _device_of(current, channel)).fetch_sub(1)
    current.connection.state_wait.wake_all(current.actor)


def _device_of(current: Current, channel: Channel) -> Device:
    """The device of a claimed channel."""
    primary = current.channel(channel.primary_channel) if channel.primary_channel else channel
    device: Device = current.tables.devices.from_handle(primary.device_obj)
    return device


def _claims(current: Current, device: Device) -> AtomicU64:
    return current.tables.ram.u64(device.gpa + _CLAIMS_OFFSET)


# -- in the channel's tasklet -----------------------------------------------------------------------------


@CHANNEL_CALLBACKS.register(Callbacks.ECHO_ONCHANNELCALLBACK)
def echo_onchannelcallback(current: Current, channel: Channel) -> None:
    """Take what the device sent back."""
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
