"""VM exits: eight slots in each VP page through which a guest asks, and the host answers.

A guest thread swaps FREE -> CLAIMED, fills the slot, stores RUNG, sets the slot's bell, wakes the host if it
halted, polls a little, then swaps RUNG -> SLEEPING and blocks on the slot's semaphore. The host swaps either
to DONE and posts only for a sleeper; the claimer alone frees. To the guest an exit is one instruction.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from struct import Struct
from typing import Final

from emu.errors import DeadlinePassed, GeneralProtection, MachineStopping
from emu.interrupts import AWAKE, HALTED
from emu.ipc.atomics import AtomicView
from emu.ipc.semaphores import Wakeup
from emu.layout import (
    D_EXIT_BELL,
    D_HOST_RUN_STATE,
    EXIT_SLOT,
    EXIT_SLOTS,
    VP_EXIT_SLOT,
    X_CLAIMER,
    X_FAULT,
    X_RESULT,
    X_STATE,
    ExitOperation,
    ExitState,
    Fault,
    vp_page_offset,
)

FREE: Final = int(ExitState.FREE)
CLAIMED: Final = int(ExitState.CLAIMED)
RUNG: Final = int(ExitState.RUNG)
SLEEPING: Final = int(ExitState.SLEEPING)
DONE: Final = int(ExitState.DONE)

POLL_NS: Final = 60_000
KEEP_NS: Final = 20_000
SHARED_YIELD_NS: Final = 5_000
"""A yield that took so long gave the core to somebody."""
DEADLINE_NS: Final = 5_000_000_000
_LOOK_AGAIN_NS: Final = 500_000_000
"""Longest single block for an answer: so soon is a machine that stops noticed, token or not."""

_OPERATIONS: Final = {int(operation): operation.name for operation in ExitOperation}
_ASK: Final = Struct("<IIIQQQ")
_ANSWER: Final = Struct("<QQ")
_FAULT: Final = Struct("<I")
_OUTCOME: Final = Struct(f"<I{X_RESULT - X_FAULT - 4}xQQ")
"""From the fault on: fault, then both result words."""
_WHOLE: Final = Struct("<IIIIQQQQQQ")


class InvalidOpcode(GeneralProtection):
    """A #UD: a hypercall before the hypercall page was enabled."""


class HostBell:
    """Wakes the host after something was rung for it: the guest's half of the host's halt protocol."""

    __slots__ = ("_cas", "_load", "_post")

    def __init__(self, doorbells: AtomicView, host: Wakeup) -> None:
        state = doorbells.cell_u32(D_HOST_RUN_STATE)
        self._load = state.load
        self._cas = state.cas
        self._post = host.post

    def wake(self) -> None:
        """Post one token if the host had halted; the caller's last atomic store was a full barrier."""
        if self._load() == HALTED and self._cas(HALTED, AWAKE) == HALTED:
            self._post()


