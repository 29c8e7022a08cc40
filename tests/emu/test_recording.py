"""Recordings: written while the machine runs, read by themselves, and read as far as they are whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emu.control import ActorKind
from emu.errors import UserError
from emu.machine import Machine
from emu.recording import MAGIC, RecordedActor, Recording, RecordingError, RecordingWriter, chunk_of
from emu.tracing import (
    CAPACITY,
    E_EOM,
    E_OFFER,
    E_POST,
    EVENTS,
    NO_VP,
    RECORD_BYTES,
    WRITTEN_AT_ONCE,
    Context,
    Recorder,
)
from tests.emu.conftest import MakeMachine
from tests.processes import Crowd, Forked


@pytest.fixture
def machine(make_machine: MakeMachine) -> Machine:
    """A machine that records."""
    machine = make_machine(vp_indices=[1, 0])
    machine.control.set_recording()
    return machine


def recorder(machine: Machine, kind: ActorKind, name: str, *, cpu: int = 0, vp: int = NO_VP) -> Recorder:
    """An actor of the machine that records."""
    row, _counters = machine.enlist(kind, name, cpu=cpu)
    made = machine.recorder(row, vp=vp, context=Context.TASK)
    assert made is not None
    return made


def write(machine: Machine, path: Path, record: Callable[[], None]) -> RecordingWriter:
    """Record something into a file, whole."""
    writer = RecordingWriter(path, machine)
    record()
    writer.close()
    return writer


# -- whole recordings -----------------------------------------------------------------------------


def test_record_is_read_back_with_names(machine: Machine, tmp_path: Path) -> None:
    """Actor, processor, context, event and arguments of a record come back by name."""
    vcpu = recorder(machine, ActorKind.VCPU, "vcpu1", cpu=1, vp=1)
    path = tmp_path / "r"
    write(machine, path, lambda: vcpu.record(E_POST, 4, 14, 240, 0))

    with Recording(path) as recording:
        (record,) = recording.records()
        assert record.actor == RecordedActor(0, "vcpu1", "VCPU", os.getpid(), 1)
        assert (record.seq, record.vp, record.context, record.event.name) == (0, 1, "TASK", "post")
        arguments = {"connection_id": 4, "msgtype": 14, "size": 240, "status": 0, "serial": 0, "claimer": 0}
        assert record.arguments == record.shown == arguments
        assert recording.head["began_ns"] < record.t_ns
        assert (recording.machine, recording.head["vp_indices"]) == (machine.name, [1, 0])
        assert (recording.damage, recording.count, recording.dropped) == ("", 1, 0)


def test_actor_without_a_processor_has_none(machine: Machine, tmp_path: Path) -> None:
    """The hypervisor is no VP."""
    host = recorder(machine, ActorKind.HYPERVISOR, "hypervisor")
    write(machine, tmp_path / "r", lambda: host.record(E_EOM))

    with Recording(tmp_path / "r") as recording:
        (record,) = recording.records()
    assert record.vp is None


def test_records_of_all_actors_come_by_time(machine: Machine, tmp_path: Path) -> None:
    """Two actors that took turns are read in those turns, over several polls."""
    actors = [recorder(machine, ActorKind.VCPU, f"vcpu{cpu}", cpu=cpu) for cpu in range(2)]
    writer = RecordingWriter(tmp_path / "r", machine)
    for turn in range(100):
        actors[turn % 2].record(E_EOM, turn)
        if turn % 30 == 29:
            writer.poll()
    writer.close()

    with Recording(tmp_path / "r") as recording:
        records = list(recording.records())
    assert [record.values[0] for record in records] == list(range(100))
    assert [record.actor.name for record in records[:3]] == ["vcpu0", "vcpu1", "vcpu0"]
    assert [record.seq for record in records if record.actor.name == "vcpu1"] == list(range(50))


def test_empty_recording_is_whole(machine: Machine, tmp_path: Path) -> None:
    """Nothing happened, and the file says so."""
    write(machine, tmp_path / "r", lambda: None)

    with Recording(tmp_path / "r") as recording:
        assert (recording.damage, recording.count, list(recording.records())) == ("", 0, [])


def test_counts_agree_with_the_records(machine: Machine, tmp_path: Path) -> None:
    """The quick count by event is that of reading everything."""
    one, two = (recorder(machine, ActorKind.VCPU, f"vcpu{cpu}", cpu=cpu) for cpu in range(2))

    def record() -> None:
        for number, event in enumerate(EVENTS.values()):
            for _ in range(number % 5):
                (one if number % 2 else two).record(event.number)

    writer = write(machine, tmp_path / "r", record)

    with Recording(tmp_path / "r") as recording:
        names = [record.event.name for record in recording.records()]
        counts = recording.counts()
    assert counts == {name: names.count(name) for name in set(names)}
    assert counts.total() == recording.count == writer.records == len(names)


def test_dropped_records_are_counted(machine: Machine, tmp_path: Path) -> None:
    """What a ring lost before the writer came is known from the sequences, and to the writer."""
    vcpu = recorder(machine, ActorKind.VCPU, "vcpu0")
    writer = RecordingWriter(tmp_path / "r", machine)
    for burst in (10, CAPACITY + 100, 10):
        for _ in range(burst):
            vcpu.record(E_EOM)
        writer.poll()
    writer.close()

    with Recording(tmp_path / "r") as recording:
        assert recording.dropped == writer.dropped == 100 + WRITTEN_AT_ONCE
        assert recording.count == CAPACITY + 20 - WRITTEN_AT_ONCE
        assert recording.damage == ""


def test_poll_says_how_much_came(machine: Machine, tmp_path: Path) -> None:
    """Each poll drains once; closing twice is no error."""
    vcpu = recorder(machine, ActorKind.VCPU, "vcpu0")
    writer = RecordingWriter(tmp_path / "r", machine)
    vcpu.record(E_EOM)
    vcpu.record(E_EOM)

    assert (writer.poll(), writer.poll()) == (2, 0)
    writer.close()
    writer.close()


def test_real_processes_are_recorded_whole(machine: Machine, tmp_path: Path) -> None:
    """Three processes record while the writer polls: every record is in the file, or counted as dropped."""
    each = 3_000
    done = machine.control.view.cell_u32(2048)

    def work(who: int) -> None:
        mine = recorder(machine, ActorKind.VCPU, f"vcpu{who}", cpu=who)
        for number in range(each):
            mine.record(E_OFFER, who, number)
        done.fetch_add(1)

    writer = RecordingWriter(tmp_path / "r", machine)
    with Crowd() as crowd:
        for who in range(3):
            crowd.start(partial(work, who))
        while done.load() < 3:
            writer.poll()
    writer.close()

    with Recording(tmp_path / "r") as recording:
        assert recording.damage == ""
        assert recording.count + recording.dropped == 3 * each
        times = [record.t_ns for record in recording.records()]
        assert times == sorted(times)
        assert {actor.name for actor in recording.actors.values()} == {"vcpu0", "vcpu1", "vcpu2"}


def test_recording_of_an_older_program_is_read_by_its_own_table(machine: Machine, tmp_path: Path) -> None:
    """Names come from the file: a number that it does not explain is still a record."""
    vcpu = recorder(machine, ActorKind.VCPU, "vcpu0")
    vcpu.record(E_EOM, 1, 2, 3)
    vcpu.record(E_OFFER, 7)
    path = tmp_path / "r"
    head: dict[str, object] = {"contexts": {4: "SOMEWHERE"}, "events": [[E_EOM, "end_of_message", ["vp"]]]}

    def other_head(_machine: Machine) -> dict[str, object]:
        return head

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emu.recording.head_of", other_head)
        write(machine, path, lambda: None)

    with Recording(path) as recording:
        first, second = recording.records()
    assert (first.event.name, first.arguments, first.context) == ("end_of_message", {"vp": 1}, "SOMEWHERE")
    assert (second.event.name, second.arguments["a"]) == (f"event_{E_OFFER}", 7)


# -- files that are none, or not whole ------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"VMBUSRE", b"#!/bin/sh\necho hello\n", bytes(64)])
def test_file_that_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    """One line that names the file and says how recordings are made."""
    path = tmp_path / "x"
    path.write_bytes(content)

    with pytest.raises(RecordingError, match=r"x is no recording; `vmbus-emu run --record FILE`"):
        Recording(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    """A newer format is named, not guessed at."""
    path = tmp_path / "x"
    path.write_bytes(MAGIC + (3).to_bytes(4, "little") + bytes(4))

    with pytest.raises(RecordingError, match="format 3; this program reads 2: record it again"):
        Recording(path)


def test_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    """Missing, a directory, a device: one line, with a way out where the name alone does not show it."""
    with pytest.raises(RecordingError, match="/dev/null is not a regular file; give one that `vmbus-emu run --record"):
        Recording(Path("/dev/null"))
    with pytest.raises(RecordingError, match="cannot read .*missing: No such file.*; give a file that `vmbus-emu run"):
        Recording(tmp_path / "missing")
    with pytest.raises(RecordingError, match="cannot read .*: Is a directory"):
        Recording(tmp_path)


@pytest.mark.timeout(20)
def test_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """Nobody may ever write into it; `check`, `trace` and the others do not wait for that."""
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(RecordingError, match="pipe is not a regular file"):
        Recording(tmp_path / "pipe")


def test_path_that_cannot_be_written_is_refused(machine: Machine, tmp_path: Path) -> None:
    """The user's to mend, before anything is recorded."""
    with pytest.raises(UserError, match="cannot record into .*: No such file or directory; choose a file"):
        RecordingWriter(tmp_path / "no" / "where", machine)


