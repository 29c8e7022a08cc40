"""`sysfs -- CMD`: what the command sees, what comes back of it, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
import pytest

from emu.control import ActorKind
from emu.errors import MissingPrerequisite
from emu.layout import MachineState
from emu.machine import Machine
from tests.processes import Forked
from tests.tools.sysfs_records import Guest, guest_of, idle_machine
from tools import sysfs_mounts
from tools.exit_status import ExitStatus
from tools.sysfs import launcher_of
from tools.sysfs_mounts import FuseMounts
from tools.sysfs_nodes import FixedDirectory

RunCli = Callable[..., subprocess.CompletedProcess[str]]

SOURCES = Path(__file__).resolve().parents[2]
DEADLINE_S: Final = 30.0
DEVICES = "/sys/bus/vmbus/devices"
FIRST = f"{DEVICES}/00000000-0000-0000-0000-000000000001"

pytestmark = pytest.mark.usefixtures("namespaces")
both = pytest.mark.parametrize("technique", ["fuse", "tmpfs"])


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with nothing running in it."""
    with idle_machine("sysfs") as machine:
        yield machine


@pytest.fixture
def guest(machine: Machine) -> Guest:
    """Its guest: two echo devices, a NIC with two sub-channels, one driver bound to the first."""
    guest = guest_of(machine)
    guest.driver(1, "hv_echo")
    guest.device(3, 1, driver=1, cpu=1)
    guest.device(5, 2)
    _, nic = guest.device(9, 3, "nic")
    guest.sub_channel(nic, 12, 1, cpu=1)
    guest.sub_channel(nic, 4, 2)
    return guest


@pytest.fixture
def inside(machine: Machine, guest: Guest, run_cli: RunCli) -> RunCli:
    """Runs a command inside, on that machine; `technique=` picks one."""

    def run(*command: str | Path, technique: str | None = None) -> subprocess.CompletedProcess[str]:
        options = ("--technique", technique) if technique else ()
        return run_cli("sysfs", "--machine", machine.name, *options, "--", *command)

    return run


