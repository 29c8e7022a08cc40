"""Drivers that only schedules use: a machine that runs none does not have them."""

from __future__ import annotations

from typing import Final

from emu.machine import Machine
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver, add_drivers
from guestproc.drivers.lender import LenderDriver
from guestproc.drivers.lenient import LenientDriver
from guestproc.drivers.locked_nic import LockedNicDriver
from guestproc.drivers.polling import PollingDriver
from guestproc.drivers.stream import StreamDriver

EXHIBIT_DRIVERS: Final[tuple[HvDriver, ...]] = (
    PollingDriver(),
    LockedNicDriver(),
    LenientDriver(),
    StreamDriver(),
    LenderDriver(),
)

assert len({driver.number for driver in EXHIBIT_DRIVERS}) == len(EXHIBIT_DRIVERS), "two drivers have one number"


def add_exhibit_drivers(machine: Machine) -> None:
    """Make them known to this process, if its machine runs schedules; once."""
    if machine.races:
        add_drivers(driver for driver in EXHIBIT_DRIVERS if driver.number not in DRIVER_OBJECTS)
