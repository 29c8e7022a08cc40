"""The signal doorbell: the fast form of HvCallSignalEvent, a bit for each connection id below 16,384.

Guest: or the bit, then its summary bit, then wake the host if it halted. Host: exchange the summary, then
the words. In that order a ring is never lost: a bit whose summary bit was just taken is either seen with the
word, or its own summary bit comes after. Owner of the connection bitmap and its summary words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

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
        self.loads = tuple(cell.load for cell in summary)
        words = [(doorbells.cell_u64(D_CONNECTION + 8 * word).exchange, 64 * word) for word in range(CONNECTIONS // 64)]
        # Of each summary word: its load and its exchange, and what takes each of its 64 words, with the first id there.
        self._summaries = [
            (cell.load, cell.exchange, words[64 * index : 64 * index + 64]) for index, cell in enumerate(summary)
        ]

    def take(self) -> list[int]:
        """Connection ids that rang, each once, lowest first within a word."""
        ids: list[int] = []
        for load, swap_summary, words in self._summaries:
            if not load():
                continue
            summary = swap_summary(0)
            while summary:
                low = summary & -summary
                summary ^= low
                take, first = words[low.bit_length() - 1]
                bits = take(0)
                while bits:
                    bit = bits & -bits
                    bits ^= bit
                    ids.append(first + bit.bit_length() - 1)
        return ids
