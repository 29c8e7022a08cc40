"""`vmbus-emu bench`: what an anchor says of its runs, and that each bench measures what it names."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

from emu.errors import DeadlinePassed, MissingPrerequisite, UserError, VmbusError
from emu.scenario import DeviceSpec, MachineSpec, Scenario
from tests.conftest import RunCli
from tools import bench as module
from tools import cli
from tools.anchors import Against, Anchor
from tools.bench_boot import launch_to_open
from tools.bench_machine import bench_scenario, machines_like
from tools.bench_path import stream
from tools.exit_status import ExitStatus
from tools.launch import Death, MachineDied, launch

FIELDS = {"name", "value", "unit", "better", "runs", "spread", "against", "ratio", "goal", "floor", "met", "reason"}

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def anchor(*runs: float, **more: Any) -> Anchor:
    """An anchor of these runs; more is better unless said otherwise."""
    return Anchor.of("a", runs, "x", **{"better": "higher", **more})


def test_value_is_the_median_and_spread_its_range() -> None:
    """One lucky and one unlucky run change the spread, not the value."""
    one = anchor(1.0, 10.0, 11.0, 12.0, 30.0)

    assert (one.value, one.spread) == (11.0, 29.0 / 11.0)


@pytest.mark.parametrize(
    ("better", "goal", "met"),
    [
        ("higher", 9.0, True),
        ("higher", 10.0, True),
        ("higher", 11.0, False),
        ("lower", 9.0, False),
        ("lower", 10.0, True),
    ],
)
def test_goal_is_of_the_value_where_there_is_nothing_to_compare_with(better: str, goal: float, met: bool) -> None:
    """A goal that is just reached is met, in both directions."""
    assert anchor(10.0, better=better, goal=goal).met is met


def test_goal_is_of_the_ratio_where_there_is_something_to_compare_with() -> None:
    """10 against 20 is half, whatever 10 is."""
    one = anchor(10.0, against=Against("b", 20.0), goal=0.4)

    assert (one.ratio, one.met) == (0.5, True)


def test_comparison_that_is_not_to_be_had_is_neither_met_nor_missed() -> None:
    """Ratio and verdict are null, and the reason is told."""
    told = anchor(10.0, against=Against("b", None), goal=0.4, reason="b does not install here").as_json()

    assert (told["ratio"], told["met"], told["reason"]) == (None, None, "b does not install here")
    assert told.keys() == FIELDS


def test_figure_without_a_verdict_needs_a_reason() -> None:
    """An anchor that can judge nothing and does not say why is our own mistake."""
    with pytest.raises(AssertionError, match="no reason"):
        anchor(10.0, against=Against("b", None), goal=0.4)


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with one bench that misses its goal and one that meets it."""

    def of(name: str, goal: float) -> Callable[[int, bool, bool], list[Anchor]]:
        return lambda runs, short, peers: [Anchor.of(name, [5.0] * runs, "x", better="higher", goal=goal)]

    monkeypatch.setattr(module, "BENCHES", {"slow": of("slow", 6.0), "fast": of("fast", 4.0)})


@pytest.mark.usefixtures("benches")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["fast", "--strict"], 0), (["all"], 0), (["slow", "--strict"], 1), (["all", "--strict"], 1)],
)
def test_missed_goal_is_a_finding_only_when_strict(arguments: list[str], status: int) -> None:
    """Without --strict a bench informs; with it a missed goal is exit status 1."""
    done = CliRunner().invoke(module.bench, [*arguments, "--json", "--runs", "3"], standalone_mode=False)

    assert done.return_value == status
    told = json.loads(done.output)
    assert told["schema"] == {"name": "vmbus-emu.bench", "version": 1}
    assert all(len(one["runs"]) == 3 for one in told["results"])


