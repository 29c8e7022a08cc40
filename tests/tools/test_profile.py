"""`vmbus-emu profile`: processes, the machine's counters, and what one of each costs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from emu.control import is_over
from tests.conftest import RunCli
from tests.system.commands import assert_gone, wait_until_open
from tools import cli, profile_samples, svg
from tools.exit_status import ExitStatus
from tools.options import FLIGHT_VARIABLE
from tools.profile import _Command, _Running, watch
from tools.profile_picture import MOST_BANDS, svg_of
from tools.profile_samples import ProcessCost, Profile

POLYGON = "{http://www.w3.org/2000/svg}polygon"


def cost(name: str, kind: str, cpu_ns: int) -> ProcessCost:
    """A process that computed evenly for two seconds."""
    return ProcessCost(name, kind, 1, cpu_ns=cpu_ns, timeline=[(0.0, 2.0, cpu_ns / 2e9)])


def test_costs_are_of_host_and_guest_without_the_harness() -> None:
    """Launcher and zygote are no part of the machine; what was never counted has no cost."""
    processes = [cost("launcher", "launcher", 7_000), cost("hypervisor", "hypervisor", 600), cost("vcpu0", "vcpu", 400)]
    found = Profile(2.0, processes, {"packets": 10, "interrupts": 4, "exits": 0})

    assert found.machine_ns == 1_000
    assert (found.per("packets"), found.per("interrupts"), found.per("exits")) == (100.0, 250.0, None)


@pytest.mark.parametrize(("count", "bands"), [(1, 1), (MOST_BANDS, MOST_BANDS), (70, MOST_BANDS + 1)])
def test_picture_has_a_band_for_each_process_up_to_a_limit(count: int, bands: int) -> None:
    """Well-formed, the cheapest of many summed up in one band."""
    found = Profile(2.0, [cost(f"vcpu{n}", "vcpu", 10**6 * (n + 1)) for n in range(count)], {})

    assert len(ElementTree.fromstring(svg_of(found)).findall(POLYGON)) == bands


def test_bands_stand_on_each_other_within_the_picture() -> None:
    """From the left edge to the right one; the heights are the shares, the highest just below the top."""
    found = Profile(2.0, [cost("vcpu0", "vcpu", 10**9), cost("vcpu1", "vcpu", 3 * 10**9)], {})
    bands = [
        [(float(x), float(y)) for x, y in (one.split(",") for one in band.attrib["points"].split())]
        for band in ElementTree.fromstring(svg_of(found)).findall(POLYGON)
    ]
    below, above = ({y for _, y in band} for band in bands)
    unit = max(above) - min(above)

    assert all((min(xs), max(xs)) == (60.0, 620.0) for xs in ([x for x, _ in band] for band in bands))
    assert max(below) == 360.0 - 40.0 and min(below) == max(above)
    assert max(below) - min(below) == pytest.approx(3 * unit, rel=0.01)
    assert 36.0 < min(above) < 36.0 + 0.1 * (max(below) - 36.0)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (2.15, ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        (0.98, ["0.0", "0.2", "0.4", "0.6", "0.8"]),
        (0.1, ["0.00", "0.02", "0.04", "0.06", "0.08", "0.10"]),
        (1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (3600.0, ["0", "1000", "2000", "3000"]),
    ],
)
def test_axes_have_round_numbers(span: float, words: list[str]) -> None:
    """A grid line stands where its number says: a rounded quarter of 2.15 s is no 1.1 s."""
    ticks = svg.ticks(span)

    assert [written for _, written in ticks] == words
    assert all(value == pytest.approx(float(written)) for value, written in ticks)


@pytest.mark.parametrize("exponent", range(-4, 5))
def test_axes_have_three_to_six_numbers(exponent: int) -> None:
    """Of whatever size."""
    for tenths in range(10, 100):
        ticks = svg.ticks(tenths * 10.0**exponent / 10)
        assert 3 <= len(ticks) <= 6 and ticks[-1][0] <= tenths * 10.0**exponent / 10 * (1 + 1e-9)


WORKS_IN_A_THREAD = """
import sys, threading

