"""The SynIC's numbers: MSRs, register bits, message types, CPUID leaves, and the 256-byte SynIC message.

Every VP has 16 SINTs, each with a slot of 256 bytes in the VP's message page (SIMP) and 2,048 flags in
its event-flag page (SIEFP). A slot is free when `message_type` is 0; so whoever fills it writes the
type last. What the registers do is in `emu.synic`; here is what they are called and where their bits
lie (TLFS; hyperv-tlfs.h).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

# Partition-wide and per-VP registers.
HV_X64_MSR_GUEST_OS_ID: Final = 0x4000_0000
HV_X64_MSR_HYPERCALL: Final = 0x4000_0001
HV_X64_MSR_VP_INDEX: Final = 0x4000_0002
HV_X64_MSR_RESET: Final = 0x4000_0003
HV_X64_MSR_VP_RUNTIME: Final = 0x4000_0010
HV_X64_MSR_TIME_REF_COUNT: Final = 0x4000_0020
HV_X64_MSR_REFERENCE_TSC: Final = 0x4000_0021
HV_X64_MSR_TSC_FREQUENCY: Final = 0x4000_0022
HV_X64_MSR_APIC_FREQUENCY: Final = 0x4000_0023
HV_X64_MSR_EOI: Final = 0x4000_0070
HV_X64_MSR_ICR: Final = 0x4000_0071
HV_X64_MSR_TPR: Final = 0x4000_0072
HV_X64_MSR_VP_ASSIST_PAGE: Final = 0x4000_0073
HV_X64_MSR_SCONTROL: Final = 0x4000_0080
HV_X64_MSR_SVERSION: Final = 0x4000_0081
HV_X64_MSR_SIEFP: Final = 0x4000_0082
HV_X64_MSR_SIMP: Final = 0x4000_0083
HV_X64_MSR_EOM: Final = 0x4000_0084
HV_X64_MSR_SINT0: Final = 0x4000_0090
HV_X64_MSR_SINT15: Final = 0x4000_009F
HV_X64_MSR_STIMER0_CONFIG: Final = 0x4000_00B0
HV_X64_MSR_STIMER0_COUNT: Final = 0x4000_00B1
HV_X64_MSR_STIMER3_COUNT: Final = 0x4000_00B7
HV_X64_MSR_CRASH_P0: Final = 0x4000_0100
HV_X64_MSR_CRASH_P4: Final = 0x4000_0104
HV_X64_MSR_CRASH_CTL: Final = 0x4000_0105

MSR_NAMES: Final[dict[int, str]] = {
    **{HV_X64_MSR_SINT0 + sint: f"SINT{sint}" for sint in range(16)},
    **{HV_X64_MSR_STIMER0_CONFIG + 2 * timer: f"STIMER{timer}_CONFIG" for timer in range(4)},
    **{HV_X64_MSR_STIMER0_COUNT + 2 * timer: f"STIMER{timer}_COUNT" for timer in range(4)},
    **{HV_X64_MSR_CRASH_P0 + number: f"CRASH_P{number}" for number in range(5)},
    HV_X64_MSR_GUEST_OS_ID: "GUEST_OS_ID",
    HV_X64_MSR_HYPERCALL: "HYPERCALL",
    HV_X64_MSR_VP_INDEX: "VP_INDEX",
    HV_X64_MSR_RESET: "RESET",
    HV_X64_MSR_VP_RUNTIME: "VP_RUNTIME",
    HV_X64_MSR_TIME_REF_COUNT: "TIME_REF_COUNT",
    HV_X64_MSR_REFERENCE_TSC: "REFERENCE_TSC",
    HV_X64_MSR_TSC_FREQUENCY: "TSC_FREQUENCY",
    HV_X64_MSR_APIC_FREQUENCY: "APIC_FREQUENCY",
    HV_X64_MSR_EOI: "EOI",
    HV_X64_MSR_ICR: "ICR",
    HV_X64_MSR_TPR: "TPR",
    HV_X64_MSR_VP_ASSIST_PAGE: "VP_ASSIST_PAGE",
    HV_X64_MSR_SCONTROL: "SCONTROL",
    HV_X64_MSR_SVERSION: "SVERSION",
    HV_X64_MSR_SIEFP: "SIEFP",
    HV_X64_MSR_SIMP: "SIMP",
    HV_X64_MSR_EOM: "EOM",
    HV_X64_MSR_CRASH_CTL: "CRASH_CTL",
}
"""Every register of the reference, for people and for the fuzzer's choice."""

HV_SYNIC_SINT_COUNT: Final = 16
HV_SYNIC_STIMER_COUNT: Final = 4
HV_SYNIC_VERSION_1: Final = 1
HV_SYNIC_FIRST_VALID_VECTOR: Final = 16
HV_CLOCK_HZ: Final = 10_000_000
"""Reference time counts 100 ns."""

