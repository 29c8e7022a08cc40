"""The `vmbus-emu` script: gives the zygote a head start where one will be needed, then runs the command line.

Nothing else is imported before that: click and what it brings take as long as the zygote takes to warm up. And nothing
that takes time before signals are noted, as nobody would catch what they raise.
"""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""`ExitStatus.INTERRUPTED`, for Ctrl-C before that could be imported."""

try:
    import io
    import os
    import signal

    from tools.early_signals import note_signals
    from tools.sources_first import PURE, take_sources
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)


def main() -> int:
    """Run the command line of this process; its exit status."""
    try:
        note_signals()
        asked = sys.argv[1:]
        if asked[:1] == ["explore"]:
            # It looks into the objects of a whole guest and host, which a compiled build keeps to itself.
            os.environ[PURE] = "1"
        if os.environ.get(PURE):
            take_sources()
        from emu.assertions import keep_assertions

        keep_assertions()
        hear_of_children()
        replace_closed_streams()
        write_every_character()
        if asked[:1] in (["run"], ["demo"]) and not {"--help", "--detach"} & set(asked):
            from tools.zygote_start import start_early

            start_early()
        from tools.cli import main as run_command
    except KeyboardInterrupt:
        return INTERRUPTED
    status = run_command(asked)
    # Ctrl-C inside an `exec`, as a dataclass is made by while its module is imported, is what `python -m` ends by at
    # last, though it was caught. The next one takes that back.
    exec("")
    return status


def hear_of_children() -> None:
    """Take SIGCHLD back from whoever ignores it for all that he starts (`trap '' CHLD`, some supervisors).

    Otherwise the system reaps our children itself: nobody learns how they ended, and who waits for the signal waits on.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def replace_closed_streams() -> None:
    """Put /dev/null where whoever started us closed a standard stream (`>&-`).

    Otherwise the first file that is opened gets its number, a segment for example, and Python has no stream at all.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def write_every_character() -> None:
    """An arrow that the locale lacks becomes a question mark, and a file's name that is no text stays its bytes.

    Neither is a reason to end in the middle of a table.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding.lower() == "utf-8" else "replace")


if __name__ == "__main__":
    sys.exit(main())