worker = threading.Thread(target=lambda: (sum(range(10**6)), print("worked", flush=True), sys.stdin.readline()))
worker.start()
worker.join()
print("joined", flush=True)
sys.stdin.readline()
"""


def test_what_an_ended_thread_or_process_cost_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's figures go with a thread, and a process that is ending has no memory left; what was seen stays."""
    monkeypatch.setattr(profile_samples, "MEMORY_EVERY", 1)
    with subprocess.Popen(
        [sys.executable, "-c", WORKS_IN_A_THREAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        watched = profile_samples.Watched("one", "vcpu", process.pid, 0.0, from_birth=True)
        seen = []
        for step in ("worked", "joined"):
            assert process.stdout.readline() == f"{step}\n"
            watched.sample(1.0)
            seen.append(watched.cost.cpu_ns)
            if step == "worked":
                process.stdin.write("\n")
                process.stdin.flush()
        process.kill()
        while not is_over(process.pid):
            os.sched_yield()
        watched.sample(2.0)
        seen.append(watched.cost.cpu_ns)

    assert seen == sorted(seen) and seen[0] > 0
    assert watched.cost.rss >= watched.cost.pss >= watched.cost.uss > 0


WAITS_IN_A_THREAD = """
import sys, threading

def wait():
    for line in iter(sys.stdin.readline, "end\\n"):
        print(line, end="", flush=True)

worker = threading.Thread(target=wait)
worker.start()
worker.join()
"""


def test_switches_are_those_of_all_threads() -> None:
    """Where a thread waits a hundred times its process has, though the first thread stands still meanwhile."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_A_THREAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def said(line: str) -> str:
            print(line, file=process.stdin, flush=True)
            assert process.stdout is not None
            return process.stdout.readline()

        assert said("there") == "there\n"
        watched = profile_samples.Watched("one", "workqueue", process.pid, 0.0, from_birth=False)
        for number in range(200):
            assert said(str(number)) == f"{number}\n"
        watched.sample(1.0)
        process.communicate("end\n")

    # Now and then its next line is there before it waits for it.
    assert watched.cost.voluntary + watched.cost.involuntary > 100


@pytest.mark.parametrize("from_birth", [True, False])
def test_what_a_process_did_before_it_was_watched(from_birth: bool) -> None:
    """It is the profile's of one that it started, with its threads'; of one that ran before it is left out."""
    while time.process_time() < 0.5:
        pass
    before_s = time.process_time()
    watched = profile_samples.Watched("one", "vcpu", os.getpid(), 0.0, from_birth=from_birth)
    watched.sample(1.0)
    cost, threads_s = watched.cost, sum(one.user_s + one.system_s for one in watched.cost.threads.values())

    assert (cost.cpu_ns / 1e9 > before_s / 2) is from_birth
    assert (threads_s > before_s / 2) is from_birth
    assert (cost.user_s + cost.system_s > before_s / 2) is from_birth


def test_command_is_watched_from_its_machines_first_instruction(run_cli: RunCli, tmp_path: Path) -> None:
    """A run's processes, threads, switches and memory, joined with its packets and interrupts."""
    done = run_cli("profile", "--json", "--plot", "out.svg", "--", "run", "--duration", "0.5", timeout_s=60)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == {"name": "vmbus-emu.profile", "version": 1}
    by_name = {one["name"]: one for one in told["processes"]}
    assert {"launcher", "zygote", "hypervisor", "vcpu0", "vcpu1", "workqueue"} <= by_name.keys()
    assert all(one["cpu_ns"] > 0 and one["rss"] >= one["uss"] > 0 for one in by_name.values())
    assert len(by_name["workqueue"]["threads"]) > 5
    for one in by_name.values():
        # The picture has all of the time that the legend claims, from each process's birth on.
        drawn_ns = sum((end - begin) * share * 1e9 for begin, end, share in one["timeline"])
        assert drawn_ns == pytest.approx(one["cpu_ns"], rel=0.02, abs=2e6)
    assert told["per_packet_ns"] > 0 and told["per_interrupt_ns"] > 0
    assert told["counters"]["packets"] > 0
    ElementTree.parse(tmp_path / "out.svg")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--machine", "nobody"), "nobody"),
        (("--machine", "nobody", "--", "run"), "--machine"),
        (("--", "doctor"), "doctor"),
        (("--duration", "0"), "--duration"),
    ],
)
def test_nothing_to_watch_is_one_line_and_status_2(run_cli: RunCli, arguments: tuple[str, ...], word: str) -> None:
    """A machine that is not there, or a command that runs none."""
    done = run_cli("profile", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", [("run",), ("one.toml",), ("record", "-o", "x.rec")], ids="-".join)
def test_machine_that_would_outlive_its_command_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    """Exit 2 and one line, before anything starts: the profile said that no machine ran, and one went on."""
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_more: started.append(words))

    assert cli.main(["profile", "--duration", "1", "--", *command, "--detach"]) == ExitStatus.USAGE

    shown = capsys.readouterr()
    said = " ".join(("run", *command) if command[0].endswith(".toml") else command)
    assert (started, shown.out) == ([], "")
    assert shown.err == (
        f"vmbus-emu: `{said} --detach` would leave its machine behind; leave --detach out, "
        "or run it alone and watch the machine with `vmbus-emu profile --machine NAME`\n"
    )