class ExitClient:
    """The guest's side, for one VP; safe to use by several threads at once.

    `poll_ns` says how long to poll before blocking; `aside` is called when the host had been waiting for this core.
    """

    def __init__(
        self,
        vps: AtomicView,
        memory: memoryview,
        doorbells: AtomicView,
        position: int,
        host: HostBell,
        wakeups: Callable[[int], Wakeup],
        *,
        claimer: int = 1,
        poll_ns: int = POLL_NS,
        stopping: Callable[[], bool],
        deadline_ns: int = DEADLINE_NS,
        aside: Callable[[], object] | None = None,
    ) -> None:
        base = vp_page_offset(position) + VP_EXIT_SLOT
        self._memory = memory
        self._bases = [base + EXIT_SLOT.size * slot for slot in range(EXIT_SLOTS)]
        self._states = [vps.cell_u32(at + X_STATE) for at in self._bases]
        self._claim_first = self._states[0].cas
        bell = doorbells.cell_u64(D_EXIT_BELL + 8 * (position // 8))
        self._ring = bell.fetch_or
        self._bits = [1 << ((position * EXIT_SLOTS + slot) & 63) for slot in range(EXIT_SLOTS)]
        self._host = host
        self._wakeups = wakeups
        self._claimer = claimer
        self._poll_ns = poll_ns
        self._keep_ns = KEEP_NS
        self._aside = aside
        self._stopping = stopping
        self._deadline_ns = deadline_ns
        self.position = position

    def exit(self, operation: int, a0: int = 0, a1: int = 0, a2: int = 0) -> tuple[int, int]:
        """Do one exit and return its two result words.

        Raises GeneralProtection or InvalidOpcode for a fault, DeadlinePassed when the host does not answer
        within the deadline (5 s), MachineStopping when the machine ends meanwhile.
        """
        # The first slot is nearly always free: the others are for threads that exit at the same time.
        slot = 0 if self._claim_first(FREE, CLAIMED) == FREE else self._claim()
        at = self._bases[slot]
        state = self._states[slot]
        _ASK.pack_into(self._memory, at + X_CLAIMER, self._claimer, operation, 0, a0, a1, a2)
        # Released: the host that sees RUNG sees the request.
        state.store(RUNG)
        # Rung after RUNG: the host takes the bell first and the slot second.
        self._ring(self._bits[slot])
        self._host.wake()
        self._wait(slot, state.load, state.cas)
        fault, low, high = _OUTCOME.unpack_from(self._memory, at + X_FAULT)
        state.store(FREE)
        if fault:
            kind = GeneralProtection if fault == Fault.GENERAL_PROTECTION else InvalidOpcode
            raise kind(_operation_name(operation), a0, a1)
        return low, high

    def _claim(self) -> int:
        """Swap a slot FREE -> CLAIMED; waits while all eight are in use."""
        end = 0
        while True:
            for slot, state in enumerate(self._states):
                if state.load() == FREE and state.cas(FREE, CLAIMED) == FREE:
                    return slot
            # Gives away the core and the interpreter: the slots may be those of this process's other threads.
            time.sleep(0)
            end = end or time.monotonic_ns() + self._deadline_ns
            if self._stopping():
                raise MachineStopping("the machine is stopping")
            if time.monotonic_ns() > end:
                raise DeadlinePassed(f"a free exit slot of VP page {self.position}", self._deadline_ns)

    def _wait(self, slot: int, load: Callable[[], int], cas: Callable[[int, int], int]) -> None:
        """Poll for the answer, then sleep for it."""
        now = time.monotonic_ns
        started = now()
        keep, end = started + self._keep_ns, started + self._poll_ns
        while True:
            for _ in range(20):
                if load() == DONE:
                    return
            passed = now()
            if passed > end:
                break
            # A host that is awake answers within the time of one yield: the core is kept that long. One that was
            # waiting for this very core is let run at once the next time (a bring-up took 600 us instead of 390).
            if passed > keep:
                os.sched_yield()
                self._keep_ns = 0 if load() == DONE and now() - passed > SHARED_YIELD_NS else KEEP_NS
                if not self._keep_ns and self._aside is not None:
                    self._aside()
        # A token is posted only to a slot that says SLEEPING: whoever leaves RUNG first decides.
        if cas(RUNG, SLEEPING) != RUNG:
            return
        # From here exactly one token is owed: take it even when DONE is seen first, or the next sleeper here
        # would wake for nothing.
        wakeup = self._wakeups(slot)
        deadline = started + self._deadline_ns
        while not (wakeup.block(max(0, min(_LOOK_AGAIN_NS, deadline - now())) / 1e9) and load() == DONE):
            # The slot is lost in both cases: the host may still be about to answer into it.
            if self._stopping():
                raise MachineStopping("the machine is stopping")
            if now() >= deadline:
                raise DeadlinePassed(f"exit slot {slot} of VP page {self.position}", self._deadline_ns)


def _operation_name(operation: int) -> str:
    """How a fault's text calls an exit operation."""
    return _OPERATIONS.get(operation) or f"operation {operation}"


class ExitRequest:
    """One exit, copied out of its slot once."""

    __slots__ = ("arguments", "claimer", "operation", "position", "serial", "slot")

    def __init__(
        self,
        position: int,
        slot: int,
        claimer: int,
        operation: int,
        arguments: tuple[int, int, int],
        serial: int,
    ) -> None:
        self.position = position
        self.slot = slot
        self.claimer = claimer
        self.operation = operation
        self.arguments = arguments
        self.serial = serial


class ExitServer:
    """The host's side over all VP pages: takes rung slots, stores answers, wakes sleepers."""

    def __init__(
        self,
        vps: AtomicView,
        memory: memoryview,
        doorbells: AtomicView,
        vp_count: int,
        wakeups: Callable[[int, int], Wakeup],
    ) -> None:
        self._memory = memory
        words = (vp_count * EXIT_SLOTS + 63) // 64
        self._bells = [doorbells.cell_u64(D_EXIT_BELL + 8 * word) for word in range(words)]
        self._loads = tuple(cell.load for cell in self._bells)
        self._wakeups = wakeups
        self._bases = [
            vp_page_offset(position) + VP_EXIT_SLOT + EXIT_SLOT.size * slot
            for position in range(vp_count)
            for slot in range(EXIT_SLOTS)
        ]
        self._states = [
            vps.cell_u32(vp_page_offset(position) + VP_EXIT_SLOT + EXIT_SLOT.size * slot + X_STATE)
            for position in range(vp_count)
            for slot in range(EXIT_SLOTS)
        ]
        self.unknown_bells = 0

    @property
    def loads(self) -> tuple[Callable[[], int], ...]:
        """Loads of the bell words, for the host's look."""
        return self._loads

    def take(self) -> list[ExitRequest]:
        """Every slot that was rung since the last time (at most 8 for each VP)."""
        requests: list[ExitRequest] = []
        memory, unpack = self._memory, _WHOLE.unpack_from
        for word, load in enumerate(self._loads):
            if not load():
                continue
            bits = self._bells[word].exchange(0)
            while bits:
                low = bits & -bits
                bits ^= low
                index = word * 64 + low.bit_length() - 1
                # A bell follows RUNG, and each is taken once: one without an exit is a guest's own mistake.
                if index < len(self._states) and self._states[index].load() in (RUNG, SLEEPING):
                    _state, claimer, operation, _fault, a0, a1, a2, _low, _high, serial = unpack(
                        memory, self._bases[index]
                    )
                    requests.append(
                        ExitRequest(index // EXIT_SLOTS, index % EXIT_SLOTS, claimer, operation, (a0, a1, a2), serial)
                    )
                else:
                    self.unknown_bells += 1
        return requests

    def reclaim(self) -> None:
        """Free the slots that a dead guest left behind, whatever state it died in.

        The guest that comes after it may be at its ATTACH already, which is left alone: when it is RUNG or
        SLEEPING by its operation; and one that is only CLAIMED is rung by a store, which overwrites our FREE.
        """
        for index, state in enumerate(self._states):
            seen = state.load()
            at = vp_page_offset(index // EXIT_SLOTS) + VP_EXIT_SLOT + EXIT_SLOT.size * (index % EXIT_SLOTS)
            attaching = _WHOLE.unpack_from(self._memory, at)[2] == ExitOperation.ATTACH
            if seen not in (RUNG, SLEEPING) or not attaching:
                state.cas(seen, FREE)

    def answer(self, request: ExitRequest, result: tuple[int, int] = (0, 0), fault: int = 0) -> None:
        """Store the answer and hand the slot back; a sleeper gets its token."""
        index = request.position * EXIT_SLOTS + request.slot
        at = self._bases[index]
        _FAULT.pack_into(self._memory, at + X_FAULT, fault)
        _ANSWER.pack_into(self._memory, at + X_RESULT, *result)
        state = self._states[index]
        if state.cas(RUNG, DONE) == RUNG:
            return
        # Not RUNG: a sleeper (or a guest that scribbles over its own slot, which concerns nobody else).
        if state.cas(SLEEPING, DONE) == SLEEPING:
            self._wakeups(request.position, request.slot).post()
