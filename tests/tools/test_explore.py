"""The explorer: it finds rules that are broken on purpose, and nothing in the right machine."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from emu.errors import UserError
from emu.wire.messages import RelidReleased, RescindChannelOffer, parse
from guestproc.protocol import rescinds
from tools.explore import INTERRUPTED, explore, report_of, show
from tools.explore_cores import Setting
from tools.explore_events import Names
from tools.explore_guest import Guest
from tools.explore_host import Host
from tools.explore_search import GUEST, TO_GUEST, Explorer, Pair


@contextmanager
def exploring(**options: Any) -> Iterator[Explorer]:
    """An explorer that ends with the block."""
    guest, host = options.pop("guest", Guest), options.pop("host", Host)
    explorer = Explorer(Setting(**options), guest=guest, host=host)
    try:
        yield explorer
    finally:
        explorer.close()


def test_the_right_machine_breaks_nothing() -> None:
    """Two devices and a sub-channel, every order to depth 6: no violation, and every state counted once."""
    with exploring() as explorer:
        found = explorer.explore(6)
        report = report_of(explorer, found, 2.0)

    assert found.violation is None
    assert found.depth == 6 and not found.stopped
    assert found.transitions > found.states > 500
    assert (report["stopped"], report["transitions_per_second"]) == (None, round(found.transitions / 2))


def test_a_step_is_the_same_each_time() -> None:
    """The order in which states are tried changes neither how many there are nor how many ways lead to them."""
    with exploring(devices=1) as one, exploring(devices=1) as other:
        first, second = one.explore(6, seed=1), other.explore(6, seed=2)

    assert (first.states, first.transitions) == (second.states, second.transitions)
    assert len(one.guest) == len(other.guest) and len(one.host) == len(other.host)


def test_an_open_sub_channel_that_alone_is_taken_back_is_its_closers() -> None:
    """No rule is broken while its primary is open; when that is unbound, the relid is given back."""
    steps = [
        *["offer", "deliver", "receive", "answer", "deliver", "receive", "answer", "deliver"],
        *["offer", "deliver", "receive", "answer", "deliver", "receive", "answer", "deliver"],
        *["revoke", "deliver"],
    ]
    with exploring(devices=1) as explorer:
        pair: Pair = (0, 0, (), ())
        for number, step in enumerate(steps):
            names = Names()
            events = [(one, explorer.event_of(pair, one, names)) for one in explorer.transitions(pair)]
            choice = [one for one, event in events if event["do"] == step and event.get("yes", True)]
            # Once both are open, it is the sub-channel that goes.
            pair, problems = explorer.follow(pair, choice[-1 if number >= 16 else 0])
            assert not problems and explorer.judge(pair) == []
        assert explorer.guest.facts(pair[1]).channels[2].rescinded
        unbind = next(one for one in explorer.transitions(pair) if one == (GUEST, ("unbind", 1)))
        after, _ = explorer.follow(pair, unbind)

        said = [parse(explorer.messages.payloads[number]) for number in after[3]]
    assert RelidReleased(2) in said


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_a_step_that_is_used_again_is_what_the_real_code_does(seed: int, threads: bool) -> None:
    """Along a random schedule, cores that do every step themselves send what the known steps say, and look the same."""
    chance = random.Random(seed)
    with exploring(threads=threads) as explorer:
        explorer.explore(4)
        host, guest = explorer._new_host(), explorer._new_guest()
        pair: Pair = (0, 0, (), ())
        for _ in range(60):
            possible = list(explorer.transitions(pair))
            if not possible:
                break
            transition = chance.choice(possible)
            who, what = transition
            to_guest = who in (TO_GUEST, GUEST)
            if what is None:
                messages = explorer.messages
                what = messages.delivered[pair[2][0]] if to_guest else messages.received[pair[3][0]]
            sent, problems = guest.do(*what) if to_guest else host.do(*what)
            step = explorer.guest.step(pair[1], what) if to_guest else explorer.host.step(pair[0], what)
            assert ([explorer.messages.number(one) for one in sent], problems) == (list(step.sent), list(step.problems))
            pair, _ = explorer.follow(pair, transition)
            assert guest.facts() == explorer.guest.facts(pair[1])
            assert host.facts() == explorer.host.facts(pair[0])
        guest.close()


def test_a_state_that_is_put_back_is_that_state() -> None:
    """A guest with a thread in the middle of something and one that was unloaded become what was kept of a third."""
    with exploring(devices=1) as explorer:
        host, first, second = explorer._new_host(), explorer._new_guest(), explorer._new_guest()
        kept = first.save()
        assert kept is not None
        before = first.digest()
        for payload in host.do("offer", 0)[0]:
            first.do("deliver", payload)
        assert first.save() is None and first.digest() != before
        for payload in host.do("receive", second.do("unload", 0)[0][0])[0]:
            second.do("deliver", payload)
        assert second.facts().unloaded

        first.restore(kept)
        second.restore(kept)

        assert first.digest() == second.digest() == before
        assert first.do("unload", 0)[0] == second.do("unload", 0)[0]
        first.close()
        second.close()


def test_the_right_machine_breaks_nothing_in_any_order_of_its_threads() -> None:
    """One device, every order of messages and of the guest's threads to depth 11: no violation."""
    with exploring(devices=1, subchannels=0, threads=True) as explorer:
        found = explorer.explore(11)

    assert found.violation is None
    assert found.depth == 11 and not found.stopped


