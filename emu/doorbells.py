"""The signal doorbell: the fast form of HvCallSignalEvent, a bit for each connection id below 16,384.

Guest: or the bit, then its summary bit, then wake the host if it halted. Host: exchange the summary, then
the words. In that order a ring is never lost: a bit whose summary bit was just taken is either seen with the
word, or its own summary bit comes after. Owner of the connection bitmap and its summary words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.bits import BITS
from emu.interrupts import AWAKE, HALTED
from emu.ipc.atomics import AtomicView
from emu.layout import CONNECTIONS, D_CONNECTION, D_CONNECTION_SUMMARY, D_HOST_RUN_STATE

_SUMMARY_WORDS: Final = CONNECTIONS // 64 // 64


def make_bell(doorbells: AtomicView, connection_id: int, post_host: Callable[[], None]) -> Callable[[], None]:
    """A function that rings `connection_id` (< 16,384) and wakes the host if it halted."""
    assert 0 <= connection_id < CONNECTIONS, connection_id
    word = connection_id >> 6
    or_bit = doorbells.cell_u64(D_CONNECTION + 8 * word).fetch_or
    or_summary = doorbells.cell_u64(D_CONNECTION_SUMMARY + 8 * (word >> 6)).fetch_or
    state = doorbells.cell_u32(D_HOST_RUN_STATE)
    load, cas = state.load, state.cas
    bit, summary_bit = 1 << (connection_id & 63), 1 << (word & 63)

    def ring() -> None:
        or_bit(bit)
        # A full barrier before the load of the run state: the host announces HALTED, then looks here.
        or_summary(summary_bit)
        if load() == HALTED and cas(HALTED, AWAKE) == HALTED:
            post_host()

    return ring


class DoorbellServer:
    """The host's side: which connection ids rang since the last look."""

    def __init__(self, doorbells: AtomicView) -> None:
        summary = [doorbells.cell_u64(D_CONNECTION_SUMMARY + 8 * word) for word in range(_SUMMARY_WORDS)]
        self.loads: tuple[Callable[[], int], ...] = tuple(cell.load for cell in summary)
        self._swap_summary: tuple[Callable[[int], int], ...] = tuple(cell.exchange for cell in summary)
        self._swap: tuple[Callable[[int], int], ...] = tuple(
            doorbells.cell_u64(D_CONNECTION + 8 * word).exchange for word in range(CONNECTIONS // 64)
        )

    def take(self) -> list[int]:
        """Connection ids that rang, each once, lowest first within a word."""
        ids: list[int] = []
        for index, load in enumerate(self.loads):
            if load():
                for number in BITS[self._swap_summary[index](0)]:
                    word = index << 6 | number
                    for bit in BITS[self._swap[word](0)]:
                        ids.append(word << 6 | bit)  # noqa: PERF401 (a list comprehension is a call of its own)
        return ids


def unannounced(doorbells: AtomicView) -> list[int]:
    """Connection ids whose bit is set and whose summary bit is not, lowest first: no host ever looks there.

    A guest on its way from the one to the other is seen so for an instant; one that stays so rings in the wrong order.
    """
    ids: list[int] = []
    for word in range(CONNECTIONS // 64):
        bits = doorbells.load_u64(D_CONNECTION + 8 * word)
        if bits and not doorbells.load_u64(D_CONNECTION_SUMMARY + 8 * (word >> 6)) >> (word & 63) & 1:
            ids += [word << 6 | bit for bit in BITS[bits]]
    return ids
