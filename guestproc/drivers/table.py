"""All drivers that every process of the guest knows; a new one is a line here."""

from __future__ import annotations

from typing import Final

from guestproc.drivers.driver import HvDriver, add_drivers
from guestproc.drivers.echo import EchoDriver
from guestproc.drivers.netlike import NetlikeDriver
from guestproc.drivers.uio_hv_generic import UioHvGeneric

BUILT_IN: Final[tuple[HvDriver, ...]] = (EchoDriver(), NetlikeDriver(), UioHvGeneric())

add_drivers(BUILT_IN)