def test_command_that_says_what_is_wrong_is_not_talked_over(run_cli: RunCli) -> None:
    """Its line is the only one, and its status is ours."""
    done = run_cli("profile", "--", "nosuch")

    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'nosuch'" in done.stderr and done.stderr.count("\n") == 1


def test_command_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """It could say nothing itself: one line says how it died; the status is a death's, and the object is there."""
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr("tools.profile.own_python", lambda *_words: killed)

    assert cli.main(["profile", "--json", "--", "run"]) == ExitStatus.FAILED

    shown = capfd.readouterr()
    told = json.loads(shown.out)
    assert (told["command_status"], told["processes"], told["interrupted"]) == (4, [], False)
    assert re.fullmatch(r"vmbus-emu: `run` \(pid \d+\) died: killed by SIGKILL\n", shown.err)


def test_interrupted_profile_tells_what_there_was() -> None:
    """Ctrl-C ends the watching, not the command: the samples so far are its result."""

    class Interrupted(_Running):
        def over(self) -> bool:
            raise KeyboardInterrupt

    found, interruption = watch(Interrupted("nobody"), None)

    assert interruption.status == ExitStatus.INTERRUPTED
    assert found.processes == [] and found.seconds > 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_signal_that_ends_the_profile_ends_the_command_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """Only by Ctrl-C may it end by itself; no signal but ours has reached it here, and it leaves nothing."""
    monkeypatch.setattr("tools.profile.INTERRUPTED_END_S", 3600.0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = signal.signal(signum, signal.SIG_DFL)  # the tests themselves may run below `nohup`
    try:
        command = _Command(("run", "--duration", "600"))
        with command.process as process:
            wait_until_open(f"vm{process.pid}", process)
            command.end(signum=signum)
    finally:
        signal.signal(signum, before)

    assert process.returncode == 128 + signum
    assert_gone(f"vm{process.pid}")


def test_command_that_takes_no_notice_of_a_signal_is_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below `nohup` a hang-up ends nothing; what profiles it does not wait for ever."""
    monkeypatch.setattr("tools.profile.ENDED_S", 0.5)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = _Command(("run", "--duration", "600"))
        with command.process as process:
            wait_until_open(f"vm{process.pid}", process)
            assert command.end(signum=signal.SIGHUP) == 0
    finally:
        signal.signal(signal.SIGHUP, before)

    assert_gone(f"vm{process.pid}")


def test_scenario_alone_is_run(run_cli: RunCli, tmp_path: Path) -> None:
    """As by `-- run`: its machine is what is watched."""
    path = tmp_path / "two.toml"
    path.write_text("[machine]\nvcpus = 2\n")
    done = run_cli("profile", "--json", str(path), "--", "--duration", "0.3", timeout_s=60)

    told = json.loads(done.stdout)
    assert (done.returncode, told["command"]) == (0, ["run", str(path), "--duration", "0.3"])
    assert {"vcpu0", "vcpu1"} <= {one["name"] for one in told["processes"]}


def test_launcher_of_several_machines_is_one_process(run_cli: RunCli, tmp_path: Path) -> None:
    """`latency` runs two machines: what launches them is told once, the others have their machine's number."""
    done = run_cli("profile", "--json", "--", "latency", "--duration", "0.1", timeout_s=60)

    assert done.returncode == 0, done.stderr
    processes = json.loads(done.stdout)["processes"]
    assert [one["machine"] for one in processes if one["kind"] == "launcher"] == [1]
    assert sorted(one["machine"] for one in processes if one["name"] == "vcpu0") == [1, 2]
    assert len({one["pid"] for one in processes}) == len(processes)


def test_machine_that_has_gone_is_let_go(run_cli: RunCli) -> None:
    """`demo` ends when nobody has its machine mapped any more; and all that the machine counted is in the profile."""
    done = run_cli("profile", "--json", "--", "demo", "--fast", timeout_s=60)

    assert done.returncode == 0, done.stderr
    counters = json.loads(done.stdout)["counters"]
    assert counters["requested"] == counters["merged"] + counters["interrupts"] > 0
    assert counters["packets"] == 96


def test_picture_that_cannot_be_written_is_told_before_the_command_runs(run_cli: RunCli) -> None:
    """Nobody waits for a measurement whose picture has no place."""
    done = run_cli("profile", "--plot", "nowhere/x.svg", "--", "run", "--duration", "0")

    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "vmbus-emu: --plot nowhere/x.svg: No such file or directory; choose a file that can be written\n"
    )


