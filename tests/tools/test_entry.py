"""The script's first moments, before the command line is there to catch anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools import entry
from tools.exit_status import ExitStatus


@pytest.mark.parametrize("command", ["run", "demo"])
def test_an_interrupt_before_the_command_line_is_there_is_no_traceback(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the zygote is started, or while click is imported, ends like any other."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["vmbus-emu", command])
    monkeypatch.setattr("tools.zygote_start.start_early", interrupted)

    assert entry.main() == entry.INTERRUPTED == ExitStatus.INTERRUPTED


def in_shell(streams: str) -> subprocess.CompletedProcess[str]:
    """`vmbus-emu --version` with its streams as a shell redirects them."""
    line = f'"$0" -m tools.entry --version {streams}'
    return subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("closed", "heard"), [("<&-", True), (">&-", False), ("2>&-", True), ("<&- >&- 2>&-", False)])
def test_a_closed_stream_is_as_good_as_dev_null(closed: str, heard: bool) -> None:
    """The command does its work, silently where nobody hears it, and without a traceback."""
    done = in_shell(closed)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vmbus-emu ") == heard


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    """Exit 2 and no traceback, also when the interpreter flushes once more at its end."""
    done = in_shell(">/dev/full")

    assert done.returncode == ExitStatus.USAGE
    assert done.stderr == (
        "vmbus-emu: cannot write to stdout: No space left on device; make room, or send it somewhere else\n"
    )
