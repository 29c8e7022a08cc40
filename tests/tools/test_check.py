"""`vmbus-emu check`: a real recording holds every rule, and an edit of it breaks the one that it is made for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from emu.control import ActorKind
from emu.faults import FaultKind
from emu.recording import TraceRecord
from emu.tracing import EVENTS, Context, WaitedFor, refused_words
from emu.wire.messages import MessageType
from guestproc.kernel.layout import ChannelState
from hostproc.protocol.states import ChannelState as HostState
from tests.conftest import RunCli
from tests.tools.recorded import Edited
from tests.tools.recordings import recorders
from tools.check import violations_of
from tools.exit_status import ExitStatus
from tools.invariant_table import RULES
from tools.invariants import Machine, Rule, Verdict, judge

MACHINE = Machine((0, 1))
PENDING_SIZE, REFUSED = EVENTS["pending_size"], EVENTS["refused"]
SECONDS_3 = 3_000_000_000
HOST = "HYPERVISOR"


def verdicts(records: list[TraceRecord], missing: str = "") -> list[Verdict]:
    """What the rules say."""
    return judge(RULES, records, MACHINE, missing=missing)


def broken(records: list[TraceRecord]) -> set[int]:
    """Numbers of the rules that do not hold."""
    return {one.rule.NUMBER for one in verdicts(records) if one.count}


def rescinded(edited: Edited) -> int:
    """A relid that the guest was told is taken back."""
    return edited.records[edited.where("rescind", actor="WORKER")].values[0]


# -- one edit a rule ----------------------------------------------------------------------------------


def offer_of_a_held_relid(edited: Edited) -> None:
    """The host offers a relid that the guest has."""
    first = edited.where("offer", actor=HOST, relid=1)
    edited.insert(first + 50, first, generation=2)


def released_twice(edited: Edited) -> None:
    """The guest gives the same relid back again."""
    first = edited.where("release", actor="WORKER")
    edited.insert(first + 1, first)


def rescind_that_finds_nothing(edited: Edited) -> None:
    """A rescind overtook its offer: no such channel."""
    edited.change(edited.where("rescind", actor="WORKER"), generation=0)


def rescind_beside_an_offer(edited: Edited) -> None:
    """An offer that was read before the rescind is still in progress when that goes on."""
    read = edited.where("slot_read", msgtype=MessageType.RESCIND_CHANNELOFFER)
    # Somebody who reads no slot: in whose slot something is read twice is another rule's business.
    actor = edited.records[edited.where("rescind", actor="WORKER")].actor
    edited.insert(read, read, msgtype=MessageType.OFFERCHANNEL, serial=9_999)
    at = edited.records[read]
    edited.records[read] = type(at)(at.t_ns, 0, actor, 1, "TASKLET", at.event, at.values)


def rescind_of_a_successor(edited: Edited) -> None:
    """The host takes another generation back than the one that lives."""
    first = edited.where("rescind", actor=HOST)
    edited.change(first, generation=edited.records[first].values[1] + 1)


def waiter_on_a_rescinded_channel(edited: Edited) -> None:
    """A request enters the list behind the rescind, and nobody wakes it."""
    behind = edited.where("rescind", actor="WORKER") + 1
    edited.insert(behind, edited.where("req_alloc"), request=999, relid=rescinded(edited))


def slot_emptied_by_a_stranger(edited: Edited) -> None:
    """Somebody frees a message that he has not read."""
    first = edited.where("slot_free")
    edited.change(first, serial=edited.records[first].values[2] + 1_000)


def eom_that_is_owed(edited: Edited) -> None:
    """The pending bit was set behind the free, and no EOM follows."""
    edited.change(edited.where("slot_free", last=True, pending=0), pending=1)


def pending_bit_of_nobody(edited: Edited) -> None:
    """A message waits behind the last one that the slot ever held."""
    edited.insert(edited.where("slot_write", last=True) + 1, edited.where("pending_set"))


def message_that_stays(edited: Edited) -> None:
    """The last message is in the slot, and no tasklet comes for it."""
    last = edited.where("slot_write", last=True)
    edited.insert(last + 1, last, serial=9_999)


def post_of_something_else(edited: Edited) -> None:
    """The page was overwritten between fill and call."""
    edited.change(edited.where("post", actor="WORKER"), msgtype=MessageType.GPADL_TEARDOWN)


def page_freed_under_the_host(edited: Edited) -> None:
    """A page of a ring goes back while its GPADL lives."""
    added = edited.where("gpadl_add", actor="WORKER")
    edited.insert(added + 1, edited.where("page_free"), pfn=edited.records[added].values[3], pages=1)


def reply_to_another(edited: Edited) -> None:
    """A completion for an id that is not out."""
    edited.change(edited.where("req_complete", msgtype=MessageType.OPENCHANNEL), key=0xBAD)


def flag_cleared_for_nothing(edited: Edited) -> None:
    """A word of flags is written back: a flag goes that nobody handled."""
    first = edited.where("flag_clear")
    edited.insert(first + 1, first)


def mask_that_stays(edited: Edited) -> None:
    """The ISR masks, and the poller that it asks is not enabled."""
    edited.insert(edited.where("cpu_offline", cpu=0), edited.where("mask", actor="VCPU"), context="ISR")


def tasklet_left_disabled(edited: Edited) -> None:
    """Scheduled, and never run."""
    edited.insert(edited.where("cpu_offline", cpu=0), edited.where("tasklet_sched"), tasklet=2)


def reader_that_sleeps(edited: Edited) -> None:
    """Bytes behind the reader's last look, and no interrupt for seconds."""
    close = edited.where("close", actor="VCPU", relid=1)
    publish = edited.where("ring_publish", relid=1, side=1, last=True)
    release = edited.where("ring_release", relid=1, side=1, last=True)
    size = edited.records[edited.where("ring_attach", relid=1, side=1)].values[2]
    index = edited.records[publish].values[2]
    assert edited.records[release].values[2] == index
    edited.insert(close, publish, write_index=(index + 64) % size, bytes=64)
    edited.insert(close, edited.where("unmask", actor="VCPU", relid=1), bytes_to_read=0)
    edited.wait(close + 2, SECONDS_3)


