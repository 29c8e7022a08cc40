"""What Ctrl-C ends before anything is finished: one line says so, for programs one object."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import pytest

from tools import bench, cli, latency, run_machine
from tools.anchors import Anchor
from tools.exit_status import ExitStatus


def interrupt(*_arguments: Any, **_options: Any) -> NoReturn:
    """What Ctrl-C is to whoever measures."""
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither command finishes what it measures, but for the bench `ring`."""
    monkeypatch.setattr(latency, "measure", interrupt)
    monkeypatch.setattr(
        bench, "BENCHES", {"ring": lambda *_: [Anchor.of("a", [1.0], "x", better="higher")], "idle": interrupt}
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["latency"], "interrupted before both measurements were done; --duration makes them shorter"),
        (["bench", "idle", "ring"], "interrupted; not measured: idle, ring"),
    ],
)
def test_who_interrupts_is_told_that_nothing_is_finished(
    capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    """Exit 130, nothing on stdout, one line on stderr."""
    assert cli.main(command) == ExitStatus.INTERRUPTED
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"vmbus-emu: {words}\n")


def test_what_was_finished_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of what was measured, and what was not."""
    assert cli.main(["bench", "ring", "idle"]) == ExitStatus.INTERRUPTED
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].split()[:2] == ["a", "1"]
    assert shown.err == "vmbus-emu: interrupted; not measured: idle\n"


@pytest.mark.parametrize("command", ["latency", "bench"])
def test_programs_get_one_object(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """It says that it was interrupted; stderr is empty."""
    assert cli.main([command, *(["idle"] if command == "bench" else []), "--json"]) == ExitStatus.INTERRUPTED
    shown = capsys.readouterr()
    assert (json.loads(shown.out)["interrupted"], shown.err) == (True, "")


@pytest.mark.parametrize("step", ["launch", "settle"])
def test_run_that_is_interrupted_outside_its_life_still_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    """Ctrl-C before the machine stands, or a second one while it is taken away: one object with what there was."""
    monkeypatch.setattr(run_machine, step, interrupt)

    assert cli.main(["run", "--device", "echo:1", "--duration", "0", "--name", "early", "--json"]) == 130

    told = json.loads(capsys.readouterr().out)
    assert (told["machine"], told["channels_open"]) == ("early", 0 if step == "launch" else 1)