@pytest.mark.usefixtures("benches")
def test_short_run_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """For eyes in a line, for programs in the object; the load of the computer is that before anything was measured."""
    load = [0.25]
    monkeypatch.setattr("os.getloadavg", lambda: (load[0], 0.0, 0.0))
    fast = module.BENCHES["fast"]

    def busy(runs: int, short: bool, peers: bool) -> list[Anchor]:
        load[0] = 2.0
        return fast(runs, short, peers)

    monkeypatch.setitem(module.BENCHES, "fast", busy)

    shown = CliRunner().invoke(module.bench, ["slow", "--short"], standalone_mode=False).output
    told = json.loads(CliRunner().invoke(module.bench, ["fast", "--short", "--json"], standalone_mode=False).output)

    assert "one short run each (--short)" in shown
    assert (told["short"], told["peers"], told["machine"]["load_1m"]) == (True, False, 0.25)


@pytest.mark.usefixtures("benches")
@pytest.mark.parametrize(("arguments", "status"), [(["all"], 3), (["slow", "lame", "--strict"], 1)])
def test_bench_that_cannot_run_here_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int
) -> None:
    """On one core, for example: it is named with the reason, the others are measured; exit 3."""

    def lame(*_: object) -> list[Anchor]:
        raise MissingPrerequisite("there is one core")

    monkeypatch.setitem(module.BENCHES, "lame", lame)
    done = CliRunner().invoke(module.bench, [*arguments, "--json"], standalone_mode=False)

    assert done.return_value == status
    told = {one["name"]: one for one in json.loads(done.output)["results"]}
    assert told["slow"]["value"] == 5.0
    assert (told["lame"]["ratio"], told["lame"]["met"], told["lame"]["reason"]) == (None, None, "there is one core")


