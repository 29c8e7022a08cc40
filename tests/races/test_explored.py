"""What the explorer finds is a schedule for processes, too: the same is broken there, and with the fix nothing is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import RunCli
from tools.explore_cores import Setting
from tools.explore_events import Event, Names
from tools.explore_schedule import Translation, invariants_of, schedule_text
from tools.explore_search import Explorer, Pair
from tools.race_run import HELD, INCONCLUSIVE, VIOLATED, RaceMachine
from tools.schedule import NotForced, Schedule

SEED_TWICE = Setting(1, 0, threads=True, without=("rescind_once",), era="seed", twice=True)
FOUND = [
    pytest.param(Setting(1, 0, without=("wake_before_probe_wait",)), id="A5"),
    pytest.param(Setting(1, 0, threads=True, without=("offer_gate",)), id="A1", marks=pytest.mark.soak),
    pytest.param(Setting(1, 0, without=("rescind_own_queue",)), id="A2", marks=pytest.mark.soak),
    pytest.param(Setting(2, 0, without=("addchan_offload",)), id="A3", marks=pytest.mark.soak),
    pytest.param(Setting(1, 2, without=("addchan_offload",)), id="A3_subchannels", marks=pytest.mark.soak),
    pytest.param(
        Setting(1, 0, threads=True, without=("recheck_rescind_after_enlist",)), id="A4", marks=pytest.mark.soak
    ),
    pytest.param(SEED_TWICE, id="A6", marks=pytest.mark.soak),
]
UNTIL_OPEN = ["offer", "deliver", "receive", "answer", "deliver", "receive", "answer", "deliver"]


def explored(setting: Setting, folder: Path) -> Schedule:
    """What an exploration finds, as a schedule for processes."""
    explorer = Explorer(setting)
    try:
        violation = explorer.explore(24).violation
    finally:
        explorer.close()
    assert violation is not None
    path = folder / "found.toml"
    path.write_text(schedule_text(setting, violation.problems, violation.schedule, "found"), encoding="utf-8")
    return Schedule.load(path)


def _kind(event: Event) -> str:
    """In a word or two what an event is."""
    return "refuse" if event.get("yes") is False else f"{event['do']} {event.get('thread', '')}".strip()


def translated(setting: Setting, wanted: Sequence[str]) -> list[str]:
    """The director's steps of the first way along events of these kinds; `run X`: a turn of that thread."""
    explorer, names = Explorer(setting), Names()
    translation = Translation(setting)
    schedule: list[Event] = []
    pair: Pair = (0, 0, (), ())
    try:
        for want in wanted:
            events = [(one, explorer.event_of(pair, one, names)) for one in explorer.transitions(pair)]
            fits = [both for both in events if _kind(both[1]) == want]
            schedule.append(fits[0][1])
            pair, _ = explorer.told(pair, fits[0][0], names)
        return [step for step, _ in translation.steps(schedule)]
    finally:
        explorer.close()
        translation.close()


def test_messages_are_taken_when_the_schedule_says() -> None:
    """Each is held at its end until its turn, and the next one is waited for before it may come."""
    steps = translated(Setting(1, 0), ["offer", "revoke", "deliver", "receive"])

    assert steps == [
        *["rescind echo#1", "until settled"],
        *["arm g.msg.taken as R1", "offer echo number=0 as D1", "until settled", "expect R1"],
        *["rescind D1", "until settled"],
        *[
            "arm g.msg.taken as R2",
            "arm h.ctl.on_message as M1",
            "resume R1",
            "until settled",
            "expect R2",
            "expect M1",
        ],
        *["resume M1", "until settled"],
    ]


def test_a_thread_goes_from_turn_to_point() -> None:
    """A worker that was woken is held until its turn, then at the sync point where the explorer's thread stopped."""
    steps = translated(Setting(1, 0, threads=True), ["offer", "deliver", "run WORK", "run WORK"])

    assert "arm g.turn actor=kworker/system/1 as W6" in steps
    first = steps.index("expect W1")
    assert steps[first : first + 5] == [
        *["expect W1", "arm g.wq.offer.before_map actor=kworker/work as T1", "resume W1", "until settled", "expect T1"],
    ]
    assert "resume T1" in steps[first + 5 :]


def test_a_device_answers_when_the_schedule_says() -> None:
    """What it has done is held back from the server, each kind of answer at its point."""
    steps = translated(Setting(1, 0), UNTIL_OPEN)

    assert "arm h.ctl.before_answer relid=D1 as A1" in steps
    assert "arm h.ctl.before_open_result relid=D1 as A2" in steps
    assert steps.index("expect A1") < steps.index("resume A1") < steps.index("expect A2")


def test_a_sub_channel_is_offered_unasked() -> None:
    """Its primary's driver knows of it, as the scenario does; when it comes is the schedule's."""
    steps = translated(Setting(1, 1), [*UNTIL_OPEN, "offer"])

    assert steps[-4:] == ["arm g.msg.taken as R4", "offer-subchannel D1 index=1 as D2", "until settled", "expect R4"]


@pytest.mark.parametrize(("before", "event"), [([], "unload"), (UNTIL_OPEN[:3], "refuse")])
def test_what_nobody_can_force_is_said(before: list[str], event: str) -> None:
    """A guest that unloads, a device that refuses: the step and the reason."""
    with pytest.raises(NotForced, match=r"step \d, .* cannot be forced: "):
        translated(Setting(1, 0), [*before, event])


def test_what_processes_may_be_found_to_break() -> None:
    """An invariant stands for its family; a guest that broke down, for what its last words name."""
    assert invariants_of(["INV-15: OPENCHANNEL of relid 1 is never answered"]) == [
        "INV-15",
        "INV-06",
        "INV-27",
        "INV-03",
    ]
    assert invariants_of(["the guest broke down: AssertionError"]) == ["INV-13", "INV-30"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("setting", FOUND)
def test_a_counterexample_is_broken_on_processes_too(setting: Setting, tmp_path: Path) -> None:
    """With the switch off the same family of invariants, each time; with it on nothing."""
    schedule = explored(setting, tmp_path)
    assert schedule.scenario.fix.off() == setting.without and schedule.scenario.machine.era == setting.era

    for fix in (False, True):
        with RaceMachine(schedule, fix=fix) as machine:
            for number in range(2):
                run = machine.run(tmp_path / f"{number}.rec")
                assert run.expected and run.verdict == (HELD if fix else VIOLATED), run.report()


def test_a_file_of_the_explorers_that_cannot_be_forced_is_inconclusive(run_cli: RunCli, tmp_path: Path) -> None:
    """One line that says which step and why, exit status 124; for programs an object, a file, and the same status."""
    found = {
        "devices": 1,
        "subchannels": 0,
        "threads": False,
        "without": [],
        "era": "current",
        "faults": [],
        "violation": {"problems": ["INV-28: x"], "schedule": [{"do": "unload", "text": "guest: unload"}]},
    }
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found), encoding="utf-8")

    done = run_cli("races", "run", str(path), "--json", "--junit", str(tmp_path / "runs.xml"))

    assert done.returncode == 124
    told = json.loads(done.stdout)
    assert (told["verdict"], told["invariant"], told["recording"]) == (INCONCLUSIVE, "", None)
    assert told["reason"].startswith("step 1, 'guest: unload', cannot be forced: ")
    assert 'skipped="1"' in (tmp_path / "runs.xml").read_text()
    assert run_cli("races", "show", str(path)).returncode == 124
    assert done.stderr.strip() == (
        f"{path}: inconclusive: step 1, 'guest: unload', cannot be forced: a guest of processes unloads only as it ends"
    )
