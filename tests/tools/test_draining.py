"""A recording is drained beside whatever its command does: nothing runs over, and what cannot be written is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from emu.control import ActorKind
from emu.errors import UserError
from emu.machine import Machine
from emu.recording import Recording, RecordingWriter
from emu.tracing import CAPACITY, E_EOM, WRITTEN_AT_ONCE, Recorder
from tests.processes import Forked
from tests.tools.recorded import recording_machine
from tools.draining import ASIDE_SHARE, LEAST_TURN_S, TURN_S, Drainer, drain, next_turn_s, step_aside
from tools.testing import wait_for


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that records."""
    with recording_machine() as made:
        yield made


@pytest.fixture
def vcpu(machine: Machine) -> Recorder:
    """One actor of it."""
    row, _counters = machine.enlist(ActorKind.VCPU, "vcpu0")
    recorder = machine.recorder(row)
    assert recorder is not None
    return recorder


def test_nobody_has_to_poll(machine: Machine, vcpu: Recorder, tmp_path: Path) -> None:
    """Three times what a ring holds is in the file, while its command only waits."""
    writer = RecordingWriter(tmp_path / "r", machine)
    drainer = Drainer(writer)
    recorded = 0
    for _ in range(6):
        for _ in range(CAPACITY // 2):
            vcpu.record(E_EOM)
        recorded += CAPACITY // 2
        wait_for(lambda: writer.records == recorded, "the drainer")  # noqa: B023
    drainer.stop()
    drainer.check()
    writer.close()

    with Recording(tmp_path / "r") as recording:
        assert (recording.damage, recording.dropped, recording.count) == ("", 0, 3 * CAPACITY)


def test_what_is_recorded_after_the_last_turn_is_the_closers(machine: Machine, vcpu: Recorder, tmp_path: Path) -> None:
    """A drainer that has stopped touches nothing more; `close` takes what is left."""
    writer = RecordingWriter(tmp_path / "r", machine)
    drainer = Drainer(writer)
    drainer.stop()
    vcpu.record(E_EOM)

    assert writer.records == 0
    writer.close()
    assert writer.records == 1


def test_full_disk_is_told_to_whoever_looks_after_the_machine(machine: Machine, vcpu: Recorder, tmp_path: Path) -> None:
    """The thread ends, the next look raises what it met, and later ones are quiet."""
    writer = RecordingWriter(tmp_path / "r", machine)
    vars(writer)["_file"].close()
    with Path("/dev/full").open("wb") as full:
        vars(writer)["_file"] = full
        vcpu.record(E_EOM)
        drainer = Drainer(writer)
        wait_for(lambda: full.closed, "the write that fails")
        drainer.stop()

        with pytest.raises(UserError, match="No space left"):
            drainer.check()
        drainer.check()


def test_mistake_of_ours_ends_no_recording_quietly(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the thread dies of is raised where the machine is looked after."""
    writer = RecordingWriter(tmp_path / "r", machine)
    monkeypatch.setattr(writer, "poll", Mock(side_effect=[AssertionError("an index is odd"), 0]))
    drainer = Drainer(writer)
    vars(drainer)["_thread"].join()

    with pytest.raises(AssertionError, match="odd"):
        drainer.check()
    writer.close()


@pytest.mark.parametrize(
    ("turn_s", "share", "wanted_s"),
    [
        (TURN_S, 0.0, TURN_S),
        (TURN_S, 0.25, TURN_S),
        (TURN_S, 0.5, TURN_S),
        (TURN_S, 1.0, TURN_S / 2),
        (0.004, 0.25, 0.008),
        (0.004, 0.01, TURN_S),
        (LEAST_TURN_S, 1.0, LEAST_TURN_S),
        (0.008, 0.0, TURN_S),
    ],
)
def test_fuller_rings_are_looked_at_sooner(turn_s: float, share: float, wanted_s: float) -> None:
    """The next turn is as long as fills half a ring, within its bounds."""
    assert next_turn_s(turn_s, share) == pytest.approx(wanted_s)


def test_each_turn_is_as_long_as_the_last_one_says(
    machine: Machine, vcpu: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full ring halves the next wait; one that stays empty is looked at as seldom as at first."""
    monkeypatch.setattr("tools.draining.step_aside", Mock())
    writer = RecordingWriter(tmp_path / "r", machine)
    waited: list[float] = []
    bursts = [CAPACITY - WRITTEN_AT_ONCE, CAPACITY // 2, 0]

    def stopped(seconds: float) -> bool:
        """Wait, and let something be recorded meanwhile."""
        waited.append(seconds)
        for _ in range(bursts[len(waited) - 1] if len(waited) <= len(bursts) else 0):
            vcpu.record(E_EOM)
        return len(waited) > len(bursts)

    drain(writer, stopped)
    writer.close()

    assert waited == pytest.approx([TURN_S, TURN_S / 2, TURN_S / 2, TURN_S], rel=0.01)


def test_drain_steps_aside_for_who_records_much(
    machine: Machine, vcpu: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a turn in which a ring was a tenth full, for the process whose ring it was; not for a few records."""
    aside = Mock()
    monkeypatch.setattr("tools.draining.step_aside", aside)
    writer = RecordingWriter(tmp_path / "r", machine)
    bursts = [int(ASIDE_SHARE * CAPACITY) + 1, int(ASIDE_SHARE * CAPACITY) - 1, 0]
    called: list[int] = []

    def stopped(_seconds: float) -> bool:
        """Let something be recorded; whether that was all."""
        called.append(aside.call_count)
        for _ in range(bursts.pop(0) if bursts else 0):
            vcpu.record(E_EOM)
        return len(called) > 3

    drain(writer, stopped)
    writer.close()

    assert called == [0, 1, 1, 1]
    assert aside.call_args.args == (os.getpid(), os.sched_getaffinity(0))


def cores_after(step: Callable[[], None]) -> set[int]:
    """Where a thread of its own may run after this step."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(step).result()
        return thread.submit(os.sched_getaffinity, 0).result()


def test_thread_steps_aside_from_the_core_of_a_process() -> None:
    """Of the cores that it may have, it keeps all but that one; the only one it keeps, and for nobody it keeps all."""
    cores = os.sched_getaffinity(0)
    core = max(cores)
    (ready, tell), (end, stop) = os.pipe(), os.pipe()

    def busy() -> None:
        os.sched_setaffinity(0, {core})
        os.write(tell, b"x")
        os.read(end, 1)

    with Forked(busy) as process:
        os.read(ready, 1)
        assert cores_after(lambda: step_aside(process.pid, cores)) == (cores - {core} or cores)
        assert cores_after(lambda: step_aside(process.pid, {core})) == cores
        os.write(stop, b"x")
    for fd in (ready, tell, end, stop):
        os.close(fd)
    assert cores_after(lambda: step_aside(process.pid, cores)) == cores


def test_share_is_that_of_the_fullest_ring(machine: Machine, vcpu: Recorder, tmp_path: Path) -> None:
    """Of two actors one fills a quarter of its ring; when nobody records the next look says 0."""
    row, _counters = machine.enlist(ActorKind.VCPU, "vcpu1", cpu=1)
    other = machine.recorder(row)
    assert other is not None
    writer = RecordingWriter(tmp_path / "r", machine)
    other.record(E_EOM)
    for _ in range(CAPACITY // 4):
        vcpu.record(E_EOM)
    shares = []
    for _ in range(2):
        writer.poll()
        shares.append(writer.share)
    writer.close()

    assert shares == [0.25, 0.0]
    assert writer.fullest_pid == os.getpid()