def writer_that_sleeps(edited: Edited) -> None:
    """It wishes for the whole ring behind its last packet; the host reads that, and nobody says so."""
    publish = edited.where("ring_publish", actor="VCPU", relid=1, side=0, last=True)
    size = edited.records[edited.where("ring_attach", relid=1, side=0)].values[2]
    wish = replace(edited.records[publish], event=PENDING_SIZE, values=(1, 0, size - 8))
    edited.records.insert(publish + 1, wish)
    edited.wait(edited.where("close", actor="VCPU", relid=1), SECONDS_3)


def signal_on_every_write(edited: Edited) -> None:
    """A signal more than there were publishes."""
    first = edited.where("signal", last=True)
    edited.insert(first + 1, first)


def index_off_the_grid(edited: Edited) -> None:
    """A length that changed between check and use."""
    last = edited.where("ring_publish", last=True)
    edited.change(last, write_index=edited.records[last].values[2] + 4)


def target_that_is_offline(edited: Edited) -> None:
    """A channel is opened for a processor that nobody brought up."""
    edited.change(edited.where("vmbus_open"), target_vp=77)


def circle_of_mutexes(edited: Edited) -> None:
    """Two workers, each with a mutex that the other sleeps for."""
    taken = edited.where("lock", actor="WORKER")
    mutex = edited.records[taken].values[0]
    one, other = edited.records[taken].actor, edited.records[edited.where("lock", actor="VCPU")].actor
    wait, at = edited.where("wait"), taken + 1
    edited.insert(at, wait, what=WaitedFor.MUTEX, object=mutex)
    edited.records[at] = replace(edited.records[at], actor=other)
    edited.insert(at, at, what=WaitedFor.MUTEX, object=0xABC0)  # like the one that is there now
    edited.records[at] = replace(edited.records[at], actor=one)
    edited.insert(at, taken, lock=0xABC0)
    edited.records[at] = replace(edited.records[at], actor=other)


