"""`hv_lender`: a driver whose device has memory of the guest's beside its rings, as a NIC has its receive buffer.

The buffer is a GPADL of its own on the device's channel, which must be open first. It is the host's until it was torn
down; that comes behind the close, as the kernel's netvsc does it from 4.0 on; only then do its pages go back. A driver
that frees them earlier lets the device write into whatever has them next, which INV-12 finds.

It takes what `driver_override` gives to it, and is an echo driver in all else. Driver state words besides that one's:
8 where the buffer is, 9 the handle of its GPADL.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from emu.errors import OutOfMemory
from guestproc.drivers.echo import EchoDriver
from guestproc.kernel.layout import Channel, Device
from guestproc.kernel.page_records import PAGE_SHIFT
from guestproc.kernel.pages import PageOwner, owned_by
from guestproc.vmbus.channel import vmbus_establish_gpadl, vmbus_teardown_gpadl

if TYPE_CHECKING:
    from guestproc.current import Current

BUFFER_GPA: Final = 8
BUFFER_GPADL: Final = 9
BUFFER_PAGES: Final = 40
"""More than one message can name."""


class LenderDriver(EchoDriver):
    """`hv_driver` of whatever it is told to take."""

    number: int = 54
    name: str = "hv_lender"
    id_table: frozenset[bytes] = frozenset()

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel, then lend the buffer; a device without it does not work."""
        device.driver_state[BUFFER_GPA] = device.driver_state[BUFFER_GPADL] = 0
        result = super().probe(current, device)
        if result == 0 and (result := _lend(current, device, current.channel(device.channel))):
            self.remove(current, device)
        return result

    def remove(self, current: Current, device: Device) -> None:
        """Close the channel, take the buffer back from the host, free it."""
        channel = current.channel(device.channel)
        super().remove(current, device)
        _take_back(current, device, channel)


def _lend(current: Current, device: Device, channel: Channel) -> int:
    """Allocate the buffer and describe it to the host: 0, or why there is none."""
    owner = owned_by(PageOwner.DRIVER, device.index)
    try:
        run = current.tables.pages.alloc_pages_exact(current.actor, BUFFER_PAGES, owner)
    except OutOfMemory as error:
        current.log(f"relid {channel.relid}: {error}")
        return -errno.ENOMEM
    result, gpadl = vmbus_establish_gpadl(current, channel, run.pfns)
    # With a handle the host may have the pages, also in failure.
    device.driver_state[BUFFER_GPA], device.driver_state[BUFFER_GPADL] = run.gpa, gpadl
    return result


def _take_back(current: Current, device: Device, channel: Channel) -> None:
    """Tear the buffer's GPADL down, if there is one; pages that the host keeps are not freed."""
    gpa, gpadl = device.driver_state[BUFFER_GPA], device.driver_state[BUFFER_GPADL]
    if gpadl and (result := vmbus_teardown_gpadl(current, channel, gpadl)):
        current.log(f"relid {channel.relid}: the host may hold its buffer ({result}); it is not given back")
        return
    if gpa:
        pages = current.tables.pages
        pages.free(current.actor, pages.run_at(gpa >> PAGE_SHIFT))
        device.driver_state[BUFFER_GPA] = device.driver_state[BUFFER_GPADL] = 0
