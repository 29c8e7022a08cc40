"""What Ctrl-C ends before anything is finished: one line says so, for programs one object."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any, NoReturn

import pytest

from emu.errors import DeadlinePassed, MachineStopping, NotOpened
from tools import bench, cli, explore_search, latency, output, run_machine
from tools.anchors import Anchor
from tools.exit_status import ExitStatus
from tools.latency import Measured, Trips
from tools.launch import Death, MachineDied


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
        (["latency"], "interrupted before the first measurement was done; --duration makes it shorter"),
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


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, {"interrupted": True}),
        (SystemExit(143), 143, {"interrupted": True}),
        (MachineDied([Death("vcpu1", 77, 9)]), 4, {"interrupted": False, "timed_out": None}),
        (DeadlinePassed("the guest tasks to end", 10**9), 124, {"deaths": []}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("as_json", [False, True])
def test_round_trips_of_the_first_machine_are_told_whatever_ends_the_second(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    told: dict[str, Any],
    as_json: bool,
) -> None:
    """The figures, the files that were asked for, and what ended it; of the stages nothing."""

    def measure(*_arguments: Any, record: bool = False, **_options: Any) -> Measured:
        if record:
            raise error
        return Measured(Trips(array("Q", range(0, 3000, 1000)), array("Q", range(500, 3500, 1000)), 0.0, 1.0), lost=0)

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "measure", measure)
    files = [tmp_path / name for name in ("a.hgrm", "a.hlog", "a.svg")]
    words = ["--rate", "1000", "--hgrm", str(files[0]), "--hlog", str(files[1]), "--plot", str(files[2])]

    assert cli.main(["latency", *words, *(["--json"] if as_json else [])]) == status

    shown = capsys.readouterr()
    assert [path for path in files if path.stat().st_size < 100] == []
    if as_json:
        report = json.loads(shown.out)
        assert (list(report["stages"]), report["stages"]["round_trip"]["count"]) == (["round_trip"], 3)
        assert (report["achieved"], report["achieved_recorded"], report["recorder_ns"]) == (1000.0, None, None)
        assert report | told == report
    else:
        assert re.search("^round_trip  +3 +0.5 ", shown.out, re.MULTILINE) and "\n1,000 round trips a s" in shown.out
        assert "vmbus-emu: the machine that records did not come to its end: there are no stages\n" in shown.err


@pytest.mark.parametrize("step", ["launch", "settle"])
def test_run_that_is_interrupted_outside_its_life_still_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    """Ctrl-C before the machine stands, or a second one while it is taken away: one object with what there was."""
    monkeypatch.setattr(run_machine, step, interrupt)

    assert cli.main(["run", "--device", "echo:1", "--duration", "0", "--name", "early", "--json"]) == 130

    told = json.loads(capsys.readouterr().out)
    assert (told["machine"], told["channels_open"]) == ("early", 0 if step == "launch" else 1)


@pytest.mark.parametrize("status", [129, 130, 143])
def test_a_command_that_ends_with_nothing_to_tell_gives_programs_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    """`races run` before its first run, `profile` of a command that was ended at its start: it says so itself."""
    monkeypatch.setattr(cli, "_carry_out", lambda _asked: status)

    assert cli.main(["races", "run", "A1", "--json"]) == status

    assert json.loads(capsys.readouterr().out)["interrupted"] is True


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (
            DeadlinePassed("an answer to `move`", 10**10),
            124,
            {"timed_out": "an answer to `move`: no answer within 10 s"},
        ),
        (NotOpened(3, "it is gone"), 1, {"unopened": "relid 3 will not be open: it is gone"}),
        (
            MachineDied([Death("vcpu1", 77, 9)]),
            4,
            {"deaths": ["vcpu1 (pid 77) died: killed by SIGKILL, holding no lock"]},
        ),
        (MachineStopping("the machine stopped"), 4, {"error": "the machine stopped"}),
        (KeyError("nobody"), 4, {"error": "'nobody'"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_command_that_fails_with_nothing_told_gives_programs_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int, told: Any
) -> None:
    """What was waited for in vain, who died, or what else went wrong; a person who asked for no object gets none."""

    def fail(_asked: list[str]) -> NoReturn:
        raise error

    monkeypatch.setattr(cli, "_carry_out", fail)

    assert cli.main(["ctl", "move", "3", "1", "--json"]) == status
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"]["name"], answer["interrupted"]) == ("vmbus-emu.failed", False)
    assert answer | told == answer
    assert (cli.main(["ctl", "move", "3", "1"]), capsys.readouterr().out) == (status, "")


def test_an_object_that_nobody_reads_does_not_hide_what_ended_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reader of the pipe has left, too: the status is still that of the time limit, and no traceback follows."""

    def fail(_asked: list[str]) -> NoReturn:
        raise DeadlinePassed("the guest to unload", 10**9)

    def nobody_reads(*_arguments: object) -> NoReturn:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_carry_out", fail)
    monkeypatch.setattr(output, "print_json", nobody_reads)
    monkeypatch.setattr("tools.output.silence", lambda _stream: None)

    assert cli.main(["stop", "--json"]) == ExitStatus.TIME_LIMIT
    assert capsys.readouterr().err == "vmbus-emu: the guest to unload: no answer within 1 s\n"


def test_explore_that_is_interrupted_while_its_cores_are_made_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No error of the cores: they are whole, and nothing was explored."""
    make = explore_search.Explorer.__init__

    def interrupted_half_way(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        make(*arguments)

    monkeypatch.setattr(explore_search.Explorer, "__init__", interrupted_half_way)

    assert cli.main(["explore", "--depth", "3", "--json"]) == ExitStatus.INTERRUPTED

    told = capsys.readouterr()
    assert (json.loads(told.out)["stopped"], told.err) == ("interruption", "")


IN_AN_EXEC = """
import runpy, sys
from tools import cli

def main(_asked):
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        return 130

cli.main = main
sys.argv[:] = ["vmbus-emu", "ps"]
runpy.run_module("tools.entry", run_name="__main__")
"""


def test_an_interrupt_in_the_middle_of_an_import_is_a_status(tmp_path: Path) -> None:
    """As of a module that makes a dataclass: `python -m` would end by the signal, behind all that was told."""
    (tmp_path / "interrupted.py").write_text(IN_AN_EXEC, encoding="utf-8")
    root = Path(__file__).resolve().parents[2]

    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, env={"PYTHONPATH": str(root)}, check=False, timeout=30
    )

    assert done.returncode == 130
