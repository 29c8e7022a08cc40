"""`vmbus_bus_init` and its undoing: the order in which the bus driver comes up and goes (reference 3.1, 3.13)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from emu.errors import DeadlinePassed
from guestproc.drivers.driver import DRIVER_OBJECTS
from guestproc.kernel.smp import ProcessorGone
from guestproc.kernel.tasklet import tasklet_kill
from guestproc.kernel.wait import SECOND_NS
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Ipis
from guestproc.vmbus.chan_points import handler_of
from guestproc.vmbus.channel_mgmt import vmbus_free_channels
from guestproc.vmbus.connection import vmbus_connect, vmbus_disconnect, vmbus_request_offers
from guestproc.vmbus.cpu_hotplug import hv_synic_cleanup
from guestproc.vmbus.device import vmbus_driver_register, vmbus_driver_unregister
from guestproc.vmbus.hv import hv_synic_alloc, hv_synic_free, hyperv_cleanup, hyperv_init
from guestproc.vmbus.vector import hv_remove_vmbus_irq, hv_setup_vmbus_irq

if TYPE_CHECKING:
    from guestproc.current import Current

FLUSH_TIMEOUT_NS: Final = 180 * SECOND_NS


def vmbus_bus_init(current: Current, ncpus: int) -> int:
    """Boot CPU, before any CPU's SynIC: handler, drivers, pages; 0 or a negative errno, then all is undone."""
    result = hyperv_init(current)
    if result:
        return result
    hv_setup_vmbus_irq(current, handler_of(current))
    for driver in DRIVER_OBJECTS.values():
        result = result or vmbus_driver_register(current, driver)
    result = result or hv_synic_alloc(current, ncpus)
    if result:
        for driver in DRIVER_OBJECTS.values():
            vmbus_driver_unregister(current, driver)
        hv_remove_vmbus_irq(current)
        hyperv_cleanup(current)
    return result


def vmbus_start(current: Current) -> int:
    """Boot CPU, once every CPU's SynIC is up: connect and ask for offers, whose failure is only logged."""
    result = vmbus_connect(current)
    if result:
        return result
    result = vmbus_request_offers(current)
    if result:
        current.log(f"requesting offers failed: {errno.errorcode.get(-result, result)}")
    return 0


def vmbus_wait_for_offers(current: Current, delivered: Callable[[], bool], timeout_ns: int = 60 * SECOND_NS) -> None:
    """Until ALLOFFERS_DELIVERED came and every offer before it was processed, probes included; DeadlinePassed.

    The kernel never waits for this; whoever shows a machine does.
    """
    connection, queues = current.connection, current.tables.work_queues
    connection.state_wait.wait_until(current.actor, delivered, timeout_ns, "ALLOFFERS_DELIVERED")
    for queue in (QueueNumber.WORK, QueueNumber.PRI_CHAN, QueueNumber.SUB_CHAN):
        queues.flush(current.actor, queue, FLUSH_TIMEOUT_NS)


def vmbus_exit(current: Current) -> None:
    """Unload the drivers, then the bus: UNLOAD, handler off, channels, every CPU's SynIC, pages.

    Without drivers no work waits for the host any more, so the queues run empty before UNLOAD, and after it
    what came last is ignored.
    """
    for driver in list(DRIVER_OBJECTS.values()):
        vmbus_driver_unregister(current, driver)
    _drain_queues(current)
    vmbus_disconnect(current)
    _drain_queues(current)
    hv_remove_vmbus_irq(current)
    for cpu in current.tables.cpus.live():
        for dpc in (cpu.msg_dpc, cpu.event_dpc):
            tasklet_kill(current.actor, dpc, current.connection.tasklet_idle)
    vmbus_free_channels(current)
    _synic_offline(current)
    hv_synic_free(current)
    hyperv_cleanup(current)


def _drain_queues(current: Current) -> None:
    """Offers first, since they queue work on the others; a rescind may wait for any of them."""
    for queue in (QueueNumber.WORK, QueueNumber.PRI_CHAN, QueueNumber.SUB_CHAN, current.era.rescind_queue):
        current.tables.work_queues.flush(current.actor, queue, FLUSH_TIMEOUT_NS)


def _synic_offline(current: Current) -> None:
    """`hv_synic_cleanup` on every online CPU: on the others by IPI."""
    actor = current.actor
    for cpu in current.tables.cpus.live():
        if not cpu.online.load():
            continue
        if cpu.index == current.cpu:
            hv_synic_cleanup(current)
            continue
        alive = _is_alive(current, cpu.actor.load())
        try:
            cpu.call.call(actor, cpu.index, Ipis.HV_SYNIC_CLEANUP, cpu.index, online=alive)
        except (ProcessorGone, DeadlinePassed) as error:
            current.log(str(error))


def _is_alive(current: Current, actor: int) -> Callable[[], bool]:
    """Not `Cpu.online`: that falls to 0 in the middle of this call."""
    return lambda: not current.actor.is_dead(actor)
