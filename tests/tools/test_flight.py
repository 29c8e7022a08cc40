"""The flight recorder: a machine that dies leaves its last seconds, and the newest ten of them are kept."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from emu.errors import DeadlinePassed
from emu.ipc import segments
from emu.recording import Recording
from emu.scenario import Scenario, parse_device
from tools import flight as module
from tools import run as run_module
from tools.crash import crash_recorded, failure_report
from tools.flight import LEAST_FREE, save_flight, saved_if_it_hangs, usual_s
from tools.invariants import missing_of
from tools.launch import MachineDied, launch
from tools.options import FLIGHT_VARIABLE
from tools.run_machine import Options


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where state goes in this test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "vmbus-emu"


def test_machine_that_dies_leaves_its_last_seconds(state: Path) -> None:
    """The rings of all its actors, also of the dead one, in a recording that says why; the oldest flight goes."""
    flights = state / "flights"
    flights.mkdir(parents=True)
    for number in range(10):
        (flights / f"20000101T00000{number}-old.rec").touch()
    scenario = Scenario.default().with_overrides(devices=[parse_device("echo:1")])

    with (
        pytest.raises(MachineDied) as died,
        launch(scenario, record=True) as running,
        crash_recorded(running, 3600.0),
    ):
        running.wait_ready()
        running.kill("vcpu1")
        running.watch(30.0)

    path = died.value.flight
    assert path is not None and f"flight recording: {path}" in str(died.value)
    assert len(list(flights.iterdir())) == 10 and not (flights / "20000101T000000-old.rec").exists()
    assert died.value.crash_record is not None
    assert json.loads(died.value.crash_record.read_text())["flight"] == str(path)
    assert failure_report(died.value)["flight"] == str(path)
    with Recording(path) as flight:
        assert flight.flight.startswith("crash: vcpu1") and "killed by SIGKILL" in flight.flight
        assert {"hypervisor", "vcpu0", "vcpu1"} <= {actor.name for actor in flight.actors.values()}
        assert flight.counts()["vmbus_onoffer"] == 1
        # Nothing was overwritten yet, so all is decided that needs no orderly end.
        assert missing_of(flight) == ""
        assert (flight.damage, flight.dropped) == ("", 0)


def test_only_the_last_seconds_are_saved(state: Path) -> None:
    """What is older than asked for is left out; asked for none, there is no file."""
    scenario = Scenario.default().with_overrides(devices=[parse_device("echo:1")])
    with launch(scenario, record=True) as running:
        running.wait_ready()
        before_ns = time.monotonic_ns()
        late = save_flight(running.machine, 1e-9, "test")
        assert save_flight(running.machine, 0.0, "off") is None

    assert late is not None and late.parent == state / "flights"
    with Recording(late) as flight:
        assert flight.damage == ""
        assert all(record.t_ns > before_ns for record in flight.records())


def test_hang_is_saved_from_before_its_wait(state: Path) -> None:
    """A wait that was longer than the flight is: what was done when it began is what it is about."""
    scenario = Scenario.default().with_overrides(devices=[parse_device("echo:1")])
    with launch(scenario, record=True) as running:
        running.wait_ready()
        with pytest.raises(DeadlinePassed) as hung, saved_if_it_hangs(running, 1e-9):
            raise DeadlinePassed("the host to answer", 3_600_000_000_000)
        with pytest.raises(DeadlinePassed), saved_if_it_hangs(running, 0.0):
            raise DeadlinePassed("the host to answer", 3_600_000_000_000)

    (path,) = (state / "flights").iterdir()
    assert hung.value.recording == path
    with Recording(path) as flight:
        assert flight.flight == "hang: the host to answer: no answer within 3.6e+03 s"
        assert flight.counts()["vmbus_onoffer"] == 1


@pytest.mark.parametrize(
    ("free_bytes", "recording", "seconds"),
    [(LEAST_FREE, False, 10.0), (LEAST_FREE, True, 0.0), (LEAST_FREE - 1, False, 0.0), (0, False, 0.0)],
)
def test_flight_that_nobody_asked_for_takes_no_memory_that_is_scarce(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, recording: bool, seconds: float
) -> None:
    """Ten seconds, but not beside a recording, which has them, nor where its rings could make a run fail."""
    monkeypatch.setattr(module, "free_shared_memory", lambda: free_bytes)

    assert usual_s(recording) == seconds


def test_shared_memory_that_is_missing_has_nothing_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No mount, no flight; whoever makes the machine then says what is missing."""
    assert segments.free_shared_memory() > 0

    monkeypatch.setattr(segments, "SHM", tmp_path / "nowhere")

    assert segments.free_shared_memory() == 0


@pytest.mark.parametrize(
    ("words", "variable", "seconds"),
    [([], None, 7.0), (["--flight", "0"], None, 0.0), (["--flight", "3"], "0", 3.0), ([], "0", 0.0)],
)
def test_run_flies_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str | None, seconds: float
) -> None:
    """A run keeps its last seconds by itself; the option says how many, the variable where that is silent."""
    asked: list[Options] = []
    monkeypatch.setattr(run_module, "usual_s", lambda _recording: 7.0)

    def note(options: Options) -> int:
        asked.append(options)
        return 0

    monkeypatch.setattr(run_module, "run_here", note)

    done = CliRunner().invoke(run_module.run, words, env={FLIGHT_VARIABLE: variable}, standalone_mode=False)

    assert (done.exception, [one.flight_s for one in asked]) == (None, [seconds])


@pytest.mark.parametrize(
    ("words", "flight"),
    [(["--flight", "3"], "3"), (["--flight", "0"], "0"), (["--record", "x.rec"], "10"), ([], "7")],
)
def test_what_is_repeated_records_as_the_run_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], flight: str
) -> None:
    """A run that recorded, into a file or its rings, and one that did not: recording changes who waits for whom."""
    asked: list[Options] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "usual_s", lambda recording: 0.0 if recording else 7.0)
    monkeypatch.setattr(run_module, "run_here", lambda options: asked.append(options))

    CliRunner().invoke(run_module.run, words, env={FLIGHT_VARIABLE: None}, standalone_mode=False)

    (options,) = asked
    again = options.case().words
    assert again[again.index("--flight") + 1] == flight
