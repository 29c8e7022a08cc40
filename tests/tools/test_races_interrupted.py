"""`races run` over several runs: what is told and kept of them, and Ctrl-C in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from tools.director import Broken
from tools.exit_status import ExitStatus
from tools.race_run import HELD, VIOLATED, RaceMachine, RaceRun
from tools.races import races


class ThreeRuns:
    """A machine whose runs are violated as expected, held against what is expected, and violated again."""

    def __init__(self, *_schedule: object, **_options: object) -> None:
        self.number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """It is nothing that has to end."""

    def run(self, path: Path) -> RaceRun:
        """The next one, with its number for a recording."""
        self.number += 1
        path.write_text(f"run {self.number}")
        verdict, expected = (HELD, False) if self.number == 2 else (VIOLATED, True)
        broken = (Broken("INV-01", "it was overtaken"),) if verdict == VIOLATED else ()
        return RaceRun("a1", False, verdict, broken, expected, "", 0.5, path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files and findings go; machines come to what `ThreeRuns` says."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("tools.races.RaceMachine", ThreeRuns)
    return tmp_path


@pytest.mark.parametrize(("times", "kept"), [(1, "run 1"), (3, "run 2")])
def test_recording_that_was_asked_for_is_of_the_run_that_decides(home: Path, times: int, kept: str) -> None:
    """Of several the one that came out otherwise than expected, in whatever place."""
    path = home / "kept.rec"
    CliRunner().invoke(races, ["run", "a1", "--times", str(times), "--record", str(path)], standalone_mode=False)

    assert path.read_text() == kept


def test_each_run_is_a_line_for_people_alone(home: Path) -> None:
    """What it came to, whether that was expected, and what was broken; programs get one object instead."""
    told = CliRunner().invoke(races, ["run", "a1", "--times", "3"], standalone_mode=False)
    as_json = CliRunner().invoke(races, ["run", "a1", "--times", "3", "--json"], standalone_mode=False)

    first, why, second, *_rest = told.stdout.splitlines()
    assert first == "a1, fix off: violated INV-01, as expected (0.50 s)"
    assert why == "  INV-01: it was overtaken"
    assert second == "a1, fix off: held, NOT as expected (0.50 s)"
    assert [one["expected"] for one in json.loads(as_json.stdout)["runs"]] == [True, False, True]


def test_junit_file_says_where_the_finding_is_kept(home: Path) -> None:
    """With the line that repeats it."""
    junit = home / "runs.xml"
    told = CliRunner().invoke(races, ["run", "a1", "--junit", str(junit), "--json"], standalone_mode=False)

    finding = json.loads(told.stdout)["finding"]
    said = "".join(ElementTree.parse(junit).getroot().itertext())
    assert finding is not None
    assert f"finding kept in {finding}; repeat it: sh {finding}/repeat" in said


def test_an_interrupted_run_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the first run has ended gives one line with the count, and the status of an interruption."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RaceMachine, "run", interrupted)
    result = CliRunner().invoke(races, ["run", "a1", "--times", "5"], standalone_mode=False)
    assert result.return_value == ExitStatus.INTERRUPTED
    assert "interrupted after 0 of 5 runs" in result.output