def test_full_disk_is_one_line(machine: Machine) -> None:
    """A file system without room is told where it happens, once; what comes behind it is quiet."""
    with pytest.raises(UserError, match="cannot record into /dev/full: No space left"):
        RecordingWriter(Path("/dev/full"), machine)


def test_disk_that_fills_up_is_told_once(machine: Machine, tmp_path: Path) -> None:
    """The poll that fails says so; the polls and the close behind it do nothing."""
    vcpu = recorder(machine, ActorKind.VCPU, "vcpu0")
    writer = RecordingWriter(tmp_path / "r", machine)
    vcpu.record(E_EOM)
    vars(writer)["_file"].close()

    with Path("/dev/full").open("wb") as full:
        vars(writer)["_file"] = full
        with pytest.raises(UserError, match="No space left"):
            writer.poll()
        assert writer.poll() == 0
        writer.close()
        assert full.closed


@pytest.fixture
def sample(machine: Machine, tmp_path: Path) -> bytes:
    """A small recording of two actors, in several chunks."""
    one, two = (recorder(machine, ActorKind.VCPU, f"vcpu{cpu}", cpu=cpu) for cpu in range(2))
    writer = RecordingWriter(tmp_path / "sample", machine)
    for number in range(4):
        one.record(E_EOM, number)
        two.record(E_OFFER, number)
        writer.poll()
    writer.close()
    return (tmp_path / "sample").read_bytes()


