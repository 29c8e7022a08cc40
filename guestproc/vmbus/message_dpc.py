"""`vmbus_on_msg_dpc`: takes the message out of the slot, runs or queues its handler, ends it (reference 3.6).

The slot is copied whole before anything in it is believed, and only the copy is used. A blocking message
becomes a work record with that copy; if there is none to be had the message stays in the slot, without EOM,
until the tasklet is scheduled again: by whatever interrupts this processor, and by who gives a record back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emu.syncpoint import Point
from emu.tracing import E_EOM, E_SLOT_FREE, E_SLOT_READ, E_TASKLET_RUN, E_VMBUS_ON_MSG_DPC, E_WORK_QUEUE
from emu.wire.message_relid import relid_of
from emu.wire.messages import MessageType
from emu.wire.synic import HVMSG_NONE, HVMSG_TIMER_EXPIRED, HYPERVISOR_CALLBACK_VECTOR, VMBUS_MESSAGE_SINT
from guestproc.kernel.functions import TASKLET_FUNCTIONS, WORK_FUNCTIONS
from guestproc.kernel.layout import ConnectionState
from guestproc.kernel.work_records import WorkItem
from guestproc.protocol import faults
from guestproc.protocol.numbers import Tasklets, Works
from guestproc.protocol.triage import MESSAGE_BYTES, Triage, payload_of, triage
from guestproc.vmbus.channel_mgmt import MESSAGE_HANDLERS, offer_done, vmbus_onmessage
from guestproc.vmbus.hv import write_eom

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vcpu import WorkerThread
    from guestproc.vmbus.percpu import PerCpuContext

MOST_TRIES: Final = 1_000
"""How often a tasklet that never gives up may ask, before its processor is called stuck."""
_TAKEN: Final = int(Point.MSG_TAKEN)
_BEFORE_ALLOC: Final = int(Point.MSG_BEFORE_ALLOC)
_AFTER_PENDING_READ: Final = int(Point.MSG_AFTER_PENDING_READ)


@TASKLET_FUNCTIONS.register(Tasklets.VMBUS_ON_MSG_DPC)
def vmbus_on_msg_dpc(current: Current, _cpu: int) -> None:
    """The tasklet of this processor's SINT2 slot."""
    hv_cpu = current.percpu
    if hv_cpu is None:  # this SynIC went down while the tasklet was pending
        return
    serial = hv_cpu.serial_gate()
    copy = bytes(current.tables.ram.octets[hv_cpu.slot_gpa : hv_cpu.slot_gpa + MESSAGE_BYTES])
    message = triage(current.era, copy)
    # A timer's message is the interrupt's that it came with, which this tasklet got in front of.
    if message.message_type in (HVMSG_NONE, HVMSG_TIMER_EXPIRED):
        return
    current.record(E_TASKLET_RUN, Tasklets.VMBUS_ON_MSG_DPC)
    current.record(E_SLOT_READ, VMBUS_MESSAGE_SINT, message.message_type, message.msgtype, serial)
    current.record(E_VMBUS_ON_MSG_DPC, message.msgtype)
    current.counters.messages_taken += 1
    current.counters.tasklets += 1
    if current.armed[_TAKEN]:
        current.reach(_TAKEN, relid_of(message.payload))
    if message.complaint is not None:
        current.refuse(message.complaint, "vmbus_on_msg_dpc")
    if message.blocking:
        tries = 0
        while not _queue(current, message, copy, serial):
            if current.fix.msg_reserve and not tries:
                # Announced before the second look: who gives a record back behind it has this slot looked at again.
                current.connection.slot_waits.fetch_or(1 << current.cpu)
            elif current.fix.msg_reserve or current.fix.variant != "spin":
                return  # no EOM: the slot stays full until this tasklet runs again
            # Wrong on purpose (races.md B3): the slot is full, so here it is again, and nobody else runs meanwhile.
            tries += 1
            assert tries <= MOST_TRIES, f"INV-29: the message tasklet asked {tries} times for a record of work"
    elif message.entry is not None:
        current.serial = serial
        MESSAGE_HANDLERS[message.entry.message_handler](current, message.payload)
    vmbus_signal_eom(current, hv_cpu, message.message_type, serial)


