"""A thread of the guest's leaves the host's core: when it looks, when it goes, and that it may come back."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from emu.aside import ROW_NS, TIMES, Aside, Cores, leave_core

SOON: int = ROW_NS // 10


class Thread:
    """One that has been on these cores, with the host on that one; each look and each leave is noted."""

    def __init__(self, *own: int, host: int = 0) -> None:
        self.own = list(own)
        self.host = host
        self.now = 0
        self.looked_at: list[int] = []
        self.left: list[int] = []
        self.times = 0
        self.aside = Aside(self.cores, self.left.append, lambda: self.now)

    def cores(self) -> tuple[int, int]:
        """Where both ran last."""
        self.looked_at.append(self.times)
        return self.own.pop(0) if len(self.own) > 1 else self.own[0], self.host

    def wait(self, times: int, apart_ns: int = SOON) -> None:
        """Find the host in the way so often."""
        for _ in range(times):
            self.now += apart_ns
            self.times += 1
            self.aside.in_the_way()


def test_it_goes_from_the_core_of_the_host() -> None:
    """Behind a row of waits, not before, and never while the host is elsewhere."""
    shares, apart = Thread(3, host=3), Thread(1, host=3)

    shares.wait(TIMES - 1)
    assert shares.looked_at == []
    shares.wait(1)
    apart.wait(TIMES)

    assert shares.left == [3]
    assert (apart.looked_at, apart.left) == ([TIMES], [])


def test_waits_now_and_then_are_no_row() -> None:
    """One answer on the wrong core costs less than a look and a move."""
    thread = Thread(0, host=0)

    thread.wait(100, ROW_NS + 1)

    assert thread.looked_at == []


def test_it_looks_less_and_less_often_in_a_row() -> None:
    """Whoever is put back there, or waits for somebody else, does not move all the time; a new row begins anew."""
    thread = Thread(0, host=0)

    thread.wait(8 * TIMES)
    thread.now += ROW_NS + 1
    thread.wait(TIMES)

    assert thread.looked_at == [TIMES, 2 * TIMES, 4 * TIMES, 8 * TIMES, 9 * TIMES]
    assert len(thread.left) == 5


def test_without_a_host_it_stays() -> None:
    """No process of that number: a machine's end, or a computer without /proc."""
    left: list[int] = []
    aside = Aside(Cores(lambda: 0), left.append)

    for _ in range(TIMES):
        aside.in_the_way()

    assert left == []


def test_cores_are_of_the_thread_and_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Field 39 of /proc/…/stat, whatever a process calls itself, and each time anew."""
    own, host = tmp_path / "own", tmp_path / "host"
    opened = {"/proc/thread-self/stat": own, "/proc/7/stat": host}
    real_open = os.open
    monkeypatch.setattr("emu.aside.os.open", lambda path, flags: real_open(opened[path], flags))
    for path, core in ((own, 4), (host, 2)):
        path.write_text(f"1 (a) 5 (b)) S {' '.join(['0'] * 35)} {core} 0 0\n")
    cores = Cores(lambda: 7)

    before = cores()
    host.write_text(host.read_text().replace(" 2 ", " 4 "))

    assert (before, cores()) == ((4, 2), (4, 4))


def test_a_thread_that_left_may_run_where_it_could() -> None:
    """It is moved and not tied, and one that has one core only stays there."""
    allowed = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def run() -> None:
        first = min(allowed)
        os.sched_setaffinity(0, {first})
        leave_core(first)
        seen.append(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed)
        leave_core(first)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert seen == [{min(allowed)}, allowed]
    assert os.sched_getaffinity(0) == allowed
