"""The task board: ordered by the harness, taken once by the right CPU, reported back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emu.control import TASKS, Control
from emu.errors import UserError
from emu.ipc.segments import object_name
from emu.task_board import PATH_BYTES, Program, TaskBoard, TaskState
from tests.processes import Crowd


@pytest.fixture
def board(machine_name: str) -> Iterator[TaskBoard]:
    """An empty board."""
    control = Control.create(object_name(machine_name, "control"), {})
    yield TaskBoard(control)
    control.close()


def test_order_is_read_back(board: TaskBoard) -> None:
    """Program, CPU, channel, amount and path of an order stand in its row."""
    index = board.order(Program.STREAM, 3, relid=7, wanted=1 << 40, path="somewhere/a file")

    (row,) = board.rows()
    assert (row.index, row.state, row.program) == (index, TaskState.ORDERED, Program.STREAM)
    assert (row.cpu, row.relid, row.wanted, row.path) == (3, 7, 1 << 40, "somewhere/a file")
    assert (row.packets, row.nbytes, row.errors, row.digest) == (0, 0, 0, bytes(32))


def test_order_is_taken_once_by_its_cpu(board: TaskBoard) -> None:
    """Another CPU finds nothing; its own gets it running; nobody gets it twice."""
    index = board.order(Program.CRUNCH, 1)
    others = board.take(0)
    taken = board.take(1)

    assert others is None
    assert taken is not None
    assert (taken.index, board.row(index).state) == (index, TaskState.RUNNING)
    assert board.take(1) is None


def test_a_board_takes_the_programs_that_it_is_for(board: TaskBoard) -> None:
    """Two who share a CPU's orders: each finds its own, and passes the other's over."""
    rest, some = (
        TaskBoard(board._control, frozenset(Program) - {Program.BIND}),
        TaskBoard(board._control, {Program.BIND}),
    )
    for program in (Program.CRUNCH, Program.BIND, Program.PING):
        board.order(program, 1)
    taken = [row.program for one in (some, rest, some, rest, rest) if (row := one.take(1)) is not None]

    assert taken == [Program.BIND, Program.CRUNCH, Program.PING]


def test_orders_of_a_cpu_are_taken_in_order(board: TaskBoard) -> None:
    """First come, first served."""
    for wanted in (5, 6, 7):
        board.order(Program.CRUNCH, 0, wanted=wanted)
    rows = [board.take(0) for _ in range(4)]

    assert [row.wanted for row in rows if row] == [5, 6, 7]
    assert rows[3] is None


def test_report_fills_the_row(board: TaskBoard) -> None:
    """The figures and the end state come together; what was ordered stays."""
    board.order(Program.ECHO_CHECK, 0, relid=2, wanted=9, path="p")
    row = board.take(0)
    assert row is not None
    board.report(row, TaskState.DONE, packets=10, nbytes=640, errors=1, digest=b"\x11" * 32)

    (done,) = board.rows()
    assert (done.state, done.packets, done.nbytes, done.errors) == (TaskState.DONE, 10, 640, 1)
    assert (done.digest, done.relid, done.wanted, done.path) == (b"\x11" * 32, 2, 9, "p")


def test_path_may_hold_any_bytes(board: TaskBoard) -> None:
    """A file name that is no UTF-8 (as os.fsdecode gives it) comes back as it was."""
    name = "/tmp/\udcff\udc80" + "é"
    board.order(Program.STREAM, 0, path=name)

    assert board.rows()[0].path == name


def test_longest_path_fits_and_one_more_byte_does_not(board: TaskBoard) -> None:
    """256 bytes are kept whole; 257 are the user's to shorten, and take no row."""
    longest = "x" * PATH_BYTES
    board.order(Program.STREAM, 0, path=longest)

    with pytest.raises(UserError, match="more than 256 bytes"):
        board.order(Program.STREAM, 0, path=longest + "x")

    assert [row.path for row in board.rows()] == [longest]


def test_full_board_is_our_mistake(board: TaskBoard) -> None:
    """64 tasks are more than anybody orders."""
    for _ in range(TASKS):
        board.order(Program.CRUNCH, 0)

    with pytest.raises(AssertionError, match="rows of the task board"):
        board.order(Program.CRUNCH, 0)


def test_a_freed_row_takes_another_order(board: TaskBoard) -> None:
    """Only one whose program has ended may be freed."""
    for _ in range(TASKS):
        board.order(Program.CRUNCH, 0)
    row = board.take(0)
    assert row is not None
    with pytest.raises(AssertionError):
        board.free(row.index)
    board.report(row, TaskState.DONE, packets=1, nbytes=2, errors=0)

    board.free(row.index)

    assert board.order(Program.NET_CHECK, 1) == row.index
    assert board.row(row.index).packets == 0


def test_processes_share_the_board(board: TaskBoard) -> None:
    """Two orderers and two takers at once: every order is taken exactly once."""

    def order(cpu: int) -> None:
        for wanted in range(20):
            board.order(Program.CRUNCH, cpu, wanted=wanted)

    def take() -> None:
        taken = 0
        while taken < 20:
            row = board.take(0)
            if row is not None:
                taken += 1
                board.report(row, TaskState.DONE, packets=1, nbytes=0, errors=0)

    with Crowd() as crowd:
        for body in (lambda: order(0), lambda: order(0), take, take):
            crowd.start(body)

    rows = board.rows()
    assert len(rows) == 40
    assert sum(row.packets for row in rows) == 40
    assert sorted(row.wanted for row in rows) == sorted(list(range(20)) * 2)
