"""Vector 0xF3: the gate that the hypervisor's interrupt enters the guest by (reference 3.2).

The vector stays installed for ever; what it calls is one function pointer that `hv_setup_vmbus_irq` sets and
`hv_remove_vmbus_irq` clears. The pointer is a number in guest RAM, since every processor is a process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from emu.wire.synic import (
    CPUID_ENLIGHTENMENT_INFO,
    HV_DEPRECATING_AEOI_RECOMMENDED,
    HYPERVISOR_CALLBACK_VECTOR,
)
from guestproc.kernel.functions import FunctionTable
from guestproc.kernel.layout import Cpu
from guestproc.kernel.rcu import isr_enter, isr_exit
from guestproc.kernel.records import position_of
from guestproc.vmbus.registers import cpuid

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

VMBUS_HANDLERS: Final[FunctionTable[Callable[..., None]]] = FunctionTable("handlers of vector 0xF3")


class PtRegs:
    """The frame of what an interrupt interrupted: here only the vector that came, for reports."""

    __slots__ = ("vector",)

    def __init__(self, vector: int) -> None:
        self.vector = vector


class Gate:
    """The vector table's entry for 0xF3 on one processor, with what its handler needs at hand."""

    def __init__(self, current: Current, vcpu: Vcpu) -> None:
        self.current = current
        self.vcpu = vcpu
        self.hints = 0
        self.irq_regs: PtRegs | None = None
        self.cpu = current.cpu_record()
        self._handler = current.connection.vmbus_handler.load
        self._sequence = self.cpu.isr_sequence
        self._grace_wait = current.connection.grace_wait
        self._count = self.cpu.irq_hv_callback_count
        # Of the processor and its record, which stays: at hand, as all of it is used in every interrupt.
        self._quads, self._position = self.cpu.quads, position_of(Cpu, "irq_hv_callback_count")
        self._lapic = vcpu.lapic
        self._known: tuple[int, Callable[..., None] | None] = 0, None
        self._regs = PtRegs(HYPERVISOR_CALLBACK_VECTOR)

    def install(self) -> None:
        """Put the gate into the processor's vector table; there is no way to take it out again. Runs on it."""
        self.hints = cpuid(self.current, CPUID_ENLIGHTENMENT_INFO)[0]
        self.vcpu.vectors[HYPERVISOR_CALLBACK_VECTOR] = partial(hyperv_vector_handler, self, self._regs)

    def set_irq_regs(self, regs: PtRegs | None) -> PtRegs | None:
        """Publish the frame of the interrupt being handled and return the one before (generic x86)."""
        old, self.irq_regs = self.irq_regs, regs
        return old

    def entering_irq(self) -> None:
        """Hard-interrupt context begins; whoever waits for a grace period sees an odd sequence."""
        self.vcpu.entering_irq()
        isr_enter(self._sequence)

    def exiting_irq(self) -> None:
        """Hard-interrupt context ends; pending tasklets run on the way out."""
        isr_exit(self.current.actor, self._sequence, self._grace_wait)
        self.vcpu.exiting_irq()

    def inc_irq_stat(self) -> None:
        """Count in `irq_hv_callback_count`, the HYP: line of /proc/interrupts."""
        # This processor alone writes it: one store, and no look at what was there.
        self._count += 1
        self._quads[self._position] = self._count

    @property
    def vmbus_handler(self) -> Callable[..., None] | None:
        """What `hv_setup_vmbus_irq` registered, None after `hv_remove_vmbus_irq`."""
        number = self._handler()
        if number != self._known[0]:
            self._known = number, VMBUS_HANDLERS.lookup(number) if number else None
        return self._known[1]

    def ack_APIC_irq(self) -> None:  # noqa: N802 (the kernel's name)
        """End the interrupt at the local APIC."""
        self._lapic.eoi()


def hyperv_vector_handler(gate: Gate, regs: PtRegs) -> None:
    """C body of vector 0xF3: count, call the handler if there is one, EOI unless the SINT ends it itself."""
    old_regs = gate.set_irq_regs(regs)
    gate.entering_irq()
    gate.inc_irq_stat()
    handler = gate.vmbus_handler
    if handler is not None:
        handler(gate.current)
    if gate.hints & HV_DEPRECATING_AEOI_RECOMMENDED:
        gate.ack_APIC_irq()
    gate.exiting_irq()
    gate.set_irq_regs(old_regs)


def hv_setup_vmbus_irq(current: Current, handler: int) -> None:
    """Register the handler (a number in VMBUS_HANDLERS) on every processor at once."""
    current.connection.vmbus_handler.store(handler)


def hv_remove_vmbus_irq(current: Current) -> None:
    """Clear the pointer; interrupts that come still are counted, ended, and otherwise swallowed."""
    current.connection.vmbus_handler.store(0)