@pytest.mark.soak
def test_a_rescind_that_overtakes_its_offer_is_found(tmp_path: Path) -> None:
    """Without the offer gate (races.md A1) a schedule is found, none being given, and done again from its file."""
    arguments = [
        "--threads",
        "--devices",
        "1",
        "--subchannels",
        "0",
        "--depth",
        "30",
        "--without",
        "offer_gate",
        "--json",
    ]
    first = CliRunner().invoke(explore, arguments, standalone_mode=False)
    file = tmp_path / "found.json"
    file.write_text(first.stdout)

    again = CliRunner().invoke(explore, ["--replay", str(file), "--json"], standalone_mode=False)

    assert first.return_value == again.return_value == 1
    violation = json.loads(first.stdout)["violation"]
    assert "INV-01: relid 1 was rescinded and is never released" in violation["problems"]
    assert json.loads(again.stdout)["violation"] == violation
    turns = [event["thread"] for event in violation["schedule"] if event["do"] == "run"]
    # The offer's worker stood where the relid was not entered yet, or had not begun.
    assert turns.index("RESCIND") < len(turns) - 1 - turns[::-1].index("WORK")


def test_without_the_order_of_threads_the_same_machine_looks_right() -> None:
    """A guest that stands still after each message never has a rescind and its offer under way at once."""
    with exploring(devices=1, subchannels=0, without=("offer_gate",)) as explorer:
        assert explorer.explore(14).violation is None


def test_a_switch_that_there_is_not_is_refused() -> None:
    """A name mistyped is told with the likeliest one."""
    result = CliRunner().invoke(explore, ["--without", "offer_gat"], standalone_mode=False)

    assert isinstance(result.exception, UserError)
    assert "did you mean offer_gate?" in str(result.exception)


def test_a_relid_that_is_not_released_is_found() -> None:
    """A guest whose rescinds forget RELID_RELEASED: the shortest schedule ends with the rescind being taken."""

    class Forgetful(Guest):
        def do(self, kind: str, argument: Any) -> tuple[list[bytes], list[str]]:
            sent, problems = super().do(kind, argument)
            return [one for one in sent if not isinstance(parse(one), RelidReleased)], problems

    with exploring(devices=1, subchannels=0, guest=Forgetful) as explorer:
        found = explorer.explore(8)

    assert found.violation is not None
    assert found.violation.problems == ["INV-01: only the host has relid 1"]
    assert found.violation.schedule[-1]["text"].startswith("guest takes RESCIND_CHANNELOFFER")


def test_a_relid_released_twice_is_found() -> None:
    """A guest that says RELID_RELEASED twice: the host has no such relid the second time."""

    class Stammering(Guest):
        def do(self, kind: str, argument: Any) -> tuple[list[bytes], list[str]]:
            sent, problems = super().do(kind, argument)
            return [one for one in sent for _ in range(1 + isinstance(parse(one), RelidReleased))], problems

    with exploring(devices=1, subchannels=0, guest=Stammering) as explorer:
        found = explorer.explore(8)

    assert found.violation is not None
    assert "release-unknown-relid" in found.violation.problems[0]


