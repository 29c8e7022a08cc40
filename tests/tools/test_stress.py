"""`vmbus-emu stress`: sums that cannot hide a loss, verdicts, and a machine that really is stressed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest

from emu.build_kind import BUILD
from emu.errors import DeadlinePassed, OwnLimit
from emu.recording import Recording
from emu.scenario import DeviceSpec, Scenario
from tests.conftest import RunCli
from tests.system.commands import ended, start, wait_until_open
from tools import cli, stress
from tools.ctl import ask_host
from tools.exit_status import ExitStatus
from tools.invariant_table import RULES
from tools.launch import RunningMachine, launch
from tools.stress import INGREDIENTS, add_up, findings_of, junit_of
from tools.testing import assert_gone


def lane(handle: int, sent: int, received: dict[int, int], *, gone: bool = False, corrupt: int = 0) -> dict[str, Any]:
    """One channel of one CPU's report."""
    counts = {str(sender): count for sender, count in received.items()}
    return {
        "handle": handle,
        "relid": handle,
        "owned": bool(received),
        "sent": sent,
        "received": counts,
        "corrupt": corrupt,
        "gone": gone,
        "bytes": 8 * sum(received.values()),
    }


def report(cpu: int, *lanes: dict[str, Any]) -> dict[str, Any]:
    """One CPU's report."""
    return {"cpu": cpu, "computed": 1, "complaints": [], "lanes": list(lanes)}


def test_help_says_what_the_mix_may_hold(run_cli: RunCli) -> None:
    """Each ingredient with what it does, and how to have none."""
    shown = " ".join(run_cli("stress", "--help").stdout.split())

    for word, what in INGREDIENTS.items():
        assert f"{word} ({what})" in shown
    assert "or none." in shown


def test_what_cannot_begin_is_one_line(run_cli: RunCli) -> None:
    """A file that no recording can be written into is found at the launch; there is nothing to do again then."""
    done = run_cli("stress", "--duration", "1", "--record", "/proc/x")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "/proc/x" in done.stderr


def test_what_two_cpus_sent_is_compared_with_what_the_owner_got() -> None:
    """Senders are counted apart, so that one's surplus does not hide the other's loss."""
    owner, other = report(0, lane(5, 10, {0: 10, 1: 7})), report(1, lane(5, 7, {}))

    sums = add_up([owner, other])
    assert (sums.packets, sums.nbytes, sums.lost, sums.channels) == (17, 136, 0, 1)
    wrong = add_up([report(0, lane(5, 10, {0: 11, 1: 6})), other])
    assert wrong.lost == 2
    assert "relid 5: of 7 packets of cpu1, 1 lost" in wrong.complaints


def test_packet_that_nobody_sent_is_a_loss_too() -> None:
    """More than was sent is as wrong as less."""
    assert add_up([report(0, lane(5, 3, {0: 4}))]).lost == 1
    assert add_up([report(0, lane(5, 3, {0: 3, 7: 2}))]).lost == 2, "of a CPU that reports nothing of that channel"


def test_complaint_is_of_what_is_missing_alone() -> None:
    """A channel that lost nothing has none."""
    sums = add_up([report(0, lane(5, 3, {0: 3}), lane(6, 3, {0: 2}))])

    assert sums.complaints == ["relid 6: of 3 packets of cpu0, 1 lost"]


def test_channel_that_was_taken_away_takes_its_packets_with_it() -> None:
    """Whoever saw it go: what was under way is no loss, and is told."""
    sums = add_up([report(0, lane(5, 10, {0: 8}, gone=True)), report(1, lane(5, 4, {}))])

    assert (sums.lost, sums.taken_away) == (0, 6)
    assert (sums.packets, sums.nbytes) == (8, 64)
    more = add_up([report(0, lane(5, 10, {0: 12}, gone=True)), report(1, lane(5, 4, {}))])
    assert more.taken_away == 4, "what came back too often of one CPU hides nothing of another"


def ordered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[Scenario, int, stress.Limit | None, dict[str, Any]]:
    """What a command line orders: scenario, seed and limit; and the object that it prints."""
    given: list[Any] = []

    def run_stress(*arguments: Any, **_options: Any) -> dict[str, Any]:
        given.extend(arguments)
        return {"seed": arguments[1], "complaints": []}

    monkeypatch.setattr(stress, "run_stress", run_stress)
    assert cli.main(["stress", "--json", *words]) == ExitStatus.FINE
    scenario, seed, _duration_s, _ingredients, limit = given[:5]
    return scenario, seed, limit, json.loads(capsys.readouterr().out)