@pytest.mark.usefixtures("benches")
@pytest.mark.parametrize(
    ("error", "status", "timed_out", "deaths"),
    [
        (MachineDied([Death("vcpu0", 7, 9)]), 4, None, ["vcpu0 (pid 7) died: killed by SIGKILL, holding no lock"]),
        (DeadlinePassed("vcpu0 to halt", 10**9), 124, "vcpu0 to halt: no answer within 1 s", []),
    ],
    ids=["death", "deadline"],
)
def test_what_was_measured_before_a_machine_failed_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: VmbusError,
    status: int,
    timed_out: str | None,
    deaths: list[str],
) -> None:
    """To programs in the one object, to people as a table and what is left; the status is the failure's."""

    def fail(*_: object) -> list[Anchor]:
        raise error

    monkeypatch.setitem(module.BENCHES, "frail", fail)

    assert cli.main(["bench", "fast", "frail", "slow", "--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in told["results"]] == ["fast"]
    assert (told["interrupted"], told["timed_out"], told["deaths"]) == (False, timed_out, deaths)

    assert cli.main(["bench", "fast", "frail", "slow"]) == status
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].startswith("fast")
    assert shown.err == f"vmbus-emu: not measured: frail, slow\nvmbus-emu: {error}\n"


def test_unknown_bench_is_one_line_with_those_there_are(run_cli: RunCli) -> None:
    """Exit status 2, nothing measured."""
    done = run_cli("bench", "wheels")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "wheels" in done.stderr and "ring" in done.stderr


SCENARIO = """
[machine]
name = "fixed"
era = "seed"
host_version = "4.0"
"""


def test_machines_of_a_bench_are_like_a_scenario_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but processors and devices, which are the bench's, and a name; the next bench has the default again."""
    seen: list[MachineSpec] = []

    def measure(runs: int, short: bool, peers: bool) -> list[Anchor]:
        seen.append(bench_scenario(vcpus=3).machine)
        return [Anchor.of("one", [1.0], "x", better="higher")]

    monkeypatch.setattr(module, "BENCHES", {"one": measure})
    path = tmp_path / "old.toml"
    path.write_text(SCENARIO)
    invoke = partial(CliRunner().invoke, module.bench, standalone_mode=False)

    told = json.loads(invoke(["one", str(path), "--json"]).output)
    assert json.loads(invoke(["one", "--json"]).output)["scenario"] is None

    assert told["scenario"] == str(path)
    assert [(one.era, one.vcpus, one.name) for one in seen] == [("seed", 3, None), ("current", 3, None)]


def test_a_scenario_that_is_too_small_for_one_bench_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured before is told, what comes behind is measured; then one line, and status 2."""

    def measure(runs: int, short: bool, peers: bool) -> list[Anchor]:
        return [Anchor.of("fits", [1.0], "x", better="higher")]

    def too_many(runs: int, short: bool, peers: bool) -> list[Anchor]:
        with launch(bench_scenario(devices=[DeviceSpec("echo", count=2_000)])):
            raise AssertionError("there is no room for their rings")

    monkeypatch.setattr(module, "BENCHES", {"one": measure, "many": too_many, "another": measure})
    path = tmp_path / "small.toml"
    path.write_text('[machine]\nram = "64MiB"\n')

    status = cli.main(["bench", "all", str(path)])

    shown = capsys.readouterr()
    assert (status, shown.out.count("fits"), shown.err.count("many: ")) == (ExitStatus.USAGE, 2, 1)
    assert "raise machine.ram" in shown.err


def test_a_bench_that_says_no_processors_and_devices_has_the_defaults(tmp_path: Path) -> None:
    """Not the scenario's: a device that is added to one of many processors costs more."""
    path = tmp_path / "large.toml"
    path.write_text('[machine]\nvcpus = 7\nera = "seed"\n[[device]]\nclass = "echo"\ncount = 40\n')

    with machines_like(path):
        scenario = bench_scenario()

    default = Scenario.default()
    assert (scenario.machine.era, scenario.machine.vcpus) == ("seed", default.machine.vcpus)
    assert scenario.device_specs == default.device_specs


def test_the_machine_of_the_channel_path_is_like_the_scenario(tmp_path: Path) -> None:
    """Also the one that `bench ring` and the recorder's cost are measured in; with the bench's own device."""
    path = tmp_path / "scattered.toml"
    path.write_text('[machine]\nring_memory = "scattered"\nvcpus = 2\n')
    seen: list[Scenario] = []

    def note(scenario: Scenario, **_options: object) -> NoReturn:
        seen.append(scenario)
        raise VmbusError("seen")

    with machines_like(path), pytest.MonkeyPatch.context() as patch, pytest.raises(VmbusError, match="seen"):
        patch.setattr("tools.testing.launch", note)
        stream(None)

    assert [(one.machine.ring_memory, one.machine.vcpus) for one in seen] == [("scattered", 1)]
    assert "path-bench" in seen[0].plugins.classes


def test_fewer_processors_than_the_scenario_has_nodes_are_on_one_each(tmp_path: Path) -> None:
    """A bench that has one processor has one node; one that has more has the file's."""
    path = tmp_path / "nodes.toml"
    path.write_text("[machine]\nvcpus = 8\nnuma = 4\n")

    with machines_like(path):
        assert [bench_scenario(vcpus=count).machine.numa for count in (1, 3, 16)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "text", "why"),
    [
        (("idle", "s.toml", "other.toml"), SCENARIO, "one scenario at a time"),
        (("s.toml",), SCENARIO, "Name a bench"),
        (("idle", "s.toml"), '[[fault]]\nname = "guest.die"\nvalue = "200ms"\n', "bench: guest.die"),
        (("idle", "s.toml"), "[machine]\nvcpus = 0\n", "not between 1 and 64"),
    ],
)
def test_scenario_that_no_bench_runs_on_is_one_line(
    run_cli: RunCli, tmp_path: Path, arguments: tuple[str, ...], text: str, why: str
) -> None:
    """Exit status 2, nothing measured."""
    (tmp_path / "s.toml").write_text(text)
    done = run_cli("bench", *(str(tmp_path / one) if one == "s.toml" else one for one in arguments))

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and why in done.stderr


