"""What a driver of the bus is: `struct hv_driver`, as an object that every process makes for itself.

A driver keeps no state in Python: probe, callback and remove run in different processes. Its per-device
state is `Device.driver_state`, 32 words in guest RAM, with whatever layout the driver gives them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.kernel.layout import Device


class HvDriver(Protocol):
    """A driver: its number in every process, its name in sysfs, the class GUIDs (wire form) it takes."""

    number: int
    name: str
    id_table: frozenset[bytes]

    def probe(self, current: Current, device: Device) -> int:
        """Take a device, usually by opening its channel; 0 or a negative errno. May sleep."""

    def remove(self, current: Current, device: Device) -> None:
        """Give it back: close the channel. May sleep."""


@runtime_checkable
class ShutsDown(Protocol):
    """A driver that wants to know of the machine's shutdown (`hv_driver.shutdown`; it may have none)."""

    def shutdown(self, current: Current, device: Device) -> None:
        """Make the device quiet; it stays bound."""


def takes_sockets(driver: HvDriver) -> bool:
    """`hv_driver.hvsock`: whether it is the driver of hv_sock channels; without a word, it is not."""
    return bool(getattr(driver, "hvsock", False))


DRIVER_OBJECTS: Final[dict[int, HvDriver]] = {}
"""Drivers by number; filled by `guestproc.drivers.table`."""


def add_drivers(drivers: Iterable[HvDriver]) -> None:
    """Make drivers known to this process; a number that is taken is our bug."""
    for driver in drivers:
        assert driver.number not in DRIVER_OBJECTS, f"driver number {driver.number} is taken"
        DRIVER_OBJECTS[driver.number] = driver