def test_scenario_keeps_its_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without one there are as many echo channels as are asked for."""
    path = tmp_path / "one.toml"
    path.write_text('[[device]]\nclass = "netlike"\n')

    theirs, *_rest = ordered(monkeypatch, capsys, str(path))
    ours, *_rest = ordered(monkeypatch, capsys, "--channels", "5")

    assert [(one.class_name, one.count) for one in theirs.device_specs] == [("netlike", 1)]
    assert [(one.class_name, one.count) for one in ours.device_specs] == [("echo", 5)]


def test_seed_is_drawn_where_nobody_gives_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And told, with the line that does the same again; 0 is one that was given."""
    monkeypatch.setattr(random.SystemRandom, "randrange", lambda _self, stop: stop - 3)

    (_, drawn, limit, told), (_, given, _, again) = (
        ordered(monkeypatch, capsys, *words) for words in ((), ("--seed", "0"))
    )

    assert (drawn, given, limit) == (2**31 - 3, 0, None)
    assert f"--seed {drawn} " in told["again"] and "--seed 0 " in again["again"]


def test_limit_is_counted_from_now(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Not from when the computer was started, or never."""
    _scenario, _seed, limit, _told = ordered(monkeypatch, capsys, "--time-limit", "3600")

    assert limit is not None
    assert limit.seconds == 3600 and 3000 < limit.left_s <= 3600


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fault", "guest.die=1ms"), "stress: guest.die would end what is measured"),
        (("old.toml",), "the guest of era current speaks no version that a host of 1.1 has"),
    ],
)
def test_what_would_only_fail_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str], said: str
) -> None:
    """In one line, before a machine is made."""
    monkeypatch.chdir(tmp_path)
    Path("old.toml").write_text('[machine]\nhost_version = "1.1"\n')
    monkeypatch.setattr(stress, "run_stress", lambda *_: pytest.fail("a machine was made"))

    assert cli.main(["stress", *words]) == ExitStatus.USAGE
    assert said in capsys.readouterr().err


class Chance:
    """Draws in a row, instead of chance."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self) -> float:
        """The next of them."""
        return self.draws.pop(0)

    def randrange(self, _stop: int) -> int:
        """The next of them."""
        return int(self.draws.pop(0))


@pytest.mark.parametrize(
    ("mix", "hot", "draws", "done"),
    [
        ({"move", "hot"}, 0, (0.29, 0.1), ["move"]),
        ({"move", "hot"}, 0, (0.3, 0.09, 1), ["add"]),
        ({"move", "hot"}, 1, (0.0, 0.0, 2), ["move", "add"]),
        ({"move", "hot"}, 2, (0.3, 0.09, 2), ["remove"]),
        ({"hot"}, 2, (0.0, 1), ["remove"]),
        ({"move"}, 0, (0.0,), ["move"]),
        (set(), 0, (), []),
    ],
)
def test_trouble_is_of_what_the_mix_has(
    monkeypatch: pytest.MonkeyPatch, mix: set[str], hot: int, draws: tuple[float, ...], done: list[str]
) -> None:
    """A vCPU is moved in three turns of ten; in one a device comes, or goes where there are more than were drawn."""
    did: list[str] = []
    for name in ("move", "add", "remove"):
        monkeypatch.setattr(stress.Troubles, name, lambda _self, name=name: did.append(name))
    chance = Chance(*draws)
    troubles = stress.Troubles(cast(RunningMachine, None), cast(random.Random, chance), frozenset(mix), [0, 1])
    troubles.hot.extend({} for _ in range(hot))

    troubles.turn()

    assert (did, chance.draws) == (done, [])


def test_vcpu_that_has_just_died_is_not_moved() -> None:
    """That it died is told by the launcher; a move that came to nothing is not counted."""
    child = subprocess.Popen(["true"])
    child.wait()
    fake = SimpleNamespace(machine=SimpleNamespace(vp_count=1), inner={"vcpu0": SimpleNamespace(pid=child.pid)})
    troubles = stress.Troubles(cast(RunningMachine, fake), random.Random(1), frozenset({"move"}), [0])

    troubles.move()
    assert troubles.moves == 0

    fake.inner["vcpu0"].pid = 0  # this process
    before = os.sched_getaffinity(0)
    troubles.cores = sorted(before)
    try:
        for _ in range(20):
            troubles.move()
        assert troubles.moves == 20 and os.sched_getaffinity(0) <= before
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("name", ["lost", "corrupt", "not_open", "failed_tasks", "leaked"])
def test_each_count_that_must_be_nothing_is_a_finding(name: str) -> None:
    """It is named with the seed that repeats it, and is a failure in the JUnit file."""
    counts = ("lost", "corrupt", "not_open", "failed_tasks", "leaked")
    told = dict.fromkeys(counts, 0) | {"refused": {}, "seed": 42, "seconds": 1.0}
    assert not findings_of(told)

    told[name] = 3
    assert findings_of(told) == {name: f"{name}: 3 (seed 42)"}
    suite = ElementTree.fromstring(junit_of(told))
    assert suite.get("failures") == "1"
    assert [case.get("name") for case in suite if case.find("failure") is not None] == [name]


def test_stressed_machine_loses_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    """Several senders a channel, devices that come and go, vCPUs that are moved: every byte comes back right.

    And no invariant is broken in what was recorded of it, and each interrupt that was requested was taken or merged.
    """
    arguments = ("--duration", "1.5", "--seed", "11", "--vcpus", "3", "--channels", "6", "--json", "--junit", "out.xml")
    done = run_cli("stress", *arguments, "--record", "s.rec", timeout_s=100)

    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == {"name": "vmbus-emu.stress", "version": 2}
    assert (told["lost"], told["corrupt"], told["leaked"], told["seed"]) == (0, 0, 0, 11)
    assert told["build"] == BUILD
    assert (told["violations"], told["recording"]["path"]) == ([], "s.rec")
    assert all(told[name] > 0 for name in ("packets", "bytes", "interrupts", "wakeups", "empty_transitions", "moves"))
    assert told["requested"] == told["merged"] + told["interrupts"], "what was ordered at the launcher counts as well"
    assert told["requested"] == told["merged"] + sum(told["kicks"].values())
    assert ElementTree.parse(tmp_path / "out.xml").getroot().get("failures") == "0"


def test_old_host_is_no_finding(run_cli: RunCli, tmp_path: Path) -> None:
    """A guest that asks for newer versions first is refused in good faith; `run` and INV-30 say so as well."""
    (tmp_path / "old.toml").write_text('[machine]\nhost_version = "3.0"\n')
    done = run_cli("stress", "old.toml", "--duration", "0.2", "--mix", "none", "--json", timeout_s=60)

    told = json.loads(done.stdout)
    assert (done.returncode, told["refused"], told["refusals"], told["violations"]) == (0, {}, [], [])
    assert told["packets"] > 0


def test_why_the_host_refused_is_told(run_cli: RunCli, tmp_path: Path) -> None:
    """Of a back end that raised there is its exception: for people, in the object, and in the JUnit file."""
    plugin = Path(__file__).with_name("slammed_echo.py")
    (tmp_path / "m.toml").write_text(f'plugins = ["{plugin}"]\n[[device]]\nclass = "echo"\nbackend = "slammed"\n')
    words = ("stress", "m.toml", "--duration", "0.1", "--mix", "none", "--flight", "0", "--junit", "out.xml")
    done = run_cli(*words, timeout_s=60)

    assert done.returncode == 1, done.stderr
    why = "backend-error: slammed: close of channel 1: RuntimeError: the door jams"
    assert re.search(rf"finding: refused: .* \(seed \d+\)\n  {re.escape(why)}\n", done.stdout), done.stdout
    (failure,) = ElementTree.parse(tmp_path / "out.xml").iter("failure")
    assert "refused" in str(failure.get("message")) and why in str(failure.text)


def test_stress_that_is_killed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what its programs report nor what was recorded of them."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with ended(start(tmp_path, "stress", "--duration", "60")) as process:
        name = f"vm{process.pid}"
        wait_until_open(name, process)
        os.kill(process.pid, signal.SIGKILL)
    assert_gone(name)

    assert list(temporary.iterdir()) == []


def test_what_no_file_was_asked_for_is_checked_as_well(run_cli: RunCli, tmp_path: Path) -> None:
    """Every invariant is decided, nothing is left of the recording; who wants none has no check, and is told so."""
    done = run_cli("stress", "--duration", "0.5", "--seed", "11", "--json")

    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["violations"], told["undecided"], told["unchecked"], told["recording"]) == ([], {}, "", None)
    assert told["checked"] == len(RULES)
    assert not list(tmp_path.glob("*.rec"))

    done = run_cli("stress", "--duration", "0.5", "--seed", "11", "--flight", "0")
    assert "invariants were not checked: nothing was recorded\n" in done.stdout
    assert f"{len(RULES)} invariants checked" not in done.stdout


