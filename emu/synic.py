"""The SynIC of one virtual processor: its registers, its two overlay pages, its sixteen message slots.

Only the host's SynIC task writes message pages. It changes a resident message by an atomic or on its flags
byte alone, and writes a new one only after it read type 0: bytes 4..255 first, then the type with release.
Enabling or moving SIMP or SIEFP keeps the RAM page's old bytes and writes the overlay's; disabling puts them
back; all of it within the MSR exit. (TLFS "Synthetic Interrupt Controller", reference 1.2 and 1.3.)
"""

from __future__ import annotations

from collections.abc import Callable

from emu.errors import GeneralProtection, OutOfMemory, ProtocolViolation
from emu.ipc.atomics import RELEASE
from emu.layout import PAGE_SIZE
from emu.memory import GuestMemory
from emu.wire.synic import (
    HV_EVENT_FLAGS_COUNT,
    HV_MESSAGE_FLAG_PENDING,
    HV_SYNIC_CONTROL_ENABLE,
    HV_SYNIC_FIRST_VALID_VECTOR,
    HV_SYNIC_SINT_AUTO_EOI,
    HV_SYNIC_SINT_COUNT,
    HV_SYNIC_SINT_MASKED,
    HV_SYNIC_SINT_POLLING,
    HV_SYNIC_VERSION_1,
    HV_X64_MSR_EOM,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SINT15,
    HV_X64_MSR_SVERSION,
    MESSAGE_FLAGS_OFFSET,
    MESSAGE_PAYLOAD_OFFSET,
    SINT_RESET,
    event_flag,
    message_slot,
    page_register_enabled,
    page_register_gpa,
    sint_vector,
)

Overlays = dict[int, list["OverlayPage"]]
"""What lies over each page of a partition's RAM, the lowest first; a guest may put several over one."""


class OverlayPage:
    """A page of the hypervisor's that lies over guest RAM while its register enables it."""

    __slots__ = ("_content", "_hidden", "_overlays", "gpa", "register")

    def __init__(self, overlays: Overlays) -> None:
        self.register = 0
        self.gpa: int | None = None
        self._content = bytes(PAGE_SIZE)
        self._hidden = b""
        self._overlays = overlays

    def place(self, memory: GuestMemory, value: int, name: str, msr: int) -> None:
        """Take a new register value; GeneralProtection when the page is not RAM (or RAM's tmpfs is full)."""
        target = page_register_gpa(value) if page_register_enabled(value) else None
        if target is not None:
            try:
                memory.reserve(target, PAGE_SIZE)
            except (ProtocolViolation, OutOfMemory):
                raise GeneralProtection(f"write of {name}", msr, value) from None
        if target != self.gpa:
            self.lift(memory)
            if target is not None:
                self._hidden = memory.read(target, PAGE_SIZE)
                memory.write(target, self._content)
                self.gpa = target
                self._overlays.setdefault(target, []).append(self)
        self.register = value

    def lift(self, memory: GuestMemory) -> None:
        """Take the overlay away: keep its bytes, give RAM, or the overlay below, its own back."""
        if self.gpa is None:
            return
        pile = self._overlays[self.gpa]
        place = pile.index(self)
        if place == len(pile) - 1:
            self._content = memory.read(self.gpa, PAGE_SIZE)
            memory.write(self.gpa, self._hidden)
        else:
            # Our bytes are what the one above hides; what we hid lies under that one now.
            above = pile[place + 1]
            self._content, above._hidden = above._hidden, self._hidden
        del pile[place]
        if not pile:
            del self._overlays[self.gpa]
        self.gpa = None

    def reset(self, memory: GuestMemory) -> None:
        """VP reset: register 0, page lifted and zeroed."""
        self.lift(memory)
        self._content = bytes(PAGE_SIZE)
        self.register = 0


