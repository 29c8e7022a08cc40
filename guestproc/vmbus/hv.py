"""The guest's hypervisor layer: hypercalls and registers, SynIC pages, bring-up and shut-down of a CPU's SynIC.

Stands for drivers/hv/hv.c and the register order of reference 3.1: SIMP, SIEFP, SINT2, SCONTROL on the way
up; SINT2 masked, SIMP, SIEFP, SCONTROL on the way down. Who asks whether a CPU may go is `cpu_hotplug`.
"""

from __future__ import annotations

import errno
from contextlib import nullcontext
from struct import Struct
from types import TracebackType
from typing import TYPE_CHECKING, Final

from emu.errors import OutOfMemory
from emu.layout import ExitOperation
from emu.syncpoint import Point
from emu.tracing import E_CPU_ONLINE
from emu.wire.hypercalls import HV_HYPERCALL_FAST, HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT
from emu.wire.synic import (
    CPUID_ENLIGHTENMENT_INFO,
    CPUID_FEATURES,
    CPUID_VENDOR_AND_MAX_FUNCTIONS,
    HV_DEPRECATING_AEOI_RECOMMENDED,
    HV_MSR_HYPERCALL_AVAILABLE,
    HV_MSR_VP_INDEX_AVAILABLE,
    HV_SYNIC_CONTROL_ENABLE,
    HV_SYNIC_SIEFP_ENABLE,
    HV_SYNIC_SIMP_ENABLE,
    HV_SYNIC_SINT_AUTO_EOI,
    HV_SYNIC_SINT_MASKED,
    HV_SYNIC_SINT_VECTOR_MASK,
    HV_VENDOR,
    HV_X64_MSR_EOM,
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_HYPERCALL_ENABLE,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_VP_INDEX,
    HVMSG_CHANNEL_MESSAGE,
    HYPERVISOR_CALLBACK_VECTOR,
    VMBUS_MESSAGE_SINT,
)
from guestproc.kernel.actors import Actor
from guestproc.kernel.layout import Cpu
from guestproc.kernel.pages import PageOwner, owned_by
from guestproc.protocol.numbers import Tasklets
from guestproc.vmbus.hyperv_timer import hv_stimer_legacy_init
from guestproc.vmbus.registers import cpuid, rdmsr, wrmsr

if TYPE_CHECKING:
    from guestproc.current import Current

_HYPERCALL: Final = int(ExitOperation.HYPERCALL)

_SINT2: Final = HV_X64_MSR_SINT0 + VMBUS_MESSAGE_SINT
_PAGE_BASE: Final = ~0xFFF
_LINUX_GUEST_OS_ID: Final = 0x8100 << 48
"""Open source, Linux; its version code in bits 47 to 16 (reference 1.1)."""
_LEAST_LEAF: Final = 0x4000_0005
_MOST_LEAF: Final = 0x4000_FFFF
_AFTER_FILL: Final = int(Point.POST_AFTER_FILL)
_POST_HEAD: Final = Struct("<IIII")
MAX_MESSAGE_PAYLOAD: Final = 240


def hyperv_init(current: Current) -> int:
    """Boot CPU: look whether this is Hyper-V, say who we are, enable the hypercall page. 0, -ENODEV, -ENOMEM."""
    highest, *vendor = cpuid(current, CPUID_VENDOR_AND_MAX_FUNCTIONS)
    features = cpuid(current, CPUID_FEATURES)[0]
    needed = HV_MSR_HYPERCALL_AVAILABLE | HV_MSR_VP_INDEX_AVAILABLE
    if tuple(vendor) != HV_VENDOR or not _LEAST_LEAF <= highest <= _MOST_LEAF or features & needed != needed:
        current.log(f"not on Hyper-V: highest leaf {highest:#x}, vendor {vendor}, privileges {features:#x}")
        return -errno.ENODEV
    try:
        page = current.tables.pages.alloc_pages(current.actor, 0, PageOwner.HYPERCALL)
    except OutOfMemory as error:
        current.log(str(error))
        return -errno.ENOMEM
    wrmsr(current, HV_X64_MSR_GUEST_OS_ID, _LINUX_GUEST_OS_ID | current.era.linux_version_code << 16)
    wrmsr(current, HV_X64_MSR_HYPERCALL, page.gpa | HV_X64_MSR_HYPERCALL_ENABLE)
    return 0


