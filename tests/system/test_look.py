"""Looking into a machine that runs, without disturbing it, and into one that died."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.commands import COMMAND, call, environment, objects, report, wait_for
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


def test_one_sample_is_plain_through_a_pipe() -> None:
    """Three tables for `awk`: every channel, processor and process of the machine."""
    done = here("top", "--once", "--machine", NAME, "--interval", "0.2", "--sort", "class")
    tables = [[line.split() for line in table.splitlines()] for table in done.stdout.split("\n\n")]

    assert done.returncode == 0, done.stderr
    assert [table[0][0] for table in tables] == ["relid", "vp", "process"]
    assert sorted(row[0] for row in tables[0][1:]) == ["1", "2"]
    assert {"hypervisor", "vcpu0", "vcpu1", "workqueue"} <= {row[0] for row in tables[2][1:]}


def test_leaf_is_printed_alone_and_a_wrong_path_is_one_line() -> None:
    """For scripts: the value; for people: what is near, exit status 2."""
    leaf = here("inspect", "channels/2/host/state", "--machine", NAME)
    wrong = here("inspect", "channels/2/host/sate", "--machine", NAME)

    assert leaf.stdout == "OPEN\n"
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1 and "channels/2/host/state" in wrong.stderr


class Screen:
    """A command on a terminal of 80 by 24, and what it wrote there."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self._leader, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 80))
        self.before = termios.tcgetattr(terminal)
        self._terminal = terminal
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=home,
            env={**environment(home), "TERM": "xterm", "COLUMNS": "80"},
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.written = ""
        # A read may end in the middle of a character.
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def wait_for(self, text: str) -> None:
        """Read until the text was written since the last look."""

        def there() -> bool:
            ready, _, _ = select.select([self._leader], [], [], 0.05)
            self.written += self._decode(os.read(self._leader, 1 << 16)) if ready else ""
            assert ready or self.process.poll() is None, self.process.communicate()
            return text in self.written

        wait_for(there, f"{text!r} on the screen")
        self.written = self.written.partition(text)[2]

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._leader, keys.encode())

    def end(self) -> tuple[int, str]:
        """Its exit status and what it said; the screen was given back and the terminal is as it was."""
        self.wait_for("\x1b[?1049l")
        said = self.process.communicate(timeout=30)[1].decode()
        assert termios.tcgetattr(self._terminal) == self.before
        return self.process.returncode, said

    def close(self) -> None:
        """Whatever a test does, the command does not outlive it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate(timeout=30)
        os.close(self._leader)
        os.close(self._terminal)


@contextlib.contextmanager
def on_screen(home: Path, *arguments: str) -> Iterator[Screen]:
    """A command on a terminal of its own."""
    screen = Screen(home, *arguments)
    try:
        yield screen
    finally:
        screen.close()


def test_top_is_used_by_keys(home: Path) -> None:
    """It lists both channels, sorts, filters, pauses, and quits; the terminal is given back."""
    with on_screen(home, "top", "--machine", NAME, "--interval", "0.2") as screen:
        screen.wait_for("2 echo")
        screen.press("s")
        screen.wait_for("by class")
        screen.press("/1 ech\r")
        screen.wait_for("of 2, filter 1 ech")
        screen.press("p")
        screen.wait_for("PAUSED")
        screen.press("q")

        assert screen.end() == (0, "")


def test_top_gives_the_terminal_back_after_a_signal(home: Path) -> None:
    """SIGTERM: exit status 143, nothing said, the terminal as before."""
    with on_screen(home, "top", "--machine", NAME) as screen:
        screen.wait_for("2 echo")
        screen.process.terminate()

        assert screen.end() == (143, "")


def test_machine_that_died_is_inspected_from_its_record(home: Path) -> None:
    """A detached machine loses a processor under `top`: that, `stop` and `ps` say where its state is."""
    with on_screen(home, "top", "--machine", NAME, "--interval", "0.2") as screen:
        screen.wait_for("2 echo")
        os.kill(int(inspected("processes/vcpu1/pid")), signal.SIGKILL)
        status, said = screen.end()
    wait_for(lambda: not objects(NAME), f"{NAME} to be gone")
    record = next((home / "state" / "vmbus-emu" / "crashes").glob(f"*-{NAME}.json"))

    stop, ps = here("stop", "--machine", NAME), here("ps", "--json")
    saved = here("inspect", "--from", str(record), "processes/vcpu1/state")

    assert (status, str(record) in said) == (4, True)
    assert stop.returncode == 2 and str(record) in stop.stderr
    assert str(record) in [one["crash_record"] for one in report(ps.stdout)["died"]]
    assert (saved.returncode, saved.stdout) == (0, "DEAD\n")


@pytest.mark.parametrize("victim", ["launcher", "zygote", "hypervisor", "vcpu0", "workqueue"])
def test_every_process_that_is_killed_leaves_record_and_flight(tmp_path: Path, victim: str) -> None:
    """The launcher as well: who sweeps behind it writes them. The dead are dead in it, and both ends are there."""
    name = f"t-kill-{os.getpid()}"
    done = call(tmp_path, "run", "--detach", "--name", name, "--device", "echo:1", "--flight", "5")
    assert done.returncode == 0, done.stderr
    pid = call(tmp_path, "inspect", f"processes/{victim}/pid", "--machine", name).stdout
    os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: not objects(name), f"{name} to be gone")
    state = tmp_path / "state" / "vmbus-emu"
    (record,), (flight,) = state.glob(f"crashes/*-{name}.json"), state.glob(f"flights/*-{name}.rec")

    saved = json.loads(call(tmp_path, "inspect", "--from", str(record), "--json").stdout)["value"]
    checked = call(tmp_path, "check", str(flight))

    assert saved["processes"][victim]["state"] == "DEAD"
    assert (saved["channels"]["1"]["host"]["state"], saved["channels"]["1"]["guest"]["state"]) == ("OPEN", "OPENED")
    assert checked.returncode == 0 and " 0 broken" in checked.stdout
    assert str(record) in call(tmp_path, "ls", "--machine", name).stderr
