"""Findings that are kept: what is in a folder, that its scenario and its line are right, and that only findings are."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.errors import DeadlinePassed, NotOpened, OwnLimit, UserError
from emu.faults import parse
from emu.host_policy import ANSWERS, CELLS
from emu.layout import PAGE_SIZE
from emu.scenario import ERAS, MIN_RAM, SUPPORTED_FEATURES, DeviceSpec, MachineSpec, Poll, Scenario
from emu.switches import SWITCHES, Fix
from emu.wire.versions import KNOWN_VERSIONS, FeatureFlags
from tests.conftest import SOURCES, RunCli
from tests.system.commands import start, wait_until_open
from tools.crash import failure_report
from tools.exit_status import ExitStatus
from tools.findings import (
    KEPT,
    Case,
    InFolder,
    findings_dir,
    folder_of,
    keep_death,
    kept_if_it_hangs,
    program,
    scenario_text,
)
from tools.launch import Death, MachineDied
from tools.run_outcome import Outcome

FAULTS = (
    "delay_irq=200us@relid=7",
    "reply.drop@kind=openchannel_result,nth=2",
    "alloc.fail=probe@times=3",
    "host.refuse=open@status=0xc000009a,device=0ce1cd77-c4e5-56e0-aa2c-2da5f1a538a4",
    "host.mutate_slot=239:0xff@vp=1",
    "vsp.stall@class=echo",
    "guest.die=1500ms",
)


PLUGIN = """from emu.plugin import device_class

KEPT = device_class("keptclass", guid="6d5a2f3e-8f0c-4b59-9c3c-1f1f5b0a7a11")
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where state goes in this test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "with space"))
    return tmp_path / "with space" / "vmbus-emu"


def case(**more: Any) -> Case:
    """What a test says that it ran."""
    words = (InFolder("scenario.toml"), "--stream", "it's $HOME")
    return Case(**{"command": ("run",), "scenario": Scenario.default(), "seed": 7, "words": words, **more})


def contents(folder: Path | None) -> set[str]:
    """Names of the files in a folder."""
    assert folder is not None
    return {path.name for path in folder.iterdir()}


