"""`run` tells what there was, also of a machine that is up before the host has published its numbers."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from emu.errors import UserError
from emu.fault_plan import FaultPlan
from emu.ipc import segments
from emu.ipc.segments import objects_of
from emu.mirror import Mirror, MirrorHead
from emu.scenario import Scenario
from emu.task_board import Program, TaskRow
from tools import cli, detach, launch, run_machine, standstill
from tools.ctl import ask_host
from tools.device_list import list_devices
from tools.exit_status import ExitStatus
from tools.run_outcome import Outcome, tell

SOURCES = Path(__file__).resolve().parent.parent.parent

NO_THREAD = """
import threading

start = threading.Thread.start

def limited(thread):
    if thread.name == {name!r}:
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = limited
"""
"""A `sitecustomize` of a process that gets no thread of this name."""

AT_ITS_LIMIT = """
import os, sys
fork = os.fork
def refuses():
    if sys._getframe(1).f_locals["name"] == "{first}":
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = refuses
"""
"""A sitecustomize of a zygote that gets no process for `first`."""


class LateMirror(Mirror):
    """What a launcher reads that looks in the first milliseconds: nothing, and then no offers."""

    looks = 0

    def head(self) -> MirrorHead:
        """Nothing at the first three looks; never how many offers there are."""
        LateMirror.looks += 1
        return replace(super().head(), offers=0, **({"version": 0} if LateMirror.looks <= 3 else {}))


def test_version_and_offers_of_a_machine_that_is_up_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The version is waited for; what the scenario has was offered, whatever the mirror says yet."""
    monkeypatch.setattr(LateMirror, "looks", 0)
    monkeypatch.setattr(run_machine, "Mirror", LateMirror)

    assert cli.main(["run", "--device", "echo:2", "--duration", "0", "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["offers"], told["channels_open"]) == ("5.3", 2, 2)


def test_boot_that_does_not_end_shows_the_guests_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host that never says that these were all offers: exit 124, how far the guest has come, and an object."""
    monkeypatch.setattr(run_machine, "BOOT_TIMEOUT_S", 0.6)
    silent = ("--fault", "reply.drop@kind=alloffers_delivered")

    assert cli.main(["run", "--device", "echo:1", "--duration", "0", "--json", *silent]) == ExitStatus.TIME_LIMIT

    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert "vcpu0: Vmbus version:5.3" in shown.err.splitlines()
    assert "to reach CHANNELS_OPEN: no answer within 0.6 s" in shown.err and told["timed_out"] in shown.err
    assert (told["version"], told["channels_open"], told["faults"][0]["hits"]) == ("5.3", 1, 1)
    assert told["log"] == ["vcpu0: Vmbus version:5.3"]


@pytest.mark.parametrize(
    ("fault", "awaited"),
    [
        ("reply.drop@kind=openchannel_result", "it waits for the host's answer to OPENCHANNEL of relid 1"),
        ("reply.drop@kind=alloffers_delivered", "it waits for ALLOFFERS_DELIVERED"),
        ("alloc.fail=probe_hang", "it waits for drivers to probe their devices"),
    ],
    ids=["request", "offers", "probe"],
)
def test_boot_that_stands_still_says_for_what_it_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, awaited: str
) -> None:
    """Once while it waits, with the fault that struck and what to do; and at its end, with the fault's own line."""
    monkeypatch.setattr(run_machine, "BOOT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(standstill, "STILL_S", 0.2)

    assert cli.main(["run", "--device", "echo:1", "--duration", "0", "--fault", fault]) == ExitStatus.TIME_LIMIT

    shown = capsys.readouterr()
    name, options = fault.partition("@")[::2]
    (said,) = [line for line in shown.err.splitlines() if "the boot stands still" in line]
    assert f"stands still: {awaited}; faults that struck: {name}" in said and options in said
    assert said.endswith("it gives up 1 s after its begin, with status 124; Ctrl-C ends it now")
    assert "CHANNELS_OPEN: no answer within 1 s; " + awaited in shown.err.splitlines()[-1]
    assert shown.out.startswith(f"fault {name}") and "1 hit of 1 occasion" in shown.out


@pytest.mark.parametrize("fault", ["reply.drop@kind=alloffers_delivered", "alloc.fail=alloc_channel"])
@pytest.mark.parametrize("free", [0, segments.LEAST_FREE])
def test_boot_that_fails_on_a_full_dev_shm_is_for_want_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, free: int
) -> None:
    """Exit 3 and one line, where it is not known that a fault was the cause; as ever where memory is left."""
    monkeypatch.setattr(run_machine, "BOOT_TIMEOUT_S", 0.6)
    monkeypatch.setattr(segments, "free_shared_memory", lambda: free)
    # Nobody tells of a hit: the fault stands for an allocation that fails by itself.
    monkeypatch.setattr(FaultPlan, "report", lambda _plan: [])

    status = cli.main(["run", "--device", "echo:1", "--duration", "0", "--fault", fault])

    late = "alloffers" in fault
    if free:
        assert status == (ExitStatus.TIME_LIMIT if late else ExitStatus.FINDING)
        return
    what = "did not reach CHANNELS_OPEN" if late else "1 of 1 channel is not open"
    told = capsys.readouterr().err
    assert status == ExitStatus.MISSING and told.startswith("vmbus-emu: /dev/shm is full: ") and what in told
    assert told.count("\n") == 1


def test_guest_that_never_unloads_is_a_time_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host that never answers UNLOAD: exit 124 and an object, with what was waited for and what there was."""
    monkeypatch.setattr(run_machine, "SHUTDOWN_TIMEOUT_S", 0.3)
    silent = ("--fault", "reply.drop@kind=unload_response")

    assert cli.main(["run", "--device", "echo:1", "--duration", "0", "--json", *silent]) == ExitStatus.TIME_LIMIT

    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["timed_out"] == "the guest to unload: no answer within 0.3 s" and told["timed_out"] in shown.err
    assert (told["channels_open"], told["leaked"], told["faults"][0]["hits"]) == (1, None, 1)


def test_log_of_a_run_is_in_its_object_and_shown_where_a_fault_struck(capsys: pytest.CaptureFixture[str]) -> None:
    """What the guest refused and went on is in its log alone: a fault is ordered to see just that."""
    refused = "kworker/work: vmbus_process_offer: offer of relid 1, which is in use [offer-relid-taken]"
    run = ("run", "--device", "echo:1", "--duration", "0")

    assert cli.main([*run, "--json"]) == 0
    plain = capsys.readouterr()
    assert cli.main([*run, "--fault", "host.dup_relid"]) == 0
    assert refused in capsys.readouterr().err.splitlines()

    assert (json.loads(plain.out)["log"], plain.err) == (["vcpu0: Vmbus version:5.3"], "")


def test_log_of_a_guest_that_ended_itself_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Its last words are that the log says why."""
    run = ("run", "--device", "echo:1", "--duration", "0", "--flight", "0")

    assert cli.main([*run, "--fault", "alloc.fail=request@nth=1"]) == ExitStatus.FAILED

    shown = capsys.readouterr().err.splitlines()
    assert "vcpu0: Unable to connect to host" in shown
    assert any("vmbus_connect: ENOMEM; the guest's log says why" in line for line in shown)


def test_refusals_that_are_alike_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A guest of today asks a host of 4.1 on connection 4 four times, for 5.3 down to 5.0: the count says so."""
    scenario = tmp_path / "old.toml"
    scenario.write_text('[machine]\nhost_version = "4.1"\n[[device]]\nclass = "echo"\n')

    assert cli.main(["run", str(scenario), "--duration", "0"]) == 0

    shown = [line for line in capsys.readouterr().out.splitlines() if "unknown-message-connection" in line]
    assert shown == [
        "refused: unknown-message-connection 4",
        "  unknown-message-connection: hypercall with connectionid 0x4: INVALID_CONNECTION_ID",
    ]

    assert cli.main(["run", str(scenario), "--duration", "0", "--json"]) == 0

    refusals = json.loads(capsys.readouterr().out)["refusals"]
    assert [(one["rule"], one["count"]) for one in refusals if not one["legal"]] == [("unknown-message-connection", 4)]


def test_refusals_that_are_shown_are_those_that_came_last(capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that had come before: told twice, its place is that of the second time."""
    outcome = Outcome("t-last", Scenario.default(), 0)
    outcome.refused = {"rule": 8}
    outcome.refusals = [{"rule": "rule", "text": text, "legal": text == "f"} for text in "abcdefga"]

    tell(outcome, as_json=False, interrupted=None)

    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  rule: ")]
    assert shown == [f"  rule: {text}" for text in "cdega"]


def test_device_that_no_driver_takes_needs_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    """It stays closed rightly: nothing is wrong, and nothing is said."""
    assert cli.main(["run", "--device", "hv_sock:1", "--device", "echo:1", "--duration", "0", "--json"]) == 0

    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert (told["offers"], told["channels_open"], told["not_open"], shown.err) == (2, 1, 0, "")


class MirrorBehind(Mirror):
    """What a launcher reads right after the guest has unloaded: its GPADLs, as of a few milliseconds ago."""

    looks = 0

    def head(self) -> MirrorHead:
        """Seven GPADLs at the first three looks."""
        MirrorBehind.looks += 1
        return replace(super().head(), **({"gpadls": 7} if MirrorBehind.looks <= 3 else {}))


def test_a_mirror_that_is_behind_is_no_leak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPADLs that the host has given up and not yet told of are waited for, and are no finding."""
    monkeypatch.setattr(MirrorBehind, "looks", 0)
    monkeypatch.setattr(launch, "Mirror", MirrorBehind)

    assert cli.main(["run", "--device", "echo:1", "--duration", "0", "--json"]) == 0

    assert (json.loads(capsys.readouterr().out)["leaked"], MirrorBehind.looks > 3) == (0, True)


def test_what_leaked_is_told_by_the_guests_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a leak the number alone helps nobody: the guest's log, which names the tables, is printed as well."""
    monkeypatch.setattr(
        launch.RunningMachine, "leaked", lambda running: running.log.append("vcpu0: leaked: 2 of devices") or 2
    )

    assert cli.main(["run", "--device", "echo:1", "--duration", "0"]) == ExitStatus.FINDING

    assert "vcpu0: leaked: 2 of devices" in capsys.readouterr().err.splitlines()


def test_a_stream_whose_channel_is_taken_back_ended_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is no file that came back different: how far it came is told, and which channel went."""
    source = tmp_path / "file"
    source.write_bytes(bytes(64 << 20))
    order = launch.RunningMachine.order

    def order_and_rescind(running: launch.RunningMachine, program: Program, *arguments: Any, **options: Any) -> int:
        row = order(running, program, *arguments, **options)
        if program is Program.STREAM:
            ask_host(running.machine, "rescind", relid=1, instance="")
        return row

    monkeypatch.setattr(launch.RunningMachine, "order", order_and_rescind)

    run = ("run", "--device", "echo:1", "--flight", "0", "--stream", str(source))
    assert cli.main([*run]) == ExitStatus.FINDING

    (told,) = [line for line in capsys.readouterr().out.splitlines() if str(source) in line]
    assert re.fullmatch(
        rf"{source}: \d+ of {64 << 20} bytes there and back, then relid 1 was gone, or its device did not answer", told
    )


def test_a_guest_that_is_to_die_in_a_stream_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nobody looks whether it is due while the stream runs, so it would never die."""
    assert cli.main(["run", "--stream", str(tmp_path), "--fault", "guest.die=100ms"]) == ExitStatus.USAGE

    assert "--stream: guest.die would wait for its end; add --duration" in capsys.readouterr().err


def test_a_file_that_is_written_while_it_is_sent_is_no_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The two readings of a file that grows meanwhile differ: that is said of the file, not of the bus."""
    source = tmp_path / "log"
    source.write_bytes(b"x" * 100)
    wait_tasks = launch.RunningMachine.wait_tasks

    def written_meanwhile(running: launch.RunningMachine, rows: list[int], timeout_s: float) -> list[TaskRow]:
        tasks = wait_tasks(running, rows, timeout_s)
        if not tasks or tasks[0].program is not Program.STREAM:
            return tasks
        source.write_bytes(b"x" * 101)
        return [replace(tasks[0], digest=bytes(32))]

    monkeypatch.setattr(launch.RunningMachine, "wait_tasks", written_meanwhile)

    assert cli.main(["run", "--device", "echo:1", "--stream", str(source), "--json"]) == ExitStatus.USAGE

    said = f"vmbus-emu: --stream {source}: somebody wrote it while it was sent; give a file that stays as it is\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("launcher", "told"),
    [
        (lambda *_: ExitStatus.FINDING, ExitStatus.FINDING),
        (lambda *_: ExitStatus.MISSING, ExitStatus.MISSING),
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), ExitStatus.FAILED),
    ],
    ids=["finding", "missing", "killed"],
)
def test_detached_launcher_that_ends_before_its_machine_is_up(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    launcher: Callable[..., int],
    told: ExitStatus,
) -> None:
    """Its exit status is the command's; one that was killed has failed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(detach, "run_here", launcher)
    options = cast(run_machine.Options, SimpleNamespace(as_json=False))

    assert cli.status_of(["run", "--detach"], lambda: detach.run_detached(options)) == told
    assert capsys.readouterr().err == "vmbus-emu: the launcher ended before its machine was up\n"


def test_of_a_detached_launcher_that_was_killed_there_is_an_object_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It could tell nothing itself; who asked for JSON is told by the command."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(detach, "run_here", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    options = cast(run_machine.Options, SimpleNamespace(as_json=True))

    assert cli.status_of(["run", "--detach", "--json"], lambda: detach.run_detached(options)) == ExitStatus.FAILED
    told = json.loads(capsys.readouterr().out)
    assert told["schema"]["name"] == "vmbus-emu.failed"
    assert told["error"] == "the launcher ended before its machine was up"


IMPATIENT = """
import sys
from tools import cli, run_machine
run_machine.BOOT_TIMEOUT_S = 0.6
sys.exit(cli.main(["run", "--detach", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("as_json", [False, True], ids=["plain", "json"])
def test_detached_boot_that_does_not_end_is_a_time_limit(tmp_path: Path, as_json: bool) -> None:
    """As in the foreground: exit 124, the guest's log and one line that says what was waited for; an object on stdout.

    The object names what was kept of it.
    """
    silent = ("--device", "echo:1", "--fault", "reply.drop@kind=alloffers_delivered")
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, *silent, *(["--json"] if as_json else [])],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        cwd=SOURCES,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == ExitStatus.TIME_LIMIT, done.stderr
    assert "Traceback" not in done.stderr and "vcpu0: Vmbus version:5.3" in done.stderr.splitlines()
    assert "to reach CHANNELS_OPEN: no answer within 0.6 s" in done.stderr.splitlines()[-1]
    assert list(tmp_path.rglob("*.log")) == []
    if not as_json:
        assert done.stdout == ""
        return
    told = json.loads(done.stdout)
    assert done.stderr.endswith(f"{told['timed_out']}\n") and Path(told["finding"]).parent.name == "findings"


def test_detached_boot_that_does_not_end_is_told_where_stdout_is_full(tmp_path: Path) -> None:
    """What the launcher said is on stderr, and behind it that the object found no room."""
    silent = ("--device", "echo:1", "--fault", "reply.drop@kind=alloffers_delivered", "--json")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", IMPATIENT, *silent],
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
            cwd=SOURCES,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    assert "to reach CHANNELS_OPEN: no answer within 0.6 s" in done.stderr
    assert done.returncode == ExitStatus.USAGE and "cannot write to stdout" in done.stderr.splitlines()[-1]


def test_a_file_whose_path_no_order_holds_is_refused(tmp_path: Path) -> None:
    """A program's order has room for 256 bytes of path: that is said before a machine is made."""
    folder = tmp_path.resolve() / ("d" * 50)
    source = folder / ("f" * (255 - len(os.fsencode(folder))))
    source.parent.mkdir()
    source.write_bytes(b"")
    longer = source.with_name(source.name + "f")
    longer.write_bytes(b"")

    run_machine.check_stream_file(source)
    with pytest.raises(UserError, match="longer than 256 bytes"):
        run_machine.check_stream_file(longer)


@pytest.mark.parametrize("first", ["sweeper", "hypervisor", "workqueue"])
def test_a_process_that_cannot_be_forked_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, first: str
) -> None:
    """At the limit of processes: the one that could not be started, why, where limits are, and nothing left."""
    (tmp_path / "sitecustomize.py").write_text(AT_ITS_LIMIT.format(first=first), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert cli.main(["run", "--name", "t-limit", "--device", "echo:1", "--duration", "0"]) == ExitStatus.MISSING

    why = f"cannot start {first}: Resource temporarily unavailable; a machine needs some 20 processes and threads"
    out, said = capsys.readouterr()
    assert (out, said.count("\n"), why in said, objects_of("t-limit")) == ("", 1, True, [])


@pytest.mark.parametrize("name", ["kworker/rescind", "user/1"])
def test_a_thread_that_cannot_be_started_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """The same limit counts threads: of a worker, or of the guest's user space."""
    (tmp_path / "sitecustomize.py").write_text(NO_THREAD.format(name=name), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert cli.main(["run", "--name", "t-threads", "--device", "echo:1", "--duration", "0"]) == ExitStatus.MISSING

    why = "cannot start a thread of the workqueue process: can't start new thread; a machine needs some 20 processes"
    out, said = capsys.readouterr()
    assert (out, said.count("\n"), why in said, objects_of("t-threads")) == ("", 1, True, [])


def test_a_zygote_that_cannot_be_started_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same of the first of them."""

    def refused(*_arguments: object, **_options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)

    assert cli.main(["run", "--device", "echo:1", "--duration", "0"]) == ExitStatus.MISSING

    assert "cannot start the zygote: Resource temporarily unavailable" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "amount"), [("v", 60_000), ("v", 3_145_727), ("f", 100_000), ("n", 20)])
def test_a_limit_that_is_too_small_is_one_line_that_names_it(tmp_path: Path, option: str, amount: int) -> None:
    """Not /dev/shm, which is as it should be: which limit it is and how much is enough; and nothing is left."""
    command = f"ulimit -{option} {amount}; exec {sys.executable} -m tools.entry run --name t-ulimit --duration 0"
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "XDG_STATE_HOME": str(tmp_path)}

    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitStatus.MISSING, "", 1)
    assert f"(`ulimit -{option}`) is {amount}" in done.stderr and "; raise it to " in done.stderr
    assert (objects_of("t-ulimit"), list(tmp_path.iterdir())) == ([], [])


def test_looking_at_a_machine_maps_its_ram_once_more_at_most() -> None:
    """However often: whoever may map only so much could not look at a gigabyte of RAM a third time."""
    with launch.launch(Scenario.default().with_overrides(vcpus=1), name="t-looks") as running:
        running.wait_ready()
        for _ in range(3):
            list_devices(running.machine)

        assert Path("/proc/self/maps").read_text(encoding="utf-8").count("vmbus-emu.t-looks.ram") == 2


def test_a_command_that_meets_a_limit_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever step it was that got no memory: where a limit is set, that is what to mend."""

    def at_the_limit(_context: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(cli.vmbus_emu, "invoke", at_the_limit)
    monkeypatch.setattr(resource, "getrlimit", lambda _number: (1 << 20, 1 << 20))

    assert cli.main(["ps"]) == ExitStatus.MISSING

    said = capsys.readouterr().err
    assert said.startswith("vmbus-emu: Cannot allocate memory; the limit on address space (`ulimit -v`) is 1024 KiB")
