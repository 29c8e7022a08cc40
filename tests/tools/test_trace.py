"""`vmbus-emu trace`: a recording as JSON Lines, whole, agreeing with the recording's own count; the command itself."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emu.recording import RecordedActor, Recording, TraceRecord
from emu.tracing import (
    E_EOM,
    E_FAULT,
    E_LOCK,
    E_POST,
    E_REFUSED,
    E_RELEASE,
    E_TASKLET_RUN,
    E_VMBUS_ONOFFER,
    E_WORK_QUEUE,
    EVENTS,
    refused_words,
)
from tests.tools.recordings import record_every_event
from tools.event_names import ENUMS
from tools.exit_status import ExitStatus
from tools.trace import as_json

RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def recording_path(tmp_path: Path) -> Path:
    """A recording of every event once, by two actors in turn."""
    return record_every_event(tmp_path / "boot.rec")


def record(event: int, *values: int) -> dict[str, Any]:
    """One record as its JSON object."""
    spec = next(spec for spec in EVENTS.values() if spec.number == event)
    actor = RecordedActor(3, "vcpu1", "VCPU", 77, 1)
    words = [*values, *[0] * (6 - len(values))]
    return as_json(TraceRecord(1_000, 9, actor, 0, "ISR", spec, spec.unpack(words)))


def test_record_is_one_object() -> None:
    """Time, sequence, actor, processor, context and event; the arguments by name, apart from those."""
    assert record(E_EOM, 1, 2, 3) == {
        "t_ns": 1_000,
        "seq": 9,
        "actor": "vcpu1",
        "vp": 0,
        "context": "isr",
        "event": "eom",
        "args": {"position": 1, "sint": 2, "delivered": 3},
    }


def test_argument_may_be_called_like_a_column() -> None:
    """The actor that a lock belongs to does not replace the actor that recorded it."""
    locked = record(E_LOCK, 5, 6)

    assert (locked["actor"], locked["args"]) == ("vcpu1", {"lock": 5, "actor": 6, "name": ""})


def test_numbers_are_named() -> None:
    """Message types, statuses, tasklets, queues, functions and faults come with their names."""
    assert record(E_POST, 4, 14, 240, 0x13)["args"] == {
        "connection_id": 4,
        "msgtype": 14,
        "msgtype_name": "INITIATE_CONTACT",
        "size": 240,
        "status": 0x13,
        "status_name": "INSUFFICIENT_BUFFERS",
        "serial": 0,
        "claimer": 0,
    }
    assert record(E_TASKLET_RUN, 1)["args"]["tasklet_name"] == "VMBUS_ON_MSG_DPC"
    work = record(E_WORK_QUEUE, 1, 2, 3)["args"]
    assert (work["queue_name"], work["function_name"]) == ("RESCIND", "VMBUS_ADD_CHANNEL_WORK")
    fault = record(E_FAULT, 2, 1)["args"]
    assert (fault["operation_name"], fault["code_name"]) == ("RDMSR", "GENERAL_PROTECTION")


def test_number_without_a_name_stays_a_number() -> None:
    """What a hostile peer sent has no name, and is told all the same."""
    assert record(E_POST, 4, 0xFFFF, 0, 0)["args"]["msgtype"] == 0xFFFF
    assert "msgtype_name" not in record(E_POST, 4, 0xFFFF, 0, 0)["args"]


def test_errno_is_signed_again() -> None:
    """A result below zero was stored modulo 2^64."""
    assert record(E_RELEASE, 1, 2, (1 << 64) - 19)["args"]["ret"] == -19
    assert record(E_RELEASE, 1, 2, 19)["args"]["ret"] == 19


def test_texts_are_texts() -> None:
    """A GUID reads as the kernel prints it, a rule as it is called."""
    offered = record(E_VMBUS_ONOFFER, *EVENTS["vmbus_onoffer"].pack(9, 0, 1, 0x2009, 0x0706050403020100, 0, 0, 0, 3))
    assert offered["args"]["if_type"] == "03020100-0504-0706-0000-000000000000"
    assert (offered["args"]["child_relid"], offered["args"]["sub_idx"]) == (9, 3)
    assert record(E_REFUSED, *refused_words("unknown-msgtype", 99))["args"] == {"rule": "unknown-msgtype", "value": 99}


def test_every_enum_of_the_table_is_known() -> None:
    """What the table names is there, and nothing else."""
    assert {field.enum for spec in EVENTS.values() for field in spec.fields} - {""} == set(ENUMS)


def test_command_prints_json_lines(run_cli: RunCli, recording_path: Path) -> None:
    """Every record of the recording is one line of JSON on stdout, in the order of time."""
    done = run_cli("trace", recording_path, "--to", "json")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert [line["event"] for line in lines] == list(EVENTS)
    assert {line["actor"] for line in lines} == {"vcpu0", "vcpu1"}
    with Recording(recording_path) as recording:
        assert Counter(line["event"] for line in lines) == recording.counts()


def test_record_prints_the_object_of_a_run(run_cli: RunCli, tmp_path: Path) -> None:
    """`record --json`: where the recording is, and how many records are in it; they are."""
    path = tmp_path / "boot.rec"
    done = run_cli("record", "--json", "-o", path, "--device", "echo:1", "--duration", "0")

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"]["name"], told["channels_open"]) == ("vmbus-emu.run", 1)
    assert (told["recording"]["path"], told["recording"]["dropped"]) == (str(path), 0)
    with Recording(path) as recording:
        assert told["recording"]["records"] == sum(recording.counts().values())


def test_command_writes_into_a_file(run_cli: RunCli, recording_path: Path, tmp_path: Path) -> None:
    """`-o OUT`: the same lines there, nothing on stdout."""
    shown = run_cli("trace", recording_path).stdout
    done = run_cli("trace", recording_path, "--to", "json", "-o", tmp_path / "out.jsonl")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out.jsonl").read_text() == shown


def test_json_tells_of_the_file_that_was_written(run_cli: RunCli, recording_path: Path, tmp_path: Path) -> None:
    """One object: format, path and size; on stdout the recording itself would be in its way."""
    done = run_cli("trace", str(recording_path), "--to", "vcd", "-o", "out.vcd", "--json")

    told = json.loads(done.stdout)
    assert (done.returncode, told["schema"]) == (0, {"name": "vmbus-emu.trace", "version": 1})
    assert (told["format"], told["path"], told["damage"]) == ("vcd", "out.vcd", "")
    assert told["bytes"] == (tmp_path / "out.vcd").stat().st_size > 0
    refused = run_cli("trace", str(recording_path), "--json")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)


def test_damaged_recording_is_a_finding(run_cli: RunCli, recording_path: Path) -> None:
    """What is whole is written; stderr says in one line what is not, and the status is 1."""
    recording_path.write_bytes(recording_path.read_bytes()[:-100])
    done = run_cli("trace", recording_path)

    assert done.returncode == ExitStatus.FINDING
    assert len(done.stdout.splitlines()) >= len(EVENTS) - 2
    assert done.stderr.startswith(f"vmbus-emu: {recording_path}: at byte ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("what", ["missing", "text", "directory", "empty", "cut"])
def test_wrong_file_is_one_line(run_cli: RunCli, recording_path: Path, tmp_path: Path, what: str) -> None:
    """A file that is no recording, or only the beginning of its head: exit 2 and one line that names it."""
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "cut":
        path.write_bytes(recording_path.read_bytes()[:100])
    elif what != "missing":
        path.write_text("hello" if what == "text" else "")
    done = run_cli("trace", path)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitStatus.USAGE, "", 1)
    assert str(path) in done.stderr


def test_recording_is_not_overwritten_by_its_export(run_cli: RunCli, recording_path: Path) -> None:
    """Writing into the file that is being read is refused."""
    before = recording_path.read_bytes()
    done = run_cli("trace", recording_path, "-o", recording_path)

    assert done.returncode == ExitStatus.USAGE
    assert f"-o {recording_path}: that is {recording_path} itself" in done.stderr
    assert recording_path.read_bytes() == before


def test_output_that_cannot_be_written_is_one_line(run_cli: RunCli, recording_path: Path) -> None:
    """The user's to mend."""
    done = run_cli("trace", recording_path, "-o", recording_path / "below")

    assert (done.returncode, done.stderr.count("\n")) == (ExitStatus.USAGE, 1)
    assert done.stderr.startswith(f"vmbus-emu: -o {recording_path / 'below'}: Not a directory; choose a file")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(("record", "-o"), "-o"), (("run", "--record"), "--record"), (("latency", "--record"), "--record")],
)
@pytest.mark.parametrize("place", ["no/where.rec", "."])
def test_recording_that_cannot_be_written_is_told_before_the_machine_is_made(
    run_cli: RunCli, arguments: tuple[str, ...], option: str, place: str
) -> None:
    """By the name under which it was given, with the cure; nothing was launched for it."""
    done = run_cli(*arguments, place)

    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    why = "Is a directory" if place == "." else "No such file or directory"
    assert done.stderr == f"vmbus-emu: {option} {place}: {why}; choose a file that can be written\n"