VMBUS_MESSAGE_SINT: Final = 2
REDIRECT_SINT: Final = 7
HYPERVISOR_CALLBACK_VECTOR: Final = 0xF3
HYPERV_REENLIGHTENMENT_VECTOR: Final = 0xEE
HYPERV_STIMER0_VECTOR: Final = 0xED

# Bits of SCONTROL, SIMP, SIEFP, HYPERCALL and the other registers that hold a page.
HV_SYNIC_CONTROL_ENABLE: Final = 1 << 0
HV_SYNIC_SIMP_ENABLE: Final = 1 << 0
HV_SYNIC_SIEFP_ENABLE: Final = 1 << 0
HV_X64_MSR_HYPERCALL_ENABLE: Final = 1 << 0
HV_X64_MSR_HYPERCALL_LOCKED: Final = 1 << 1
PAGE_REGISTER_ENABLE: Final = 1 << 0
PAGE_REGISTER_GPA_MASK: Final = 0xFFFF_FFFF_FFFF_F000

# Bits of a SINT.
HV_SYNIC_SINT_VECTOR_MASK: Final = 0xFF
HV_SYNIC_SINT_MASKED: Final = 1 << 16
HV_SYNIC_SINT_AUTO_EOI: Final = 1 << 17
HV_SYNIC_SINT_POLLING: Final = 1 << 18
SINT_RESET: Final = HV_SYNIC_SINT_MASKED

# Bits of STIMERn_CONFIG.
HV_STIMER_ENABLE: Final = 1 << 0
HV_STIMER_PERIODIC: Final = 1 << 1
HV_STIMER_LAZY: Final = 1 << 2
HV_STIMER_AUTOENABLE: Final = 1 << 3
HV_STIMER_DIRECT_MODE: Final = 1 << 12
HV_STIMER_VECTOR_SHIFT: Final = 4
HV_STIMER_SINT_SHIFT: Final = 16
HV_STIMER_RESERVED: Final = 0xFFFF_FFFF_FFF0_E000
"""Bits 63:20 and 15:13, which must be zero."""

# CPUID leaves, and the bits of them that VMBus guests look at.
CPUID_VENDOR_AND_MAX_FUNCTIONS: Final = 0x4000_0000
CPUID_INTERFACE: Final = 0x4000_0001
CPUID_VERSION: Final = 0x4000_0002
CPUID_FEATURES: Final = 0x4000_0003
CPUID_ENLIGHTENMENT_INFO: Final = 0x4000_0004
CPUID_IMPLEMENT_LIMITS: Final = 0x4000_0005

HV_VENDOR: Final = (0x7263_694D, 0x666F_736F, 0x7648_2074)
"""EBX, ECX, EDX of the first leaf: the text "Microsoft Hv"."""
HV_INTERFACE: Final = 0x3123_7648
"""EAX of the second leaf: the text "Hv#1"."""

# EAX of the features leaf.
HV_MSR_VP_RUNTIME_AVAILABLE: Final = 1 << 0
HV_MSR_TIME_REF_COUNT_AVAILABLE: Final = 1 << 1
HV_MSR_SYNIC_AVAILABLE: Final = 1 << 2
HV_MSR_SYNTIMER_AVAILABLE: Final = 1 << 3
HV_MSR_APIC_ACCESS_AVAILABLE: Final = 1 << 4
HV_MSR_HYPERCALL_AVAILABLE: Final = 1 << 5
HV_MSR_VP_INDEX_AVAILABLE: Final = 1 << 6
HV_MSR_RESET_AVAILABLE: Final = 1 << 7
HV_MSR_REFERENCE_TSC_AVAILABLE: Final = 1 << 9
HV_ACCESS_FREQUENCY_MSRS: Final = 1 << 11
# EBX of the features leaf.
HV_POST_MESSAGES: Final = 1 << 4
HV_SIGNAL_EVENTS: Final = 1 << 5
# EDX of the features leaf.
HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE: Final = 1 << 10
HV_FEATURE_SINT_POLLING_MODE: Final = 1 << 17
HV_STIMER_DIRECT_MODE_AVAILABLE: Final = 1 << 19
# EAX of the enlightenment leaf.
HV_X64_APIC_ACCESS_RECOMMENDED: Final = 1 << 3
HV_X64_RELAXED_TIMING_RECOMMENDED: Final = 1 << 5
HV_DEPRECATING_AEOI_RECOMMENDED: Final = 1 << 9
HV_X64_CLUSTER_IPI_RECOMMENDED: Final = 1 << 10
HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED: Final = 1 << 11

