"""`doctor`: each check by itself, and what the whole prints and returns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import doctor
from tools.doctor import ABSENT, OK, WEAK, Finding
from tools.exit_status import ExitStatus

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def test_doctor_reports_every_check(run_cli: RunCli) -> None:
    """The JSON has a line for each check, and the status tells whether a machine can run."""
    done = run_cli("doctor", "--json")

    report = json.loads(done.stdout)
    assert report["schema"] == {"name": "vmbus-emu.doctor", "version": 1}
    assert len(report["checks"]) == len(doctor.CHECKS)
    assert done.returncode == (ExitStatus.FINE if report["ready"] else ExitStatus.MISSING)
    assert {check["status"] for check in report["checks"]} <= {OK, WEAK, ABSENT}


def test_doctor_is_plain_through_a_pipe(run_cli: RunCli) -> None:
    """Through a pipe it is one aligned line a check, without an escape sequence."""
    lines = run_cli("doctor").stdout.splitlines()

    assert lines[0].split() == ["what", "status", "found", "what", "to", "do"]
    assert len(lines) == 1 + len(doctor.CHECKS)
    assert all(line.isprintable() for line in lines)


def test_doctor_looks_for_the_readers_of_what_we_write() -> None:
    """Each is named, absent or not, and is no reason against a machine."""
    found = {finding.name: finding for finding in doctor.examine()}

    assert {"trace-cmd", "tshark", "node", "chromium"} == doctor.READERS.keys() <= found.keys()
    assert not any(found[name].necessary for name in doctor.READERS)


def test_a_reader_that_is_missing_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is for, and the line that installs it."""
    monkeypatch.setattr(shutil, "which", lambda _name: None)

    found = next(one for one in doctor.examine() if one.name == "tshark")

    assert (found.status, found.cure) == (ABSENT, "optional, to read `trace --to pcapng`: apt install tshark")


def test_this_computer_has_what_the_tests_need() -> None:
    """What is necessary is there, or no other test here means anything."""
    assert [finding for finding in doctor.examine() if finding.necessary and finding.status == ABSENT] == []


def test_doctor_leaves_nothing_in_shared_memory() -> None:
    """The semaphore that was tried is gone."""
    doctor.semaphores()

    assert list(Path("/dev/shm").glob(f"*doctor-{os.getpid()}*")) == []


def test_missing_necessity_is_status_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One necessary thing that is absent makes the whole status 3 and says what to do."""
    absent = Finding("shared memory", ABSENT, "gone", "mount it", necessary=True)
    monkeypatch.setattr(doctor, "examine", lambda: [absent])

    status = doctor.doctor.main(["--json"], standalone_mode=False)

    assert status == ExitStatus.MISSING
    assert json.loads(capsys.readouterr().out)["checks"][0]["cure"] == "mount it"


def test_missing_option_is_fine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What only some command wants may be absent."""
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("fuse", ABSENT, "no", "optional")])

    assert doctor.doctor.main([], standalone_mode=False) == ExitStatus.FINE
    assert "optional" in capsys.readouterr().out


class Space:
    """What statvfs says of a file system with `free` bytes."""

    f_frsize = 4096

    def __init__(self, free: int) -> None:
        self.f_blocks = self.f_bavail = free // 4096


@pytest.mark.parametrize(
    ("free", "status"),
    [
        (0, ABSENT),
        (doctor.LEAST_SHM_BYTES - 4096, ABSENT),
        (doctor.LEAST_SHM_BYTES, WEAK),
        (doctor.GOOD_SHM_BYTES, OK),
    ],
)
def test_shared_memory_is_judged_by_its_room(monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    """A full tmpfs is as good as none, a small one will do for little."""
    monkeypatch.setattr(os, "statvfs", lambda _path: Space(free))

    finding = doctor.shared_memory()

    assert finding.status == status
    assert (finding.cure == "") is (status == OK)


def test_shared_memory_that_is_not_mounted_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No /dev/shm at all is told with the cure."""
    monkeypatch.setattr(doctor, "SHM", tmp_path / "shm")

    finding = doctor.shared_memory()

    assert (finding.status, finding.necessary) == (ABSENT, True)
    assert "mount a tmpfs" in finding.cure


def test_namespaces_that_are_refused_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that says no to user namespaces is quoted, and it is no necessity."""
    refused = subprocess.CompletedProcess(["unshare"], 1, "", "unshare: Operation not permitted\n")
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/unshare")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: refused)

    finding = doctor.user_namespaces()

    assert (finding.status, finding.necessary) == (ABSENT, False)
    assert finding.found == "unshare: Operation not permitted"


def test_single_core_is_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core works, but its figures mean little."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})

    assert doctor.cores().status == WEAK


def test_outside_command_is_found_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program counts when it is on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.command("some-program", "for tests", "some-package")
    assert check() == Finding("some-program", ABSENT, "not found", "optional, for tests: apt install some-package")

    program = tmp_path / "some-program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    assert check() == Finding("some-program", OK, str(program))
