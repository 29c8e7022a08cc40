"""A bench runs as many programs on a machine as its runs take, which are more than the task board has rows."""

from __future__ import annotations

from emu.control import TASKS
from tools.bench_echo import round_trips
from tools.exchanges import exchanging_machine


def test_runs_are_not_bounded_by_the_rows_of_the_board() -> None:
    """The row of a program that has ended is free for the next one."""
    with exchanging_machine(1, 1) as running:
        for _ in range(TASKS + 1):
            assert round_trips(running, 0.002)
