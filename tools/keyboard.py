"""A terminal's keys, one at a time, without waiting for a whole line; the terminal is as before when it ends.

Ctrl-C stays a signal. Ctrl-Z does nothing meanwhile, for whoever came back would find a half-drawn screen.
"""

from __future__ import annotations

import os
import select
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

SEQUENCES: Final = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "page-up",
    "\x1b[6~": "page-down",
    "\x1b[H": "home",
    "\x1b[1~": "home",
    "\x1b": "escape",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
}
"""What terminals send for keys that are no character."""


def keys_of(text: str) -> Iterator[str]:
    """The keys that were pressed: characters, and names for the others. Sequences that nobody knows are skipped."""
    while text:
        found = next((one for one in sorted(SEQUENCES, key=len, reverse=True) if text.startswith(one)), "")
        if text.startswith(("\x1b[", "\x1bO")) and len(found) < 2:
            end = next((n for n, letter in enumerate(text[2:], 3) if letter.isalpha() or letter == "~"), len(text))
            text = text[end:]
            continue
        yield SEQUENCES.get(found, text[0])
        text = text[len(found) or 1 :]


class Keyboard:
    """Keys of a file descriptor; over one that is no terminal nobody presses any."""

    def __init__(self, fd: int) -> None:
        self._fd: Final = fd
        self._there = os.isatty(fd)

    def wait(self, timeout_s: float) -> list[str]:
        """The keys that were pressed; waits for the first one for at most so long."""
        ready, _, _ = select.select([self._fd] if self._there else [], [], [], max(0.0, timeout_s))
        if not ready:
            return []
        raw = os.read(self._fd, 1024)
        # A terminal that was closed is always ready and gives nothing.
        self._there = bool(raw)
        return list(keys_of(raw.decode(errors="ignore")))


@contextmanager
def keyboard(fd: int) -> Iterator[Keyboard]:
    """The terminal on `fd` gives single keys, unechoed, inside the block."""
    if not os.isatty(fd):
        yield Keyboard(fd)
        return
    before: list[Any] = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        changed = termios.tcgetattr(fd)
        changed[6][termios.VSUSP] = b"\0"
        termios.tcsetattr(fd, termios.TCSANOW, changed)
        yield Keyboard(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
