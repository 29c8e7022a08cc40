"""The hypervisor's CPUID leaves 0x40000000 to 0x40000005, as a guest reads them (reference 1.1)."""

from __future__ import annotations

from typing import Final

from emu.layout import MAX_VPS
from emu.wire.synic import (
    CPUID_ENLIGHTENMENT_INFO,
    CPUID_FEATURES,
    CPUID_IMPLEMENT_LIMITS,
    CPUID_INTERFACE,
    CPUID_VENDOR_AND_MAX_FUNCTIONS,
    CPUID_VERSION,
    HV_DEPRECATING_AEOI_RECOMMENDED,
    HV_FEATURE_SINT_POLLING_MODE,
    HV_INTERFACE,
    HV_MSR_HYPERCALL_AVAILABLE,
    HV_MSR_RESET_AVAILABLE,
    HV_MSR_SYNIC_AVAILABLE,
    HV_MSR_SYNTIMER_AVAILABLE,
    HV_MSR_TIME_REF_COUNT_AVAILABLE,
    HV_MSR_VP_INDEX_AVAILABLE,
    HV_POST_MESSAGES,
    HV_SIGNAL_EVENTS,
    HV_VENDOR,
)

Leaf = tuple[int, int, int, int, int]
"""Leaf number, EAX, EBX, ECX, EDX."""

_BUILD: Final = 20_348
_MAJOR_MINOR: Final = 10 << 16
_FEATURES_EAX: Final = (
    HV_MSR_TIME_REF_COUNT_AVAILABLE
    | HV_MSR_SYNIC_AVAILABLE
    | HV_MSR_SYNTIMER_AVAILABLE
    | HV_MSR_HYPERCALL_AVAILABLE
    | HV_MSR_VP_INDEX_AVAILABLE
    | HV_MSR_RESET_AVAILABLE
)


def leaves(*, deprecate_auto_eoi: bool = True) -> list[Leaf]:
    """All six leaves; the hint bit says whether a guest should end its interrupts itself."""
    hints = HV_DEPRECATING_AEOI_RECOMMENDED if deprecate_auto_eoi else 0
    return [
        (CPUID_VENDOR_AND_MAX_FUNCTIONS, CPUID_IMPLEMENT_LIMITS, *HV_VENDOR),
        (CPUID_INTERFACE, HV_INTERFACE, 0, 0, 0),
        (CPUID_VERSION, _BUILD, _MAJOR_MINOR, 0, 0),
        (CPUID_FEATURES, _FEATURES_EAX, HV_POST_MESSAGES | HV_SIGNAL_EVENTS, 0, HV_FEATURE_SINT_POLLING_MODE),
        (CPUID_ENLIGHTENMENT_INFO, hints, 0, 0, 0),
        (CPUID_IMPLEMENT_LIMITS, MAX_VPS, MAX_VPS, 0, 0),
    ]
