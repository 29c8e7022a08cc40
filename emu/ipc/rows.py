"""Rows of numbers in shared memory that one process writes while others read them.

`Struct.pack_into` is not for them: it clears all the bytes that it will write, then sets them one by one, so that
others find a state of 0 (nobody's row), a count of 0 or half of a number there. `unpack_from` reads byte by byte,
too. Here a row is packed aside and copied in one go, which moves whole words: a word is the old or the new one. The
words of a row may still be of two writings; where that matters, a state stored last or a sequence says so.
"""

from __future__ import annotations

from mmap import mmap
from struct import Struct
from typing import Any


def store_row(memory: mmap, at: int, layout: Struct, *values: Any) -> None:
    """Write `values` at `at` bytes; each word goes from its old value to its new one."""
    memory[at : at + layout.size] = layout.pack(*values)


def load_row(memory: mmap, at: int, layout: Struct) -> tuple[Any, ...]:
    """Copy the row at `at` bytes, then take it apart."""
    return layout.unpack(memory[at : at + layout.size])