def hyperv_cleanup(current: Current) -> None:
    """Boot CPU, last of all: no guest OS id, no hypercall page, whose memory is given back."""
    pfn = rdmsr(current, HV_X64_MSR_HYPERCALL) >> 12
    wrmsr(current, HV_X64_MSR_GUEST_OS_ID, 0)
    wrmsr(current, HV_X64_MSR_HYPERCALL, 0)
    pages = current.tables.pages
    # The number comes from the host: only what is a hypercall page is freed as one.
    if pfn < current.tables.layout.end_page and pages.owner_of(pfn) == PageOwner.HYPERCALL:
        pages.free(current.actor, pages.run_at(pfn))


def hv_synic_alloc(current: Current, ncpus: int) -> int:
    """Per CPU: the msg_dpc tasklet and a zeroed page each for messages, events and posting. 0 or -ENOMEM."""
    pages = current.tables.pages
    try:
        for number in range(ncpus):
            cpu = current.cpu_record(number)
            cpu.msg_dpc.init(Tasklets.VMBUS_ON_MSG_DPC, number)
            cpu.event_dpc.init(Tasklets.VMBUS_EVENT_DPC, number)
            owner = owned_by(PageOwner.SYNIC, number)
            cpu.synic_message_page_gpa = pages.alloc_pages(current.actor, 0, owner).gpa
            cpu.synic_event_page_gpa = pages.alloc_pages(current.actor, 0, owner).gpa
            cpu.post_msg_page_gpa = pages.alloc_pages(current.actor, 0, owner).gpa
    except OutOfMemory as error:
        current.log(str(error))
        hv_synic_free(current)
        return -errno.ENOMEM
    return 0


def hv_synic_free(current: Current) -> None:
    """Give the pages of `hv_synic_alloc` back, those that were had."""
    pages = current.tables.pages
    for cpu in current.tables.cpus.live():
        for gpa in (cpu.synic_message_page_gpa, cpu.synic_event_page_gpa, cpu.post_msg_page_gpa):
            if gpa:
                pages.free(current.actor, pages.run_at(gpa >> 12))
        cpu.synic_message_page_gpa = cpu.synic_event_page_gpa = cpu.post_msg_page_gpa = 0


def hv_synic_init(current: Current) -> None:
    """Bring this CPU's SynIC up; runs on that CPU. After SCONTROL messages and events may come."""
    cpu = current.cpu_record()
    cpu.vp_index = rdmsr(current, HV_X64_MSR_VP_INDEX) & 0xFFFFFFFF
    simp = rdmsr(current, HV_X64_MSR_SIMP) & 0xFFE
    wrmsr(current, HV_X64_MSR_SIMP, simp | cpu.synic_message_page_gpa | HV_SYNIC_SIMP_ENABLE)
    siefp = rdmsr(current, HV_X64_MSR_SIEFP) & 0xFFE
    wrmsr(current, HV_X64_MSR_SIEFP, siefp | cpu.synic_event_page_gpa | HV_SYNIC_SIEFP_ENABLE)
    sint = rdmsr(current, _SINT2) & ~(HV_SYNIC_SINT_VECTOR_MASK | HV_SYNIC_SINT_MASKED | HV_SYNIC_SINT_AUTO_EOI)
    if not cpuid(current, CPUID_ENLIGHTENMENT_INFO)[0] & HV_DEPRECATING_AEOI_RECOMMENDED:
        sint |= HV_SYNIC_SINT_AUTO_EOI
    wrmsr(current, _SINT2, sint | HYPERVISOR_CALLBACK_VECTOR)
    wrmsr(current, HV_X64_MSR_SCONTROL, rdmsr(current, HV_X64_MSR_SCONTROL) | HV_SYNIC_CONTROL_ENABLE)
    hv_stimer_legacy_init(current, VMBUS_MESSAGE_SINT)
    cpu.online.store(1)
    current.record(E_CPU_ONLINE, current.cpu, cpu.vp_index)


