"""`ps`, `stop`, `clean` and `--machine`: the living are told from the dead, and only those are cleaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emu.errors import DeadlinePassed, UserError
from emu.ipc.segments import objects_of, unlink_objects
from tools import cli, machines
from tools.exit_status import ExitStatus
from tools.machines import Life, chosen_machine, find_machine, machine_names
from tools.stop import stop_machine

SOURCES = Path(__file__).resolve().parents[2]

RunCli = Callable[..., subprocess.CompletedProcess[str]]

LAUNCHER = """
import fcntl, signal, sys
from emu.control import ActorKind, Ready
from emu.ipc.segments import unlink_objects
from emu.layout import MachineState
from emu.machine import Machine

def leave(signum, frame):
    print("asked", flush=True)
    if "stubborn" in sys.argv:
        return
    unlink_objects(name)
    sys.exit(143)

name = sys.argv[1]
machine = Machine.create(name, {}, ram_bytes=1 << 25, vp_indices=[0, 1], cpuid=[])
if "unheld" in sys.argv:
    fcntl.flock(machine.control.segment.fd, fcntl.LOCK_UN)
if "half-made" not in sys.argv:
    machine.control.enlist(ActorKind.LAUNCHER, "launcher")
    machine.set_state(MachineState.RUNNING)
    machine.control.reach(Ready.HOST_RUNS)
signal.signal(signal.SIGTERM, leave)
print("made", flush=True)
while True:
    signal.pause()
"""


class FakeLauncher:
    """A process that made a machine's objects and stands as its launcher, with nothing behind."""

    def __init__(self, name: str, *how: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, name, *how], cwd=SOURCES, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        assert self.stdout.readline() == "made\n"

    def kill(self) -> None:
        """End it without a chance to unlink anything."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it and remove what it left."""
        self.kill()
        self.stdout.close()
        unlink_objects(self.name)


@pytest.fixture
def launcher() -> Iterator[Callable[..., FakeLauncher]]:
    """Starts fake launchers under names of this test; nothing of them is left behind it."""
    started: list[FakeLauncher] = []

    def start(*how: str) -> FakeLauncher:
        started.append(FakeLauncher(f"test-{os.getpid()}-{len(started)}", *how))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_running_machine_is_listed(run_cli: RunCli, launcher: Callable[..., FakeLauncher]) -> None:
    """`ps --json` tells name, state, launcher and how far a machine has come."""
    running = launcher()

    report = json.loads(run_cli("ps", "--json").stdout)

    (row,) = [row for row in report["machines"] if row["name"] == running.name]
    assert report["schema"] == {"name": "vmbus-emu.ps", "version": 1}
    assert row.pop("up_s") >= 0
    assert row == {
        "name": running.name,
        "state": "running",
        "ready": "host_runs",
        "pid": running.process.pid,
        "vcpus": 2,
        "version": None,
        "offers": 0,
        "channels_open": 0,
    }


def test_dead_machine_is_listed_as_dead(run_cli: RunCli, launcher: Callable[..., FakeLauncher]) -> None:
    """A machine whose launcher was killed is dead, and `ps` says so in its columns."""
    dead = launcher()
    dead.kill()

    (line,) = [line for line in run_cli("ps").stdout.splitlines() if line.startswith(f"{dead.name} ")]

    assert line.split() == [dead.name, "dead", str(dead.process.pid), "-", "-", "0/0", "-"]


def test_killed_launcher_that_nobody_reaped_is_dead(launcher: Callable[..., FakeLauncher]) -> None:
    """A zombie runs nothing."""
    dead = launcher()
    dead.process.kill()
    os.waitid(os.P_PID, dead.process.pid, os.WEXITED | os.WNOWAIT)

    assert find_machine(dead.name).life is Life.DEAD