@pytest.mark.parametrize("name", list(module.BENCHES))
def test_every_bench_measures(run_cli: RunCli, name: str) -> None:
    """A short run of each gives figures above zero (but of records that were dropped), and says what it ran on.

    Nothing in it takes longer than all of it: a time in a unit that is not its own does.
    """
    began_s = time.monotonic()
    done = run_cli("bench", name, "--short", "--json", timeout_s=100.0)
    elapsed_s = time.monotonic() - began_s

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"cpu", "cores", "kernel", "python", "build"} <= told["machine"].keys()
    assert told["results"] and all(one.keys() == FIELDS for one in told["results"])
    # What is the difference of two launches can be anything on a computer that is busy.
    assert all(
        one["value"] > 0 for one in told["results"] if not one["name"].endswith(("-dropped", "one more vCPU running"))
    )
    times_s = {one["name"]: one["value"] * SECONDS[one["unit"]] for one in told["results"] if one["unit"] in SECONDS}
    assert not {what: time_s for what, time_s in times_s.items() if time_s > elapsed_s}


@pytest.mark.parametrize(
    ("better", "floor", "below"),
    [
        ("higher", 9.0, False),
        ("higher", 10.0, False),
        ("higher", 11.0, True),
        ("lower", 9.0, True),
        ("lower", 10.0, False),
    ],
)
def test_figure_just_at_its_floor_holds_it(better: str, floor: float, below: bool) -> None:
    """In both directions; what has no floor or cannot be judged is not below it."""
    assert anchor(10.0, better=better, floor=floor).below_floor is below
    assert not anchor(10.0).below_floor
    assert not anchor(10.0, against=Against("b", None), floor=floor, reason="b is missing").below_floor


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(module.BENCHES))
def test_figures_hold_their_floors(name: str) -> None:
    """Each anchor that has a floor is at least as good as that, median of five runs; wants a quiet computer."""
    below = [
        f"{one.name}: {one.value:.4g} {one.unit}, ratio {one.ratio}, floor {one.floor:.3g}"
        for one in module.BENCHES[name](5, False, True)
        if one.below_floor
    ]

    assert not below, "\n".join(below)


@pytest.mark.parametrize(
    ("status", "error", "why"),
    [
        (ExitStatus.MISSING, MissingPrerequisite, "/dev/shm is full; free some of it"),
        (ExitStatus.USAGE, UserError, "machine.numa: 8 nodes are more than the 4 vCPUs; lower it"),
    ],
)
def test_boot_that_cannot_be_says_why(
    monkeypatch: pytest.MonkeyPatch, status: ExitStatus, error: type[VmbusError], why: str
) -> None:
    """The run that is timed is a process of its own: what it says is lacking, or wrong, the bench says."""
    ended = subprocess.CompletedProcess[bytes]([], status, b"", f"vmbus-emu: {why}\n".encode())
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: ended)

    with pytest.raises(error, match=f"^{why}$"):
        launch_to_open()


def test_boot_with_a_finding_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the scenario that keeps a channel closed makes it one; the others are open, and that is the boot."""
    told = json.dumps({"opened_at_ns": time.monotonic_ns() + 10**12}).encode()
    ended = subprocess.CompletedProcess[bytes]([], ExitStatus.FINDING, told, b"finding kept in there\n")
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: ended)

    assert 900 < launch_to_open() < 1000


def test_boot_that_died_is_told_behind_what_was_measured_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is a process of its own, whose words say who died; what other benches found is not lost."""
    ended = subprocess.CompletedProcess[bytes]([], ExitStatus.FAILED, b"{}", b"vmbus-emu: vcpu0 (pid 7) died\n")
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: ended)
    monkeypatch.setitem(module.BENCHES, "ring", lambda *_how: [Anchor.of("one", (1.0,), "s", better="lower")])
    status = cli.main(["bench", "ring", "boot", "--json"])

    said = capsys.readouterr()
    why = "`vmbus-emu run` ended with 4: vcpu0 (pid 7) died"
    told = json.loads(said.out)
    assert (status, [one["name"] for one in told["results"]], told["error"]) == (4, ["one"], why)
    assert said.err == f"vmbus-emu: {why}\n"