def _queue(current: Current, message: Triage, copy: bytes, serial: int) -> bool:
    """Hand a blocking message to its queue; False when no work record was to be had."""
    connection = current.connection
    if (message.is_offer or message.is_rescind) and connection.ignore_any_offer_msg.load():
        return True
    queues = current.tables.work_queues
    if current.armed[_BEFORE_ALLOC]:
        current.reach(_BEFORE_ALLOC)
    fails = faults.strikes(current.faults, "message_work", relid_of(message.payload))
    item = None if fails else queues.allocate(Works.VMBUS_ONMESSAGE_WORK, (), copy, serial)
    if item is None and current.fix.msg_reserve:
        # Nobody would come back for a slot that stays full (races.md B3): some records are kept for this.
        item = queues.allocate(Works.VMBUS_ONMESSAGE_WORK, (), copy, serial, reserved=True)
    if item is None:
        return False
    queue = message.queue(current.era, current.fix)
    if message.is_offer:
        # Counted before it is queued: a rescind that runs on its own queue waits for this to come down to 0.
        connection.offer_in_progress.fetch_add(1)
    current.record(E_WORK_QUEUE, queue, Works.VMBUS_ONMESSAGE_WORK, serial)
    queues.queue_work(current.actor, queue, item)
    return True


def look_at_slot_again(current: Current, worker: WorkerThread) -> None:
    """A record of work is free again: an interrupt for each processor whose message found none, as from the host.

    Our host posts to one processor; another may post to any of them. Who finds no record this time waits again.
    The kernel has nothing like it: there the slot stays full until something else interrupts that processor.
    """
    waiting = current.connection.slot_waits.exchange(0)
    while waiting:
        cpu = waiting.bit_length() - 1
        waiting &= ~(1 << cpu)
        worker.peers.request(cpu, HYPERVISOR_CALLBACK_VECTOR)


def vmbus_signal_eom(current: Current, hv_cpu: PerCpuContext, old_type: int, serial: int = 0) -> None:
    """Empty the slot, then tell the hypervisor if it has more (reference 1.3).

    Emptied by compare-and-swap: if the type changed, somebody else emptied or refilled it, and it is theirs.
    The swap is a full barrier between the clear and the load of the pending bit; the host sets that bit and
    then looks at the type again. Without either half both sides may wait for each other.
    """
    early = 0 if current.fix.eom_after_clear else _pending(current, hv_cpu)
    if hv_cpu.cas_message_type(old_type, HVMSG_NONE) != old_type:
        return
    # Read behind the clear; before it (races.md B1) is wrong, as the host may set it in between.
    pending = _pending(current, hv_cpu) if current.fix.eom_after_clear else early
    current.record(E_SLOT_FREE, VMBUS_MESSAGE_SINT, old_type, serial, pending)
    if pending:
        # Recorded before it is written: what it brings may interrupt us on the way back from that exit.
        current.record(E_EOM, current.hooks.position, VMBUS_MESSAGE_SINT)
        write_eom(current)


def _pending(current: Current, hv_cpu: PerCpuContext) -> int:
    """The slot's pending bit."""
    pending = hv_cpu.load_message_flags() & 1
    if current.armed[_AFTER_PENDING_READ]:
        current.reach(_AFTER_PENDING_READ)
    return pending


@WORK_FUNCTIONS.register(Works.VMBUS_ONMESSAGE_WORK)
def vmbus_onmessage_work(current: Current, item: WorkItem) -> None:
    """A queued message: handled, unless the connection is gone by now."""
    payload = payload_of(current.era, item.message)
    if current.connection.conn_state.load() == ConnectionState.DISCONNECTED:
        # The kernel loses the record here, and the count with it, which a later connection would wait for.
        if payload[0] == MessageType.OFFERCHANNEL:
            offer_done(current)
        return
    vmbus_onmessage(current, payload)
