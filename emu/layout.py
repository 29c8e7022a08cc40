"""Where everything lies in the three segments that a guest may reach; one table, for Python and for C.

`ram` is guest physical memory, offset = GPA. `vps` is a machine page, then a page per virtual processor.
`doorbells` holds what a guest rings and the host's run state. `docs/abi.md` explains how the words are used;
`tools/abi_header.py` prints these tables as a C header, and a test keeps the two equal.
All integers are little-endian and naturally aligned; every offset is in bytes from the start of its block.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from emu.values import valueclass

ABI_MAJOR: Final = 1
ABI_MINOR: Final = 0
MAGIC: Final = int.from_bytes(b"VMBUSEMU", "little")

PAGE_SIZE: Final = 4096
RAM_HEAD_BYTES: Final = 2 * PAGE_SIZE
"""So much of RAM has memory from the launch on: where guests of ours say that they have laid it out. Others look there
before that is so, and a first look at a page needs memory, too, which a full tmpfs has not: SIGBUS."""
CACHE_LINE: Final = 64
MAX_VPS: Final = 64
EXIT_SLOTS: Final = 8
CONNECTIONS: Final = 16_384
CPUID_ENTRIES: Final = 16
VECTOR_WORDS: Final = 4

_WIDTH: Final = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


@valueclass()
class Field:
    """One field: name, byte offset, element type (`u8` to `u64`), element count, what it holds."""

    name: str
    offset: int
    ctype: str
    count: int
    doc: str

    @property
    def nbytes(self) -> int:
        """Bytes that the whole field takes."""
        return _WIDTH[self.ctype] * self.count


@valueclass()
class Block:
    """One block of shared memory as a C structure: name, size in bytes, fields in order of offset."""

    name: str
    size: int
    doc: str
    fields: tuple[Field, ...]

    def offset(self, name: str) -> int:
        """Byte offset of the field `name` (KeyError when there is none)."""
        for field in self.fields:
            if field.name == name:
                return field.offset
        raise KeyError(f"{self.name} has no field {name}")


MACHINE_PAGE: Final = Block(
    "vmbus_emu_machine_page",
    PAGE_SIZE,
    "page 0 of `vps`: what the machine is; written by the launcher and the host only",
    (
        Field("magic", 0, "u64", 1, "the bytes VMBUSEMU"),
        Field("abi_major", 8, "u16", 1, "another major is another ABI: do not attach"),
        Field("abi_minor", 10, "u16", 1, "a higher minor only adds"),
        Field("state", 12, "u32", 1, "enum vmbus_emu_machine_state"),
        Field("ram_bytes", 16, "u64", 1, "size of `ram`; GPAs at or above it do not exist"),
        Field("vp_count", 24, "u32", 1, "virtual processors, and VP pages behind this one"),
        Field("exit_slots", 28, "u32", 1, "exit slots in each VP page"),
        Field("connections", 32, "u32", 1, "connection ids that the doorbell bitmap covers"),
        Field("attach_generation", 36, "u32", 1, "how often a guest attached"),
        Field("cpuid_count", 40, "u32", 1, "entries used in `cpuid`"),
        Field("cpuid", 64, "u32", 5 * CPUID_ENTRIES, "{leaf, eax, ebx, ecx, edx} for each hypervisor leaf"),
    ),
)

EXIT_SLOT: Final = Block(
    "vmbus_emu_exit_slot",
    64,
    "one VM exit in flight; the claimer writes all of it but what the host answers",
    (
        Field("state", 0, "u32", 1, "enum vmbus_emu_exit_state; changed by compare-and-swap"),
        Field("claimer", 4, "u32", 1, "any non-zero number that the guest gives the claiming thread"),
        Field("operation", 8, "u32", 1, "enum vmbus_emu_exit_operation"),
        Field("fault", 12, "u32", 1, "host: enum vmbus_emu_fault"),
        Field("arguments", 16, "u64", 3, "what the operation takes"),
        Field("result", 40, "u64", 2, "host: what the operation gives"),
        Field("serial", 56, "u64", 1, "tracing only: the guest may write 0"),
    ),
)

VP_PAGE: Final = Block(
    "vmbus_emu_vp_page",
    PAGE_SIZE,
    "one virtual processor: its interrupt words, run state and exit slots, each on lines of its own",
    (
        Field("vp_index", 0, "u32", 1, "VP index of this page (not its position, not a CPU number)"),
        Field("position", 4, "u32", 1, "position of this page, from 0"),
        Field("request", 64, "u64", VECTOR_WORDS, "bit v: vector v is requested; anyone may or a bit in"),
        Field("in_service", 128, "u64", VECTOR_WORDS, "bit v: vector v awaits its EOI; the VP's own"),
        Field("auto_eoi", 192, "u64", VECTOR_WORDS, "bit v: vector v needs no EOI; the host's"),
        Field("run_state", 256, "u32", 1, "enum vmbus_emu_run_state"),
        Field("exit_slot", 512, "u8", EXIT_SLOT.size * EXIT_SLOTS, "struct vmbus_emu_exit_slot[8]"),
    ),
)

DOORBELLS: Final = Block(
    "vmbus_emu_doorbells",
    2 * PAGE_SIZE,
    "what the guest rings, and whether the host must be woken for it",
    (
        Field("connection_summary", 0, "u64", 4, "bit w: word w of `connection` has news"),
        Field("exit_bell", 64, "u64", MAX_VPS // 8, "bit 8 * position + slot: that exit slot was rung"),
        Field("host_run_state", 128, "u32", 1, "AWAKE or HALTED of enum vmbus_emu_run_state"),
        Field("connection", PAGE_SIZE, "u64", CONNECTIONS // 64, "bit c: connection id c is signalled"),
    ),
)

BLOCKS: Final = (MACHINE_PAGE, EXIT_SLOT, VP_PAGE, DOORBELLS)


class MachineState(IntEnum):
    """State word of the machine page."""

    STARTING = 0
    RUNNING = 1
    STOPPING = 2


class RunState(IntEnum):
    """How soon a VP (or the host) looks at its requests by itself; see `emu.interrupts`."""

    AWAKE = 0
    HALTED = 1
    COMPUTING = 2
    IN_ISR = 3
    INTERRUPTS_OFF = 4
    OFFLINE = 5


class ExitState(IntEnum):
    """State word of an exit slot."""

    FREE = 0
    CLAIMED = 1
    RUNG = 2
    SLEEPING = 3
    DONE = 4


class ExitOperation(IntEnum):
    """What a guest asks of the hypervisor by an exit; arguments and results stand in `docs/abi.md`."""

    HYPERCALL = 1
    RDMSR = 2
    WRMSR = 3
    CPUID = 4
    ATTACH = 5
    DETACH = 6


class Fault(IntEnum):
    """How an exit ends when not with a result."""

    NONE = 0
    GENERAL_PROTECTION = 1
    INVALID_OPCODE = 2


ENUMS: Final = {
    "vmbus_emu_machine_state": MachineState,
    "vmbus_emu_run_state": RunState,
    "vmbus_emu_exit_state": ExitState,
    "vmbus_emu_exit_operation": ExitOperation,
    "vmbus_emu_fault": Fault,
}

CONSTANTS: Final = {
    "VMBUS_EMU_ABI_MAJOR": ABI_MAJOR,
    "VMBUS_EMU_ABI_MINOR": ABI_MINOR,
    "VMBUS_EMU_MAGIC": MAGIC,
    "VMBUS_EMU_PAGE_SIZE": PAGE_SIZE,
    "VMBUS_EMU_MAX_VPS": MAX_VPS,
    "VMBUS_EMU_EXIT_SLOTS": EXIT_SLOTS,
    "VMBUS_EMU_CONNECTIONS": CONNECTIONS,
}

# The offsets that hot code uses, resolved once from the tables above.
M_MAGIC: Final = MACHINE_PAGE.offset("magic")
M_ABI_MAJOR: Final = MACHINE_PAGE.offset("abi_major")
M_ABI_MINOR: Final = MACHINE_PAGE.offset("abi_minor")
M_STATE: Final = MACHINE_PAGE.offset("state")
M_RAM_BYTES: Final = MACHINE_PAGE.offset("ram_bytes")
M_VP_COUNT: Final = MACHINE_PAGE.offset("vp_count")
M_EXIT_SLOTS: Final = MACHINE_PAGE.offset("exit_slots")
M_CONNECTIONS: Final = MACHINE_PAGE.offset("connections")
M_ATTACH_GENERATION: Final = MACHINE_PAGE.offset("attach_generation")
M_CPUID_COUNT: Final = MACHINE_PAGE.offset("cpuid_count")
M_CPUID: Final = MACHINE_PAGE.offset("cpuid")
VP_INDEX: Final = VP_PAGE.offset("vp_index")
VP_POSITION: Final = VP_PAGE.offset("position")
VP_REQUEST: Final = VP_PAGE.offset("request")
VP_IN_SERVICE: Final = VP_PAGE.offset("in_service")
VP_AUTO_EOI: Final = VP_PAGE.offset("auto_eoi")
VP_RUN_STATE: Final = VP_PAGE.offset("run_state")
VP_EXIT_SLOT: Final = VP_PAGE.offset("exit_slot")
X_STATE: Final = EXIT_SLOT.offset("state")
X_CLAIMER: Final = EXIT_SLOT.offset("claimer")
X_OPERATION: Final = EXIT_SLOT.offset("operation")
X_FAULT: Final = EXIT_SLOT.offset("fault")
X_ARGUMENTS: Final = EXIT_SLOT.offset("arguments")
X_RESULT: Final = EXIT_SLOT.offset("result")
X_SERIAL: Final = EXIT_SLOT.offset("serial")
D_CONNECTION_SUMMARY: Final = DOORBELLS.offset("connection_summary")
D_EXIT_BELL: Final = DOORBELLS.offset("exit_bell")
D_HOST_RUN_STATE: Final = DOORBELLS.offset("host_run_state")
D_CONNECTION: Final = DOORBELLS.offset("connection")


def vp_page_offset(position: int) -> int:
    """Byte offset in `vps` of the VP page at `position` (from 0)."""
    return PAGE_SIZE * (1 + position)


def vps_bytes(vp_count: int) -> int:
    """Size of the `vps` segment for `vp_count` processors."""
    return PAGE_SIZE * (1 + vp_count)