@contextmanager
def started(machine: Machine, *command: str, technique: str = "tmpfs") -> Iterator[subprocess.Popen[str]]:
    """A session that goes on while the test looks; nothing of it is left behind, whatever the test does."""
    session = subprocess.Popen(
        [
            *(sys.executable, "-m", "tools.cli", "sysfs", "--machine", machine.name),
            *("--technique", technique, "--", *command),
        ],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    below = psutil.Process(session.pid)
    try:
        yield session
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            left = [*below.children(recursive=True), below]
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        session.communicate(timeout=DEADLINE_S)


def line(session: subprocess.Popen[str]) -> str:
    """The next line that the command prints."""
    assert session.stdout is not None
    return session.stdout.readline()


def say(session: subprocess.Popen[str], text: str) -> None:
    """A line for the command to read."""
    assert session.stdin is not None
    session.stdin.write(text + "\n")
    session.stdin.flush()


def entries(directory: str) -> set[str]:
    """Names in a directory."""
    return {path.name for path in Path(directory).iterdir()}


def gone(*pids: int) -> bool:
    """Whether these processes end within the deadline."""
    alive = []
    for pid in pids:
        # No look before the leap: a process may end between the two.
        with contextlib.suppress(psutil.NoSuchProcess):
            alive.append(psutil.Process(pid))
    _gone, alive = psutil.wait_procs(alive, timeout=DEADLINE_S)
    return not alive


# -- what the command sees ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("verbosity", ["-v", "-vv"])
def test_kernels_lsvmbus_lists_our_devices(
    inside: RunCli, machine: Machine, run_cli: RunCli, lsvmbus: Path, technique: str, verbosity: str
) -> None:
    """The unmodified program of the kernel prints what `vmbus-emu ls` prints, byte for byte."""
    theirs = inside(sys.executable, lsvmbus, verbosity, technique=technique)

    ours = run_cli("ls", verbosity, "--machine", machine.name)
    assert (theirs.returncode, theirs.stderr) == (0, "")
    assert theirs.stdout == ours.stdout
    assert theirs.stdout.count("VMBUS ID") == 3


@both
def test_links_lead_from_bus_to_device_to_driver_and_back(inside: RunCli, technique: str) -> None:
    """Every link of the tree ends where the kernel's does."""
    done = inside(
        *("sh", "-ec", 'cd "$0"; readlink -e . driver driver/0* subsystem; cat driver/0*/uevent', FIRST),
        technique=technique,
    )

    device = "/sys/devices/vmbus-emu/00000000-0000-0000-0000-000000000001"
    assert (done.stdout.splitlines(), done.stderr) == (
        [
            *(device, "/sys/bus/vmbus/drivers/hv_echo", device, "/sys/bus/vmbus"),
            *("DRIVER=hv_echo", "MODALIAS=vmbus:6f6863656d7675429d2d656d752d3031"),
        ],
        "",
    )


@both
def test_values_change_under_a_command_that_runs(machine: Machine, guest: Guest, technique: str) -> None:
    """A count that the guest raises and a device that it adds are seen by the command that is running."""
    script = (
        'cat "$0/channels/3/interrupts"; read go; '
        'until grep -qx 12 "$0/channels/3/interrupts" && test -e "$1"; do :; done; cat "$1/id"'
    )
    added = f"{DEVICES}/00000000-0000-0000-0000-000000000007"
    with started(machine, "sh", "-ec", script, FIRST, added, technique=technique) as session:
        before = line(session)
        guest.tables.channels.at(0).interrupts = 12
        guest.device(77, 7)
        say(session, "go")

        assert (before, line(session)) == ("0\n", "77\n")
        assert session.wait(DEADLINE_S) == 0


@pytest.mark.usefixtures("fuse")
def test_one_descriptor_reads_anew_and_fails_as_the_kernels_does(inside: RunCli, guest: Guest) -> None:
    """A file rewound is made anew; ring attributes are EINVAL, and what went under an open file is ENODEV."""
    program = """
import errno, os, sys
first = sys.argv[1]
def fails(path):
    try:
        return open(path).read()
    except OSError as error:
        return errno.errorcode[error.errno]
file = os.open(first + "/state", os.O_RDONLY)
print(os.read(file, 1), os.read(file, 9), os.read(file, 9), os.pread(file, 9, 0))
print(fails(first + "/out_read_index"), fails(first + "/channels/3/in_mask"), fails(first + "/nothing"))
print(os.stat(first + "/id").st_size, oct(os.stat(first + "/channels/3/cpu").st_mode))
"""

    done = inside(sys.executable, "-c", program, FIRST, technique="fuse")

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        r"b'3' b'\n' b'' b'3\n'",
        "EINVAL EINVAL ENOENT",
        "4096 0o100644",
    ]


@pytest.mark.usefixtures("fuse")
def test_device_that_goes_under_an_open_file_is_enodev(machine: Machine, guest: Guest) -> None:
    """A command that holds a file of a device that was removed is told so, and finds it nowhere."""
    script = 'exec 3<"$0/id"; echo open; read go; cat <&3; ls "$1"'
    with started(machine, "sh", "-c", script, FIRST, DEVICES, technique="fuse") as session:
        assert line(session) == "open\n"
        guest.remove(guest.tables.devices.at(0))
        guest.remove(guest.tables.devices.at(1))
        say(session, "go")
        out, err = session.communicate(timeout=DEADLINE_S)

    assert out == "00000000-0000-0000-0000-000000000003\n"
    assert "No such device" in err


@both
def test_tree_is_not_the_users_to_shape(inside: RunCli, technique: str) -> None:
    """Nothing can be made or removed, and a file that shows something cannot be written, also by root."""
    done = inside("sh", "-c", 'echo x >"$0/id"; rm "$0/id"; mkdir "$0/x"', FIRST, technique=technique)

    complaints = [said.rpartition(": ")[2] for said in done.stderr.splitlines()]
    if technique == "tmpfs":
        assert complaints == ["Read-only file system"] * 3
    else:
        assert complaints == ["Permission denied", "Operation not permitted", "Operation not permitted"]