def test_recording_cut_at_any_byte_is_read_as_far_as_it_goes(sample: bytes, tmp_path: Path) -> None:
    """Whatever is cut off: whole records are read, in order, and the damage is said with its place.

    Where not even the head is whole it is refused in one line.
    """
    path = tmp_path / "cut"
    before = 0
    head_ends = 36 + int.from_bytes(sample[24:28], "little")
    for length in range(16, head_ends):
        path.write_bytes(sample[:length])
        with pytest.raises(RecordingError, match=r"cut was cut short .*; `vmbus-emu run --record FILE` makes another"):
            Recording(path)
    for length in range(head_ends, len(sample)):
        path.write_bytes(sample[:length])
        with Recording(path) as recording:
            count = len(list(recording.records()))
            assert recording.damage.startswith(f"{path}: at byte ")
            assert f"{count} records" in recording.damage
        assert before <= count <= 8
        before = count
    assert before == 8


def test_killed_writer_leaves_what_it_drained(machine: Machine, tmp_path: Path) -> None:
    """kill -9 of the launcher in the middle: the file is read up to its last poll."""
    path = tmp_path / "r"
    polled = machine.control.view.cell_u32(2048)

    def launcher() -> None:
        vcpu = recorder(machine, ActorKind.VCPU, "vcpu0")
        writer = RecordingWriter(path, machine)
        for number in range(100):
            vcpu.record(E_EOM, number)
        writer.poll()
        vcpu.record(E_EOM, 100)
        polled.store(1)
        signal.pause()

    with Forked(launcher) as killed:
        while not polled.load():
            os.sched_yield()
        killed.kill()

    with Recording(path) as recording:
        assert [record.values[0] for record in recording.records()] == list(range(100))
        assert "without its TAIL" in recording.damage


