"""`struct hv_per_cpu_context` of this processor: its SynIC pages and its tasklets, at hand for the ISR.

The record in guest RAM says where the pages lie; this object holds the atomic words over them, made once
when the processor comes online. Other processes look at the record, never at this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emu.wire.synic import VMBUS_MESSAGE_SINT
from guestproc.kernel.tasklet import TaskletQueue

if TYPE_CHECKING:
    from guestproc.current import Current

EVENT_WORDS: Final = 32
"""2,048 flags of one SINT."""


class PerCpuContext:
    """What this processor's ISR and tasklets use."""

    def __init__(self, current: Current, tasklets: TaskletQueue) -> None:
        cpu = current.cpu_record()
        atomics = current.tables.ram.atomics
        self.tasklets: Final = tasklets
        self.msg_dpc: Final = cpu.msg_dpc
        self.slot_gpa: Final[int] = cpu.synic_message_page_gpa + VMBUS_MESSAGE_SINT * 256
        self.event_gpa: Final[int] = cpu.synic_event_page_gpa + VMBUS_MESSAGE_SINT * 256
        message_type = atomics.cell_u32(self.slot_gpa)
        self.load_message_type: Final = message_type.load
        self.cas_message_type: Final = message_type.cas
        self.load_message_flags: Final = atomics.cell_u8(self.slot_gpa + 5).load
        self.event_words: Final = tuple(atomics.cell_u64(self.event_gpa + 8 * word) for word in range(EVENT_WORDS))
        self.serial_gate: Final = current.machine.control.view.cell_u64(
            current.machine.control.serial_offset(current.hooks.position, VMBUS_MESSAGE_SINT)
        ).load
        self.randomness = 0
        self.clock_events = 0

    def add_interrupt_randomness(self) -> None:
        """The entropy hook: mixes something of each interrupt into a word nobody depends on."""
        self.randomness = (self.randomness * 0x9E3779B1 + self.tasklets.runs + 1) & 0xFFFFFFFF
