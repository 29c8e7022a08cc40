"""Looking into a machine that runs, without disturbing it, and into one that died."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.commands import call, objects, report, wait_for
from tools import cli

NAME = f"t-look-{os.getpid()}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of its own, and a machine with two echo devices that runs meanwhile; the last test ends it."""
    home = tmp_path_factory.mktemp("look")
    done = call(home, "run", "--detach", "--name", NAME, "--device", "echo:2")
    assert done.returncode == 0, done.stderr
    yield home
    if objects(NAME):
        assert call(home, "stop", "--machine", NAME).returncode == 0
    assert objects(NAME) == []


@pytest.fixture(autouse=True)
def same_signals(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """State is the test's own; what the command line does with signals ends with the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command line, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(arguments))
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def inspected(path: str) -> Any:
    """What is at a path of the machine's tree."""
    done = here("inspect", path, "--machine", NAME, "--json")
    assert done.returncode == 0, done.stderr
    return report(done.stdout)["value"]


def test_machine_is_inspected_while_it_runs() -> None:
    """Both ends agree on a channel, the registers are those of a Linux guest, every page lent is one granted."""
    channel = inspected("channels/1")

    assert (channel["host"]["state"], channel["guest"]["state"]) == ("OPEN", "OPENED")
    assert channel["host"]["ring_gpadl"] == channel["guest"]["ringbuffer_gpadlhandle"]
    assert [one["state"] for one in channel["gpadls"].values()] == ["ACCEPTED"]
    assert inspected("vps/1/sint/2/vector") == "0xf3"
    assert inspected("vps/1/simp/gpa") == inspected("vps/1/guest/synic_message_page_gpa")
    assert inspected("connection/host/offers") == 2
    assert inspected("refused") == {}


def test_leaf_is_printed_alone_and_a_wrong_path_is_one_line() -> None:
    """For scripts: the value; for people: what is near, exit status 2."""
    leaf = here("inspect", "channels/2/host/state", "--machine", NAME)
    wrong = here("inspect", "channels/2/host/sate", "--machine", NAME)

    assert leaf.stdout == "OPEN\n"
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1 and "channels/2/host/state" in wrong.stderr


def test_machine_that_died_is_inspected_from_its_record(home: Path) -> None:
    """A detached machine loses a processor: `stop` and `ps` say where its state is, and that shows who died."""
    os.kill(int(inspected("processes/vcpu1/pid")), signal.SIGKILL)
    wait_for(lambda: not objects(NAME), f"{NAME} to be gone")
    record = next((home / "state" / "vmbus-emu" / "crashes").glob(f"*-{NAME}.json"))

    stop, ps = here("stop", "--machine", NAME), here("ps", "--json")
    saved = here("inspect", "--from", str(record), "processes/vcpu1/state")

    assert stop.returncode == 2 and str(record) in stop.stderr
    assert str(record) in [one["crash_record"] for one in report(ps.stdout)["died"]]
    assert (saved.returncode, saved.stdout) == (0, "DEAD\n")
