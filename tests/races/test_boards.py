"""Claims about the boards: which of the four settings of two fixes survive the schedules of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import RunCli
from tests.races.test_exhibits import busy_loops
from tools.director import Broken
from tools.exit_status import ExitStatus
from tools.race_board import BOARDS, SETTINGS, Board, Cell, Game, find_board, run_of_board
from tools.race_run import HELD, INCONCLUSIVE, VIOLATED, RaceMachine, RaceRun
from tools.races import find_schedule, races, status_of

BY_NAME = {board.name: board for board in BOARDS}


def a_run(verdict: str, *invariants: str) -> RaceRun:
    """A run that came to this."""
    broken = tuple(Broken(name, "") for name in invariants)
    reason = "nobody came" if verdict == INCONCLUSIVE else ""
    return RaceRun("a", False, verdict, broken, True, reason, 0.1, Path("a.rec"))


def played(board: Board) -> Game:
    """A game in which every cell came out once as the board says."""
    game = Game.of(board, find_schedule)
    for cell in game.cells:
        names = cell.schedule.invariants if cell.told_broken else ()
        cell.runs.append(a_run(VIOLATED if names else HELD, *names))
    return game


# -- what a board says ---------------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_one_setting_survives_both_schedules(board: Board) -> None:
    """With both fixes on nothing breaks; whichever is off, one of the two schedules breaks something."""
    fragile = board.breaks[0] | board.breaks[1]
    assert fragile == set(SETTINGS) - {(True, True)}
    assert played(board).summary() == "One of the four settings survives both schedules: both fixes on."


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_both_exhibits_are_of_one_machine(board: Board) -> None:
    """One machine is reset from one to the other; each has a switch of its own, and an exhibit breaks by that alone."""
    first, second = (find_schedule(number) for number in board.numbers)
    assert first.scenario.machine == second.scenario.machine
    assert len({*first.scenario.fix.off(), *second.scenario.fix.off()}) == 2
    assert (False, True) in board.breaks[0] and (True, False) in board.breaks[1]
    assert "The rule: " in board.story


def test_a_cells_machine_has_its_setting() -> None:
    """A switch is off where the setting says so, of both exhibits, whichever schedule it is."""
    game = Game.of(BY_NAME["A4xA5"], find_schedule)
    off = [game.under(cell).scenario.fix.off() for cell in game.cells[:4]]

    first, second = "recheck_rescind_after_enlist", "wake_before_probe_wait"
    assert off == [(), (second,), (first,), (first, second)]
    assert [game.under(cell).scenario.fix.off() for cell in game.cells[4:]] == off
    assert game.under(game.cells[4]).steps == find_schedule("A5").steps


@pytest.mark.parametrize("name", ["A4xA5", "a4xa5", "A4×A5", "a4 x a5"])
def test_a_board_is_found_by_its_name(name: str) -> None:
    """In any case, and with the sign of multiplication."""
    assert find_board(name) is BY_NAME["A4xA5"]


# -- what was seen of it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told_broken", "runs", "text"),
    [
        (False, [], "not run"),
        (False, [a_run(HELD)], "nothing is broken"),
        (True, [a_run(HELD)], "nothing is broken: NOT as told"),
        (True, [a_run(VIOLATED, "INV-06", "INV-27", "INV-28")], "broken: INV-06 and INV-27"),
        (False, [a_run(VIOLATED, "INV-13")], "broken: INV-13: NOT as told"),
        (True, [a_run(VIOLATED, "INV-27"), a_run(HELD)], "broken: INV-27, in 1 of 2 runs: NOT as told"),
        (True, [a_run(VIOLATED, "INV-27"), a_run(INCONCLUSIVE)], "inconclusive"),
    ],
)
def test_a_cell_says_what_was_seen(told_broken: bool, runs: list[RaceRun], text: str) -> None:
    """Of what is broken, what the exhibit is about; and whether that is what the board says."""
    assert Cell(find_schedule("A4"), (True, True), told_broken, runs).text == text


def test_a_table_is_first_fix_by_second_fix() -> None:
    """Rows are the first exhibit's fix, columns the second's, of one schedule."""
    game = played(BY_NAME["B1xB2"])
    columns, rows = game.table(game.schedules[1])

    assert columns == ("", "B2's fix on", "B2's fix off")
    assert rows == [
        ("B1's fix on", "nothing is broken", "broken: INV-09 and INV-28"),
        ("B1's fix off", "nothing is broken", "broken: INV-09 and INV-28"),
    ]


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda runs: None, ExitStatus.FINE),
        (lambda runs: runs.append(a_run(VIOLATED, "INV-13")), ExitStatus.FINDING),
        (lambda runs: runs.append(a_run(INCONCLUSIVE)), ExitStatus.TIME_LIMIT),
    ],
)
def test_the_exit_status_is_of_the_board(spoil: Callable[[list[RaceRun]], None], status: ExitStatus) -> None:
    """0: as told, violations and all; 1: something is not; 124: something says nothing."""
    game = played(BY_NAME["A4xA5"])
    spoil(game.cells[0].runs)
    assert status_of(game) is status


def test_no_page_is_made_of_what_is_not_as_told() -> None:
    """The museum would show a lie."""
    game = played(BY_NAME["A4xA5"])
    game.cells[0].runs.append(a_run(VIOLATED, "INV-13"))
    with pytest.raises(AssertionError, match="A4xA5 is not as told: a4-rescind-misses-waiter, both fixes on"):
        run_of_board(game)


# -- the command ---------------------------------------------------------------------------------------


def test_an_interrupted_board_shows_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second run: one line with the count, the tables so far, and the status of an interruption."""
    runs = iter([a_run(HELD)])

    def run(*_arguments: object) -> RaceRun:
        for one in runs:
            return one
        raise KeyboardInterrupt

    monkeypatch.setattr(RaceMachine, "run", run)
    result = CliRunner().invoke(races, ["board", "A4xA5"], standalone_mode=False)

    assert result.return_value == ExitStatus.INTERRUPTED
    assert "interrupted after 1 of 8 runs" in result.output
    assert result.output.count("nothing is broken") == 1 and result.output.count("not run") == 7
    assert result.output.endswith("Not every setting was run.\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["board", "A4xB1"], "no board is called A4xB1; there are A4xA5, B1xB2"),
        (["show", "a4xa5"], "a4xa5 is a board of two exhibits; `vmbus-emu races board A4xA5` plays it"),
    ],
)
def test_a_wrong_name_is_one_line(run_cli: RunCli, arguments: list[str], line: str) -> None:
    """Exit status 2, with the cure."""
    done = run_cli("races", *arguments)
    assert done.returncode == 2
    assert line in done.stderr and done.stderr.count("\n") == 1


def test_a_board_is_played_on_real_processes(run_cli: RunCli) -> None:
    """A4 and A5: eight runs on one machine, each as told; exit status 0."""
    done = run_cli("races", "board", "A4xA5", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == {"name": "vmbus-emu.races-board", "version": 1}
    seen = [(cell["fixes"], [run["verdict"] for run in cell["runs"]]) for cell in report["cells"][:2]]
    assert seen == [({"A4": "on", "A5": "on"}, [HELD]), ({"A4": "on", "A5": "off"}, [VIOLATED])]
    assert report["summary"].endswith("survives both schedules: both fixes on.")


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loops", [0, 2], ids=["idle", "loaded"])
@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_a_board_is_the_same_twenty_times(board: Board, loops: int) -> None:
    """Every schedule under every setting, twenty times on one machine, idle and beside two busy loops."""
    game = Game.of(board, find_schedule)
    with busy_loops(loops):
        for _cell in game.play(times=20):
            pass
    assert [cell.text for cell in game.cells if not cell.as_told] == []