def work_that_never_runs(edited: Edited) -> None:
    """A record on a queue whose worker waits for it."""
    first = edited.where("work_queue")
    edited.insert(first + 1, first, serial=9_999)


def round_in_a_circle(edited: Edited) -> None:
    """The host asks for the same interrupt again and again."""
    first = edited.where("irq_raise")
    edited.records[first:first] = [edited.records[first]] * 1_000


def something_illegal(edited: Edited) -> None:
    """The host refuses a message."""
    state = edited.where("state", actor="WORKER", new=ChannelState.OPENING_STATE)
    host = edited.records[edited.where("message_take")]
    edited.records.insert(
        state, host.__class__(host.t_ns, 0, host.actor, None, "HOST", REFUSED, REFUSED.unpack(refused_words("open-id")))
    )


EDITS: dict[int, Callable[[Edited], None]] = {
    1: offer_of_a_held_relid,
    2: released_twice,
    3: rescind_that_finds_nothing,
    4: rescind_beside_an_offer,
    5: rescind_of_a_successor,
    6: waiter_on_a_rescinded_channel,
    7: slot_emptied_by_a_stranger,
    8: eom_that_is_owed,
    9: pending_bit_of_nobody,
    10: message_that_stays,
    11: post_of_something_else,
    12: page_freed_under_the_host,
    15: reply_to_another,
    16: flag_cleared_for_nothing,
    17: mask_that_stays,
    18: tasklet_left_disabled,
    19: reader_that_sleeps,
    20: writer_that_sleeps,
    21: signal_on_every_write,
    24: index_off_the_grid,
    26: target_that_is_offline,
    27: circle_of_mutexes,
    28: work_that_never_runs,
    29: round_in_a_circle,
    30: something_illegal,
}


def test_rule_that_names_no_events_is_no_rule() -> None:
    """What a rule is fed with is not left out by mistake: such a class cannot be made."""
    with pytest.raises(TypeError, match="feeds"):
        Rule(MACHINE)  # type: ignore[abstract]


def test_every_rule_has_an_edit_that_breaks_it() -> None:
    """None is there that no record could ever break."""
    assert [rule.NUMBER for rule in RULES] == sorted(EDITS)
    assert all(rule.TITLE and rule.__doc__ for rule in RULES)


def test_real_recording_holds_every_rule(records: list[TraceRecord]) -> None:
    """Boot, traffic, hot plug, shutdown: nothing broken, nothing undecided."""
    assert [(one.name, one.violations, one.undecided) for one in verdicts(records) if one.count or one.undecided] == []


@pytest.mark.parametrize(("apart_ns", "circle"), [(12_000, False), (1_200_000, True)])
def test_tasklet_that_comes_back_may_poll_for_a_second(records: list[TraceRecord], apart_ns: int, circle: bool) -> None:
    """What it polls for is done by somebody who may wait for a core meanwhile; after a second nobody does it."""
    edited = Edited(records)
    first = edited.where("tasklet_run")
    edited.wait(first, 1_000 * apart_ns)
    one = edited.records[first]
    edited.records[first:first] = [replace(one, t_ns=one.t_ns - again * apart_ns) for again in range(1_000, 0, -1)]

    assert (29 in broken(edited.records)) is circle


@pytest.mark.parametrize("number", EDITS)
def test_edit_breaks_its_rule_alone(records: list[TraceRecord], number: int) -> None:
    """One thing is wrong, and exactly that is named, with records that show it."""
    edited = Edited(records)
    EDITS[number](edited)

    assert broken(edited.records) == {number}
    for violation in violations_of(verdicts(edited.records)):
        assert violation.text
        assert violation.records