def test_what_is_undecided_is_not_told_as_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where records were dropped, as behind a Ctrl-Z of the launcher, the text says so, and of which invariants."""
    reason = "9 records were dropped"
    undecided = {"INV-02": reason, "INV-05": "the machine did not end in order", "INV-07": reason}
    found = {"violations": [], "violations_count": 0, "undecided": undecided, "checked": 25}
    monkeypatch.setattr(stress, "_checked", lambda _path: found)

    assert cli.main(["stress", "--duration", "0.3", "--seed", "5"]) == ExitStatus.FINE

    assert (
        "\n22 invariants checked, 0 violations, 3 undecided\n"
        "undecided, as 9 records were dropped: INV-02, INV-07\n"
        "undecided, as the machine did not end in order: INV-05\n"
    ) in capsys.readouterr().out


def test_violation_is_kept_with_the_recording_that_shows_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where that was a temporary one: the finding has a copy, which `check` reads."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = {"violations": ["INV-1: a broken one"], "undecided": {}, "checked": 1}
    monkeypatch.setattr(stress, "_checked", lambda path: found if path.stat().st_size else {})

    assert cli.main(["stress", "--duration", "0.3", "--seed", "5", "--json"]) == ExitStatus.FINDING

    told = json.loads(capsys.readouterr().out)
    folder = Path(told["finding"])
    assert "INV-1: a broken one" in (folder / "finding.txt").read_text(encoding="utf-8")
    with Recording(folder / "recording.rec") as recording:
        assert any(recording.records())


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("vcpus", [1, 2, 4, 8])
def test_stressed_machine_loses_nothing_for_long(run_cli: RunCli, vcpus: int) -> None:
    """Minutes of it, on few and on many processors."""
    arguments = ("--duration", "90", "--vcpus", str(vcpus), "--channels", "24", "--json", "--record", "s.rec")
    done = run_cli("stress", *arguments, timeout_s=400)

    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--mix", "salt"), "salt"),
        (("--vcpus", "0"), "--vcpus"),
        (("--channels", "0"), "--channels"),
        (("nothing.toml",), "nothing.toml"),
    ],
)
def test_what_cannot_be_meant_is_one_line(run_cli: RunCli, arguments: tuple[str, ...], word: str) -> None:
    """Exit status 2, and nothing on stdout."""
    done = run_cli("stress", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and word in done.stderr


def test_time_limit_ends_it_and_tells_how_to_do_it_again(run_cli: RunCli) -> None:
    """Exit status 124; the line that does the same again has its seed and its faults, in JSON as well."""
    stalled = ("--fault", "vsp.stall=1ms@class=echo,times=1")
    done = run_cli("stress", "--duration", "30", "--time-limit", "3", "--json", *stalled)

    told = json.loads(done.stdout)
    flight, again, limit = done.stderr.splitlines()
    assert (done.returncode, again) == (124, f"ended early; the same again: {told['again']}")
    words = told["again"].split()
    assert words[words.index("--seed") + 1] == str(told["seed"])
    assert words[-2:] == list(stalled)
    assert (told["interrupted"], told["timed_out"]) == (False, limit.removeprefix("vmbus-emu: "))
    assert told["timed_out"] == "30 s of stress did not end within the --time-limit of 3 s"
    assert flight == f"vmbus-emu: flight recording: {told['flight']}"
    with Recording(Path(told["flight"])) as saved:
        assert saved.flight == told["timed_out"]
        assert saved.count > 0


@pytest.mark.parametrize(
    ("left_s", "error", "said"),
    [
        (-1.0, OwnLimit, "5 s of stress did not end within the --time-limit of 7 s"),
        (3600.0, DeadlinePassed, "the guest tasks to end: no answer within 60 s"),
    ],
)
def test_a_limit_that_passes_while_the_programs_end_is_the_users(
    left_s: float, error: type[DeadlinePassed], said: str
) -> None:
    """Nothing hangs then; programs that do not end long before it do, however long it is."""

    class Endless:
        def wait_tasks(self, _rows: list[int], timeout_s: float) -> None:
            raise DeadlinePassed("the guest tasks to end", int(timeout_s * 1e9))

    limit = stress.Limit(7.0, time.monotonic() + left_s)
    with pytest.raises(DeadlinePassed) as passed:
        stress._ended(cast(RunningMachine, Endless()), [0], 5.0, limit)

    assert (type(passed.value), str(passed.value)) == (error, said)


def test_the_limit_counts_while_the_machine_boots_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A channel whose answer is lost is waited for as long as somebody gave, not for the 60 s of a boot."""
    asked = []
    wait_ready = RunningMachine.wait_ready

    def noted(running: RunningMachine, *, timeout_s: float) -> None:
        asked.append(timeout_s)
        wait_ready(running, timeout_s=timeout_s)

    monkeypatch.setattr(RunningMachine, "wait_ready", noted)
    lost = "reply.drop@kind=openchannel_result,nth=2"

    assert cli.main(["stress", "--seed", "4", "--time-limit", "1", "--fault", lost]) == ExitStatus.TIME_LIMIT

    assert len(asked) == 1 and asked[0] <= 1.0
    said = capsys.readouterr().err
    assert "5 s of stress did not end within the --time-limit of 1 s" in said
    assert "finding kept" not in said, "nothing is known to hang"