def hv_synic_disable_regs(current: Current) -> None:
    """This CPU's SynIC down again, in the order of reference 3.1; what its pages hold is gone with them."""
    wrmsr(current, _SINT2, rdmsr(current, _SINT2) | HV_SYNIC_SINT_MASKED)
    wrmsr(current, HV_X64_MSR_SIMP, rdmsr(current, HV_X64_MSR_SIMP) & ~_PAGE_BASE & ~HV_SYNIC_SIMP_ENABLE)
    wrmsr(current, HV_X64_MSR_SIEFP, rdmsr(current, HV_X64_MSR_SIEFP) & ~_PAGE_BASE & ~HV_SYNIC_SIEFP_ENABLE)
    wrmsr(current, HV_X64_MSR_SCONTROL, rdmsr(current, HV_X64_MSR_SCONTROL) & ~HV_SYNIC_CONTROL_ENABLE)


def hv_post_message(current: Current, connection_id: int, payload: bytes) -> int:
    """HvCallPostMessage through the CPU's page: the hypercall status, or -EMSGSIZE without a call.

    The page belongs to the CPU, so between fill and call nobody else may have it.
    """
    if len(payload) > MAX_MESSAGE_PAYLOAD:
        return -errno.EMSGSIZE
    cpu = current.cpu_record()
    # Filled and called as one; without that (races.md B4) it is wrong, and another poster may fill it in between.
    with _PageAlone(current.actor, cpu) if current.fix.post_atomic else nullcontext():
        page = cpu.post_msg_page_gpa
        current.memory.write(page, _POST_HEAD.pack(connection_id, 0, HVMSG_CHANNEL_MESSAGE, len(payload)) + payload)
        if current.armed[_AFTER_FILL]:
            current.reach(_AFTER_FILL)
        status = current.exit(_HYPERCALL, HVCALL_POST_MESSAGE, page)[0] & 0xFFFF
    current.counters.messages_posted += 1
    return status


class _PageAlone:
    """The CPU's hypercall page for this thread alone, for a block.

    Its processor has interrupts off, as in the kernel: neither one of them nor another task comes between. And the
    per-CPU lock is taken, because a worker that carries this CPU number is another process. (A generator's block costs
    2 us more, and opening a channel has three.)
    """

    __slots__ = ("_actor", "_cpu", "_flags")

    def __init__(self, actor: Actor, cpu: Cpu) -> None:
        self._actor = actor
        self._cpu = cpu
        self._flags = 0

    def __enter__(self) -> None:
        self._cpu.post_msg_mutex.acquire(self._actor)  # may sleep, so with interrupts on
        self._flags = self._actor.irq_save()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cpu.post_msg_mutex.release(self._actor)
        self._actor.irq_restore(self._flags)


def hv_do_fast_hypercall8(current: Current, code: int, argument: int) -> int:
    """A fast hypercall with one 8-byte input; its status."""
    return current.exit(_HYPERCALL, code | HV_HYPERCALL_FAST, argument)[0] & 0xFFFF


def hv_signal_event(current: Current, connection_id: int) -> int:
    """HvCallSignalEvent, flag 0, as an exit (the doorbell is its fast form); its status."""
    return hv_do_fast_hypercall8(current, HVCALL_SIGNAL_EVENT, connection_id)


def write_eom(current: Current) -> None:
    """Tell the hypervisor to scan its message queues for this CPU."""
    wrmsr(current, HV_X64_MSR_EOM, 0)