def test_a_waiter_that_a_rescind_does_not_wake_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wake of whoever waits on the channel (races.md A4), an opener waits for ever."""

    def mark(_tables: Any, channel: Any) -> list[Any]:
        channel.rescind.store(1)
        return []

    monkeypatch.setattr(rescinds, "mark", mark)
    with exploring(devices=1, subchannels=0) as explorer:
        found = explorer.explore(9)
        assert found.violation is not None
        again = explorer.replay(found.violation.schedule)

    assert any(one.startswith("INV-15") for one in found.violation.problems)
    assert again.violation is not None and again.violation.problems == found.violation.problems


def test_a_rescind_that_is_not_sent_is_found() -> None:
    """A host that takes a device away and forgets RESCIND: found when all is quiet."""

    class Silent(Host):
        def do(self, kind: str, argument: Any) -> tuple[list[bytes], list[str]]:
            sent, problems = super().do(kind, argument)
            return [one for one in sent if not isinstance(parse(one), RescindChannelOffer)], problems

    with exploring(devices=1, subchannels=0, host=Silent) as explorer:
        found = explorer.explore(8)

    assert found.violation is not None
    assert found.violation.problems == ["INV-01: relid 1 was rescinded and is never released"]


def _report(**more: Any) -> dict[str, Any]:
    """What an exploration found, as `show` is given it: nothing, in any order there is."""
    core = {"states": 1_200, "steps": 3_400, "made": 5_600}
    figures = {"transitions": 40_000, "states": 30_000, "transitions_per_second": 20_000, "seconds": 2.04}
    ends = {"depth": 9, "asked_depth": 12, "exhausted": False, "stopped": None, "violation": None}
    return {**figures, **ends, "guest": core, "host": core, **more}


@pytest.mark.parametrize(
    ("more", "last"),
    [
        ({}, ["no violation"]),
        ({"stopped": "states"}, ["stopped by the limit of states, before the depth of 12", "no violation"]),
        ({"stopped": INTERRUPTED}, ["interrupted, before the depth of 12", "no violation"]),
    ],
)
def test_what_was_explored_is_told_to_people(
    more: dict[str, Any], last: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures, and what ended it before its depth, if anything did."""
    show(_report(**more))

    assert capsys.readouterr().out.splitlines() == [
        "40,000 transitions, 30,000 distinct states, depth 9 completed",
        "20,000 transitions a second, 2.0 s",
        "guest: 1,200 states, 3,400 different steps, 5,600 made",
        "host: 1,200 states, 3,400 different steps, 5,600 made",
        *last,
    ]


def test_counterexample_is_told_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    """What was done, numbered from 1, then what is wrong behind it; and that there are no other states."""
    violation = {"problems": ["INV-07: one", "INV-11: two"], "schedule": [{"text": "contact"}, {"text": "offer 1"}]}
    show(_report(violation=violation, exhausted=True))

    first, second, *problems, figures, _rate, _guest, _host, last = capsys.readouterr().out.splitlines()
    assert (first, second) == ("   1  contact", "   2  offer 1")
    assert problems == ["      INV-07: one", "      INV-11: two"]
    assert figures.endswith("depth 9 completed, and there are no others")
    assert last == "2 violations"


def test_an_exploration_that_is_cut_short_says_so() -> None:
    """Time or states that run out are no verdict: exit status 124."""
    result = CliRunner().invoke(explore, ["--depth", "9", "--states", "20", "--json"], standalone_mode=False)

    report = json.loads(result.stdout)
    assert result.return_value == 124
    assert report["stopped"] == "states" and report["depth"] < 9 and report["violation"] is None


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_exploration_that_is_interrupted_says_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """A signal in the middle of a step is no violation; the figures are told, the exit status is the signal's."""
    steps = iter(range(1_000_000))
    real = Guest.do

    def do(guest: Guest, kind: str, argument: Any) -> Any:
        if next(steps) == 20:
            os.kill(os.getpid(), signum)
        return real(guest, kind, argument)

    monkeypatch.setattr(Guest, "do", do)
    result = CliRunner().invoke(explore, ["--depth", "100", "--json"], standalone_mode=False)

    told = json.loads(result.stdout)
    assert result.return_value == 128 + signum
    assert (told["stopped"], told["violation"], told["finding"]) == ("interruption", None, None)
    assert told["transitions"] > 20


def test_a_counterexample_is_done_again_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`explore --json` writes what `explore --replay` does again, to the same end, with the same exit status."""
    monkeypatch.setattr(rescinds, "mark", lambda _tables, channel: channel.rescind.store(1) or [])
    arguments = ["--depth", "9", "--devices", "1", "--subchannels", "0", "--json"]
    first = CliRunner().invoke(explore, arguments, standalone_mode=False)
    file = tmp_path / "found.json"
    file.write_text(first.stdout)

    again = CliRunner().invoke(explore, ["--replay", str(file), "--json"], standalone_mode=False)

    assert first.return_value == again.return_value == 1
    assert json.loads(first.stdout)["violation"] == json.loads(again.stdout)["violation"]