@pytest.mark.parametrize(("woken", "circle"), [(0xABC0, False), (0xABC8, True)])
def test_who_is_woken_sleeps_no_more_for_that(records: list[TraceRecord], woken: int, circle: bool) -> None:
    """INV-27: a wake that is about something else does not open the circle."""
    edited = Edited(records)
    circle_of_mutexes(edited)
    at = edited.where("wait", object=0xABC0)
    asleep, wake = edited.records[at], edited.records[edited.where("wake")]
    edited.records.insert(at + 1, replace(asleep, event=EVENTS["wake"], values=wake.values))
    edited.change(at + 1, object=woken, actor=asleep.actor.slot)
    # Who has taken its mutex may have slept just then until the worker had done what was flushed: no circle more.
    holder, done = edited.records[at - 1], edited.records[edited.where("wait_done")]
    edited.records.insert(at - 1, replace(holder, event=EVENTS["wait_done"], values=done.values))

    assert (27 in broken(edited.records)) is circle


def test_timer_message_that_is_taken_back_need_not_come(records: list[TraceRecord]) -> None:
    """It waited behind a pending bit, and then the guest wrote its timer's register."""
    edited = Edited(records)
    pending_bit_of_nobody(edited)
    at = edited.where("pending_set", last=True)
    position, sint, _resident = edited.records[at].values
    withdrawn = replace(edited.records[at], event=EVENTS["timer_withdrawn"], values=(position, 0, sint, 77))
    edited.records.insert(at + 1, withdrawn)

    assert broken(edited.records) == set()


def test_tasklet_between_publish_and_signal_signals_for_itself(records: list[TraceRecord]) -> None:
    """A task is interrupted before it has signalled; the tasklet makes room and says so: two signals, two causes."""
    edited = Edited(records)
    signal = edited.where("signal", actor="VCPU")
    relid = edited.records[signal].values[0]
    release = edited.where("ring_release", actor="VCPU", relid=relid, side=1)
    assert edited.records[release].actor == edited.records[signal].actor
    read_index = _read_index(edited, relid, signal)
    edited.insert(signal, release, context="TASKLET", bytes=0, read_index=read_index)
    edited.insert(signal + 1, signal + 1, context="TASKLET")

    assert broken(edited.records) == set()


def test_threshold_that_stays_armed_is_no_sleeper(records: list[TraceRecord]) -> None:
    """INV-20: a socket asks for a signal at so much room from its opening on, and writes as long as there is some."""
    edited = Edited(records)
    attach = edited.where("ring_attach", relid=1, side=0)
    edited.records.insert(attach + 1, replace(edited.records[attach], event=PENDING_SIZE, values=(1, 0, 4096)))
    edited.wait(edited.where("close", actor="VCPU", relid=1), SECONDS_3)

    assert broken(edited.records) == set()


def test_device_that_came_back_is_offered_when_its_relid_is_given_up(records: list[TraceRecord]) -> None:
    """The host was only waiting for the guest to let go of the relid: the next offer of it is right."""
    edited = Edited(records)
    offer_of_a_held_relid(edited)
    at = edited.where("offer", actor=HOST, relid=1, generation=2)
    reoffered, closed = int(HostState.REOFFERED), int(HostState.CLOSED)
    edited.insert(at, edited.where("host_state"), relid=1, generation=1, old=reoffered, new=closed)

    assert broken(edited.records) == set()


def test_release_that_is_told_behind_the_next_offer(records: list[TraceRecord]) -> None:
    """INV-02: a worker records it when it has posted it; by then the relid's next life may have begun, even be open."""
    edited = Edited(records)
    told = edited.records.pop(edited.where("release", actor="WORKER", relid=4))
    life = edited.where("offer", actor="WORKER", relid=4, last=True)
    opened = edited.where("open", actor="WORKER", relid=4, last=True)
    assert life < opened

    edited.records.insert(opened + 1, replace(told, t_ns=edited.records[opened].t_ns))

    assert broken(edited.records) == set()


