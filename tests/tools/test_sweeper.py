"""The sweeper: whatever way the launcher goes, the machine's names go with it, and nobody else's do."""

from __future__ import annotations

import os
import select
import signal
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from emu.ipc.segments import Segment, object_name, objects_of, unlink_objects, unlink_segment
from emu.ipc.semaphores import Wakeup
from tests.processes import Forked
from tools import sweeper

TIMEOUT_MS = 30_000
_numbers = count(1)


class Family:
    """A launcher that forked a zygote that forked the sweeper; the test is told their pids."""

    def __init__(self, name: str, *, zygote_stays: bool = True) -> None:
        self.name = name
        told, tell = os.pipe()
        self.launcher = self._fork(lambda: self._launch(tell, zygote_stays))
        os.close(tell)
        with os.fdopen(told, "rb") as pids:
            self.zygote, self.sweeper = struct.unpack("<II", pids.read(8))
        self._pidfds = {pid: os.pidfd_open(pid) for pid in (self.zygote, self.sweeper)}

    def _fork(self, body: Callable[[], int]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = body()
            finally:
                os._exit(status)
        return pid

    def _launch(self, tell: int, zygote_stays: bool) -> int:
        launcher = os.getpid()
        self._fork(lambda: self._be_zygote(tell, launcher, zygote_stays))
        while True:
            signal.pause()

    def _be_zygote(self, tell: int, launcher: int, zygote_stays: bool) -> int:
        sweeping = self._fork(lambda: sweeper.main(self.name, launcher))
        os.write(tell, struct.pack("<II", os.getpid(), sweeping))
        os.close(tell)
        while zygote_stays:
            signal.pause()
        return 0

    def ended(self, pid: int, timeout_ms: int = TIMEOUT_MS) -> bool:
        """Whether a process has ended (a zombie has)."""
        poll = select.poll()
        poll.register(self._pidfds[pid], select.POLLIN)
        return bool(poll.poll(timeout_ms))

    def kill_launcher(self) -> None:
        """kill -9, and reap."""
        os.kill(self.launcher, signal.SIGKILL)
        os.waitpid(self.launcher, 0)

    def close(self) -> None:
        """Leave nobody behind."""
        for pid in (self.launcher, self.zygote, self.sweeper):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for pidfd in self._pidfds.values():
            os.close(pidfd)


@pytest.fixture
def name() -> Iterator[str]:
    """A machine with a segment and a semaphore."""
    name = f"sweep{os.getpid()}-{next(_numbers)}"
    make(name)
    yield name
    unlink_objects(name)


@pytest.fixture
def family(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """The three processes, with little patience for a zygote that does not go."""
    monkeypatch.setattr(sweeper, "GRACE_S", 0.05)
    family = Family(name)
    yield family
    family.close()


def make(name: str) -> None:
    """What a launcher leaves when it is killed."""
    Segment.create(object_name(name, "control"), 4096).close()
    Wakeup.create(object_name(name, "host")).close()


def wait_until_ready(family: Family) -> None:
    """Wait until the sweeper ignores the last of its signals: then it waits for the launcher's end."""
    while True:
        lines = Path(f"/proc/{family.sweeper}/status").read_text().splitlines()
        ignored = next(line for line in lines if line.startswith("SigIgn"))
        if int(ignored.split()[1], 16) >> (signal.SIGQUIT - 1) & 1:
            return


def test_killed_launcher_leaves_no_names(family: Family) -> None:
    """kill -9 of the launcher: a zygote that does not go is killed, names are removed, the sweeper ends."""
    wait_until_ready(family)
    family.kill_launcher()

    assert family.ended(family.sweeper)
    assert family.ended(family.zygote)
    assert objects_of(family.name) == []


def test_sweeper_does_nothing_while_the_launcher_lives(family: Family) -> None:
    """It waits, whatever the terminal sends it."""
    wait_until_ready(family)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(family.sweeper, number)

    assert family.ended(family.sweeper, timeout_ms=50) is False
    assert len(objects_of(family.name)) == 2


def test_sweeper_keeps_no_descriptor_of_the_zygotes(family: Family) -> None:
    """Two pidfds and the standard three: whoever watches the zygote's socket sees the zygote go."""
    wait_until_ready(family)
    links = [str(link.readlink()) for link in Path(f"/proc/{family.sweeper}/fd").iterdir()]

    assert len(links) == 5
    assert sum("pidfd" in link for link in links) == 2


def test_successor_of_the_name_is_left_alone(family: Family, name: str) -> None:
    """Somebody cleaned up and started a machine of the same name before the sweeper came to it."""
    wait_until_ready(family)
    os.kill(family.sweeper, signal.SIGSTOP)
    family.kill_launcher()
    keep = Segment.attach(object_name(name, "control"))
    unlink_objects(name)
    make(name)
    os.kill(family.sweeper, signal.SIGCONT)

    assert family.ended(family.sweeper)
    assert len(objects_of(name)) == 2
    keep.close()


def test_successor_that_came_while_the_record_was_written_is_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record takes seconds where a machine is large: whose the name is by then is asked anew."""
    keep = Segment.attach(object_name(name, "control"))

    def clean_up_and_start_another(machine: str) -> None:
        unlink_objects(machine)
        make(machine)

    monkeypatch.setattr(sweeper, "GRACE_S", 0.05)
    monkeypatch.setattr(sweeper, "_write_crash_record", clean_up_and_start_another)
    family = Family(name)
    try:
        wait_until_ready(family)
        family.kill_launcher()

        assert family.ended(family.sweeper)
        assert len(objects_of(name)) == 2
    finally:
        family.close()
        keep.close()


def test_rest_of_a_half_cleaned_machine_is_removed(family: Family, name: str) -> None:
    """Without a control segment there is no successor: what is left is the dead machine's."""
    wait_until_ready(family)
    unlink_segment(object_name(name, "control"))
    family.kill_launcher()

    assert family.ended(family.sweeper)
    assert objects_of(name) == []


def test_launcher_that_is_gone_already_is_swept_at_once(name: str) -> None:
    """The sweeper may start when there is nobody to wait for any more."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

    assert sweeper.main(name, child) == 0
    assert objects_of(name) == []


@pytest.mark.parametrize("gone", ["reaped", "a zombie"])
def test_successor_of_a_launcher_that_is_gone_already_is_left_alone(name: str, gone: str) -> None:
    """Who has taken the name in those milliseconds holds it; the inode that the sweeper sees first is his."""
    launcher = os.fork()
    if launcher == 0:
        os._exit(0)
    os.waitid(os.P_PID, launcher, os.WEXITED | (os.WNOWAIT if gone == "a zombie" else 0))
    successor = Segment.attach(object_name(name, "control"))
    successor.hold()

    def sweep() -> None:
        assert sweeper.main(name, launcher) == 0

    with Forked(sweep):
        pass

    assert len(objects_of(name)) == 2
    successor.close()
    if gone == "a zombie":
        os.waitpid(launcher, 0)


def test_zygote_that_died_first_costs_nobody_else_his_life(name: str) -> None:
    """Its parent gone, the sweeper belongs to somebody else, whom it neither awaits nor kills."""
    family = Family(name, zygote_stays=False)
    try:
        assert family.ended(family.zygote)
        wait_until_ready(family)
        family.kill_launcher()

        assert family.ended(family.sweeper)
        assert objects_of(name) == []
        # Process 1, or whoever adopted it, is there to be asked.
        os.kill(os.getppid(), 0)
    finally:
        family.close()