# Message types; bit 31 is the hypervisor's.
HVMSG_NONE: Final = 0x0
HVMSG_CHANNEL_MESSAGE: Final = 0x1
"""VMBus's own: the payload is a channel message (`emu.wire.messages`)."""
HVMSG_UNMAPPED_GPA: Final = 0x8000_0000
HVMSG_GPA_INTERCEPT: Final = 0x8000_0001
HVMSG_TIMER_EXPIRED: Final = 0x8000_0010
HVMSG_INVALID_VP_REGISTER_VALUE: Final = 0x8000_0020
HVMSG_UNRECOVERABLE_EXCEPTION: Final = 0x8000_0021
HVMSG_UNSUPPORTED_FEATURE: Final = 0x8000_0022
HVMSG_EVENTLOG_BUFFERCOMPLETE: Final = 0x8000_0040
HVMSG_HYPERCALL_INTERCEPT: Final = 0x8000_0050
HVMSG_SYNIC_EVENT_INTERCEPT: Final = 0x8000_0060
HVMSG_SYNIC_SINT_INTERCEPT: Final = 0x8000_0061
HVMSG_SYNIC_SINT_DELIVERABLE: Final = 0x8000_0062
HVMSG_ASYNC_CALL_COMPLETION: Final = 0x8000_0070
HVMSG_X64_IOPORT_INTERCEPT: Final = 0x8001_0000
HVMSG_X64_MSR_INTERCEPT: Final = 0x8001_0001
HVMSG_X64_CPUID_INTERCEPT: Final = 0x8001_0002
HVMSG_X64_EXCEPTION_INTERCEPT: Final = 0x8001_0003
HVMSG_X64_APIC_EOI: Final = 0x8001_0004
HVMSG_X64_LEGACY_FP_ERROR: Final = 0x8001_0005

# The message page and the event-flag page.
HV_MESSAGE_SIZE: Final = 256
HV_MESSAGE_PAYLOAD_BYTE_COUNT: Final = 240
MESSAGE_HEADER: Final = Struct("<IBBxxQ")
"""`hv_message_header`: message_type, payload_size, message_flags, sender."""
MESSAGE_TYPE_OFFSET: Final = 0
MESSAGE_FLAGS_OFFSET: Final = 5
MESSAGE_PAYLOAD_OFFSET: Final = MESSAGE_HEADER.size
HV_MESSAGE_FLAG_PENDING: Final = 1 << 0
"""`msg_pending`: another message waits for this slot."""

HV_EVENT_FLAGS_COUNT: Final = 2048
HV_EVENT_FLAGS_BYTE_COUNT: Final = 256

TIMER_PAYLOAD: Final = Struct("<IxxxxQQ")
"""`hv_timer_message_payload`: timer_index, expiration_time, delivery_time (100 ns)."""
REFERENCE_TSC_PAGE: Final = Struct("<IxxxxQq")
"""`ms_hyperv_tsc_page`: tsc_sequence, tsc_scale, tsc_offset."""


def message_slot(sint: int) -> int:
    """Byte offset of a SINT's slot in the message page."""
    return sint * HV_MESSAGE_SIZE


def event_flag(sint: int, flag: int) -> tuple[int, int]:
    """Byte offset in the event-flag page, and the mask of the bit in that byte."""
    return sint * HV_EVENT_FLAGS_BYTE_COUNT + flag // 8, 1 << flag % 8


def sint_value(vector: int, masked: bool = False, auto_eoi: bool = False, polling: bool = False) -> int:
    """Build the value of a SINT register."""
    return (
        vector
        | (HV_SYNIC_SINT_MASKED if masked else 0)
        | (HV_SYNIC_SINT_AUTO_EOI if auto_eoi else 0)
        | (HV_SYNIC_SINT_POLLING if polling else 0)
    )


def sint_vector(value: int) -> int:
    """Bits 7:0 of a SINT register."""
    return value & HV_SYNIC_SINT_VECTOR_MASK


def stimer_config(
    sint: int, *, enable: bool = True, periodic: bool = False, lazy: bool = False, auto_enable: bool = False
) -> int:
    """Build the value of STIMERn_CONFIG for a timer in message mode."""
    return (
        sint << HV_STIMER_SINT_SHIFT
        | (HV_STIMER_ENABLE if enable else 0)
        | (HV_STIMER_PERIODIC if periodic else 0)
        | (HV_STIMER_LAZY if lazy else 0)
        | (HV_STIMER_AUTOENABLE if auto_enable else 0)
    )


def stimer_sint(value: int) -> int:
    """Bits 19:16 of STIMERn_CONFIG, SINTx."""
    return value >> HV_STIMER_SINT_SHIFT & 0xF


def page_register(gpa: int, enable: bool = True) -> int:
    """Build the value of SIMP, SIEFP, HYPERCALL or another register that holds a page."""
    assert gpa & ~PAGE_REGISTER_GPA_MASK == 0, hex(gpa)
    return gpa | (PAGE_REGISTER_ENABLE if enable else 0)


def page_register_gpa(value: int) -> int:
    """Bits 63:12 of such a register, as the GPA of the page."""
    return value & PAGE_REGISTER_GPA_MASK


def page_register_enabled(value: int) -> bool:
    """Bit 0 of such a register."""
    return bool(value & PAGE_REGISTER_ENABLE)


def linux_guest_os_id(version_code: int) -> int:
    """What Linux writes to GUEST_OS_ID, for a LINUX_VERSION_CODE such as 0x060C75 (6.12.117)."""
    return 0x8100 << 48 | version_code << 16
