"""Signals from before a command is there to answer them: noted first, raised when it can say what there was by then.

From its first line the script takes a tenth of a second until a command runs. Whoever ends it meanwhile gets the same
exit status, and the same JSON, as a moment later. Nothing but `signal` is imported here, not even `typing`: meanwhile
nothing is noted.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those that end a command; one that is ignored (nohup, a shell's `&`) stays so."""

_noted: list[int] = []


def note_signals() -> None:
    """From now on the first of them is noted; a second one is raised at once, by who has no patience."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def catch_signals() -> None:
    """The first SIGTERM or SIGHUP unwinds like Ctrl-C, so that whoever holds something lets go of it."""
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _leave)


def raise_noted() -> None:
    """Let a signal that was noted do what it would have done: KeyboardInterrupt, SystemExit, or a handler's note."""
    while _noted:
        signal.raise_signal(_noted.pop())


def _note(signum: int, frame: object) -> None:
    if not _noted:
        _noted.append(signum)
    elif signum == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        _leave(signum, frame)


def _leave(signum: int, _frame: object) -> None:
    signal.signal(signum, signal.SIG_IGN)
    raise SystemExit(128 + signum)
