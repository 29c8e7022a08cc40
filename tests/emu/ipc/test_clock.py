"""The clock: real time minus an offset, stopped by holds, moved by advances, and never stepping back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from emu.ipc.atomics import AtomicView
from emu.ipc.clock import WORDS_BYTES, MachineClock
from emu.ipc.segments import Segment, object_name
from tests.processes import Crowd


class RealTime:
    """A CLOCK_MONOTONIC that stands where the test puts it; `before_answer` runs inside the next reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 1_000_000
        self.before_answer: Callable[[], None] | None = None
        monkeypatch.setattr("time.monotonic_ns", self.read)

    def read(self) -> int:
        """What the process reads."""
        meanwhile, self.before_answer = self.before_answer, None
        answer = self.ns
        if meanwhile is not None:
            meanwhile()
        return answer


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> RealTime:
    """A real clock under the test's control."""
    return RealTime(monkeypatch)


@pytest.fixture
def words() -> AtomicView:
    """The clock's words."""
    return AtomicView(bytearray(WORDS_BYTES))


def started(words: AtomicView) -> MachineClock:
    """A clock that starts now."""
    clock = MachineClock(words, 0)
    clock.start()
    return clock


def test_time_begins_at_zero_and_runs(real: RealTime, words: AtomicView) -> None:
    """Machine time is 0 when the machine is made and then advances with real time."""
    clock = started(words)
    first = clock.now()
    real.ns += 250

    assert (first, clock.now()) == (0, 250)


def test_all_processes_read_one_time(real: RealTime, words: AtomicView) -> None:
    """A clock attached later reads the same time."""
    clock = started(words)
    real.ns += 77

    assert MachineClock(words, 0).now() == clock.now() == 77


def test_reference_time_counts_100_ns(real: RealTime, words: AtomicView) -> None:
    """The partition reference time has 10 MHz."""
    clock = started(words)
    real.ns += 1_000_000_099

    assert clock.reference_time() == 10_000_000


def test_held_clock_stands_still(real: RealTime, words: AtomicView) -> None:
    """Between hold and release no machine time passes, and afterwards it goes on from there."""
    clock = started(words)
    real.ns += 100
    clock.hold()
    real.ns += 5_000
    held = clock.now()
    clock.release()
    real.ns += 10

    assert (held, clock.now()) == (100, 110)


def test_holds_nest(real: RealTime, words: AtomicView) -> None:
    """Two holders (director and launcher) must both let go."""
    director, launcher = started(words), MachineClock(words, 0)
    director.hold()
    launcher.hold()
    real.ns += 100
    director.release()
    real.ns += 100
    still = launcher.held
    launcher.release()
    real.ns += 1

    assert still is True
    assert director.held is False
    assert director.now() == 1


def test_advance_moves_a_running_clock(real: RealTime, words: AtomicView) -> None:
    """Advancing jumps forward, and time runs on from there."""
    clock = started(words)
    clock.advance(1_000)
    real.ns += 5

    assert clock.now() == 1_005


def test_advance_moves_a_held_clock(real: RealTime, words: AtomicView) -> None:
    """A held clock jumps as well, and keeps the jump when it is released."""
    clock = started(words)
    clock.hold()
    clock.advance(1_000)
    held = clock.now()
    clock.release()
    real.ns += 5

    assert (held, clock.now()) == (1_000, 1_005)


def test_advance_beyond_real_time_does_not_wrap(real: RealTime, words: AtomicView) -> None:
    """The offset may become negative: a machine may be years older than this computer's uptime."""
    clock = started(words)
    clock.advance(10**17)
    first = clock.now()
    real.ns += 5

    assert (first, clock.now()) == (10**17, 10**17 + 5)


def test_hold_in_the_middle_of_a_reading_does_not_step_back(real: RealTime, words: AtomicView) -> None:
    """A reader that was suspended while the clock was held and released reads no time before the hold."""
    clock, director = started(words), MachineClock(words, 0)
    real.ns += 1_000

    def hold_and_release() -> None:
        director.hold()
        real.ns += 500_000
        director.release()

    earlier = clock.now()
    real.before_answer = hold_and_release

    assert clock.now() >= earlier


def test_hold_that_another_thread_saw_in_the_middle_of_a_reading_does_not_step_back(
    real: RealTime, words: AtomicView
) -> None:
    """So it is when a thread of its own process, or its signal handler, reads the clock meanwhile."""
    clock, director = started(words), MachineClock(words, 0)
    real.ns += 1_000

    def hold_release_and_read() -> None:
        director.hold()
        real.ns += 500_000
        director.release()
        clock.now()

    earlier = clock.now()
    real.before_answer = hold_release_and_read

    assert clock.now() >= earlier


def test_reader_survives_a_writer_that_died_half_way(real: RealTime, words: AtomicView) -> None:
    """A launcher killed in the middle of a hold does not stop everybody who asks for the time."""
    clock = started(words)
    words.fetch_or_u64(8, 1)
    real.ns += 3

    assert clock.now() == 3
    with pytest.raises(AssertionError, match="died half way"):
        clock.hold()


def test_time_never_steps_back_while_processes_hold_it(machine_name: str) -> None:
    """Two processes hold, advance and release as they like: no reader ever sees an earlier time."""
    segment = Segment.create(object_name(machine_name, "clock"), 4096)
    clock = MachineClock(segment.view, 0)
    clock.start()
    readers_done = segment.view.cell_u32(256)

    def hold_and_release() -> None:
        mine = MachineClock(segment.view, 0)
        while readers_done.load() < 1:
            mine.hold()
            mine.advance(3)
            mine.release()

    def read() -> None:
        before = clock.now()
        end = time.monotonic() + 0.5
        for _ in range(20_000):
            now = clock.now()
            assert now >= before, (now, before)
            before = now
            if time.monotonic() > end:
                break
        readers_done.store(1)

    try:
        with Crowd() as crowd:
            crowd.start(hold_and_release)
            crowd.start(hold_and_release)
            crowd.start(read)
        assert clock.held is False
    finally:
        segment.close()


def test_clock_that_is_started_again_is_another_one(real: RealTime, words: AtomicView) -> None:
    """Who read the clock before its words were wiped does not go on with the old offset."""
    clock, other = started(words), MachineClock(words, 0)
    real.ns += 500
    assert (clock.now(), other.now()) == (500, 500)

    for word in range(0, WORDS_BYTES, 8):
        words.store_u64(word, 0)
    clock.start()
    real.ns += 20

    assert (clock.now(), other.now()) == (20, 20)
