"""`hv_buffered`: a driver that lends its device a buffer besides the rings, as netvsc does (exhibit A4, two who wait).

Its probe opens the channel and then describes the buffer to the host: it waits for the host on a channel that is open
already, and that an administrator may be moving meanwhile. It takes what `driver_override` gives to it, and is
otherwise the echo driver.

Driver state words, besides the echo driver's: 8 the buffer's GPADL, 9 its first page, 0 without one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from emu.errors import OutOfMemory
from guestproc.drivers.echo import EchoDriver
from guestproc.kernel.layout import Device
from guestproc.kernel.pages import PageOwner, PageRun, owned_by
from guestproc.vmbus.channel import vmbus_establish_gpadl, vmbus_teardown_gpadl

if TYPE_CHECKING:
    from guestproc.current import Current

BUFFER_PAGES: Final = 4
GPADL: Final = 8
FIRST_PFN: Final = 9


class BufferedDriver(EchoDriver):
    """`hv_driver` of whatever it is told to take."""

    number: int = 54
    name: str = "hv_buffered"
    id_table: frozenset[bytes] = frozenset()

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel, then lend the buffer; without it the channel is closed again."""
        result = super().probe(current, device)
        if result:
            return result
        result = _lend_buffer(current, device)
        if result:
            current.log(f"{self.name}: the host does not take the buffer ({result})")
            super().remove(current, device)
        return result

    def remove(self, current: Current, device: Device) -> None:
        """Take the buffer back while the host still knows the channel, then close that."""
        _take_back(current, device)
        super().remove(current, device)


def _lend_buffer(current: Current, device: Device) -> int:
    """0, or what `vmbus_establish_gpadl` says; pages that the host may hold are left to it."""
    allocator = current.tables.pages
    try:
        run = allocator.alloc_pages_exact(current.actor, BUFFER_PAGES, owned_by(PageOwner.DRIVER, device.index))
    except OutOfMemory as error:
        current.log(str(error))
        return -errno.ENOMEM
    result, gpadl = vmbus_establish_gpadl(current, current.channel(device.channel), list(run.pfns))
    if result == 0:
        device.driver_state[GPADL], device.driver_state[FIRST_PFN] = gpadl, run.pfn
    elif not gpadl:
        allocator.free(current.actor, run)
    return result


def _take_back(current: Current, device: Device) -> None:
    """The buffer's pages are free once the host has let go of them, or its channel was rescinded."""
    gpadl, pfn = device.driver_state[GPADL], device.driver_state[FIRST_PFN]
    if pfn and vmbus_teardown_gpadl(current, current.channel(device.channel), gpadl) == 0:
        run: PageRun = current.tables.pages.run_at(pfn)
        current.tables.pages.free(current.actor, run)
        device.driver_state[GPADL] = device.driver_state[FIRST_PFN] = 0
