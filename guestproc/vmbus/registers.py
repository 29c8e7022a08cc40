"""Registers and CPUID leaves of the processor that a thread carries, each a VM exit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emu.layout import ExitOperation

if TYPE_CHECKING:
    from guestproc.current import Current

_RDMSR: Final = int(ExitOperation.RDMSR)
_WRMSR: Final = int(ExitOperation.WRMSR)
_CPUID: Final = int(ExitOperation.CPUID)


def rdmsr(current: Current, msr: int) -> int:
    """Read a register of the processor this thread carries."""
    return current.exit(_RDMSR, msr)[0]


def wrmsr(current: Current, msr: int, value: int) -> None:
    """Write a register of the processor this thread carries."""
    current.exit(_WRMSR, msr, value)


def cpuid(current: Current, leaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of a hypervisor leaf."""
    low, high = current.exit(_CPUID, leaf)
    return low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF, high >> 32
