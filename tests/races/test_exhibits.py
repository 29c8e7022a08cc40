"""Claims about the exhibits: with its fix off each breaks its invariant every time, with it on never."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from emu.scenario import Scenario
from tests.conftest import RunCli
from tools.race_run import HELD, VIOLATED, RaceMachine
from tools.races import exhibits
from tools.schedule import Schedule

EXHIBITS = sorted(exhibits())


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that want a core each."""
    with ExitStack() as stack:
        for _ in range(count):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        yield


class Machines:
    """A machine for each number of processors, launched when an exhibit first wants it: each exhibit is the next
    schedule on one of them, which is reset before every run."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._machines: dict[tuple[int, int], RaceMachine] = {}

    def of(self, schedule: Schedule) -> RaceMachine:
        """The one that such a schedule runs on, for it from now on, with its fix off."""
        spec = schedule.scenario.machine
        key = spec.vcpus, spec.ram_bytes
        if key not in self._machines:
            self._machines[key] = self._stack.enter_context(RaceMachine(schedule, fix=False))
        self._machines[key].take(schedule, fix=False)
        return self._machines[key]

    def close(self) -> None:
        """Switch all off."""
        self._stack.close()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """Machines for all exhibits."""
    machines = Machines()
    yield machines
    machines.close()


def runs_as_told(machines: Machines, name: str, *, times: int, home: Path) -> None:
    """Run an exhibit so often on one machine, with its fix off and with it on; every run must be what its file says."""
    schedule = Schedule.load(exhibits()[name])
    assert schedule.invariants and schedule.scenario.fix.off(), "an exhibit names its switch and its invariant"
    machine = machines.of(schedule)
    for fix in (False, True):
        for number in range(times):
            run = machine.run(home / f"{number}.rec", fix=fix)
            assert run.expected, f"run {number}: {run.report()}"
            assert run.fix is fix and run.verdict == (HELD if fix else VIOLATED)


@pytest.mark.parametrize("name", EXHIBITS)
def test_an_exhibit_is_the_same_twice(machines: Machines, name: str, tmp_path: Path) -> None:
    """Over real processes, twice with its fix off and twice with it on, on a machine that is reset in between."""
    runs_as_told(machines, name, times=2, home=tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loops", [0, 2], ids=["idle", "loaded"])
@pytest.mark.parametrize("name", EXHIBITS)
def test_an_exhibit_is_the_same_twenty_times(machines: Machines, name: str, loops: int, tmp_path: Path) -> None:
    """Over real processes, twenty times each way, idle and beside two busy loops."""
    with busy_loops(loops):
        runs_as_told(machines, name, times=20, home=tmp_path)


def test_the_command_says_what_it_saw(run_cli: RunCli) -> None:
    """Exit status 1 and a folder with everything that repeats it; JSON with the fields that scripts read."""
    done = run_cli("races", "run", "A1", "--fix", "off", "--json")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert {key: told[key] for key in ("name", "fix", "verdict", "invariant", "expected")} == {
        "name": "a1-offer-rescind-overtake",
        "fix": "off",
        "verdict": "violated",
        "invariant": "INV-03",
        "expected": True,
    }
    folder = Path(told["finding"])
    kept = {"finding.txt", "recording.rec", "scenario.toml", "schedule.toml", "seed", "repeat"}
    assert {path.name for path in folder.iterdir()} == kept
    assert Path(told["recording"]) == folder / "recording.rec"
    assert Scenario.load(folder / "scenario.toml") == Schedule.load(folder / "schedule.toml").scenario
    assert "INV-03: the rescind of relid 2 finds no channel" in (folder / "finding.txt").read_text()
    checked = run_cli("check", str(folder / "recording.rec"))
    assert checked.returncode == 1, checked.stdout
    assert "INV-03: the rescind of relid 2 finds no channel" in checked.stdout
    assert "found in the machine itself:\n" in checked.stdout
    again = shlex.split((folder / "repeat").read_text())
    assert run_cli(*again[1:]).returncode == 1


def test_a_run_that_finds_nothing_leaves_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    """Exit status 0, and no folder."""
    done = run_cli("races", "run", "offer-rescind-overtake", "--fix", "on")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "state").exists()


def test_a_call_that_fails_is_told(run_cli: RunCli, tmp_path: Path) -> None:
    """Nobody waited for it, and it breaks nothing; whoever wrote the schedule learns of it all the same."""
    (tmp_path / "mine.toml").write_text('step = ["call unbind device=echo#1 driver=nobody", "until settled"]\n')
    done = run_cli("races", "run", "mine.toml", "--json")

    assert done.returncode == 0, done.stderr
    (failed,) = json.loads(done.stdout)["failed_calls"]
    assert failed.startswith("call of step 1: -ENODEV: no driver nobody is registered; ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["show", "mine.rec"], "mine.rec is a recording; `vmbus-emu races show --from mine.rec` tells it"),
        (["run", "nothing"], "no exhibit is called nothing; `vmbus-emu races list` lists them"),
        (
            ["run", "bad.toml"],
            "bad.toml: step 1 `arm g.isr.entre as X`: 'g.isr.entre' is no sync point; did you mean ",
        ),
    ],
)
def test_nonsense_is_one_line(run_cli: RunCli, tmp_path: Path, arguments: list[str], line: str) -> None:
    """A name that nobody has, a step that cannot be meant: exit 2, one line with the cure."""
    (tmp_path / "bad.toml").write_text('step = ["arm g.isr.entre as X"]\n')
    done = run_cli("races", *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
