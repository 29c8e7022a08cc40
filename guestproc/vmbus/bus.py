"""`vmbus_bus_init` and its undoing: the order in which the bus driver comes up and goes (reference 3.1, 3.13)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from guestproc.drivers.driver import DRIVER_OBJECTS
from guestproc.kernel.wait import SECOND_NS
from guestproc.kernel.workqueue import QueueNumber
from guestproc.vmbus.channel_mgmt import vmbus_free_channels
from guestproc.vmbus.connection import vmbus_connect, vmbus_disconnect, vmbus_request_offers
from guestproc.vmbus.device import vmbus_driver_register, vmbus_driver_unregister
from guestproc.vmbus.hv import hv_synic_alloc, hyperv_init
from guestproc.vmbus.numbers import Handlers
from guestproc.vmbus.vector import hv_remove_vmbus_irq, hv_setup_vmbus_irq

if TYPE_CHECKING:
    from guestproc.current import Current


def vmbus_bus_init(current: Current, ncpus: int) -> int:
    """Boot CPU, before any other CPU's SynIC: handler, drivers, pages; 0 or a negative errno."""
    hyperv_init(current)
    hv_setup_vmbus_irq(current, Handlers.VMBUS_ISR)
    for driver in DRIVER_OBJECTS.values():
        result = vmbus_driver_register(current, driver)
        if result:
            return result
    return hv_synic_alloc(current, ncpus)


def vmbus_start(current: Current) -> int:
    """Boot CPU, once every CPU's SynIC is up: connect and ask for offers."""
    result = vmbus_connect(current)
    if result:
        return result
    result = vmbus_request_offers(current)
    if result:
        current.log(f"requesting offers failed: {errno.errorcode.get(-result, result)}")
    return 0


def vmbus_wait_for_offers(
    current: Current, delivered: Callable[[], bool], timeout_ns: int = 60 * SECOND_NS
) -> None:
    """Until ALLOFFERS_DELIVERED came and every offer before it was processed, probes included.

    The kernel never waits for this; whoever shows a machine does.
    """
    connection, queues = current.connection, current.tables.work_queues
    connection.state_wait.wait_until(current.actor, delivered, timeout_ns, "ALLOFFERS_DELIVERED")
    for queue in (QueueNumber.WORK, QueueNumber.PRI_CHAN, QueueNumber.SUB_CHAN):
        queues.flush(current.actor, queue, timeout_ns)


def vmbus_exit(current: Current) -> None:
    """Unload the drivers, then the bus: UNLOAD, handler off, every channel that is left freed."""
    for driver in list(DRIVER_OBJECTS.values()):
        vmbus_driver_unregister(current, driver)
    queues = current.tables.work_queues
    vmbus_disconnect(current)
    for queue in (QueueNumber.WORK, QueueNumber.RESCIND, QueueNumber.PRI_CHAN, QueueNumber.SUB_CHAN):
        queues.flush(current.actor, queue)
    vmbus_free_channels(current)
    hv_remove_vmbus_irq(current)
