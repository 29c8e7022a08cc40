"""What the guest kernel's records say, read from outside: no lock is taken, nothing is written.

For tools that show the guest (its sysfs): they have the guest's RAM mapped, but are no actor of the machine,
so they look as a debugger would. A record may go between two looks; `settled` then looks again, and what is
gone is None. What a look returns was true of each word when that word was read, not of all of them together.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from struct import Struct
from typing import Final, TypeVar

from emu.values import valueclass
from emu.wire.ring_layout import CONTROL_PAGE_SIZE, INTERRUPT_MASK, READ_INDEX, WRITE_INDEX
from guestproc.kernel.layout import Channel, Device, Driver, KernelTables
from guestproc.protocol.devices import is_registered, name_of

T = TypeVar("T")

ATTEMPTS: Final = 100
OUTBOUND: Final = 0
INBOUND: Final = 1
SERVER: Final = 0
"""Index of the monitor page that the host triggers through (parent to child)."""
CLIENT: Final = 1
"""Index of the monitor page that the guest triggers through (child to parent)."""

_U32: Final = Struct("<I")
_U16: Final = Struct("<H")
_U64: Final = Struct("<Q")
_U32_MASK: Final = 0xFFFFFFFF

# hv_monitor_page: where each of its arrays begins.
_TRIGGER_GROUP: Final = 8
_LATENCY: Final = 576
_PARAMETER: Final = 1088
_GROUPS: Final = 4
_GROUP_BITS: Final = 32


def settled(look: Callable[[], T]) -> T:
    """The result of a look; made again while it meets records that went meanwhile."""
    for _ in range(ATTEMPTS - 1):
        try:
            return look()
        except AssertionError:  # a name outlived its record between two looks
            continue
    return look()


@valueclass()
class RingFigures:
    """The words of one ring's control page, as they are: the peer may have written nonsense there."""

    interrupt_mask: int
    read_index: int
    write_index: int
    data_size: int

    @property
    def bytes_to_write(self) -> int:
        """`hv_get_bytes_to_write`, in the u32 arithmetic of the kernel."""
        if self.write_index >= self.read_index:
            return (self.data_size - (self.write_index - self.read_index)) & _U32_MASK
        return self.read_index - self.write_index

    @property
    def bytes_to_read(self) -> int:
        """`hv_get_bytes_to_read`."""
        if self.write_index >= self.read_index:
            return self.write_index - self.read_index
        return (self.data_size - self.read_index + self.write_index) & _U32_MASK


@valueclass()
class MonitorFigures:
    """What one monitor page says of a channel: its group's pending word, its latency and connection id."""

    pending: int
    latency: int
    connection_id: int


class GuestView:
    """The guest's bus as its kernel has it: devices by instance, their channels, rings and drivers."""

    def __init__(self, tables: KernelTables) -> None:
        self.tables: Final = tables
        self._handles: dict[bytes, int] = {}

    def devices(self) -> list[Device]:
        """Every device that has its channel, in no order. Between the ends of a removal it has none."""
        return settled(lambda: [device for device in self.tables.devices.live() if self.primary(device) is not None])

    def device(self, instance: bytes) -> Device | None:
        """The device of this instance GUID (wire form); only an unknown one costs a walk over all devices."""

        def look() -> Device | None:
            device = self.tables.devices.find(self._handles.get(instance, 0))
            if device is None or device.dev_instance != instance:
                self._handles = {device.dev_instance: device.handle for device in self.devices()}
                device = self.tables.devices.find(self._handles.get(instance, 0))
            return device if device is not None and self.primary(device) is not None else None

        return settled(look)

    def primary(self, device: Device) -> Channel | None:
        """A device's primary channel."""
        return self.tables.channels.find(device.channel)

    def channels(self, primary: Channel) -> list[Channel]:
        """A primary and its sub-channels, in the order of its `sc_list`; none of a primary that is gone."""

        def look() -> list[Channel]:
            if not primary.alive():
                return []
            # The list is walked without its lock: a record that moved may lead elsewhere, even round.
            met = islice(self.tables.sc_list(primary), self.tables.channels.capacity)
            ours = dict.fromkeys(channel for channel in met if channel.primary_channel == primary.handle)
            return [primary, *ours]

        return settled(look)

    def drivers(self) -> list[Driver]:
        """Every registered driver."""
        return settled(lambda: [driver for driver in self.tables.drivers.live() if is_registered(driver)])

    def driver_name(self, number: int) -> str:
        """Name of the driver of that number in DRIVERS, empty when none of that number is registered."""
        return settled(lambda: next((name_of(driver) for driver in self.drivers() if driver.number == number), ""))

    def driver_of(self, device: Device) -> str:
        """Name of the driver that is bound to a device, empty while none is."""
        number = settled(lambda: device.driver if device.alive() else 0)
        return self.driver_name(number) if number else ""

    def node_of(self, cpu: int) -> int:
        """`cpu_to_node`: NUMA node of a CPU."""
        connection = self.tables.connection
        nodes = range(connection.nr_numa_nodes)
        return next((node for node in nodes if connection.numa_cpus[node] >> cpu & 1), 0)

    def ring(self, channel: Channel, side: int) -> RingFigures | None:
        """The words of a channel's OUTBOUND or INBOUND ring; None while it has none that lies in RAM."""
        gpa = self.ring_gpa(channel, side)
        if gpa is None:
            return None
        pages = (channel.ring_send_pages, channel.ring_recv_pages)[side]
        return RingFigures(
            self._word(_U32, gpa + INTERRUPT_MASK),
            self._word(_U32, gpa + READ_INDEX),
            self._word(_U32, gpa + WRITE_INDEX),
            (pages - 1) * CONTROL_PAGE_SIZE,
        )

    def ring_gpa(self, channel: Channel, side: int) -> int | None:
        """Where the control page of a channel's OUTBOUND or INBOUND ring lies; None as `ring`."""
        pages = (channel.ring_send_pages, channel.ring_recv_pages)[side]
        gpa, listing = channel.ring_gpa, channel.ring_pfns_gpa
        first = channel.ring_send_pages if side == INBOUND else 0
        if not gpa or not pages:
            return None
        if listing:
            if not self._holds(listing + 8 * first, _U64.size):
                return None
            gpa = self._word(_U64, listing + 8 * first) * CONTROL_PAGE_SIZE
        else:
            gpa += first * CONTROL_PAGE_SIZE
        return gpa if self._holds(gpa) else None

    def monitor(self, channel: Channel, page: int) -> MonitorFigures | None:
        """What the SERVER or CLIENT monitor page says of a channel; None while there is no such page."""
        gpa = self.tables.connection.monitor_page_gpas[page]
        group, bit = channel.monitor_grp, channel.monitor_bit
        if not gpa or not self._holds(gpa) or group >= _GROUPS or bit >= _GROUP_BITS:
            return None
        place = group * _GROUP_BITS + bit
        return MonitorFigures(
            self._word(_U32, gpa + _TRIGGER_GROUP + 8 * group),
            self._word(_U16, gpa + _LATENCY + 2 * place),
            self._word(_U32, gpa + _PARAMETER + 8 * place) & 0xFFFFFF,
        )

    def _holds(self, gpa: int, nbytes: int = CONTROL_PAGE_SIZE) -> bool:
        """Whether this is RAM; an address that was read while it changed may be none."""
        return gpa + nbytes <= self.tables.ram.size

    def _word(self, layout: Struct, gpa: int) -> int:
        value: int = layout.unpack_from(self.tables.ram.octets, gpa)[0]
        return value
