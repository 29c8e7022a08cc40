"""What a guest may have spoilt for those who come after it: the machine page, the identity of VP pages, exit slots.

A guest may store anything into `vps`, die, and leave it so. The host does not read these words back, but the next
guest does before it can ask for anything, and so do the tools. So the host looks now and then and sets them right;
and it frees exit slots that nobody can be using any more.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emu.ipc.atomics import AtomicView
from emu.layout import (
    EXIT_SLOT,
    EXIT_SLOTS,
    M_ATTACH_GENERATION,
    M_MAGIC,
    M_STATE,
    MAGIC,
    PAGE_SIZE,
    VP_EXIT_SLOT,
    VP_INDEX,
    VP_POSITION,
    X_STATE,
    ExitState,
    vp_page_offset,
)
from emu.machine import Machine, write_machine_page

UPKEEP_NS: Final = 100_000_000
"""How often `look` is to be called."""
LOST_LOOKS: Final = 20
"""A slot that was taken at so many looks (2 s) while the host served no exit at all is nobody's."""

_U32: Final = Struct("<I")
_FREE: Final = int(ExitState.FREE)
assert VP_POSITION == VP_INDEX + 4
_IDENTITY_BYTES: Final = 8


class Upkeep:
    """Keeps the words of `vps` that are nobody's to change; `cpuid` rows are (leaf, eax, ebx, ecx, edx)."""

    def __init__(self, machine: Machine, cpuid: list[tuple[int, int, int, int, int]]) -> None:
        self._view = machine.vps.view
        self._memory = machine.vps_memory
        self._state = machine.control.state_word
        made = bytearray(machine.vps.size)
        with AtomicView(made) as view:
            write_machine_page(view, machine.ram.size, machine.config["vp_indices"], cpuid)
        self._page = made[:PAGE_SIZE]
        pages = [vp_page_offset(position) for position in range(machine.vp_count)]
        self._identities = [(page, bytes(made[page : page + _IDENTITY_BYTES])) for page in pages]
        slots = [page + VP_EXIT_SLOT + EXIT_SLOT.size * slot for page in pages for slot in range(EXIT_SLOTS)]
        self._slots = [self._view.cell_u32(at + X_STATE) for at in slots]
        self._still = [_FREE] * len(slots)
        self._exits = 0
        self._looks = 0
        self.generation = 0

    def attached(self) -> int:
        """Count one more attach in the machine page; the count comes from here, whatever a guest wrote there."""
        self.generation += 1
        self._view.store_u32(M_ATTACH_GENERATION, self.generation & 0xFFFF_FFFF)
        return self.generation

    def look(self, exits: int, *, watched: bool) -> tuple[int, int]:
        """Set right what is wrong; how many pages that were, and how many slots were freed.

        `exits` is how many were ever served. `watched`: a guest is attached whose end will be seen, so its slots are
        its own until then.
        """
        return self._mend(), self._free_lost(exits, watched)

    def _mend(self) -> int:
        wrong = 0
        page, memory = self._page, self._memory
        _U32.pack_into(page, M_ATTACH_GENERATION, self.generation & 0xFFFF_FFFF)
        while True:
            state = self._state.load()
            _U32.pack_into(page, M_STATE, state)
            if bytes(memory[:PAGE_SIZE]) != page:
                wrong = 1
                memory[M_MAGIC + 8 : PAGE_SIZE] = page[M_MAGIC + 8 :]
                # Last: a guest that sees the magic sees the rest.
                self._view.store_u64(M_MAGIC, MAGIC)
            # Looked at again: the launcher changes its own word first, and STOPPING must not be overwritten.
            if self._state.load() == state:
                break
        for at, identity in self._identities:
            if memory[at : at + _IDENTITY_BYTES] != identity:
                memory[at : at + _IDENTITY_BYTES] = identity
                wrong += 1
        return wrong

    def _free_lost(self, exits: int, watched: bool) -> int:
        states = [slot.load() for slot in self._slots]
        if watched or exits != self._exits:
            self._exits, self._still, self._looks = exits, states, 0
            return 0
        self._looks += 1
        self._still = [then if then == now else _FREE for then, now in zip(self._still, states, strict=True)]
        if self._looks < LOST_LOOKS:
            return 0
        self._looks = 0
        lost = [(slot, state) for slot, state in zip(self._slots, self._still, strict=True) if state != _FREE]
        self._still = states
        return sum(slot.cas(state, _FREE) == state for slot, state in lost)