class Synic:
    """Registers and pages of one VP; `memory` is the partition's RAM, `overlays` those of all its VPs."""

    __slots__ = ("_memory", "changes", "scontrol", "siefp", "simp", "sint")

    def __init__(self, memory: GuestMemory, overlays: Overlays | None = None) -> None:
        self._memory = memory
        self.changes = 0
        """How often a register was written: who keeps what follows from them compares it."""
        self.scontrol = 0
        shared: Overlays = {} if overlays is None else overlays
        self.simp = OverlayPage(shared)
        self.siefp = OverlayPage(shared)
        self.sint = [SINT_RESET] * HV_SYNIC_SINT_COUNT

    def reset(self) -> None:
        """All registers to their reset values (reference 1.2), both pages lifted and zeroed."""
        self.changes += 1
        self.scontrol = 0
        self.simp.reset(self._memory)
        self.siefp.reset(self._memory)
        self.sint[:] = [SINT_RESET] * HV_SYNIC_SINT_COUNT

    def read_msr(self, msr: int) -> int:
        """Value of a SynIC register; EOM reads 0. Any other number is the caller's mistake (AssertionError)."""
        if HV_X64_MSR_SINT0 <= msr <= HV_X64_MSR_SINT15:
            return self.sint[msr - HV_X64_MSR_SINT0]
        if msr == HV_X64_MSR_SCONTROL:
            return self.scontrol
        if msr == HV_X64_MSR_SVERSION:
            return HV_SYNIC_VERSION_1
        if msr == HV_X64_MSR_SIEFP:
            return self.siefp.register
        if msr == HV_X64_MSR_SIMP:
            return self.simp.register
        assert msr == HV_X64_MSR_EOM, hex(msr)
        return 0

    def write_msr(self, msr: int, value: int) -> None:
        """Write a SynIC register; GeneralProtection where the processor refuses it. EOM is the caller's."""
        self.changes += 1
        if HV_X64_MSR_SINT0 <= msr <= HV_X64_MSR_SINT15:
            if not value & HV_SYNIC_SINT_MASKED and sint_vector(value) < HV_SYNIC_FIRST_VALID_VECTOR:
                raise GeneralProtection("write of SINT", msr, value)
            self.sint[msr - HV_X64_MSR_SINT0] = value
        elif msr == HV_X64_MSR_SCONTROL:
            self.scontrol = value
        elif msr == HV_X64_MSR_SIEFP:
            self.siefp.place(self._memory, value, "SIEFP", msr)
        elif msr == HV_X64_MSR_SIMP:
            self.simp.place(self._memory, value, "SIMP", msr)
        else:
            raise GeneralProtection("write of a read-only register", msr, value)

    def auto_eoi_vectors(self) -> list[int]:
        """Vectors of unmasked SINTs that need no EOI."""
        return [
            sint_vector(sint) for sint in self.sint if sint & HV_SYNIC_SINT_AUTO_EOI and not sint & HV_SYNIC_SINT_MASKED
        ]

    def masked(self, sint: int) -> bool:
        """Whether `sint` is masked: nothing that arrives there raises an interrupt, now or later."""
        return bool(self.sint[sint] & HV_SYNIC_SINT_MASKED)

    def vector_to_raise(self, sint: int) -> int:
        """The vector that a delivery to `sint` requests; 0 when it is masked or polled."""
        value = self.sint[sint]
        return 0 if value & (HV_SYNIC_SINT_MASKED | HV_SYNIC_SINT_POLLING) else sint_vector(value)

    # -- messages -----------------------------------------------------------------------------------

    def messages_enabled(self) -> bool:
        """Whether message slots exist now: SynIC on and SIMP in RAM."""
        return bool(self.scontrol & HV_SYNIC_CONTROL_ENABLE) and self.simp.gpa is not None

    def slot_type(self, sint: int) -> int:
        """message_type in the slot (0: empty). Call only while messages are enabled."""
        assert self.simp.gpa is not None
        return self._memory.atomics.load_u32(self.simp.gpa + message_slot(sint))

    def slot_msgtype(self, sint: int) -> int:
        """msgtype of a channel message in the slot, as the first word of its payload has it."""
        assert self.simp.gpa is not None
        at = self.simp.gpa + message_slot(sint) + MESSAGE_PAYLOAD_OFFSET
        return self._memory.atomics.load_u32(at)

    def write_slot(self, sint: int, message: bytes) -> None:
        """Put a message (at most 256 bytes: type, header, payload) into a slot that was read as empty."""
        assert self.simp.gpa is not None
        at = self.simp.gpa + message_slot(sint)
        self._memory.buffer[at + 4 : at + len(message)] = message[4:]
        # Body first, type last: a guest that sees the type sees the whole message.
        self._memory.atomics.store_u32(at, int.from_bytes(message[:4], "little"), RELEASE)

    def set_pending(self, sint: int) -> None:
        """Set msg_pending in the resident message; a full barrier: the type can be looked at again."""
        assert self.simp.gpa is not None
        # An atomic or on this byte alone: the guest may empty the slot at the same moment.
        at = self.simp.gpa + message_slot(sint) + MESSAGE_FLAGS_OFFSET
        self._memory.atomics.fetch_or_u8(at, HV_MESSAGE_FLAG_PENDING)

    # -- event flags --------------------------------------------------------------------------------

    def events_enabled(self) -> bool:
        """Whether event flags exist now: SynIC on and SIEFP in RAM."""
        return bool(self.scontrol & HV_SYNIC_CONTROL_ENABLE) and self.siefp.gpa is not None

    def flag_cell(self, sint: int, flag: int) -> tuple[Callable[[int], int], int]:
        """What ors into the byte of event flag 0..2047 of `sint`, and its bit there: right until `changes` changes.

        An interrupt is due where the bit was clear in what that returns.
        """
        assert self.siefp.gpa is not None
        assert 0 <= flag < HV_EVENT_FLAGS_COUNT, flag
        offset, bit = event_flag(sint, flag)
        return self._memory.atomics.cell_u8(self.siefp.gpa + offset).fetch_or, bit
