"""`vmbus_isr`: events first, then the message slot (reference 3.3).

Events before messages, as Windows guests do it. One interrupt may mean events, a message, both or neither;
a spurious one is harmless. The slot is only looked at here: its message is the tasklet's.

Hosts below 2.4 have one flag for all channels, number 0; only when it was set are their bits looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.tracing import E_TASKLET_SCHED
from emu.wire.synic import HVMSG_NONE, HVMSG_TIMER_EXPIRED
from guestproc.protocol.numbers import Handlers, Tasklets
from guestproc.vmbus.chan_sched import sync_test_and_clear_bit, vmbus_chan_sched
from guestproc.vmbus.hyperv_timer import hv_stimer0_isr
from guestproc.vmbus.message_dpc import vmbus_signal_eom
from guestproc.vmbus.vector import VMBUS_HANDLERS

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vmbus.percpu import PerCpuContext


@VMBUS_HANDLERS.register(Handlers.VMBUS_ISR)
def vmbus_isr(current: Current) -> None:
    """Schedule the channels whose flags are set, then the message tasklet if the slot holds a message."""
    hv_cpu = current.percpu
    if hv_cpu is None:
        return
    if not hv_cpu.may_share or not hv_cpu.shares_interrupt() or sync_test_and_clear_bit(0, hv_cpu.event_words):
        vmbus_chan_sched(current, hv_cpu)
    message_type = hv_cpu.load_message_type()
    if message_type != HVMSG_NONE:
        message_came(current, hv_cpu, message_type)
    hv_cpu.add_interrupt_randomness()


def message_came(current: Current, hv_cpu: PerCpuContext, message_type: int) -> None:
    """Have a full slot read: a timer's message here, any other by the message tasklet."""
    if message_type == HVMSG_TIMER_EXPIRED:
        hv_process_timer_expiration(current, hv_cpu)
    elif hv_cpu.tasklets.schedule(hv_cpu.msg_dpc):
        current.record(E_TASKLET_SCHED, Tasklets.VMBUS_ON_MSG_DPC)


def hv_process_timer_expiration(current: Current, hv_cpu: PerCpuContext) -> None:
    """A timer message is handled right here: its clock event, then the end of the message."""
    hv_stimer0_isr(current, hv_cpu)
    vmbus_signal_eom(current, hv_cpu, HVMSG_TIMER_EXPIRED)