def test_reused_pid_is_no_launcher(launcher: Callable[..., FakeLauncher], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that merely has the launcher's old number does not keep a machine alive: it holds nothing of it."""
    running = launcher("unheld")
    monkeypatch.setattr(machines, "start_time_of", lambda _pid: 1)

    assert find_machine(running.name).life is Life.DEAD


@pytest.mark.parametrize("how", [(), ("half-made",)], ids=" ".join)
def test_machine_of_another_pid_namespace_lives(
    how: tuple[str, ...],
    launcher: Callable[..., FakeLauncher],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A launcher in a container with our /dev/shm is no process here. It holds its machine, and `clean` keeps off."""
    running = launcher(*how)
    monkeypatch.setattr(machines, "start_time_of", lambda _pid: 0)
    monkeypatch.setattr(machines, "in_use", lambda _name: False)

    found = find_machine(running.name)
    assert cli.main(["clean", "--dry-run", "--json"]) == 0
    with pytest.raises(UserError, match="another PID namespace|still being made"):
        stop_machine(running.name, 1.0)
    running.kill()

    assert (found.life, found.up_s) == (Life.MAKING if "half-made" in how else Life.RUNNING, None)
    assert running.name not in json.loads(capsys.readouterr().out)["removed"]
    assert find_machine(running.name).life is Life.DEAD


def test_machine_without_a_table_lives_while_somebody_has_it_open(
    launcher: Callable[..., FakeLauncher],
) -> None:
    """What is half made belongs to its maker; when that is gone, it is dead."""
    maker = launcher("half-made")
    assert find_machine(maker.name).life is Life.MAKING

    maker.kill()

    assert find_machine(maker.name).life is Life.DEAD


def test_clean_removes_what_is_dead_and_nothing_else(run_cli: RunCli, launcher: Callable[..., FakeLauncher]) -> None:
    """Dead machines go whole, running and half-made ones keep every object, other people's files stay."""
    running, making, dead = launcher(), launcher("half-made"), launcher()
    kept = {one.name: objects_of(one.name) for one in (running, making)}
    left = len(objects_of(dead.name))
    dead.kill()
    bystander = Path("/dev/shm") / f"not-ours-vmbus-emu.{dead.name}.ram"
    bystander.touch()

    try:
        trial = json.loads(run_cli("clean", "--dry-run", "--json").stdout)
        done = json.loads(run_cli("clean", "--json").stdout)
        assert bystander.exists()
    finally:
        bystander.unlink()

    assert trial["removed"][dead.name] == done["removed"][dead.name] == left > 0
    assert trial["dry_run"] is True
    assert objects_of(dead.name) == []
    assert {name: objects_of(name) for name in kept} == kept
    assert not kept.keys() & done["removed"].keys()


def test_leftovers_without_a_control_segment_are_cleaned(run_cli: RunCli) -> None:
    """A single file of a machine whose table is gone, or is no table, is a leftover too."""
    name = f"test-{os.getpid()}-odd"
    files = [Path("/dev/shm") / f"vmbus-emu.{name}.{part}" for part in ("ram", "control")]
    for file in files:
        file.write_bytes(b"odd")
    assert name in machine_names()

    done = run_cli("clean", "--json")

    assert json.loads(done.stdout)["removed"][name] == 2
    assert not any(file.exists() for file in files)


@pytest.mark.parametrize("option", [["--machine"], []])
def test_stop_waits_until_nothing_is_left(
    run_cli: RunCli, launcher: Callable[..., FakeLauncher], option: list[str]
) -> None:
    """`stop` asks the launcher with SIGTERM and returns when it is gone, with all its objects."""
    running = launcher()

    done = run_cli("stop", *option, running.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"machine {running.name} has stopped\n")
    assert running.process.wait() == 128 + signal.SIGTERM
    assert objects_of(running.name) == []


def test_what_is_typed_beats_the_variable(run_cli: RunCli, launcher: Callable[..., FakeLauncher]) -> None:
    """A machine in $VMBUS_EMU_MACHINE is in nobody's way who names another one, or a command to profile."""
    running = launcher()
    elsewhere = {"VMBUS_EMU_MACHINE": "elsewhere"}

    stopped = run_cli("stop", running.name, env=elsewhere)
    profiled = run_cli("profile", "--", "ps", env=elsewhere)

    assert (stopped.returncode, stopped.stderr) == (0, f"machine {running.name} has stopped\n")
    assert "exclude each other" not in profiled.stderr


def test_stop_gives_up_at_its_time_limit(run_cli: RunCli, launcher: Callable[..., FakeLauncher]) -> None:
    """A launcher that does not end is status 124, in one line."""
    stubborn = launcher("stubborn")

    done = run_cli("stop", "--machine", stubborn.name, "--time-limit", "0.2")

    assert (done.returncode, done.stdout) == (ExitStatus.TIME_LIMIT, "")
    assert done.stderr == f"vmbus-emu: machine {stubborn.name} to stop: no answer within 0.2 s\n"


def test_stop_of_a_machine_whose_launcher_left_objects_says_so(launcher: Callable[..., FakeLauncher]) -> None:
    """A launcher that is gone while its objects stay is a passed deadline, not a success."""
    dead = launcher()
    dead.kill()

    with pytest.raises(DeadlinePassed, match="shared objects"):
        stop_machine(dead.name, 0.1)


def test_stop_of_a_half_made_machine_is_refused(launcher: Callable[..., FakeLauncher]) -> None:
    """Without a launcher in the table there is nobody to ask."""
    maker = launcher("half-made")

    with pytest.raises(UserError, match="still being made"):
        stop_machine(maker.name, 0.1)


def test_machine_must_be_named_when_there_are_several(launcher: Callable[..., FakeLauncher]) -> None:
    """Two machines and no name: the refusal names both; a wrong name is refused, too."""
    first, second = launcher(), launcher()

    with pytest.raises(UserError, match=rf"{first.name}.*{second.name}.*--machine NAME"):
        chosen_machine(None)
    with pytest.raises(UserError, match=f"no machine nobody; running: .*{first.name}"):
        chosen_machine("nobody")
    assert chosen_machine(second.name) == second.name


def test_only_machine_needs_no_name(launcher: Callable[..., FakeLauncher], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one machine alive, dead ones aside, the name may be left out; with none it is refused."""
    running, dead = launcher(), launcher()
    dead.kill()
    monkeypatch.setattr(machines, "machine_names", lambda: sorted([running.name, dead.name]))
    assert chosen_machine(None) == running.name

    running.kill()

    with pytest.raises(UserError, match="no machine is running"):
        chosen_machine(None)
    with pytest.raises(UserError, match="no machine nobody; none is running"):
        chosen_machine("nobody")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stop", "--machine", "no-such"), "--machine: no machine no-such; "),
        (("stop", "no-such"), "vmbus-emu: NAME: no machine no-such; "),
        (("stop", "--machine", "x", "--all"), "--all and --machine exclude each other; "),
        (("stop", "--machine", "x", "y"), "--machine and y exclude each other; "),
        (("stop", "--all", "y"), "--all and y exclude each other; "),
        (("profile", "--machine", "x", "ps"), "--machine and a COMMAND exclude each other; "),
        (("stop", "--time-limit", "0"), "--time-limit"),
        (("ps", "x"), "unexpected extra argument"),
        (("inspect", "--from", "x.json", "--machine", "x"), "--from and --machine exclude each other; "),
        (("inspect", "--from", "x.json"), "--from x.json: No such file or directory; give a file that a machine left"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(run_cli: RunCli, arguments: tuple[str, ...], said: str) -> None:
    """Each of these is refused in one line, with nothing on stdout."""
    done = run_cli(*arguments)

    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