def test_device_that_the_guest_gave_back_is_taken_away_all_the_same() -> None:
    """Its offer failed, so its relid is free, or another device's: `stress` knows what it added by its instance."""
    scenario = Scenario.default().with_overrides(devices=[DeviceSpec(count=1)])
    with launch(scenario, faults=True) as running:
        running.wait_ready()
        troubles = stress.Troubles(running, random.Random(1), frozenset({"hot"}), [0])
        running.turn_on("alloc.fail=device_create@times=1")
        troubles.add()
        lives = partial(ask_host, running.machine, "lives")
        running.wait_until(lambda: lives()["released"] == 1, 20, "the guest to give its relid back")
        troubles.add()

        troubles.remove()
        troubles.remove()
        assert (troubles.adds, troubles.removes, troubles.hot) == (2, 2, [])
        running.wait_until(lambda: lives()["held"] == 1, 20, "the other one to be given back")
        assert running.shut_down_guest()


def test_device_that_somebody_else_took_back_is_no_error_of_stress() -> None:
    """A user may be at the machine with `ctl rescind` meanwhile."""
    with launch(Scenario.default().with_overrides(devices=[DeviceSpec(count=1)])) as running:
        running.wait_ready()
        troubles = stress.Troubles(running, random.Random(1), frozenset({"hot"}), [0])
        troubles.add()
        ask_host(running.machine, "rescind", relid=0, instance=troubles.hot[0]["instance"])

        troubles.remove()
        assert (troubles.adds, troubles.removes, troubles.hot) == (1, 0, [])
        assert running.shut_down_guest()