def test_signal_for_a_ring_that_was_not_empty(records: list[TraceRecord]) -> None:
    """D3: a second publish, and a signal for it, before the host has read the first: nobody is to be told twice.

    Unless the host's next release is to where the second publish began: then it had read the first.
    """
    edited = Edited(records)
    relid, side, write_index, nbytes = edited.records[edited.where("ring_publish", actor="VCPU", relid=1)].values
    published = edited.where("ring_publish", actor="VCPU", relid=1)
    signal = edited.where("signal", actor="VCPU", relid=1)
    edited.insert(signal + 1, signal)
    edited.insert(signal + 1, published, write_index=write_index + nbytes)
    release = edited.where("ring_release", actor=HOST, relid=relid, side=side)

    edited.change(release, read_index=write_index)
    assert 21 not in broken(edited.records)
    edited.change(release, read_index=write_index + nbytes)
    assert 21 in broken(edited.records)


@pytest.mark.parametrize("signals", [1, 2])
def test_signal_is_not_excused_by_what_is_read_of_the_next_rings(records: list[TraceRecord], signals: int) -> None:
    """INV-21: a channel that is opened again has new rings, whose indices begin at 0 as those of the old ones did."""
    edited = Edited(records)
    published = edited.where("ring_publish", actor="VCPU", relid=1)
    relid, side, write_index, nbytes = edited.records[published].values
    signal = edited.where("signal", actor="VCPU", relid=1)
    release = edited.where("ring_release", actor=HOST, relid=relid, side=side)
    edited.change(release, read_index=write_index)
    edited.insert(release, edited.where("map", relid=1))
    if signals == 2:
        edited.insert(signal + 1, signal)
        edited.insert(signal + 1, published, write_index=write_index + nbytes)

    assert (21 in broken(edited.records)) == (signals == 2)


def test_rescind_that_a_fault_repeats_is_no_mistake_of_the_hosts(records: list[TraceRecord]) -> None:
    """One more of the same relid breaks INV-05, unless the plan of faults said so."""
    edited = Edited(records)
    first = edited.where("rescind", actor=HOST)
    edited.insert(first + 1, first)
    assert broken(edited.records) == {5}

    values = (FaultKind.HOST_DUP_RESCIND, edited.records[first].values[0], 0, 1)
    edited.records.insert(first + 1, replace(edited.records[first], event=EVENTS["fault_hit"], values=values))

    assert broken(edited.records) == set()


def test_processor_that_attaches_to_rings_that_were_taken_back(records: list[TraceRecord]) -> None:
    """INV-24: what lies in them then was published to nobody who is left; the channel is closed like any other."""
    edited = Edited(records)
    rescind = edited.where("rescind", actor="WORKER")
    relid = edited.records[rescind].values[0]
    assert rescind < edited.where("close", actor="WORKER", relid=relid, last=True)

    attach = edited.where("ring_attach", actor="VCPU", side=1)
    edited.insert(rescind + 1, attach, relid=relid, write_index=64, read_index=0)

    assert broken(edited.records) == set()


def _read_index(edited: Edited, relid: int, before: int) -> int:
    """Where the reader of the guest's inbound ring is at some record."""
    releases = [one for one in edited.records[:before] if one.event.name == "ring_release"]
    return next((one.values[2] for one in reversed(releases) if one.values[:2] == (relid, 1)), 0)


# -- what cannot be decided ---------------------------------------------------------------------------


