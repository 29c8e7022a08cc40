"""Segments: one owner makes and unlinks, all see the same bytes, and a failure leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import posix_ipc
import pytest

from emu.errors import MissingPrerequisite, UserError
from emu.ipc.segments import (
    SHM,
    Segment,
    machines,
    object_name,
    objects_of,
    unlink_objects,
    unlink_segment,
    unlink_semaphore,
)
from emu.ipc.semaphores import Wakeup
from tests.processes import Forked


@pytest.fixture
def name(machine_name: str) -> str:
    """The name of one segment of a machine."""
    return object_name(machine_name, "ram")


def test_new_segment_is_zero_and_sparse(name: str) -> None:
    """A segment has its size at once, reads as zero, and takes no memory until it is touched."""
    segment = Segment.create(name, 1 << 30)

    assert segment.size == len(segment.memory) == 1 << 30
    assert os.fstat(segment.fd).st_blocks == 0
    assert segment.memory[:64] == bytes(64)
    segment.close()


def test_reserved_part_has_its_memory_now(name: str) -> None:
    """What may not fail at its first touch is there from the start."""
    segment = Segment.create(name, 1 << 20, reserved=8192)

    assert os.fstat(segment.fd).st_blocks * 512 == 8192
    segment.close()


def test_attached_segment_shares_the_bytes(name: str) -> None:
    """What one mapping stores the other loads, plainly and atomically."""
    ours = Segment.create(name, 4096)
    theirs = Segment.attach(name)

    theirs.memory[0:4] = b"\x01\x02\x03\x04"
    ours.view.store_u64(8, 5)

    assert ours.view.load_u32(0) == 0x04030201
    assert theirs.view.load_u64(8) == 5
    ours.close()
    theirs.close()


def test_second_mapping_is_one_for_all_and_outlives_the_segment(name: str) -> None:
    """Views of it that nobody gives back hold up no `close`; without any it goes with the segment."""
    segment = Segment.create(name, 4096)
    looked, again = memoryview(segment.apart), memoryview(segment.apart)
    segment.memory[0] = 7
    assert looked.obj is again.obj

    segment.close()

    assert (looked[0], again[0]) == (7, 7)
    before = len(list(Path("/proc/self/fd").iterdir()))
    other = Segment.attach(name)
    assert len(other.apart) == 4096
    other.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_process_that_attached_takes_no_name_with_it(name: str) -> None:
    """An attaching process ends without unlinking the segment (Python's own shared memory would)."""
    segment = Segment.create(name, 4096)

    with Forked(lambda: Segment.attach(name).close()):
        pass

    assert (SHM / name[1:]).exists()
    segment.close()


def test_existing_name_is_refused_and_stays(name: str) -> None:
    """A second machine of the name is refused, and the first one's segment lives on."""
    segment = Segment.create(name, 4096)
    segment.memory[0] = 7

    with pytest.raises(UserError, match="exists already; `vmbus-emu clean`"):
        Segment.create(name, 4096)

    attached = Segment.attach(name)
    assert attached.memory[0] == 7
    attached.close()
    segment.close()


def test_missing_name_is_refused(name: str) -> None:
    """Nobody attaches to a machine that is not there."""
    with pytest.raises(UserError, match="no such machine is running"):
        Segment.attach(name)


def test_segment_without_a_size_is_still_being_made(name: str) -> None:
    """Between making the name and giving it a size an attacher is told to try again."""
    shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX)
    shm.close_fd()

    with pytest.raises(UserError, match="still being made"):
        Segment.attach(name)


@pytest.mark.parametrize("reserved", [0, 1 << 62])
def test_size_that_cannot_be_had_leaves_no_name(machine_name: str, name: str, reserved: int) -> None:
    """A size beyond what the file system takes is one line, and the name is free again."""
    size = 1 << 62

    with pytest.raises(MissingPrerequisite, match=r"4398046511104 MiB.*; (free some of it|ask for less RAM)"):
        Segment.create(name, size, reserved=reserved)

    assert objects_of(machine_name) == []


def test_directory_that_nobody_may_look_into_has_nothing_of_ours(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A failure to make the first segment there is told as such, not as one to tidy up behind it."""

    def shut(_path: Path) -> None:
        raise PermissionError(13, "Permission denied", "/dev/shm")

    monkeypatch.setattr(Path, "iterdir", shut)

    assert (objects_of(name), unlink_objects(name)) == ([], 0)


def test_a_name_that_nothing_can_have_is_one_of_no_machine() -> None:
    """The system refuses it in words of its own; who typed it is told what of any other name."""
    with pytest.raises(UserError, match="no such machine is running"):
        Segment.attach("/vmbus-emu.../x.control")


def test_interrupt_while_making_leaves_no_name(machine_name: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two steps of the making is no reason to leave something."""

    def interrupt(_fd: int, _size: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.ftruncate", interrupt)

    with pytest.raises(KeyboardInterrupt):
        Segment.create(name, 4096)

    assert objects_of(machine_name) == []


def test_refusal_of_the_system_is_a_missing_prerequisite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission in /dev/shm is something this computer lacks."""

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise posix_ipc.PermissionsError("No permission")

    monkeypatch.setattr(posix_ipc, "SharedMemory", refuse)

    with pytest.raises(MissingPrerequisite, match="mounted and writable"):
        Segment.create(name, 4096)
    with pytest.raises(UserError, match="another user's"):
        Segment.attach(name)


def test_unlink_says_whether_there_was_something(name: str) -> None:
    """Unlinking twice is no error; the second time there was nothing."""
    Segment.create(name, 4096).close()
    Wakeup.create(name).close()

    assert (unlink_segment(name), unlink_segment(name)) == (True, False)
    assert (unlink_semaphore(name), unlink_semaphore(name)) == (True, False)


def test_objects_are_those_of_one_machine(machine_name: str) -> None:
    """A machine whose name begins like another's keeps its objects when that one is swept."""
    longer = f"{machine_name}x"
    for machine in (machine_name, longer):
        Segment.create(object_name(machine, "control"), 4096).close()
        Wakeup.create(object_name(machine, "host")).close()
    try:
        found = objects_of(machine_name)
        count = unlink_objects(machine_name)

        assert found == [f"sem.vmbus-emu.{machine_name}.host", f"vmbus-emu.{machine_name}.control"]
        assert count == 2
        assert len(objects_of(longer)) == 2
        assert longer in machines()
        assert machine_name not in machines()
    finally:
        unlink_objects(longer)