@both
def test_drivers_files_are_there_to_be_written(inside: RunCli, technique: str) -> None:
    """bind, unbind, new_id, remove_id and uevent show nothing, to nobody."""
    done = inside("sh", "-c", "cd /sys/bus/vmbus/drivers/hv_echo; stat -c %a:%n bind unbind new_id remove_id uevent")

    assert done.stdout.split() == ["200:bind", "200:unbind", "200:new_id", "200:remove_id", "200:uevent"]


@both
def test_rest_of_sysfs_stays_as_it_was(inside: RunCli, technique: str) -> None:
    """Every bus and device of this computer is still there, and every link among them still leads somewhere."""
    script = (
        "ls /sys/bus; echo; ls /sys/devices; echo; cat /sys/devices/system/cpu/online; "
        "for link in /sys/bus/*/devices/*; do test -e $link || echo dangling $link; done"
    )

    done = inside("sh", "-c", script, technique=technique)

    buses, devices, rest = done.stdout.split("\n\n")
    assert set(buses.split()) == {*entries("/sys/bus"), "vmbus"}
    assert set(devices.split()) == {*entries("/sys/devices"), "vmbus-emu"}
    assert rest == Path("/sys/devices/system/cpu/online").read_text()
    assert done.stderr == ""


def test_machine_that_stops_leaves_the_command_an_empty_bus(machine: Machine, guest: Guest) -> None:
    """The command goes on; there is just no device any more."""
    script = 'ls "$0" | wc -l; read go; while test "$(ls "$0")"; do :; done; echo empty'
    with started(machine, "sh", "-c", script, DEVICES) as session:
        before = line(session)
        machine.set_state(MachineState.STOPPING)
        say(session, "go")

        assert (before, line(session)) == ("3\n", "empty\n")


def readable(descriptor: int, timeout_s: float = 0) -> bool:
    """Whether a descriptor becomes readable in that time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def test_death_of_the_launcher_is_noticed() -> None:
    """A launcher that is killed can mark nothing: its descriptor becomes readable, and that of a dead one is."""
    reader, writer = os.pipe()
    with idle_machine("sysfs-dead", launched=False) as machine:

        def launcher() -> None:
            machine.control.enlist(ActorKind.LAUNCHER, "launcher")
            os.write(writer, b"1")
            signal.pause()

        with Forked(launcher) as process:
            os.read(reader, 1)
            watched = launcher_of(machine)
            assert not readable(watched)
            process.kill()
            assert readable(watched, DEADLINE_S)

        assert readable(launcher_of(machine))


# -- what comes back ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 124", 124), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_exit_status_is_the_commands(inside: RunCli, script: str, status: int, technique: str) -> None:
    """Whatever the command ends with comes back, as a shell would say it."""
    done = inside("sh", "-c", script, technique=technique)

    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_arguments_and_streams_are_the_commands_alone(machine: Machine, guest: Guest) -> None:
    """Options behind the command are not ours, its input and outputs are untouched, it works where we do."""
    program = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['VMBUS_EMU_MACHINE'], file=sys.stderr)"
    program += "; print(sys.stdin.read()[::-1], end='')"
    arguments = ("--help", "--machine", "x", "", "a b", "--")
    with started(machine, sys.executable, "-c", program, *arguments) as session:
        out, err = session.communicate("input", timeout=DEADLINE_S)

    assert (out, err) == ("tupni", f"{list(arguments)} {Path.cwd()} {machine.name}\n")
    assert session.returncode == 0


def test_command_is_root_of_its_own_namespace_and_nobody_else(inside: RunCli) -> None:
    """As in `unshare -rm`: user 0 there is this user outside, and no other user is mapped."""
    done = inside("sh", "-c", "id -u; cat /proc/self/uid_map")

    assert done.stdout.split() == ["0", "0", str(os.getuid()), "1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sysfs",), "Missing argument 'CMD…'"),
        (("sysfs", "--"), "Missing argument 'CMD…'"),
        (("sysfs", "--technique", "magic", "--", "true"), "'magic' is not one of"),
        (("sysfs", "--machine", "no-such", "--", "true"), "no machine no-such"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(run_cli: RunCli, arguments: tuple[str, ...], said: str) -> None:
    """Without a command, or without its machine, nothing is run."""
    done = run_cli(*arguments)

    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [("no-such-command", "No such file or directory"), ("/", "Permission denied")],
)
def test_command_that_cannot_be_run_is_one_line_and_status_2(inside: RunCli, command: str, said: str) -> None:
    """What keeps it from running is told as the user's mistake."""
    done = inside(command)

    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    assert done.stderr == f"vmbus-emu: cannot run {command}: {said}\n"