def test_what_must_have_happened_is_undecided_without_an_orderly_end(records: list[TraceRecord]) -> None:
    """A machine that was killed owes nothing: only what is wrong at once is told."""
    half = verdicts(records[: len(records) // 2])

    assert [one.name for one in half if one.count] == []
    assert {one.rule for one in half if one.undecided} == {rule for rule in RULES if rule.AT_END}


def test_missing_records_leave_most_rules_undecided(records: list[TraceRecord]) -> None:
    """What is not there may be what was right."""
    thinned = records[::3]
    found = verdicts(thinned, missing="2 of 3 records were dropped")

    assert {one.rule for one in found if not one.undecided} == {rule for rule in RULES if not rule.NEEDS_ALL}
    assert not any(one.count for one in found)


# -- the command --------------------------------------------------------------------------------------


def test_good_recording_is_told_in_one_line(run_cli: RunCli, recording_path: Path) -> None:
    """Exit 0, and how many rules held."""
    done = run_cli("check", recording_path)

    assert (done.returncode, done.stderr) == (ExitStatus.FINE, "")
    assert done.stdout == f"{len(RULES)} invariants held, 0 broken, 0 undecided\n"


def test_damaged_recording_is_a_finding(run_cli: RunCli, recording_path: Path, tmp_path: Path) -> None:
    """Cut off: what can be said is said, as JSON and as JUnit, and the status is 1."""
    cut, junit = tmp_path / "cut.rec", tmp_path / "j.xml"
    cut.write_bytes(recording_path.read_bytes()[:-200])
    done = run_cli("check", cut, "--json", "--junit", junit)

    report = json.loads(done.stdout)
    assert done.returncode == ExitStatus.FINDING
    assert report["schema"] == {"name": "vmbus-emu.check", "version": 1}
    assert report["violations"] == []
    assert {one["verdict"] for one in report["invariants"]} == {"held", "undecided"}
    suite = ElementTree.parse(junit).getroot()
    assert "the file ends in " in report["damage"] and report["damage"] in done.stderr
    assert (suite.get("tests"), suite.get("failures")) == (str(len(RULES) + 1), "1")
    assert suite.findall("testcase/failure")[0].get("message") == report["damage"]


@pytest.mark.parametrize(
    ("count", "more", "counted"),
    [
        (10, None, None),
        (11, "INV-30: 1 more like these (--json lists them)\n", None),
        (100, "INV-30: 90 more like these (--json lists them)\n", None),
        (
            1_150,
            "INV-30: 1,140 more like these (--json lists 90 of them)\n",
            "INV-30: 1,050 more like these, which are only counted\n",
        ),
    ],
)
def test_more_violations_than_are_shown_are_counted(
    run_cli: RunCli, tmp_path: Path, count: int, more: str | None, counted: str | None
) -> None:
    """Ten of a rule are shown, a hundred are kept; how many more there are is told, and where to find them."""
    path, junit = tmp_path / "refused.rec", tmp_path / "j.xml"
    with recorders(path, (ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST)) as (host,):
        for _ in range(count):
            host.record(REFUSED.number, *refused_words("gpadl-unknown"))

    done = run_cli("check", path, "--junit", junit)

    assert done.returncode == ExitStatus.FINDING
    told = re.findall("INV-30: .* more like these.*\n", done.stdout)
    assert told == ([] if more is None else [more])
    report = json.loads(run_cli("check", path, "--json").stdout)
    assert len(report["violations"]) == min(count, 100)
    text = (Path(report["finding"]) / "finding.txt").read_text()
    assert re.findall("INV-30: .* more like these.*\n", text) == ([] if counted is None else [counted])
    (failure,) = ElementTree.parse(junit).getroot().findall("testcase/failure")
    assert (counted is not None) == ("more like these, which are only counted" in (failure.text or ""))


def test_file_that_is_none_is_one_line(run_cli: RunCli, tmp_path: Path) -> None:
    """Exit 2 and the name."""
    done = run_cli("check", tmp_path / "missing")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitStatus.USAGE, "", 1)