def test_tail_that_disagrees_is_damage(sample: bytes, tmp_path: Path) -> None:
    """A file that lost chunks in the middle does not pass as whole."""
    first = sample.index(b"RECS")
    path = tmp_path / "hole"
    path.write_bytes(sample[:first] + sample[first + 20 + RECORD_BYTES :])

    with Recording(path) as recording:
        assert "8 records were written, 7 are there" in recording.damage


def test_unknown_chunk_is_passed_over(sample: bytes, tmp_path: Path) -> None:
    """A later program may add kinds of chunks."""
    first = sample.index(b"RECS")
    path = tmp_path / "more"
    path.write_bytes(sample[:first] + chunk_of(b"MORE", 0, b"12345") + sample[first:])

    with Recording(path) as recording:
        assert (recording.damage, recording.count) == ("", 8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_scribbled_recording_never_breaks_its_reader(sample: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes anywhere: refused in one line, or read as far as it is what was written, and not a record further."""
    (tmp_path / "whole").write_bytes(sample)
    with Recording(tmp_path / "whole") as whole:
        written = {(record.actor, record.seq): record for record in whole.records()}
    content = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=20))
        content[at : at + len(patch)] = patch
    path = tmp_path / "scribbled"
    path.write_bytes(content)
    try:
        with Recording(path) as recording:
            records = list(recording.records())
            assert len(records) == recording.count == recording.counts().total()
            assert all(written[record.actor, record.seq] == record for record in records)
            assert recording.damage or len(records) == len(written)
            assert recording.dropped >= 0
    except RecordingError as refusal:
        assert "\n" not in str(refusal)


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(-5, 300), st.text(max_size=5), st.binary(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
        max_leaves=10,
    )
)
def test_any_map_in_a_chunk_is_survived(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    """msgpack of the wrong shape is damage, or no recording at all; no other exception."""
    path = tmp_path_factory.getbasetemp() / "shapes"
    payload = msgpack.packb(content)
    chunks = b""
    for kind in (b"HEAD", b"ACTR", b"TAIL"):
        chunks += chunk_of(kind, 0, payload)
    path.write_bytes(MAGIC + (2).to_bytes(4, "little") + bytes(4) + chunks)

    try:
        with Recording(path) as recording:
            assert recording.damage
            assert list(recording.records()) == []
    except RecordingError as refusal:
        assert "before the end of its head" in str(refusal)


def test_recording_that_nobody_asked_for_is_given_up_where_it_is_too_large(machine: Machine, tmp_path: Path) -> None:
    """Its file is emptied, it says why, and whoever drains or closes it need not know."""
    path = tmp_path / "own.rec"
    trace = recorder(machine, ActorKind.HYPERVISOR, "hypervisor")
    writer = RecordingWriter(path, machine, most_bytes=1 << 20)
    for _ in range(3):
        for _ in range((1 << 19) // RECORD_BYTES):
            trace.record(E_EOM, 0, 2)
        writer.poll()

    assert writer.given_up == "it took more than 1 MiB"
    writer.note({"late": 1})
    assert writer.poll() == 0
    writer.close()
    assert path.stat().st_size == 0


def test_recording_that_nobody_asked_for_is_given_up_where_it_cannot_be_written(machine: Machine) -> None:
    """A full disk ends it, not the command; whoever asked for the file is told."""
    trace = recorder(machine, ActorKind.HYPERVISOR, "hypervisor")
    own = RecordingWriter(Path("/dev/full"), machine, most_bytes=1 << 20)
    trace.record(E_EOM, 0, 2)
    own.close()

    assert own.given_up == "it could not be written: No space left on device"
    with pytest.raises(UserError, match="No space left on device"):
        RecordingWriter(Path("/dev/full"), machine)
