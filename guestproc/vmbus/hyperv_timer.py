"""The clock event device of each processor: synthetic timer 0, one-shot, its messages on VMBus's SINT.

Stands for drivers/clocksource/hyperv_timer.c on a host that does not offer direct mode: a timer's message shares the
slot of SINT 2 with the bus's, so one that lies there delays the tick. The ISR takes it out at once
(`hv_process_timer_expiration`) and calls the handler. Every function runs on the processor whose timer it is about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emu.tracing import E_CLOCK_EVENT
from emu.wire.synic import (
    CPUID_FEATURES,
    HV_CLOCK_HZ,
    HV_MSR_SYNTIMER_AVAILABLE,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_STIMER0_COUNT,
    HV_X64_MSR_TIME_REF_COUNT,
    MESSAGE_PAYLOAD_OFFSET,
    TIMER_PAYLOAD,
    stimer_config,
)
from guestproc.kernel.functions import IPI_FUNCTIONS
from guestproc.protocol.numbers import Ipis
from guestproc.vmbus.registers import cpuid, rdmsr, wrmsr

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.vmbus.percpu import PerCpuContext

TICK_NS: Final = 1_000_000_000 // HV_CLOCK_HZ
HV_MIN_DELTA_TICKS: Final = 1
HV_MAX_MAX_DELTA_TICKS: Final = 0xFFFF_FFFF


def hv_stimer_legacy_init(current: Current, sint: int) -> None:
    """This processor's clock event device on `sint`, if the host has timers: enabled, and not counting yet."""
    if cpuid(current, CPUID_FEATURES)[0] & HV_MSR_SYNTIMER_AVAILABLE:
        current.cpu_record().stimer0_message_sint = sint
        hv_ce_set_oneshot(current)


def hv_stimer_legacy_cleanup(current: Current) -> None:
    """No clock event comes from this processor's device any more."""
    cpu = current.cpu_record()
    if cpu.stimer0_message_sint:
        hv_ce_shutdown(current)
        cpu.stimer0_message_sint = 0


def hv_ce_set_oneshot(current: Current) -> None:
    """One-shot on the processor's SINT; a count that is written later enables it."""
    sint = current.cpu_record().stimer0_message_sint
    wrmsr(current, HV_X64_MSR_STIMER0_CONFIG, stimer_config(sint, auto_enable=True))


def hv_ce_shutdown(current: Current) -> None:
    """Stop it, and disable it."""
    wrmsr(current, HV_X64_MSR_STIMER0_COUNT, 0)
    wrmsr(current, HV_X64_MSR_STIMER0_CONFIG, 0)


def hv_read_reference_counter(current: Current) -> int:
    """Partition reference time, in 100 ns."""
    return rdmsr(current, HV_X64_MSR_TIME_REF_COUNT)


@IPI_FUNCTIONS.register(Ipis.HV_CE_SET_NEXT_EVENT)
def hv_ce_set_next_event(current: Current, delta: int) -> None:
    """The next clock event of this processor comes in `delta` ticks of 100 ns; the one before is forgotten."""
    assert HV_MIN_DELTA_TICKS <= delta <= HV_MAX_MAX_DELTA_TICKS, delta
    assert current.cpu_record().stimer0_message_sint, f"CPU {current.cpu} has no clock event device"
    wrmsr(current, HV_X64_MSR_STIMER0_COUNT, hv_read_reference_counter(current) + delta)


def hv_stimer0_isr(current: Current, hv_cpu: PerCpuContext) -> None:
    """The clock event, its message still in the slot: counted and recorded, since there is no scheduler to tell."""
    current.cpu_record().clock_events += 1
    payload = TIMER_PAYLOAD.unpack_from(current.tables.ram.octets, hv_cpu.slot_gpa + MESSAGE_PAYLOAD_OFFSET)
    current.record(E_CLOCK_EVENT, *payload)