# -- the scenario -------------------------------------------------------------------------------------


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Any scenario without plugins that a machine can be made of."""
    vcpus = draw(st.integers(1, 64))
    polls = st.sampled_from([Poll(), Poll.read("off")]) | st.builds(Poll.read, st.integers(1, 1_000_000))
    machine = MachineSpec(
        name=draw(st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", fullmatch=True)),
        vcpus=vcpus,
        ram_bytes=draw(st.integers((MIN_RAM + (512 << 20)) // PAGE_SIZE, 1 << 20)) * PAGE_SIZE,
        era=draw(st.sampled_from(ERAS)),
        host_version=draw(st.sampled_from(KNOWN_VERSIONS)),
        features=FeatureFlags(draw(st.integers(0, int(SUPPORTED_FEATURES))) & SUPPORTED_FEATURES),
        deprecate_auto_eoi=draw(st.booleans()),
        poll=draw(polls),
        numa=draw(st.integers(1, vcpus)),
        vp_order=draw(st.sampled_from(["identity", "reverse"])),
        ring_memory=draw(st.sampled_from(["contiguous", "scattered"])),
        exit_deadline_ns=draw(st.integers(100_000_000, 3_600_000_000_000)),
    )
    counted = st.builds(
        DeviceSpec,
        st.sampled_from(["echo", "netlike", "kbd"]),
        count=st.integers(1, 3),
        ring_pages=st.integers(2, 32),
        subchannels=st.none() | st.integers(0, 3),
    )
    devices = draw(st.lists(counted, max_size=3))
    if draw(st.booleans()):
        devices.append(DeviceSpec(instance=draw(st.uuids(version=4))))
    off = dict.fromkeys(draw(st.lists(st.sampled_from(sorted(SWITCHES)), max_size=3)), False)
    variants = ["", *(variant for name in off for variant in SWITCHES[name].variants)]
    fix = Fix(**off, variant=draw(st.sampled_from(variants)))
    faults = tuple(parse(text) for text in draw(st.lists(st.sampled_from(FAULTS), max_size=3)))
    cells = st.sampled_from([f"{kind}.{one}" for kind, states in CELLS.items() for one in states])
    policy = draw(st.dictionaries(cells, st.sampled_from(ANSWERS), max_size=3))
    return Scenario(machine, tuple(devices), fix=fix, faults=faults, policy=policy)


@settings(max_examples=25)
@given(scenarios())
def test_scenario_that_is_written_reads_as_the_same(tmp_path_factory: pytest.TempPathFactory, one: Scenario) -> None:
    """Whatever a machine was made of, the file of a finding makes it again."""
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(scenario_text(one), encoding="utf-8")

    assert Scenario.load(path) == one


def test_scenario_of_a_plugin_is_written_with_it(tmp_path: Path) -> None:
    """By its whole path, so that the folder may lie anywhere."""
    plugin = tmp_path / "one.py"
    plugin.write_text(PLUGIN)
    scenario = Scenario.default([plugin])
    path = tmp_path / "elsewhere" / "written.toml"
    path.parent.mkdir()
    path.write_text(scenario_text(scenario), encoding="utf-8")

    assert Scenario.load(path) == scenario
    assert Scenario.load(path).plugins.paths == [str(plugin)]


# -- the folder ---------------------------------------------------------------------------------------


def test_folder_says_what_there_is_and_what_not(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No recording where the machine did not record, and that is told; one line names the folder."""
    folder = case().keep(["INV-19: one", "two"])

    assert folder is not None and folder.parent == state / "findings"
    assert contents(folder) == {"finding.txt", "scenario.toml", "seed", "repeat"}
    text = (folder / "finding.txt").read_text()
    assert text.startswith("vmbus-emu run found:\n\nINV-19: one\ntwo\n")
    assert "no recording: the machine did not record\n" in text
    assert (folder / "seed").read_text() == "7\n"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said