def within(script: str, machine: Machine, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `sysfs` in a namespace where a shell script has taken something away before."""
    command = (sys.executable, "-m", "tools.cli", "sysfs", "--machine", machine.name, *arguments)
    return subprocess.run(
        ["unshare", "-rm", "sh", "-ec", f'{script}; exec "$@"', "sh", *command],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_missing_namespaces_are_told_with_the_cure(machine: Machine, guest: Guest) -> None:
    """Where user namespaces are forbidden there is one line that says how to allow them, and status 3."""
    done = within("echo 0 >/proc/sys/user/max_user_namespaces", machine, "--", "true")

    assert (done.returncode, done.stdout) == (ExitStatus.MISSING, "")
    assert re.fullmatch(r"vmbus-emu: no mount namespace .*user\.max_user_namespaces.*\n", done.stderr)


def test_missing_fuse_is_made_up_for_unless_it_was_asked_for(machine: Machine, guest: Guest) -> None:
    """Without a working /dev/fuse the tree is a tmpfs; who asked for FUSE is told, with status 3."""
    broken = "mount --bind /dev/null /dev/fuse"
    fallback = within(broken, machine, "--", "stat", "-fc", "%T", DEVICES)
    asked = within(broken, machine, "--technique", "fuse", "--", "true")

    assert (fallback.returncode, fallback.stdout, fallback.stderr) == (0, "tmpfs\n", "")
    assert (asked.returncode, asked.stdout) == (ExitStatus.MISSING, "")
    assert re.fullmatch(r"vmbus-emu: no FUSE .*--technique tmpfs\n", asked.stderr)


def test_fuse_device_that_may_not_be_opened_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is mounted then, and the line names the device."""
    monkeypatch.setattr(sysfs_mounts, "FUSE_DEVICE", str(tmp_path / "fuse"))

    with pytest.raises(MissingPrerequisite, match=f"no FUSE .{tmp_path}/fuse: No such file"):
        FuseMounts({tmp_path: FixedDirectory({})})


# -- signals, and what is left --------------------------------------------------------------------------

FAMILY: Final = """
sh -c 'trap "" TERM HUP INT; echo $$; while :; do read line </dev/zero; done' &
sleep 1000 &
echo $$ $PPID $!
wait
"""
"""A command with two children, one of which ignores what can be ignored; their numbers in two lines."""


def family(session: subprocess.Popen[str]) -> tuple[int, int, list[int]]:
    """Pids of the command, of the server, and of everything below the outer process."""
    lines = sorted((line(session), line(session)), key=len)
    command, server, sleeper = map(int, lines[1].split())
    return command, server, [command, server, sleeper, int(lines[0])]


def mounts_of_ours() -> list[str]:
    """Mounts of a tree that are seen out here."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "vmbus-emu" in line or "/sys/bus" in line]


@both
@pytest.mark.parametrize("victim", ["outer", "server", "command"])
def test_nothing_outlives_a_killed_process(machine: Machine, guest: Guest, victim: str, technique: str) -> None:
    """Whichever of the three is killed, the other two end everything below, whatever it ignores."""
    with started(machine, "sh", "-c", FAMILY, technique=technique) as session:
        command, server, pids = family(session)

        os.kill({"outer": session.pid, "server": server, "command": command}[victim], signal.SIGKILL)

        assert gone(*pids)
        status = session.wait(DEADLINE_S)
        _out, err = session.communicate()
    assert status == {"outer": -9, "server": ExitStatus.FAILED, "command": 137}[victim]
    expected = "vmbus-emu: the process that served the tree was killed by SIGKILL\n"
    assert err == (expected if victim == "server" else "")
    assert mounts_of_ours() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signal_reaches_the_command_once_and_the_rest_ends_with_it(
    machine: Machine, guest: Guest, number: signal.Signals
) -> None:
    """Who signals `vmbus-emu` means the command: it handles it as it likes, and its status comes back."""
    other = signal.SIGTERM if number is signal.SIGINT else signal.SIGINT
    # Signals are passed on in order: were the first passed on twice, it would be there before the second.
    program = (
        "import os, signal\n"
        f"first, second = {int(number)}, {int(other)}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [first, second])\n"
        "print(os.getppid(), flush=True)\n"
        "signal.sigwait([first])\n"
        "print(flush=True)\n"
        "signal.sigwait([second])\n"
        "raise SystemExit(4 if first in signal.sigpending() else 3)\n"
    )
    with started(machine, sys.executable, "-c", program) as session:
        server = int(line(session))

        session.send_signal(number)
        line(session)
        session.send_signal(other)

        assert session.wait(DEADLINE_S) == 3
        assert gone(server)


def test_signal_that_kills_the_command_is_its_status(machine: Machine, guest: Guest) -> None:
    """Without a handler SIGTERM ends the command, what it started, and us with 143."""
    with started(machine, "sh", "-c", FAMILY) as session:
        _command, _server, pids = family(session)

        session.terminate()

        assert session.wait(DEADLINE_S) == ExitStatus.TERMINATED
        assert gone(*pids)


def test_what_the_command_leaves_running_ends_with_it(machine: Machine, guest: Guest) -> None:
    """A child in a session of its own that outlives the command is killed, so the namespace ends, too."""
    script = "setsid sleep 1000 & setsid sh -c 'sleep 1000 & echo $!'; echo $!; exit 5"
    with started(machine, "sh", "-c", script) as session:
        left = [int(line(session)), int(line(session))]

        assert session.wait(DEADLINE_S) == 5
        assert gone(*left)


def test_ctrl_c_on_a_terminal_is_the_commands(machine: Machine, guest: Guest) -> None:
    """On a terminal the command gets the interrupt once, from the terminal itself, and may go on after it."""
    program = (
        "import signal, sys\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "print('ready', sys.stdin.isatty(), flush=True)\n"
        "line = input()\n"
        "print(line, len(seen), flush=True)\n"
        "raise SystemExit(6)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "tools.cli", "sysfs", "--machine", machine.name, "--"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*command, sys.executable, "-c", program], environment)
    said = b""
    try:
        for wanted, typed in ((b"ready True", b"\x03"), (b"^C", b"on\n"), (b"on 1", b"")):
            while wanted not in said:
                assert readable(terminal, DEADLINE_S), said
                said += os.read(terminal, 1024)
            os.write(terminal, typed)
        _pid, status = os.waitpid(pid, 0)
    finally:
        os.close(terminal)

    assert os.waitstatus_to_exitcode(status) == 6


def test_machine_without_our_guest_is_listed_from_the_host(machine: Machine, run_cli: RunCli) -> None:
    """Before a guest of ours is there, `ls` and the tree show the same: what the host offers."""
    done = run_cli("sysfs", "--machine", machine.name, "--", "ls", "-A", DEVICES)
    listed = json.loads(run_cli("ls", "--json", "--machine", machine.name).stdout)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert listed["devices"] == []
