"""Claims about the host's sync points: what is left of a step is put aside, and done when the director says so."""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap
from types import SimpleNamespace
from typing import Any

import pytest

from emu.control import Control
from emu.ipc.segments import object_name, unlink_segment
from emu.syncpoint import NOT_ARMED, Point, PointAction, Tickets
from hostproc.points import HostPoints, NoPoints

ACTOR = 1 << 12 | 3


class Host:
    """A host's points on a segment of their own, and what the director was told."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.tokens = 0
        self.records: list[tuple[int, ...]] = []
        machine: Any = SimpleNamespace(control=control, wakeup=lambda _name: SimpleNamespace(post=self._post))
        trace: Any = SimpleNamespace(record=lambda *what: self.records.append(what[1:]))
        self.points = HostPoints(machine, ACTOR, trace)
        self.director = Tickets(control)

    def _post(self) -> None:
        self.tokens += 1

    def ring(self) -> None:
        """As a director does once a ticket says go."""
        self.control.view.store_u32(self.control.points_bell_offset, 1)


@pytest.fixture
def host() -> Iterator[Host]:
    """A host."""
    name = object_name("hostpoints", "control")
    control = Control.create(name, {})
    made = Host(control)
    try:
        yield made
    finally:
        assert isinstance(made.points.armed, mmap)
        made.points.armed.close()
        control.close()
        unlink_segment(name)


def test_the_rest_of_a_step_waits(host: Host) -> None:
    """Held: the director is told, the rest is not done; told to go, and rung for: done once."""
    done: list[int] = []
    number = host.director.arm(Point.HOST_ON_MODIFY, relid=9)
    assert host.points.armed[Point.HOST_ON_MODIFY]
    assert host.points.hold(Point.HOST_ON_MODIFY, 9, lambda: done.append(9))
    assert host.tokens == 1
    host.ring()
    assert not host.points.serve(), "nobody said go"
    host.director.go(number)
    host.ring()
    assert host.points.serve()
    assert not host.points.serve()
    assert done == [9]
    assert host.records == [
        (Point.HOST_ON_MODIFY, PointAction.HELD, 9),
        (Point.HOST_ON_MODIFY, PointAction.PASSED, 9),
    ]


def test_another_channel_passes(host: Host) -> None:
    """A ticket for one relid holds nobody else: the caller goes on by itself."""
    host.director.arm(Point.HOST_ON_MODIFY, relid=9)
    assert not host.points.hold(Point.HOST_ON_MODIFY, 8, lambda: None)
    assert host.tokens == 0


def test_two_tasks_are_held_apart(host: Host) -> None:
    """The second that was held may go on first."""
    done: list[int] = []
    numbers = [host.director.arm(Point.HOST_ON_MODIFY), host.director.arm(Point.HOST_ON_MODIFY)]
    for relid in (8, 9):
        assert host.points.hold(Point.HOST_ON_MODIFY, relid, lambda relid=relid: done.append(relid))  # type: ignore[misc]
    host.director.go(numbers[1])
    host.ring()
    host.points.serve()
    host.director.go(numbers[0])
    host.ring()
    host.points.serve()
    assert done == [9, 8]


def test_a_machine_without_schedules_has_none() -> None:
    """Nothing is armed there, and to be held is our mistake."""
    assert NoPoints().armed == NOT_ARMED
    with pytest.raises(AssertionError, match="runs no schedule"):
        NoPoints().hold(Point.HOST_ON_MODIFY, 1, lambda: None)