def test_line_that_repeats_is_quoted(state: Path, tmp_path: Path) -> None:
    """A shell that is given the file calls the command with the very words, whatever is in them."""
    folder = case().keep(["one"])
    assert folder is not None
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vmbus-emu"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)

    done = subprocess.run(
        ["sh", folder / "repeat"],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == ["run", str(folder / "scenario.toml"), "--stream", "it's $HOME"]


def test_recording_of_the_users_is_copied_one_of_ours_linked(state: Path, tmp_path: Path) -> None:
    """What a user may write again must not change in the finding."""
    theirs, ours = tmp_path / "x.rec", state / "flights" / "x.rec"
    ours.parent.mkdir(parents=True)
    for path in (theirs, ours):
        path.write_bytes(b"before")
    copied = case().keep(["one"], recording=theirs)
    linked = case().keep(["two"], recording=ours)
    assert copied is not None and linked is not None
    theirs.write_bytes(b"again")

    assert (copied / "recording.rec").read_bytes() == b"before"
    assert (linked / "recording.rec").samefile(ours)


def test_newest_ten_are_kept(state: Path) -> None:
    """The oldest folder goes, and with it all that is in it."""
    folders = [case().keep([str(number)]) for number in range(KEPT + 1)]

    assert sorted(findings_dir().iterdir()) == folders[1:]


def test_finding_that_makes_room_is_told_to_who_was_told_of_it(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than ten at once push each other out: one of the last hour is named; an older one is nobody's news."""
    folders = [case().keep([str(number)]) for number in range(KEPT)]
    first, second, third, fourth = folders[:4]
    assert first and second and third and fourth
    assert "removed" not in capsys.readouterr().err
    hours_ago = time.time() - 7_200
    os.utime(first, (hours_ago, hours_ago))
    case().keep(["more"])
    assert not first.exists() and "removed" not in capsys.readouterr().err

    case().keep(["more"])
    said = capsys.readouterr().err
    assert not second.exists()
    assert f"the newest 10 findings are kept, 1 of the last hour was removed: {second.name}; copy" in said

    for number in range(2):
        (findings_dir() / f"9{number}-of-another-command").mkdir()
    case().keep(["more"])
    assert f"3 of the last hour were removed: {third.name}, {fourth.name}, " in capsys.readouterr().err


def test_what_is_always_the_same_is_kept_once(state: Path) -> None:
    """The same finding of a command that is deterministic has one folder, another one another."""
    first, again, other = (case(same=True).keep([text]) for text in ("one", "one", "two"))

    assert first == again != other
    assert len(list(findings_dir().iterdir())) == 2


def test_finding_for_which_there_is_no_room_says_what_to_do(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder that is full, in the system's words, and the cure."""

    def full(*_arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Case, "_write", full)

    assert case().keep(["one"]) is None
    assert capsys.readouterr().err == (
        f"vmbus-emu: the finding was not kept: No space left on device below {findings_dir()}; "
        "make room there, or set XDG_STATE_HOME to another place\n"
    )


def test_finding_that_cannot_be_written_leaves_no_half(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says why, the command goes on, and no folder is left."""
    assert case().keep(["one"], recording=state / "gone.rec") is None

    assert "the finding was not kept" in capsys.readouterr().err
    assert list(findings_dir().iterdir()) == []


def test_death_names_its_invariant_and_its_crash_record(state: Path) -> None:
    """The record stays where crash records are; the folder has it, too."""
    record = state / "crashes" / "x.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    death = MachineDied([Death("vcpu0", 1, 256, "AssertionError: INV-13: stale, generation 3", ())])
    death.crash_record = record

    folder = keep_death(case(), death)
    assert contents(folder) == {"finding.txt", "scenario.toml", "seed", "repeat", "crash.json"}
    assert folder is not None
    text = (folder / "finding.txt").read_text()
    assert "INV-13: vcpu0 died" in text and f"crash record: {record}" in text


def test_wait_that_ended_in_vain_is_kept(state: Path) -> None:
    """With its reason, and no word of a hang; whoever asked is told the folder."""
    with pytest.raises(NotOpened) as lost, kept_if_it_hangs(case()):
        raise NotOpened(4, "its probe failed with -EIO")

    (folder,) = findings_dir().iterdir()
    text = (folder / "finding.txt").read_text()
    assert "relid 4 will not be open: its probe failed with -EIO" in text and "did not end" not in text
    assert failure_report(lost.value)["finding"] == str(folder)


def test_what_a_failure_tells_by_a_name_of_runs_is_of_runs_kind() -> None:
    """`not_open` is a number there: a reason under that name would be one that no reader of both expects."""
    why = NotOpened(4, "its probe failed with -EIO")
    told, run = failure_report(why), Outcome("one", Scenario.default(), seed=1).report()

    shared = {name for name in told.keys() & run.keys() if told[name] is not None and run[name] is not None}
    assert {name: type(told[name]) for name in shared} == {name: type(run[name]) for name in shared}
    assert told["unopened"] == str(why)


def test_only_a_hang_is_kept_not_what_a_user_does(state: Path) -> None:
    """Ctrl-C, a wrong word, a limit of the user's own pass; a wait that ends by its deadline is a finding."""
    for error in (KeyboardInterrupt(), UserError("wrong"), OwnLimit("the end", 1.0)):
        with pytest.raises(type(error)), kept_if_it_hangs(case()):
            raise error
    assert not findings_dir().exists()

    with pytest.raises(DeadlinePassed), kept_if_it_hangs(case()):
        raise DeadlinePassed("the guest", 10**9)
    (folder,) = findings_dir().iterdir()
    assert "it did not end: the guest: no answer within 1 s" in (folder / "finding.txt").read_text()
    assert folder_of(folder / "scenario.toml") == folder
    assert folder_of(folder) is None


# -- the commands -------------------------------------------------------------------------------------


def finding_of(done: subprocess.CompletedProcess[str]) -> Path:
    """The folder that a command's JSON names; its one line names the same."""
    assert done.returncode == ExitStatus.FINDING, done.stderr
    folder = Path(json.loads(done.stdout)["finding"])
    assert [line for line in done.stderr.splitlines() if str(folder) in line]
    return folder


def test_stress_keeps_what_it_found_and_repeats_it(run_cli: RunCli, tmp_path: Path) -> None:
    """With its flight, its scenario, its seed; the line finds it again."""
    fault = "host.mutate_pkt=17:0x5a@times=20"
    done = run_cli("stress", "--duration", "0.1", "--channels", "1", "--mix", "none", "--fault", fault, "--json")
    folder = finding_of(done)

    assert contents(folder) == {"finding.txt", "recording.rec", "scenario.toml", "seed", "repeat"}
    assert (folder / "seed").read_text().strip() == str(json.loads(done.stdout)["seed"])
    assert [one.text for one in Scenario.load(folder / "scenario.toml").faults] == [fault]
    shim = tmp_path / "vmbus-emu"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m tools.cli "$@"\n')
    shim.chmod(0o755)
    again = subprocess.run(
        ["sh", folder / "repeat"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(SOURCES),
            "XDG_STATE_HOME": str(tmp_path / "state"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == ExitStatus.FINDING, again.stderr
    assert len(list(folder.parent.iterdir())) == 2


def test_check_refers_to_its_recording_and_keeps_it_once(run_cli: RunCli, recording_path: Path, tmp_path: Path) -> None:
    """The folder says where it is; the same file checked again is the same finding."""
    cut = tmp_path / "cut it.rec"
    cut.write_bytes(recording_path.read_bytes()[:-200])
    folder = finding_of(run_cli("check", cut, "--json"))

    assert contents(folder) == {"finding.txt", "repeat"}
    assert (folder / "repeat").read_text() == f"vmbus-emu check '{cut}'\n"
    assert finding_of(run_cli("check", cut, "--json")) == folder
    shutil.copy(cut, folder / "recording.rec")
    assert finding_of(run_cli("check", folder / "recording.rec", "--json")) == folder
    assert json.loads(run_cli("check", recording_path, "--json").stdout)["finding"] is None


def test_counterexample_is_kept_as_a_schedule_and_done_again(run_cli: RunCli) -> None:
    """As JSON that `--replay` takes; done again from there it is the same finding."""
    world = ("--threads", "--devices", "1", "--subchannels", "0", "--depth", "30", "--without", "offer_gate")
    folder = finding_of(run_cli("explore", *world, "--json"))

    assert contents(folder) == {"finding.txt", "repeat", "schedule.json", "seed"}
    assert "INV-01: relid 1 was rescinded and is never released" in (folder / "finding.txt").read_text()
    again = shlex.split((folder / "repeat").read_text())
    assert finding_of(run_cli(*again[1:], "--json")) == folder


def test_interrupted_run_has_found_nothing(tmp_path: Path) -> None:
    """Ctrl-C: no folder, and null."""
    process = start(tmp_path, "run", "--device", "echo:1", "--name", "nofinding", "--json")
    try:
        wait_until_open("nofinding", process)
        process.send_signal(signal.SIGINT)
        out, _err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == ExitStatus.INTERRUPTED
    assert json.loads(out)["finding"] is None
    assert not (tmp_path / "state" / "vmbus-emu" / "findings").exists()


def test_the_line_finds_a_program_that_is_not_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by its path, as from a venv that nobody activated, it is repeated by its path; on PATH, by its name."""
    called = tmp_path / "bin" / "vmbus-emu"
    called.parent.mkdir()
    called.write_text("#!/bin/sh\n")
    called.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/vmbus-emu", "run"])

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert program() == str(called)
    monkeypatch.setenv("PATH", str(called.parent))
    assert program() == "vmbus-emu"
