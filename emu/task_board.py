"""The board of guest tasks in `control`: the harness orders a program on a CPU, the vCPU reports back.

A row is written by the launcher while it is FREE, then by the vCPU that runs it. The programs are the
guest's user space (`guestproc.tasks`); a path is a file of this computer that the program reads.
"""

from __future__ import annotations

import os
from collections.abc import Container
from enum import IntEnum
from struct import Struct
from typing import Final

from emu.control import TASKS, Control
from emu.errors import UserError
from emu.ipc.rows import load_row, store_row
from emu.values import valueclass

_ROW: Final = Struct("<IIIIQQQQQQ32s256s")
_STATE: Final = 0
_BEHIND_STATE: Final = Struct("<IIIQQQQQQ32s256s")
"""What is written of a row: the state changes by itself, since FREE for a moment would be an invitation."""
PATH_BYTES: Final = 256


class TaskState(IntEnum):
    """Life of a row."""

    FREE = 0
    FILLING = 1
    ORDERED = 2
    RUNNING = 3
    DONE = 4
    FAILED = 5


class Program(IntEnum):
    """What a guest task does: all but CRUNCH, which is pre-emptible, have safe points."""

    ECHO_CHECK = 1
    CRUNCH = 2
    STREAM = 3
    NET_CHECK = 4
    PING = 5
    STRESS = 6
    LISTEN = 7
    EXCHANGE = 8
    TRANSMIT = 9
    BIND = 10
    UNBIND = 11


ALL_PROGRAMS: Final = frozenset(Program)


@valueclass()
class TaskRow:
    """One row, copied out: `relid` 0 means every channel of that CPU; counts are the task's own.

    `size` (bytes) and `rate` (a second) are of those programs that have one.
    """

    index: int
    state: TaskState
    program: Program
    cpu: int
    relid: int
    wanted: int
    packets: int
    nbytes: int
    errors: int
    digest: bytes
    path: str
    size: int = 0
    rate: int = 0


class TaskBoard:
    """All rows of one machine."""

    def __init__(self, control: Control, programs: Container[Program] = ALL_PROGRAMS) -> None:
        """`programs`: those that `take` is for."""
        self._control = control
        self._programs = programs
        self._ordered = control.tasks_ordered
        self._nothing_behind: dict[int, int] = {}
        """By CPU: how many programs had been ordered when none waited for it."""

    def order(
        self,
        program: Program,
        cpu: int,
        *,
        relid: int = 0,
        wanted: int = 0,
        size: int = 0,
        rate: int = 0,
        path: str = "",
    ) -> int:
        """Put a program on the board for `cpu`; `wanted` is its amount of work. Returns the row's index.

        UserError for a path longer than a row holds; AssertionError when all rows are taken.
        """
        encoded = os.fsencode(path)
        if len(encoded) > PATH_BYTES:
            raise UserError(f"{path}: a path of more than {PATH_BYTES} bytes; use a shorter (relative) one")
        view = self._control.view
        for index in range(TASKS):
            at = self._control.task_offset(index)
            if view.cas_u32(at + _STATE, TaskState.FREE, TaskState.FILLING) == TaskState.FREE:
                store_row(
                    self._control.memory,
                    at + 4,
                    _BEHIND_STATE,
                    program,
                    cpu,
                    relid,
                    wanted,
                    size,
                    rate,
                    0,
                    0,
                    0,
                    bytes(32),
                    encoded,
                )
                view.store_u32(at + _STATE, TaskState.ORDERED)
                self._ordered.fetch_add(1)
                return index
        raise AssertionError(f"all {TASKS} rows of the task board are taken")

    def row(self, index: int) -> TaskRow:
        """Copy one row out (a FREE one reads as program ECHO_CHECK)."""
        state, program, cpu, relid, wanted, size, rate, packets, nbytes, errors, digest, path = load_row(
            self._control.memory, self._control.task_offset(index), _ROW
        )
        text = os.fsdecode(path.rstrip(b"\0"))
        return TaskRow(
            index,
            TaskState(state),
            Program(program or 1),
            cpu,
            relid,
            wanted,
            packets,
            nbytes,
            errors,
            digest,
            text,
            size,
            rate,
        )

    def rows(self) -> list[TaskRow]:
        """All rows in use."""
        return [row for row in map(self.row, range(TASKS)) if row.state != TaskState.FREE]

    def free(self, index: int) -> None:
        """A program that ended is told of: its row may hold another (who ordered it)."""
        at = self._control.task_offset(index) + _STATE
        assert self._control.view.load_u32(at) in (TaskState.DONE, TaskState.FAILED), self.row(index)
        self._control.view.store_u32(at, TaskState.FREE)

    def take(self, cpu: int) -> TaskRow | None:
        """The next program ordered for `cpu`, now RUNNING (the vCPU)."""
        # Before the rows: one that is ordered behind this look raises the count, and is found the next time. A
        # processor asks each time it wakes, and nearly always for nothing.
        ordered = self._ordered.load()
        if self._nothing_behind.get(cpu) == ordered:
            return None
        view = self._control.view
        for index in range(TASKS):
            at = self._control.task_offset(index) + _STATE
            if view.load_u32(at) != TaskState.ORDERED:
                continue
            row = self.row(index)
            if row.program not in self._programs:
                continue
            if row.cpu == cpu and view.cas_u32(at, TaskState.ORDERED, TaskState.RUNNING) == TaskState.ORDERED:
                return row
        self._nothing_behind[cpu] = ordered
        return None

    def report(
        self, row: TaskRow, state: TaskState, *, packets: int, nbytes: int, errors: int, digest: bytes = b""
    ) -> None:
        """Write a task's figures, then its state (the vCPU that runs it)."""
        at = self._control.task_offset(row.index)
        store_row(
            self._control.memory,
            at + 4,
            _BEHIND_STATE,
            row.program,
            row.cpu,
            row.relid,
            row.wanted,
            row.size,
            row.rate,
            packets,
            nbytes,
            errors,
            digest,
            os.fsencode(row.path),
        )
        self._control.view.store_u32(at + _STATE, state)
