"""The ISR of a guest that runs schedules: the same steps with sync points, and with the mistakes of E1 and F2.

Chosen when the bus comes up and when a processor comes online; the ISR of any other machine has none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from emu.syncpoint import Point
from emu.tracing import E_TASKLET_RUN, E_TASKLET_SCHED
from emu.wire.synic import HVMSG_NONE
from guestproc.kernel.functions import TASKLET_FUNCTIONS
from guestproc.protocol.numbers import Handlers, Tasklets
from guestproc.vmbus.chan_sched import find_in_table, find_on_list, schedule, schedule_locked, vmbus_chan_sched
from guestproc.vmbus.isr import message_came, vmbus_isr
from guestproc.vmbus.packets import inbound_rings
from guestproc.vmbus.vector import VMBUS_HANDLERS

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vmbus.event_lane import EventLane
    from guestproc.vmbus.percpu import PerCpuContext

Find = Callable[["Current", "PerCpuContext", int], "EventLane | None"]
Schedule = Callable[["Current", "PerCpuContext", "EventLane"], None]
_ENTER: Final = int(Point.ISR_ENTER)
_AFTER_LOOKUP: Final = int(Point.ISR_AFTER_LOOKUP)
_AT_NODE: Final = int(Point.LIST_AT_NODE)


# -- the whole of it ------------------------------------------------------------------------------------


def handler_of(current: Current) -> Handlers:
    """Which handler vector 0xF3 calls in this guest."""
    plain = current.fix.list_edit_exclusion and not current.machine.races
    return Handlers.VMBUS_ISR if plain else Handlers.VMBUS_ISR_POINTED


@VMBUS_HANDLERS.register(Handlers.VMBUS_ISR_POINTED)
def vmbus_isr_pointed(current: Current) -> None:
    """As `vmbus_isr`, with a point before it has read anything."""
    if current.armed[_ENTER]:
        current.reach(_ENTER)
    if current.fix.list_edit_exclusion:
        vmbus_isr(current)
        return
    # Wrong on purpose (races.md F2): flags are a tasklet's, in the middle of which the list is changed by an interrupt.
    hv_cpu = current.percpu
    if hv_cpu is None:
        return
    if hv_cpu.tasklets.schedule(current.cpu_record().event_dpc):
        current.record(E_TASKLET_SCHED, Tasklets.VMBUS_EVENT_DPC)
    message_type = hv_cpu.load_message_type()
    if message_type != HVMSG_NONE:
        message_came(current, hv_cpu, message_type)


@TASKLET_FUNCTIONS.register(Tasklets.VMBUS_EVENT_DPC)
def vmbus_event_dpc(current: Current, _cpu: int) -> None:
    """A processor's event tasklet, as kernels had it until 2017: what is an ISR's half now."""
    current.record(E_TASKLET_RUN, Tasklets.VMBUS_EVENT_DPC)
    if current.percpu is not None:
        vmbus_chan_sched(current, current.percpu)


# -- from a flag to its channel -------------------------------------------------------------------------


def find_of(current: Current) -> Find:
    """How this processor's ISR finds the channel of a flag."""
    if not current.percpu_lists:
        return find_in_table
    return _find_on_list_pointed if current.machine.races else find_on_list


def _find_on_list_pointed(current: Current, hv_cpu: PerCpuContext, relid: int) -> EventLane | None:
    """As `find_on_list`."""
    for channel in current.tables.chan_list(current.cpu_record()):
        if current.armed[_AT_NODE]:
            current.reach(_AT_NODE, channel.relid)
        if channel.relid == relid and not channel.rescind.load():
            return hv_cpu.lane_of(channel)
    return None


# -- what it does with the channel ----------------------------------------------------------------------


def schedule_of(current: Current) -> Schedule:
    """What this processor's ISR does with a channel whose flag was set."""
    if not current.fix.close_quiesces and current.fix.variant == "isr_after_move":
        return _schedule_unlocked
    return _schedule_pointed if current.machine.races else schedule


def _schedule_pointed(current: Current, hv_cpu: PerCpuContext, lane: EventLane) -> None:
    """The channel is found, and its callback may still be taken away.

    A machine that runs schedules may do this in a tasklet (`vmbus_event_dpc`), with interrupts on.
    """
    if current.armed[_AFTER_LOOKUP]:
        current.reach(_AFTER_LOOKUP, lane.channel.relid)
    with lane.sched_lock.hold(current.actor):
        schedule_locked(current, hv_cpu, lane)


def _schedule_unlocked(current: Current, hv_cpu: PerCpuContext, lane: EventLane) -> None:
    """Wrong on purpose (races.md E1, isr_after_move): masks without the lock that a closer takes, and without a look.

    Closers had the callback cleared by the channel's own processor, whose ISR cannot run meanwhile. After a move that
    is another one than this.
    """
    rings = inbound_rings(current, lane.channel)
    if current.armed[_AFTER_LOOKUP]:
        current.reach(_AFTER_LOOKUP, lane.channel.relid)
    if rings is not None:
        rings.inbound.begin_read()
        hv_cpu.tasklets.schedule(lane.callback_event)
