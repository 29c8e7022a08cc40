"""Which bits of a word are set, as a table: the same few words come over and over."""

from __future__ import annotations

from typing import Final

MOST_WORDS: Final = 4_096


class BitNumbers(dict[int, tuple[int, ...]]):
    """Word → numbers of its set bits, lowest first; kept for as many words as `MOST_WORDS`.

    Peers write the words: who writes a new one each time must not make it grow.
    """

    def __missing__(self, word: int) -> tuple[int, ...]:
        if len(self) >= MOST_WORDS:
            self.clear()
        numbers = []
        bits = word
        while bits:
            low = bits & -bits
            bits ^= low
            numbers.append(low.bit_length() - 1)
        found = self[word] = tuple(numbers)
        return found


BITS: Final = BitNumbers()
