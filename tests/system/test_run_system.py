"""`vmbus-emu run` as a user runs it: real processes, real signals, and nothing left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest

from emu.control import is_over
from emu.errors import MissingPrerequisite, UserError
from emu.host_tables import HostTables
from emu.layout import MachineState
from emu.memory import PAGE_SIZE
from emu.scenario import DeviceSpec, MachineSpec, Scenario
from tests.system.commands import (
    COMMAND,
    ROOT,
    assert_gone,
    call,
    ended,
    environment,
    inner_pids,
    objects,
    processes,
    report,
    start,
    wait_for,
    wait_until_open,
)
from tools import launch as launcher
from tools import zygote_start
from tools.exit_status import ExitStatus
from tools.launch import MachineDied, RunningMachine, launch
from tools.zygote import Zygote
from tools.zygote_start import Link


def test_default_machine_boots_echoes_and_leaves_nothing(tmp_path: Path) -> None:
    """8 echo devices are discovered and opened, packets come back, everything is given back."""
    done = call(tmp_path, "run", "--name", "t-default", "--duration", "0", "--json")

    assert done.returncode == 0, done.stderr
    told = report(done.stdout)
    assert told["schema"] == {"name": "vmbus-emu.run", "version": 1}
    assert (told["version"], told["era"], told["vcpus"], told["offers"], told["channels_open"]) == (
        "5.3",
        "current",
        2,
        8,
        8,
    )
    assert [device["relid"] for device in told["devices"]] == list(range(1, 9))
    assert {device["driver"] for device in told["devices"]} == {"hv_echo"}
    assert {channel["vcpu"] for device in told["devices"] for channel in device["channels"]} == {0, 1}
    assert told["packets"] > 0 and told["task_errors"] == 0
    assert told["leaked"] == 0 and told["refused"] == {} and told["deaths"] == []
    assert {"semaphore", "signal", "none"} <= told["kicks"].keys()
    assert_gone("t-default")


def test_both_kinds_of_task_are_kicked(tmp_path: Path) -> None:
    """A machine under its exercise is kicked by semaphore while halted and by signal while it computes."""
    kicks = {"semaphore": 0, "signal": 0, "none": 0}
    for seed in range(3):
        done = call(tmp_path, "run", "--name", "t-kicks", "--duration", "0", "--json", "--seed", str(seed))
        assert done.returncode == 0, done.stderr
        for kind in kicks:
            kicks[kind] += report(done.stdout)["kicks"][kind]

    assert all(count > 0 for count in kicks.values()), kicks


@pytest.mark.parametrize("scenario", sorted((ROOT / "scenarios").glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_scenario_boots(tmp_path: Path, scenario: Path) -> None:
    """Each scenario that is shipped opens every channel and leaks nothing."""
    name = f"t-{scenario.stem}"
    done = call(tmp_path, "run", str(scenario), "--name", name, "--duration", "0", "--json")

    assert done.returncode == 0, done.stderr
    told = report(done.stdout)
    assert told["channels_open"] == told["offers"] > 0 and told["leaked"] == 0
    assert_gone(name)


def test_stream_comes_back_equal(tmp_path: Path) -> None:
    """A real file of odd length goes through a channel and comes back with the same SHA-256."""
    source = tmp_path / "file"
    source.write_bytes(os.urandom(3_000_003))
    done = call(tmp_path, "run", "--name", "t-stream", "--stream", str(source), "--json")

    assert done.returncode == 0, done.stderr
    stream = report(done.stdout)["stream"]
    assert stream["bytes"] == 3_000_003 and stream["sha256_ok"] is True
    assert stream["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_empty_stream_comes_back_equal(tmp_path: Path) -> None:
    """An empty file is a file."""
    source = tmp_path / "empty"
    source.touch()
    done = call(tmp_path, "run", "--name", "t-empty", "--stream", str(source), "--json")

    assert done.returncode == 0, done.stderr
    assert report(done.stdout)["stream"]["bytes"] == 0
    assert report(done.stdout)["stream"]["sha256_ok"] is True


def test_a_pipe_is_no_stream_and_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody may ever write into it: it is refused before it is opened."""
    os.mkfifo(tmp_path / "pipe")
    done = call(tmp_path, "run", "--stream", "pipe", timeout_s=20)

    assert done.returncode == 2
    assert done.stderr.startswith("vmbus-emu: --stream pipe: not a regular file;") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stream", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--vcpus", "0"), "--vcpus"),
        (("--device", "echo:2048"), "2047"),
        (("--device", "floppy:1"), "floppy"),
        (("--name", "a/b"), "a/b"),
        (("--without", "vcpu9"), "vcpu9"),
        (("--seed", str(2**63)), "--seed"),
        (("nothing.toml",), "nothing.toml"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    """What a user typed wrong gets one line that names it, exit code 2, and nothing half made."""
    process = start(tmp_path, "run", "--duration", "0", *arguments)
    stdout, stderr = process.communicate(timeout=30)

    assert process.returncode == 2, stderr
    assert stdout == ""
    assert stderr.count("\n") == 1 and words in stderr
    # Other tests have machines there at the same time.
    assert not [entry.name for entry in Path("/dev/shm").iterdir() if f"vmbus-emu.vm{process.pid}" in entry.name]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_interrupted_run_still_tells_and_cleans_up(tmp_path: Path, number: int, status: int) -> None:
    """Ctrl-C or SIGTERM in the middle: the guest unloads, the JSON is printed, nothing is left."""
    name = f"t-signal{number}"
    with ended(start(tmp_path, "run", "--name", name, "--json")) as process:
        wait_until_open(name, process)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == status, errors
    assert report(output)["leaked"] == 0
    assert_gone(name)


def test_interrupt_during_boot_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C before all channels are open ends in the same way."""
    with ended(start(tmp_path, "run", "--name", "t-early", "--device", "echo:1500", "--json")) as process:
        wait_for(lambda: "vmbus-emu.t-early.trace" in objects("t-early"), "the machine to be made")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)

    assert process.returncode == 130
    assert_gone("t-early")


@pytest.mark.parametrize("victim", ["hypervisor", "vcpu0", "vcpu1", "workqueue", "zygote", "sweeper"])
def test_killed_process_is_reported_and_ends_the_machine(tmp_path: Path, victim: str) -> None:
    """`kill -9` of any one inner process: named within seconds, exit code 4, nothing left."""
    name = f"t-kill-{victim}"
    with ended(start(tmp_path, "run", "--name", name, "--json")) as process:
        wait_until_open(name, process)
        pids = inner_pids(name)
        pid = pids[victim] if victim in pids else _sweeper_of(name, pids)
        os.kill(pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=20)

    assert process.returncode == 4, errors
    assert victim in errors and "SIGKILL" in errors
    assert any(victim in death for death in report(output)["deaths"])
    assert_gone(name)


def test_zygote_that_sleeps_holds_up_no_end(tmp_path: Path) -> None:
    """SIGSTOP: who ended is seen without it. It is named and killed, and the run tells as ever; nothing is left."""
    with ended(start(tmp_path, "run", "--name", "t-deaf-zygote", "--json")) as process:
        wait_until_open("t-deaf-zygote", process)
        zygote = inner_pids("t-deaf-zygote")["zygote"]
        os.kill(zygote, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)

    assert process.returncode == 130, errors
    assert errors == f"vmbus-emu: killed the zygote (pid {zygote}), which did not answer within 2 s\n"
    told = report(output)
    assert (told["leaked"], told["deaths"], told["state_violations"]) == (0, [], [])
    assert_gone("t-deaf-zygote")


def test_who_does_not_end_is_named_and_killed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A processor that sleeps (SIGSTOP) when the machine is stopped."""
    monkeypatch.setattr(launcher, "STOP_TIMEOUT_S", 1.0)
    with launch(Scenario.default().with_overrides(vcpus=2), name="t-late") as running:
        running.wait_ready()
        running.kill("vcpu1", signal.SIGSTOP)

    told = capsys.readouterr().err
    assert told.startswith("vmbus-emu: killed what did not end within 1 s: ") and "vcpu1" in told
    assert_gone("t-late")


@pytest.mark.parametrize("victims", [("vcpu0", "hypervisor"), ("workqueue", "vcpu1", "vcpu0")], ids="-".join)
def test_who_was_killed_at_once_is_named_at_once(tmp_path: Path, victims: tuple[str, ...]) -> None:
    """All of them, the first one first: the zygote, which sleeps meanwhile, finds them dead together."""
    name = f"t-kill-{len(victims)}"
    with ended(start(tmp_path, "run", "--name", name, "--json")) as process:
        wait_until_open(name, process)
        pids = inner_pids(name)
        os.kill(pids["zygote"], signal.SIGSTOP)
        for victim in victims:
            pidfd = os.pidfd_open(pids[victim])
            os.kill(pids[victim], signal.SIGKILL)
            # A process whose first thread is a zombie has not ended before its others have.
            assert select.select([pidfd], [], [], 10)[0], f"{victim} lives"
            os.close(pidfd)
        os.kill(pids["zygote"], signal.SIGCONT)
        output, errors = process.communicate(timeout=20)

    told = report(output)
    expected = [f"{victim} (pid {pids[victim]}) died: killed by SIGKILL" for victim in victims]
    assert process.returncode == 4, errors
    assert [death.partition(",")[0] for death in told["deaths"]] == expected
    assert [line for line in expected if f"vmbus-emu: {line}" not in errors] == []
    kept = report(Path(told["crash_record"]).read_text())["deaths"]
    assert [(death["name"], death["how"]) for death in kept] == [(victim, "killed by SIGKILL") for victim in victims]
    assert_gone(name)


def test_who_dies_a_moment_later_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the first death was heard already: its end has begun, and is waited for."""
    with launch(Scenario.default().with_overrides(vcpus=2), name="t-kill-late") as running:
        running.wait_ready()
        exited = RunningMachine._exited

        def kill_another(running: RunningMachine, name: str, pid: int, status: int) -> None:
            exited(running, name, pid, status)
            if name == "vcpu1":
                running.kill("hypervisor")

        monkeypatch.setattr(RunningMachine, "_exited", kill_another)
        running.kill("vcpu1")
        with pytest.raises(MachineDied) as died:
            running.watch(10.0)

    assert [death.name for death in died.value.deaths] == ["vcpu1", "hypervisor"]
    assert "vcpu1 (pid " in str(died.value) and "\nhypervisor (pid " in str(died.value)


def test_what_somebody_lacks_is_told_though_another_died_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ends one may die of it and the next one say so: the word that comes a moment later is the cause."""
    with launch(Scenario.default().with_overrides(vcpus=2), name="t-lacking") as running:
        running.wait_ready()
        exited = RunningMachine._exited

        def hear_another(running: RunningMachine, name: str, pid: int, status: int) -> None:
            exited(running, name, pid, status)
            running.inner["vcpu0"].traceback = "its end has begun"
            listen = RunningMachine._listen

            def lacking(running: RunningMachine, timeout_s: float) -> bool:
                running._hear("lacking", "no memory")
                running.inner["vcpu0"].traceback = ""
                return listen(running, timeout_s)

            monkeypatch.setattr(RunningMachine, "_listen", lacking)

        monkeypatch.setattr(RunningMachine, "_exited", hear_another)
        running.kill("vcpu1")
        with pytest.raises(MissingPrerequisite, match="no memory"):
            running.watch(10.0)
    assert_gone("t-lacking")


def test_killed_zygote_leaves_no_sweeper_behind() -> None:
    """Its parent would have ended it. The launcher waits for its end, so no process is left, not even for a moment."""
    with launch(Scenario.default().with_overrides(vcpus=1), name="t-orphan") as running:
        running.wait_ready()
        sweeper = running.inner["sweeper"].pid
        os.kill(running.link.process.pid, signal.SIGKILL)
        with pytest.raises(MachineDied, match="zygote"):
            running.watch(10.0)

    assert is_over(sweeper)
    assert_gone("t-orphan")


def test_zygote_that_died_before_the_launch_is_a_death() -> None:
    """Started early, it may be gone when it is told of the machine: `run` ended with 141 and said nothing."""
    link = zygote_start.start_zygote()
    link.process.kill()
    link.process.wait()
    zygote_start._started.append(link)
    with pytest.raises(MachineDied, match=r"zygote \(pid \d+\) died: killed by SIGKILL"):
        launch(Scenario.default().with_overrides(vcpus=1), name="t-too-early")

    assert_gone("t-too-early")


def test_machine_that_was_switched_off_and_on_runs() -> None:
    """As one that was launched: `ps` and its guests are told so."""
    with launch(Scenario.default().with_overrides(vcpus=1), name="t-again") as running:
        running.wait_ready()
        running.power_cycle()
        running.wait_ready()

        assert running.machine.state is MachineState.RUNNING


@pytest.mark.parametrize("moment", ["before", "while it kills"])
def test_machine_whose_zygote_was_killed_is_not_booted_again(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """That is a death, with its name: an exhibit between two runs called it a reader of its output that had left."""
    with launch(Scenario.default().with_overrides(vcpus=1), name="t-cycle") as running:
        running.wait_ready()
        zygote = running.link.process

        def kill() -> None:
            os.kill(zygote.pid, signal.SIGKILL)
            zygote.wait()

        if moment == "before":
            kill()
        else:
            send = running.link.send

            def send_then_kill(_link: Link, *words: str) -> None:
                send(*words)
                kill()

            monkeypatch.setattr(Link, "send", send_then_kill)
        with pytest.raises(MachineDied, match=r"zygote \(pid \d+\) died: killed by SIGKILL"):
            running.power_cycle()

    assert_gone("t-cycle")


def test_death_is_told_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """A state directory that cannot be made costs the crash record and the finding, each a line, and nothing else."""
    (tmp_path / "state").write_text("")
    with ended(start(tmp_path, "run", "--name", "t-nowhere", "--json")) as process:
        wait_until_open("t-nowhere", process)
        os.kill(inner_pids("t-nowhere")["vcpu0"], signal.SIGKILL)
        output, errors = process.communicate(timeout=20)

    assert process.returncode == 4, errors
    assert "no crash record: cannot make" in errors and "internal error" not in errors
    told = report(output)
    assert "vcpu0" in told["deaths"][0] and told["crash_record"] is None
    assert_gone("t-nowhere")


def test_killed_process_ends_a_stress_which_says_how_to_repeat_it(tmp_path: Path) -> None:
    """Exit code 4, the process, a crash record that exists, the seed; nothing left.

    It may have died holding the lock of a ring: then whoever wants that ends by it, and is named behind.
    """
    scenario = tmp_path / "four.toml"
    scenario.write_text('[machine]\nname = "t-kill-stress"\n[[device]]\nclass = "echo"\ncount = 4\n')
    with ended(start(tmp_path, "stress", str(scenario), "--seed", "17", "--duration", "60", "--json")) as process:
        wait_until_open("t-kill-stress", process)
        os.kill(inner_pids("t-kill-stress")["vcpu1"], signal.SIGKILL)
        output, errors = process.communicate(timeout=20)

    assert process.returncode == 4, errors
    assert "vcpu1" in errors and "SIGKILL" in errors and "--seed 17" in errors
    assert Path(errors.partition("crash record: ")[2].strip()).is_file()
    told = report(output)
    first, *others = told["deaths"]
    assert (told["seed"], told["timed_out"]) == (17, None) and "vcpu1" in first and "SIGKILL" in first
    assert all("LockOwnerDied" in other and "_ring_lock" in first for other in others)
    assert (Path(told["finding"]) / "crash.json").read_bytes() == Path(told["crash_record"]).read_bytes()
    assert_gone("t-kill-stress")


@pytest.mark.parametrize(
    "command", ["latency --duration 60", "bench idle"], ids=lambda command: str(command).split()[0]
)
def test_killed_process_ends_a_measurement_which_tells(tmp_path: Path, command: str) -> None:
    """Exit code 4, the process, and one JSON object that has it under the name that `run` has for it; nothing left."""
    with ended(start(tmp_path, *command.split(), "--json")) as process:
        name = f"vm{process.pid}"
        wait_until_open(name, process)
        os.kill(inner_pids(name)["hypervisor"], signal.SIGKILL)
        output, errors = process.communicate(timeout=20)

    assert process.returncode == 4, errors
    assert "hypervisor" in errors and "SIGKILL" in errors
    told = report(output)
    assert (told["interrupted"], told["timed_out"], len(told["deaths"])) == (False, None, 1)
    assert "hypervisor" in told["deaths"][0]
    if command.startswith("latency"):
        assert Path(told["crash_record"]).is_file() and (Path(told["finding"]) / "finding.txt").is_file()
    assert_gone(name)


@pytest.mark.parametrize("command", ["stress --duration 60", "latency --duration 60", "matrix", "bench idle"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_measurement_still_tells_and_cleans_up(
    tmp_path: Path, command: str, signum: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM: exit code 130 or 143, one JSON object, nothing left."""
    with ended(start(tmp_path, *command.split(), "--json")) as process:
        name = f"vm{process.pid}"
        wait_for(lambda: objects(name) != [], f"{command} to make a machine")
        process.send_signal(signum)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 128 + signum, errors
    assert report(output)["interrupted"] is True
    assert_gone(name)


@pytest.mark.parametrize("seed", range(3))
def test_death_at_a_random_moment_leaves_nothing(tmp_path: Path, seed: int) -> None:
    """Any inner process, killed at any moment of a busy boot: reported by name, exit code 4, nothing left."""
    die_at_random(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_death_at_many_random_moments_leaves_nothing(tmp_path: Path) -> None:
    """The same, a hundred times."""
    for seed in range(100, 200):
        die_at_random(tmp_path, seed)


def die_at_random(home: Path, seed: int) -> None:
    """Kill one process of a booting machine of 300 devices, after a random part of its boot."""
    rng = random.Random(seed)
    victim = rng.choice(["hypervisor", "vcpu0", "vcpu1", "workqueue"])
    moment_s = rng.uniform(0.0, 0.5)
    print(f"seed {seed}: {victim} after {moment_s:.3f} s")
    name = f"t-random{seed}"
    with ended(start(home, "run", "--name", name, "--device", "echo:300", "--json")) as process:
        wait_for(lambda: objects(name) != [] and victim in _pids_now(name), f"{victim} to be there")
        pid = _pids_now(name)[victim]
        # A random moment is what is tested: nothing is waited for here.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moment_s)
        os.kill(pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 4, (seed, output, errors)
    assert victim in errors and "SIGKILL" in errors, (seed, errors)
    assert_gone(name)


def _pids_now(name: str) -> dict[str, int]:
    from emu.errors import UserError

    try:
        return inner_pids(name)
    except UserError:
        return {}


def _sweeper_of(name: str, pids: dict[str, int]) -> int:
    """The sweeper is a child of the zygote and has no row of its own."""
    import psutil

    children = psutil.Process(pids["zygote"]).children()
    return next(child.pid for child in children if child.name().startswith("vmbus:sweeper"))


def test_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    """`kill -9` of the launcher: the sweeper unlinks everything, no process survives."""
    with ended(start(tmp_path, "run", "--name", "t-launcher", "--json")) as process:
        wait_until_open("t-launcher", process)
        process.kill()
        process.communicate(timeout=30)

        assert_gone("t-launcher")


def test_clean_removes_what_launcher_and_sweeper_left(tmp_path: Path) -> None:
    """Launcher and sweeper killed at once leave names; `clean` removes those, and only those."""
    with (
        ended(start(tmp_path, "run", "--name", "t-alive", "--json")) as alive,
        ended(start(tmp_path, "run", "--name", "t-dead", "--json")) as dead,
    ):
        wait_until_open("t-dead", dead)
        wait_until_open("t-alive", alive)
        sweeper = _sweeper_of("t-dead", inner_pids("t-dead"))
        os.kill(sweeper, signal.SIGKILL)
        dead.kill()
        dead.communicate(timeout=30)
        wait_for(lambda: not _maps_anything("t-dead"), "its processes to die with it")
        left = objects("t-dead")
        again = call(tmp_path, "run", "--name", "t-dead", "--duration", "0")
        stopped = call(tmp_path, "stop", "t-dead")
        done = call(tmp_path, "clean")

        assert done.returncode == 0, done.stderr
        assert left and objects("t-dead") == []
        assert objects("t-alive") and alive.poll() is None
    # Whoever wants that name reads what helps: nothing is there to be stopped.
    assert again.returncode == stopped.returncode == 2
    assert again.stderr == (
        "vmbus-emu: machine name t-dead is taken by what a dead machine left; `vmbus-emu clean` removes that\n"
    )
    # Other tests have machines there at the same time.
    assert "no machine t-dead; running: " in stopped.stderr
    assert "; it is dead, and `vmbus-emu clean` removes what it left" in stopped.stderr


def _maps_anything(name: str) -> bool:
    from tests.system.commands import processes

    return bool(processes(name))


def test_two_machines_run_beside_each_other(tmp_path: Path) -> None:
    """A name in use is refused in one line; another name runs beside it."""
    with ended(start(tmp_path, "run", "--name", "t-one", "--json")) as one:
        wait_until_open("t-one", one)
        same = call(tmp_path, "run", "--name", "t-one", "--duration", "0")
        other = call(tmp_path, "run", "--name", "t-two", "--duration", "0", "--json")
        one.send_signal(signal.SIGINT)
        output, _errors = one.communicate(timeout=30)

    assert same.returncode == 2 and same.stderr.count("\n") == 1 and "t-one" in same.stderr
    assert other.returncode == 0 and report(other.stdout)["channels_open"] == 8
    assert report(output)["leaked"] == 0
    assert_gone("t-one")


def test_another_users_machine_cannot_be_stopped_and_nobody_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is in use, and all that helps is another one."""
    with launch(Scenario.default().with_overrides(vcpus=1), name="t-theirs") as theirs:
        theirs.wait_ready()
        monkeypatch.setattr("tools.machines.machine_names", list)  # none of this user's
        with pytest.raises(
            UserError, match=r"^machine name t-theirs is in use by another user; choose another --name$"
        ):
            launch(Scenario.default(), name="t-theirs")


def test_who_loses_the_race_for_a_name_leaves_the_winners_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers of one name, and both found it free: the second is refused in one line, the first one boots."""
    with launch(Scenario.default().with_overrides(vcpus=1), name="t-race") as winner:
        before = objects("t-race")
        answers = [[], ["t-race"]]
        monkeypatch.setattr(launcher, "machines", lambda: answers.pop(0))
        with pytest.raises(UserError, match=r"^machine name t-race is in use; choose another --name"):
            launch(Scenario.default(), name="t-race")

        winner.wait_ready()
        assert objects("t-race") == before
    assert_gone("t-race")


def test_who_interrupts_a_detached_boot_does_not_get_the_machine(tmp_path: Path) -> None:
    """Ctrl-C before the channels are open: exit status 130, one JSON object, and nothing goes on in the background."""
    words = ("run", "--name", "t-halfway", "--detach", "--without", "vcpu0", "--json")
    with ended(start(tmp_path, *words)) as process:
        wait_for(lambda: len(processes("t-halfway")) > 2, "launcher, zygote and another process")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert process.returncode == 130, err
    assert report(out)["interrupted"] is True
    assert_gone("t-halfway")
    assert list((tmp_path / "state").rglob("*.log")) == []


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_who_cannot_be_told_of_a_detached_machine_does_not_get_it(tmp_path: Path, more: tuple[str, ...]) -> None:
    """`run --detach > /dev/full` is one line and status 2; neither machine nor log is left behind."""
    name = "t-untold"
    words = [*COMMAND, "run", "--name", name, "--detach", "--device", "echo:1", *more]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    try:
        assert (done.returncode, done.stderr.count("\n")) == (ExitStatus.USAGE, 1)
        assert done.stderr.startswith("vmbus-emu: cannot write to stdout: No space left on device; make room")
        assert_gone(name)
        assert list((tmp_path / "state").rglob("*.log")) == []
    finally:
        call(tmp_path, "stop", name)


def test_who_reads_no_name_of_a_detached_machine_does_not_get_it(tmp_path: Path) -> None:
    """The reader of the output left before it came: status 141, and nothing is left behind."""
    name = "t-unread"
    process = start(tmp_path, "run", "--name", name, "--detach", "--device", "echo:1")
    with ended(process):
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        try:
            assert process.wait(timeout=60) == ExitStatus.READER_LEFT
            assert_gone(name)
        finally:
            call(tmp_path, "stop", name)


def test_detached_machine_is_listed_and_stopped(tmp_path: Path) -> None:
    """`--detach` returns with the name when all channels are open; `ps` and `ls` see it, `stop` ends it."""
    done = call(tmp_path, "run", "--name", "t-detach", "--detach")
    try:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "t-detach"
        listed = call(tmp_path, "ps", "--json")
        devices = call(tmp_path, "ls", "--machine", "t-detach")
        assert "t-detach" in listed.stdout
        assert devices.stdout.count("VMBUS ID") == 8
    finally:
        stopped = call(tmp_path, "stop", "--machine", "t-detach")
    assert stopped.returncode == 0, stopped.stderr
    assert_gone("t-detach")


def test_logs_of_detached_launchers_are_kept_up_to_ten(tmp_path: Path) -> None:
    """The newest of those that ended badly; that of a launcher that lives stays however old it is, and ends with it."""
    state = tmp_path / "state" / "vmbus-emu"
    done = call(tmp_path, "run", "--name", "t-old", "--detach", "--device", "echo:1")
    assert done.returncode == 0, done.stderr
    try:
        (living,) = state.glob("detached-*.log")
        os.utime(living, (1, 1))
        for number in range(12):
            log = state / f"detached-0{number}.log"
            log.write_text("it died\n")
            os.utime(log, (1_000 + number, 1_000 + number))
        refused = call(tmp_path, "run", "--name", "t-old", "--detach")
        assert refused.returncode == 2
        left = {path.name for path in state.glob("detached-*.log")}
    finally:
        stopped = call(tmp_path, "stop", "--machine", "t-old")

    assert stopped.returncode == 0, stopped.stderr
    assert left == {living.name, *(f"detached-0{number}.log" for number in range(2, 12))}
    assert not living.exists()


def started_by_hand(home: Path, module: str, *words: str) -> subprocess.Popen[bytes]:
    """An inner process as somebody starts it at another terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_processor_started_by_hand_boots_with_the_rest(tmp_path: Path) -> None:
    """A machine without one of its processors waits for it; started by hand, it comes online and takes channels."""
    with ended(
        start(tmp_path, "run", "--name", "t-hand", "--without", "vcpu1", "--duration", "0", "--json")
    ) as process:
        wait_for(lambda: "vmbus-emu.t-hand.trace" in objects("t-hand"), "the machine to be made")
        wait_for(lambda: _formatted("t-hand"), "the boot CPU to lay RAM out")
        by_hand = started_by_hand(tmp_path, "guestproc", "vcpu", "1", "--machine", "t-hand")
        output, errors = process.communicate(timeout=60)
        by_hand.communicate(timeout=30)

    assert process.returncode == 0, errors
    assert "python -m guestproc vcpu 1 --machine t-hand" in errors
    assert {channel["vcpu"] for device in report(output)["devices"] for channel in device["channels"]} == {0, 1}
    assert by_hand.returncode == 0


def test_hypervisor_started_by_hand_may_take_its_time(tmp_path: Path) -> None:
    """The boot CPU's first exit waits for a host that is still to come, for longer than the deadline of an exit."""
    scenario = tmp_path / "hasty.toml"
    # Less than it takes to start a Python process that imports the host.
    scenario.write_text("[machine]\nexit_deadline_s = 0.1\n")
    words = ("run", str(scenario), "--name", "t-late", "--without", "hypervisor", "--duration", "0", "--json")
    with ended(start(tmp_path, *words)) as process:
        wait_for(lambda: "vcpu0" in _enlisted("t-late"), "the boot CPU to come")
        by_hand = started_by_hand(tmp_path, "hostproc", "--machine", "t-late")
        output, errors = process.communicate(timeout=60)
        by_hand.communicate(timeout=30)

    assert process.returncode == 0, errors
    assert "python -m hostproc --machine t-late" in errors
    assert report(output)["channels_open"] == 8
    assert by_hand.returncode == 0
    assert_gone("t-late")


def test_a_process_that_a_machine_has_is_not_started_a_second_time(tmp_path: Path) -> None:
    """By hand one gets a line, and the machine goes on: two hypervisors would answer one guest."""
    wanted = {
        ("hostproc",): "machine t-twice has its hypervisor already (pid ",
        ("guestproc", "workqueue"): "machine t-twice has its workqueue already (pid ",
        ("guestproc", "vcpu", "1"): "machine t-twice has its vcpu1 already (pid ",
        ("guestproc", "vcpu", "2"): "machine t-twice has no vcpu2; its CPUs are 0 to 1\n",
    }
    with ended(start(tmp_path, "run", "--name", "t-twice", "--json")) as process:
        wait_until_open("t-twice", process)
        for words, said in wanted.items():
            command = [sys.executable, "-m", *words, "--machine", "t-twice"]
            done = subprocess.run(
                command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=30, check=False
            )
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
            assert done.stderr.startswith(said)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 143, errors
    assert (report(output)["channels_open"], report(output)["leaked"]) == (8, 0)


NO_THREAD = """
import threading

start = threading.Thread.start

def limited(thread):
    if thread.name == "kworker/rescind":
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = limited
"""
"""A `sitecustomize` of a process at the system's limit of threads."""


def test_a_process_started_by_hand_that_gets_no_thread_says_so_and_ends(tmp_path: Path) -> None:
    """One line and status 3, while the machine is still there; the launcher hears that it is gone."""
    (tmp_path / "sitecustomize.py").write_text(NO_THREAD)
    words = [sys.executable, "-m", "guestproc", "workqueue", "--machine", "t-few"]
    with ended(
        start(tmp_path, "run", "--name", "t-few", "--without", "workqueue", "--duration", "60", "--json")
    ) as process:
        wait_for(lambda: "vmbus-emu.t-few.trace" in objects("t-few"), "the machine to be made")
        wait_for(lambda: _formatted("t-few"), "the boot CPU to lay RAM out")
        limited = {**environment(tmp_path), "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
        done = subprocess.run(words, cwd=ROOT, env=limited, capture_output=True, text=True, timeout=30, check=False)
        _output, errors = process.communicate(timeout=60)

    said = "cannot start a thread of the workqueue process: can't start new thread; a machine needs some 20 processes"
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith(said)
    assert (process.returncode, "workqueue" in errors, "its terminal says more" in errors) == (4, True, True)
    assert_gone("t-few")


def test_a_process_started_by_hand_beyond_a_limit_is_one_line(tmp_path: Path) -> None:
    """Guest RAM that it may not map is this computer's to mend: status 3."""
    with ended(start(tmp_path, "run", "--name", "t-tight", "--without", "workqueue", "--duration", "60")) as process:
        wait_for(lambda: "vmbus-emu.t-tight.trace" in objects("t-tight"), "the machine to be made")
        wait_for(lambda: _formatted("t-tight"), "the boot CPU to lay RAM out")
        command = f"ulimit -v 500000; exec {sys.executable} -m guestproc workqueue --machine t-tight"
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
        )
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert "the limit on address space (`ulimit -v`) is 500000 KiB: raise it" in done.stderr


def _enlisted(name: str) -> set[str]:
    """Who is in the process table of a machine, if there is one yet."""
    from emu.control import Control
    from emu.errors import UserError
    from emu.ipc.segments import object_name

    try:
        control = Control.attach(object_name(name, "control"))
    except UserError:
        return set()
    try:
        return {row.name for row in control.rows()}
    finally:
        control.close()


def _formatted(name: str) -> bool:
    from emu.control import Control
    from emu.ipc.segments import object_name

    control = Control.attach(object_name(name, "control"))
    try:
        return control.guest_formatted
    finally:
        control.close()


def test_boot_with_both_cores_busy(tmp_path: Path) -> None:
    """With every core kept busy by other work a machine still boots, and loses nothing."""
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], stdin=subprocess.DEVNULL)
        for _ in range(os.cpu_count() or 2)
    ]
    try:
        done = call(tmp_path, "run", "--name", "t-busy", "--vcpus", "4", "--duration", "0", "--json", timeout_s=120)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()

    assert done.returncode == 0, done.stderr
    told = report(done.stdout)
    assert told["channels_open"] == 8 and told["task_errors"] == 0 and told["leaked"] == 0


def test_no_guest_ends_by_its_deadline(tmp_path: Path) -> None:
    """A machine that waits for somebody else's guest gives up at its deadline: exit code 124, nothing left.

    The object is printed all the same, and says what was waited for.
    """
    done = call(tmp_path, "run", "--name", "t-alone", "--no-guest", "--guest-timeout", "0.5", "--json")

    assert done.returncode == 124, done.stderr
    assert "guest" in done.stderr
    assert_gone("t-alone")
    told = report(done.stdout)
    assert "a guest to attach" in told["timed_out"] and told["timed_out"] in done.stderr
    assert (told["machine"], told["offers"], told["deaths"]) == ("t-alone", 0, [])


@pytest.mark.parametrize("mount", ["mount -t tmpfs -o size=64k tmpfs /dev/shm", "mount -t tmpfs -o ro tmpfs /dev/shm"])
def test_full_or_readonly_shared_memory_is_one_line(tmp_path: Path, mount: str) -> None:
    """Without room in /dev/shm, or with none to write, a run says so in one line with exit code 3."""
    done = run_behind(mount, tmp_path)

    assert done.returncode == 3, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and "/dev/shm" in done.stderr


@pytest.mark.parametrize("size", range(2900, 3500, 100))
def test_boot_that_shared_memory_has_no_room_for_is_one_line(tmp_path: Path, size: int) -> None:
    """Where the objects fit and the guest's tables do not no processor has died: it runs, or one line says why not."""
    done = run_behind(f"mount -t tmpfs -o size={size}k tmpfs /dev/shm", tmp_path)

    assert done.returncode in (0, 3), (done.stdout, done.stderr)
    assert done.stderr.count("\n") == (done.returncode == 3) and ("/dev/shm" in done.stderr) == (done.returncode == 3)


@pytest.mark.parametrize("size", range(3190, 3300, 10))
def test_no_process_dies_where_shared_memory_ends_within_the_boot(tmp_path: Path, size: int) -> None:
    """A few KiB decide who finds no room: the guest's tables, its SynIC's pages, a channel's record. Nobody dies.

    Whoever it is, the run says that /dev/shm is too small: a guest that goes on without a device is no finding then.
    """
    done = run_behind(f"mount -t tmpfs -o size={size}k tmpfs /dev/shm", tmp_path)

    assert done.returncode in (0, 3), (done.stdout, done.stderr)
    assert done.stderr.count("\n") == (done.returncode == 3) and ("/dev/shm" in done.stderr) == (done.returncode == 3)


def test_no_process_dies_where_a_worker_has_no_room_to_record(tmp_path: Path) -> None:
    """A thread of the workqueue begins behind the others, whose recordings had just room enough."""
    words = ("--device", "echo:8", "--flight", "10")
    sizes = [
        run_behind(f"mount -t tmpfs -o size={size}k tmpfs /dev/shm", tmp_path, *words)
        for size in range(7_000, 17_000, 1_000)
    ]

    assert {done.returncode for done in sizes} <= {0, 3}, [done.stderr for done in sizes]
    assert any("of recording in /dev/shm" in done.stderr for done in sizes)
    assert all(done.stderr.count("\n") == (done.returncode == 3) for done in sizes)


@pytest.mark.parametrize(
    "command", ["latency --duration 0.3", "stress --duration 0.3 --flight 0 --channels 64 --mix none"]
)
def test_no_process_dies_where_there_is_no_room_for_what_was_measured(tmp_path: Path, command: str) -> None:
    """The temporary directory is full: status 3, and one line that says what to do."""
    script = f"""
        mount -t tmpfs tmpfs /dev/shm && mkdir small && mount -t tmpfs -o size=8k tmpfs small || exit 99
        TMPDIR=$PWD/small $0 -m tools.entry {command}; status=$?; test -z "$(ls /dev/shm; ls small)" && exit $status
    """
    done = in_namespace(script, tmp_path)

    assert (done.returncode, done.stdout) == (3, ""), (done.stdout, done.stderr)
    assert "vmbus-emu: no room for what was measured: No space left on device; free some" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_computer_without_proc_is_one_line(tmp_path: Path) -> None:
    """A bare chroot, say: status 3 and how to mend it, before anything is made; no traceback of the zygote's."""
    done = run_behind("mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /proc", tmp_path)

    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "vmbus-emu: no /proc, by which processes are told apart; `mount -t proc proc /proc`\n"


def test_shared_memory_that_fills_up_is_a_guest_without_memory(tmp_path: Path) -> None:
    """No process dies of it: of the devices that come then some have no channel; with room again the next one has."""
    script = """
        emulator="$0 -m tools.entry" && mount -t tmpfs -o size=10m tmpfs /dev/shm || exit 99
        $emulator run --detach --name t-fills --device echo:8
        dd if=/dev/zero of=/dev/shm/others bs=64k 2>/dev/null
        $emulator ctl offer echo:8 >/dev/null
        $emulator ctl rescind 16 --wait >/dev/null 2>&1  # handled behind the others, if it is not gone by itself
        rm /dev/shm/others
        $emulator ctl offer echo --wait >/dev/null || echo "not opened"
        $emulator inspect channels --json
        $emulator stop >/dev/null 2>&1
        echo "stopped $? $(ls /dev/shm)"
    """
    done = in_namespace(script, tmp_path)

    name, rest = done.stdout.split("\n", 1)
    inspected, stopped = rest.split("stopped ")
    channels = json.loads(inspected)["value"]
    assert (name, stopped) == ("t-fills", "0 \n"), (done.stdout, done.stderr)
    states = [channel["host"]["state"] for channel in channels.values()]
    assert 8 + 1 <= states.count("OPEN") < 8 + 7 + 1


def run_behind(mount: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`run` with a /dev/shm of its own."""
    command = f'{mount} && "$0" "$@"; status=$?; test -z "$(ls /dev/shm)" && exit $status'
    return in_namespace(command, home, "-m", "tools.entry", "run", "--duration", "0", *arguments)


def in_namespace(script: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A shell script in a mount namespace of its own; `$0` is Python, `$@` the arguments."""
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, *arguments],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_json_survives_a_reader_that_leaves(tmp_path: Path) -> None:
    """A reader of the output that goes away ends nothing but the output."""
    with ended(start(tmp_path, "run", "--name", "t-pipe", "--duration", "0", "--json")) as process:
        assert process.stdout is not None
        process.stdout.close()
        with contextlib.suppress(ValueError):
            process.stderr and process.stderr.read()
        process.wait(timeout=60)

    assert process.returncode in (0, 141)
    assert_gone("t-pipe")


@pytest.mark.parametrize("memory", ["contiguous", "scattered"])
def test_rings_of_a_scenario_have_memory_from_the_launch_on(memory: str) -> None:
    """What is reserved for them is where our guest takes them, whatever their sizes and their pages' order."""
    devices = (
        DeviceSpec("echo", count=40),
        DeviceSpec("echo", count=3, ring_pages=5),
        DeviceSpec("echo", ring_pages=64),
    )
    scenario = Scenario(MachineSpec(ring_memory=memory), devices)
    with launch(scenario) as running:
        running.wait_ready()
        gpa, length = running.machine.ram_reserved
        tables = HostTables(running.machine.control)
        wait_for(lambda: len(list(tables.gpadls())) == 44, "44 GPADLs in the mirror")
        pages = {first + n for one in tables.gpadls() for first, count in one.runs for n in range(count)}
        running.shut_down_guest()

    assert len(pages) == 2 * (40 * 16 + 3 * 5 + 64)
    assert gpa <= min(pages) * PAGE_SIZE and (max(pages) + 1) * PAGE_SIZE <= gpa + length


@pytest.mark.parametrize("vcpus", [2, 8])
def test_last_ring_of_devices_alike_has_memory_from_the_launch_on(vcpus: int) -> None:
    """Also where the pages that the kernel takes at boot push the rings back."""
    with launch(Scenario(MachineSpec(vcpus=vcpus), (DeviceSpec("echo", count=8),))) as running:
        running.wait_ready()
        gpa, length = running.machine.ram_reserved
        tables = HostTables(running.machine.control)
        wait_for(lambda: len(list(tables.gpadls())) == 8, "8 GPADLs in the mirror")
        runs = [run for one in tables.gpadls() for run in one.runs]
        running.shut_down_guest()

    assert all(gpa <= first * PAGE_SIZE and (first + count) * PAGE_SIZE <= gpa + length for first, count in runs)


def test_rings_that_shared_memory_has_no_room_for_are_one_line(tmp_path: Path) -> None:
    """Before anything runs, with what they need and the cure; nothing is left."""
    script = 'mount -t tmpfs -o size=16m small /dev/shm && "$@"; echo "$? $(ls /dev/shm)"'
    command = [
        sys.executable,
        "-m",
        "tools.entry",
        "run",
        "--device",
        "echo:200",
        "--name",
        "t-small",
        "--duration",
        "0",
    ]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *command],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stderr == (
        "vmbus-emu: /dev/shm is full, it has no room for 25 MiB (/vmbus-emu.t-small.ram); free some of it, or ask for"
        " fewer or smaller rings\n"
    )
    assert done.stdout == "3 \n"


@pytest.mark.parametrize("command", ["latency", "run"])
def test_launcher_that_is_killed_while_it_makes_a_machine_leaves_nothing(tmp_path: Path, command: str) -> None:
    """Its objects are there before there is a sweeper: the zygote, which is still warming up, unlinks them."""
    with ended(start(tmp_path, command)) as process:
        name = f"vm{process.pid}"
        wait_for(lambda: bool(objects(name)), "the first object of the machine")
        os.kill(process.pid, signal.SIGKILL)

    assert_gone(name)


def test_zygote_of_a_killed_launcher_leaves_the_machine_of_a_quicker_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was killed as it lost the race for a name takes nothing with it."""
    monkeypatch.setattr("tools.sweeper.GRACE_S", 0.0)
    with launch(Scenario.default().with_overrides(vcpus=1), name="t-quicker") as quicker:
        quicker.wait_ready()
        before = objects("t-quicker")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.send(msgpack.packb(["making", "t-quicker"]))
            ours.close()
            Zygote(theirs, os.getpid()).run()
        quicker.shut_down_guest()

        assert objects("t-quicker") == before