@pytest.mark.parametrize(("channels", "kept"), [(2, 1), (1, 1)])
def test_channel_that_a_fault_kept_from_opening_is_a_finding(run_cli: RunCli, channels: int, kept: int) -> None:
    """As `run` has it, and by the same count; also where nothing is left through which anything could be sent."""
    flags = ("--duration", "0.2", "--channels", str(channels), "--mix", "none", "--flight", "0", "--json")
    done = run_cli("stress", *flags, "--fault", "host.refuse=open@nth=1")

    report = json.loads(done.stdout)
    assert (done.returncode, report["not_open"], report["channels"]) == (1, kept, channels - kept)
    assert "not_open: 1" in (Path(report["finding"]) / "finding.txt").read_text()


def test_hot_device_that_found_no_relid_is_not_waited_for() -> None:
    """With as many channels as there are relids the host keeps it back: nobody was offered it."""
    with launch(Scenario.default().with_overrides(devices=[DeviceSpec(count=1)])) as running:
        running.wait_ready()
        hot = [{"relid": 0, "generation": 0, "instance": "11111111-2222-3333-4444-555555555555"}]
        troubles = stress.Troubles(running, random.Random(1), frozenset({"hot"}), [0], hot=hot)

        assert troubles.not_open(lambda: None) == 0
        running.shut_down_guest()


def test_hot_device_that_nobody_opens_is_counted() -> None:
    """Of those that came under the traffic and are still there."""
    with launch(Scenario.default().with_overrides(devices=[DeviceSpec(count=1)])) as running:
        running.wait_ready()
        troubles = stress.Troubles(running, random.Random(1), frozenset({"hot"}), [0])
        troubles.add()
        running.turn_on("alloc.fail=probe@times=1")
        troubles.add()

        assert troubles.not_open(lambda: None) == 1
        running.shut_down_guest()


def test_limit_passes_also_while_hot_devices_are_waited_for() -> None:
    """It is looked at before each of these waits, which may be ten seconds long."""
    with launch(Scenario.default().with_overrides(devices=[DeviceSpec(count=1)])) as running:
        running.wait_ready()
        troubles = stress.Troubles(running, random.Random(1), frozenset({"hot"}), [0])
        troubles.add()
        passed = stress.Limit(1.0, time.monotonic() - 1.0)

        with pytest.raises(OwnLimit, match="within the --time-limit of 1 s"):
            troubles.not_open(lambda: stress._look(running, passed, 5.0))
        running.shut_down_guest()
