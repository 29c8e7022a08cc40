"""JUnit files: well-formed whatever a name holds, counts that agree, and never another run's."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import MissingPrerequisite, OwnLimit
from tools import check, cli, stress
from tools.exit_status import ExitStatus
from tools.junit import JunitCase, suite_of, write_end
from tools.race_run import HELD, RaceMachine, RaceRun

STALE = '<testsuite name="yesterday" tests="1" failures="0"><testcase name="passed" /></testsuite>\n'


@pytest.fixture
def junit(tmp_path: Path) -> Path:
    """A file of yesterday's run, all green."""
    path = tmp_path / "out.xml"
    path.write_text(STALE, encoding="utf-8")
    return path


@given(st.text(alphabet=st.characters(codec=None, exclude_categories=())))
def test_every_text_makes_a_file_that_parses(text: str) -> None:
    """Control characters, lone surrogates, non-characters, markup: in each place where text may stand."""
    file = suite_of(text, "c", [JunitCase(text, failure="x" + text, text=text)], output=text)

    assert ElementTree.fromstring(file.encode()).get("tests") == "1"


def test_what_xml_cannot_write_is_escaped() -> None:
    """A byte of a file name (PEP 383) is that byte; what XML has stays as it is."""
    suite = ElementTree.fromstring(suite_of('a\x01 \udcff \ufffe é &<"> \n\t', "c", []))

    assert suite.get("name") == 'a\\x01 \\xff \\ufffe é &<"> \n\t'


def test_counts_are_those_of_the_cases() -> None:
    """Each case is in one count at most, and the time of the whole is the suite's."""
    cases = [
        JunitCase("held"),
        JunitCase("broken", failure="1 violation", text="which"),
        JunitCase("ended", error="died"),
        JunitCase("undecided", skipped="not recorded"),
    ]
    suite = ElementTree.fromstring(suite_of("s", "c", cases, seconds=1.5, output="where"))

    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")}
    assert counts == {"tests": "4", "failures": "1", "errors": "1", "skipped": "1", "time": "1.500"}
    assert [[one.tag for one in case] for case in suite.findall("testcase")] == [
        [],
        ["failure"],
        ["error"],
        ["skipped"],
    ]
    assert suite.findtext("testcase/failure") == "which"
    assert suite.findtext("system-out") == "where"


def test_an_end_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ended the command is what it ends with."""
    write_end(tmp_path, "s", "c", "it died")

    assert (
        capsys.readouterr().err == f"vmbus-emu: --junit {tmp_path}: Is a directory; choose a file that can be written\n"
    )


def test_check_of_a_file_with_any_name(recording_path: Path, tmp_path: Path) -> None:
    """Its name is in the suite's; a name need be no text."""
    path = tmp_path / "a\x01\udcff.rec"
    path.symlink_to(recording_path)
    junit = tmp_path / "j.xml"

    assert cli.main(["check", str(path), "--junit", str(junit)]) == ExitStatus.FINE

    assert ElementTree.parse(junit).getroot().get("name") == "vmbus-emu check a\\x01\\xff.rec"
    assert check.junit_of([], path)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OwnLimit("5 s of stress", 2.0), ExitStatus.TIME_LIMIT),
        (KeyboardInterrupt(), ExitStatus.INTERRUPTED),
        (MissingPrerequisite("/dev/shm is full"), ExitStatus.MISSING),
    ],
)
def test_a_stress_that_ends_early_leaves_no_older_verdict(
    junit: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: ExitStatus,
) -> None:
    """Its limit, Ctrl-C, or what this computer lacks: one case, an error, and not yesterday's green ones."""

    def end(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(stress, "run_stress", end)

    assert cli.main(["stress", "--seed", "7", "--junit", str(junit)]) == status

    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
    message = suite.find("testcase/error")
    assert message is not None and message.get("message") == (str(error) or "interrupted")
    assert status == ExitStatus.MISSING or "--seed 7" in suite.findtext("system-out", "")
    capsys.readouterr()


@pytest.mark.parametrize("done", [0, 2])
def test_interrupted_races_are_not_green(
    junit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: int
) -> None:
    """The runs that ended are told, and that others did not."""
    runs = iter([RaceRun("a1", True, HELD, (), True, "", 0.25, Path())] * done)

    def run(*_arguments: object) -> RaceRun:
        for one in runs:
            return one
        raise KeyboardInterrupt

    monkeypatch.setattr(RaceMachine, "run", run)

    words = ["races", "run", "A1", "--fix", "on", "--times", "5", "--junit", str(junit)]
    assert cli.main(words) == ExitStatus.INTERRUPTED

    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("errors")) == (str(done + 1), "1")
    capsys.readouterr()


def test_races_that_an_error_ends_are_not_green(
    junit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that cannot be launched, for one."""

    def run(*_arguments: object) -> RaceRun:
        raise MissingPrerequisite("/dev/shm is full")

    monkeypatch.setattr(RaceMachine, "run", run)

    assert cli.main(["races", "run", "A1", "--junit", str(junit)]) == ExitStatus.MISSING

    message = ElementTree.parse(junit).getroot().find("testcase/error")
    assert message is not None and message.get("message") == "/dev/shm is full"
    capsys.readouterr()


def test_what_stress_did_not_check_is_skipped() -> None:
    """The number of cases is the same each time, and the reason is there; what was found says all of it, and where."""
    report = {name: 0 for name in stress.FINDINGS if name != "violations"} | {
        "seed": 4,
        "seconds": 2.0,
        "lost": 3,
        "complaints": ["relid 5: of 7 packets of cpu1, 3 lost"],
        "unchecked": "faults were ordered",
        "unjudged": "faults were ordered",
        "again": "vmbus-emu stress --seed 4",
        "finding": "/findings/1",
    }
    suite = ElementTree.fromstring(stress.junit_of(report))

    assert (suite.get("tests"), suite.get("skipped"), suite.get("time")) == (str(len(stress.FINDINGS)), "2", "2.000")
    assert suite.findtext("testcase/failure") == "relid 5: of 7 packets of cpu1, 3 lost"
    assert suite.findtext("system-out") == "the same again: vmbus-emu stress --seed 4\nfinding kept in /findings/1"