IDLE = """[2026-11-30T23:13:44.372618958Z ERROR inferno::flamegraph] No stack counts found
Error: Failed to write flamegraph: No stack counts found

Stack backtrace:
   0: anyhow::error::<impl anyhow::Error>::msg
"""


@pytest.mark.parametrize(
    ("said", "status", "told"),
    [
        ("Permission Denied: Try running again with elevated permissions\n", 1, "Permission Denied: Try running"),
        (IDLE, 1, "Failed to write flamegraph: No stack counts found"),
        ("", 4, "it ended with 4"),
        ("", 0, None),
    ],
)
def test_flame_graph_that_py_spy_did_not_write_is_told(
    run_cli: RunCli, tmp_path: Path, said: str, status: int, told: str | None
) -> None:
    """The profile is shown all the same; then comes py-spy's own reason, and status 2."""
    spy = tmp_path / "py-spy"
    (tmp_path / "said").write_text(said)
    spy.write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2\nexit {status}\n")
    spy.chmod(0o755)
    words = ("profile", "--json", "--flame", str(tmp_path / "x.svg"), "--", "run", "--duration", "0.3")
    done = run_cli(*words, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout_s=60)

    assert done.returncode == (2 if told else 0)
    assert json.loads(done.stdout)["counters"]["packets"] > 0
    line = f"vmbus-emu: --flame {tmp_path}/x.svg: py-spy wrote none"
    assert f"{line}: {told}" in done.stderr if told else line not in done.stderr


@pytest.mark.parametrize(("said", "flight"), [(None, "0"), ("5", "5")])
def test_command_that_is_measured_does_not_record(
    monkeypatch: pytest.MonkeyPatch, said: str | None, flight: str
) -> None:
    """Unless somebody says so: what a flight recorder costs is no part of what a packet costs."""
    environments: list[dict[str, str]] = []
    monkeypatch.delenv(FLIGHT_VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(FLIGHT_VARIABLE, said)
    monkeypatch.setattr(subprocess, "Popen", lambda *_words, env, **_more: environments.append(env))

    _Command(("run",))

    assert [one[FLIGHT_VARIABLE] for one in environments] == [flight]
