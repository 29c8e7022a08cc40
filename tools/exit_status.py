"""What our exit statuses mean; each means one thing and is never reused."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from tools.early_signals import raise_noted


class ExitStatus(IntEnum):
    """Status of every command; 128 + n is the shell's way of saying signal n."""

    FINE = 0
    FINDING = 1
    """A mismatch, a violated invariant, a regression: the command worked, what it looked at did not."""
    USAGE = 2
    MISSING = 3
    """This computer lacks something; the message says what to do."""
    FAILED = 4
    """A process of the machine died, or an error of our own."""
    TIME_LIMIT = 124
    HANGUP = 129
    INTERRUPTED = 130
    READER_LEFT = 141
    TERMINATED = 143


@dataclass(slots=True)
class Interruption:
    """Whether a block was ended by Ctrl-C, SIGTERM or SIGHUP, and with which status its command ends then."""

    status: int | None = None


@contextmanager
def noting_interruption() -> Iterator[Interruption]:
    """Let a signal end the block and not the command, which has something to tell; `status` says so behind it.

    A command of `cli.TELL_INTERRUPTIONS` calls `raise_noted` first thing in the block.
    """
    interruption = Interruption()
    try:
        yield interruption
    except KeyboardInterrupt:
        interruption.status = ExitStatus.INTERRUPTED
    except SystemExit as leave:  # SIGTERM and SIGHUP (`early_signals.catch_signals`)
        interruption.status = leave.code if isinstance(leave.code, int) else ExitStatus.FAILED


@contextmanager
def deferring_interruption() -> Iterator[Interruption]:
    """As `noting_interruption`, for a block into which nothing may be raised: it looks at `status` and ends itself."""
    interruption = Interruption()

    def note(signum: int, _frame: object) -> None:
        interruption.status = 128 + signum

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    heard = {signum: handler for signum, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for signum in heard:
            signal.signal(signum, note)
        raise_noted()
        yield interruption
    finally:
        for signum, handler in heard.items():
            signal.signal(signum, handler)
