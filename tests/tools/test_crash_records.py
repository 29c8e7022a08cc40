"""Where a machine ended: the newest record of its name, and what a look for a machine in vain says of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import pytest

from emu.errors import UserError
from tools.crash_records import RECENT_S, CrashFile, crash_dir, crash_files, newest_crash
from tools.machines import chosen_machine
from tools.options import machine_option
from tools.paths import made


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State of ours is in the test's own directory, and no machine runs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("tools.machines.machine_names", list)


def died(machine: str, age_s: float) -> Path:
    """A record of a machine that died so long ago."""
    moment = time.time() - age_s
    path = made(crash_dir()) / f"{time.strftime('%Y%m%dT%H%M%S', time.localtime(moment))}-{machine}.json"
    path.write_text("{}")
    os.utime(path, (moment, moment))
    return path


def test_newest_record_comes_first() -> None:
    """Of all machines, of one by its name, whatever dashes that has; old ones only by their name."""
    old = died("a-b", RECENT_S * 2)
    newer = died("a-b", 50)
    newest = died("c", 10)

    assert [one.path for one in crash_files()] == [newest, newer, old]
    assert newest_crash("a-b") == CrashFile(newer, "a-b", newer.stat().st_mtime)
    assert newest_crash("b") is None
    newest.unlink()
    newer.unlink()
    assert newest_crash() is None
    assert newest_crash("a-b") is not None


def test_machine_that_died_is_told_of() -> None:
    """Whoever asks for it, by name or as the only one, is shown its record; who asks for another is not."""
    path = died("vm1", 5)

    with pytest.raises(UserError, match=f"no machine vm1; none is running; vm1 died .* ago; see .*--from {path}"):
        chosen_machine("vm1")
    with pytest.raises(UserError, match=f"no machine is running.*{path}"):
        chosen_machine(None)
    with pytest.raises(UserError) as caught:
        chosen_machine("vm2")
    assert str(path) not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "variable", "named"),
    [
        ([], "zz", "$VMBUS_EMU_MACHINE"),
        (["--machine", "zz"], "yy", "--machine"),
        (["--machine", "zz"], "", "--machine"),
    ],
)
def test_wrong_name_is_blamed_on_where_it_came_from(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], variable: str, named: str
) -> None:
    """The variable or the flag, whichever the user has to mend."""

    @click.command()
    @machine_option
    def command(machine_name: str | None) -> None:
        chosen_machine(machine_name)

    monkeypatch.setenv("VMBUS_EMU_MACHINE", variable)

    with pytest.raises(UserError) as caught:
        command.main(arguments, standalone_mode=False)
    assert str(caught.value).startswith(f"{named}: no machine zz")
