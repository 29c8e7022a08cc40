"""Claims about the point at which a thread comes out of its sleep."""

from __future__ import annotations

from mmap import mmap

from emu.syncpoint import Point
from guestproc.vcpu import WorkerThread


def test_each_sleep_ends_at_a_point() -> None:
    """Whoever was woken, or woke for nothing, comes there, if it is armed; what the sleep said is passed on."""
    hooks = WorkerThread.__new__(WorkerThread)
    reached: list[int] = []
    armed, slept = mmap(-1, 64), iter([True, True, False])
    hooks._sleep = lambda _timeout_s: next(slept)

    hooks.stop_at_turns(armed, reached.append)

    assert hooks._sleep(1.0) and reached == []
    armed[Point.TURN] = 1
    assert hooks._sleep(1.0) and reached == [Point.TURN]
    assert not hooks._sleep(1.0) and reached == [Point.TURN, Point.TURN]
