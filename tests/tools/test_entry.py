"""The script's first moments, before the command line is there to catch anything."""

from __future__ import annotations

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
