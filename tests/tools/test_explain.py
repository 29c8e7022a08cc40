"""`vmbus-emu explain`: the story of a device or a message, and who owes whom what."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from emu.faults import FaultKind
from emu.recording import TraceRecord
from emu.scenario import Scenario, parse_device
from emu.tracing import EVENTS, WaitedFor
from emu.wire.messages import MessageType
from hostproc.protocol.states import ChannelState
from tests.conftest import RunCli
from tools.debts import Debt, debts_of
from tools.exit_status import ExitStatus
from tools.explain import ids_of
from tools.flight import save_flight
from tools.flows import flows_of
from tools.launch import launch
from tools.story import TELLING, TELLING_OF_GUEST, story_of_flow, story_of_relid

LINE = re.compile(r" *\d+\.\d{3} ms +[+-][\d,]+\.\d us  \S.*")


def owed(records: list[TraceRecord]) -> list[str]:
    """Who owes whom what, without how long."""
    return [debt.text.partition(", for ")[0] for debt in debts_of(records, flows_of(records, (0, 1)))]


def index_of(records: list[TraceRecord], event: str, *values: int) -> int:
    """The last record of an event that begins with these values."""
    return max(
        index
        for index, record in enumerate(records)
        if record.event.name == event and record.values[: len(values)] == values
    )


def test_sentences_name_arguments_that_there_are(records: list[TraceRecord]) -> None:
    """No word of a story is a question mark."""
    told = story_of_relid(records, flows_of(records, (0, 1)), 1)

    assert not [one.text for one in told if "?" in one.text]
    assert set(TELLING_OF_GUEST) <= set(TELLING)


def test_story_of_a_device_goes_from_its_offer_to_its_release(run_cli: RunCli, recording_path: Path) -> None:
    """Each line says when, how long after the last, who, where, what, and which function it stands for."""
    done = run_cli("explain", recording_path, "--relid", "1")

    *lines, debt = done.stdout.splitlines()
    assert (done.returncode, done.stderr, debt) == (0, "", "nobody owes anybody anything")
    assert all(LINE.fullmatch(line) for line in lines)
    story = "\n".join(lines)
    for words in (
        "hypervisor                 offers relid 1, generation 1",
        "vcpu0 (isr)                takes interrupt 0xf3  [vmbus_isr]",
        "[vmbus_on_msg_dpc]",
        "kworker/work               begins VMBUS_ONMESSAGE_WORK",
        "lets driver hv_echo take the device  [vmbus_probe]",
        "driver hv_echo has let go  [vmbus_remove]",
        "tells user space of the device: ADD",
        "tells user space of the channel's directory: ADD",
        "channel goes from OPENING to OPEN  [control plane]",
        "bytes to the host",
        "gives relid 1 up (it went well)",
    ):
        assert words in story, words


def test_message_is_told_as_json(run_cli: RunCli, recording_path: Path) -> None:
    """One object: the message, its steps with role, actor, context, function and record, and what is owed."""
    listed = json.loads(run_cli("explain", recording_path, "--json").stdout)
    offer = next(one for one in listed["messages"] if one["message"] == "OFFERCHANNEL")
    report = json.loads(run_cli("explain", recording_path, "--message", offer["id"], "--json").stdout)

    assert (listed["schema"]["name"], report["message"]["id"]) == ("vmbus-emu.explain", offer["id"])
    assert (report["owed"], listed["owed"], listed["damage"]) == ([], [], "")
    first = report["steps"][0]
    assert (first["role"], first["actor"], first["context"], first["later_ns"]) == ("posted", "hypervisor", "host", 0)
    assert {"slot_write", "isr", "dpc", "work_run", "probe"} <= {step["role"] for step in report["steps"]}
    assert sum(step["later_ns"] for step in report["steps"]) == report["steps"][-1]["t_ns"] - first["t_ns"]


def test_message_that_a_foreign_guest_took_is_said_to_be_gone(records: list[TraceRecord]) -> None:
    """It says nothing itself; the host finds the slot empty when it writes the next message: so it is told."""
    host = [record for record in records if record.actor.kind == "HYPERVISOR"]
    flow = next(one for one in flows_of(host, (0, 1)) if one.name == "OFFERCHANNEL")
    told = [one.text for one in story_of_flow(host, flow)]

    assert [text.split(" the slot")[0] for text in told if "the slot of VP page 0" in text] == [
        "posts OFFERCHANNEL (h2) for",
        "writes OFFERCHANNEL into",
        "finds",
    ]


def test_message_of_a_foreign_guest_that_the_host_has_not_handled_is_owed_to_the_guest(
    records: list[TraceRecord],
) -> None:
    """The host alone records such a post, and does not owe itself anything."""
    host = [record for record in records if record.actor.kind == "HYPERVISOR"]
    posted = index_of(host, "post")

    assert owed(host[: posted + 1])[-1].startswith("hypervisor owes the guest the handling of ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--relid", "77"), "has nothing about it"),
        (("--message", "x9"), " and h1 to h"),
        (("--relid", "1", "--message", "h1"), "exclude each other"),
    ],
)
def test_wrong_question_is_one_line(
    run_cli: RunCli, recording_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    """Exit 2, nothing on stdout, and what there is to ask for."""
    done = run_cli("explain", recording_path, *arguments)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitStatus.USAGE, "", 1)
    assert words in done.stderr


def test_ids_that_there_are_begin_where_the_recording_does(records: list[TraceRecord]) -> None:
    """A flight recorder's first message has a higher number than 1; of one alone there is no range."""
    posted = [one for one in records if one.event.name == "message_post"]
    taken = [one for one in records if one.event.name == "message_take"]
    h, g = posted[-1].arguments["serial"], taken[-1].arguments["serial"]

    assert ids_of(flows_of(records)) == f"there are g1 to g{g} and h1 to h{h}"
    assert ids_of(flows_of(taken[-4:])) == f"there are g{g - 3} to g{g}"
    assert ids_of(flows_of([posted[-1], *taken[-4:]])) == f"there are g{g - 3} to g{g} and h{h}"
    assert ids_of([]) == "it holds none"


# -- debts ----------------------------------------------------------------------------------------------


def test_whole_machine_owes_nothing(records: list[TraceRecord]) -> None:
    """Everything was answered before the end."""
    assert owed(records) == []


def test_host_that_does_not_answer_owes(records: list[TraceRecord]) -> None:
    """An OPENCHANNEL that was taken, and no result: who waits is named."""
    taken = index_of(records, "message_take", MessageType.OPENCHANNEL)
    relid = records[taken].values[3]

    assert f"the host owes kworker/pri_chan the answer to OPENCHANNEL (relid {relid}, key {relid:#x})" in owed(
        records[: taken + 1]
    )


def test_slot_that_nobody_reads_owes(records: list[TraceRecord]) -> None:
    """A message that lies in its slot is the processor's to take."""
    written = index_of(records, "slot_write")
    position, serial = records[written].values[0], records[written].values[4]

    debt = f"VP page {position} owes hypervisor a look at UNLOAD_RESPONSE (h{serial}) in its slot"
    assert debt in owed(records[: written + 1])


def test_guest_that_keeps_a_rescinded_relid_owes(records: list[TraceRecord]) -> None:
    """RESCIND was sent, RELID_RELEASED has not come."""
    sent = max(i for i, one in enumerate(records) if one.event.name == "rescind" and one.actor.kind == "HYPERVISOR")
    relid = records[sent].values[0]

    assert f"the guest owes the host RELID_RELEASED of relid {relid}" in owed(records[: sent + 1])


def test_relid_is_owed_from_when_the_host_took_it_back(records: list[TraceRecord]) -> None:
    """Not from when the guest heard of it; and no longer than until the guest gives it back."""
    heard = max(i for i, one in enumerate(records) if one.event.name == "rescind" and one.actor.kind != "HYPERVISOR")
    relid = records[heard].values[0]
    # Others may be taken back between the two, and each relid is given back and taken anew.
    before = [(i, one) for i, one in enumerate(records[:heard]) if one.event.name == "rescind"]
    sent = max(i for i, one in before if one.actor.kind == "HYPERVISOR" and one.values[0] == relid)
    released = heard + index_of(records[heard:], "release", relid)

    kept, given = (debts_of(records[:end], flows_of(records[:end], (0, 1))) for end in (heard + 1, released + 1))
    what = f"RELID_RELEASED of relid {relid}"
    assert [debt.since_ns for debt in kept if debt.what == what] == [records[sent].t_ns]
    # The host may not have handled that message yet, and owes it then.
    assert what not in [debt.what for debt in given]


def test_message_that_the_host_has_not_handled_is_owed_to_who_sent_it(records: list[TraceRecord]) -> None:
    """Of our own guest the records say who that was."""
    got = max(i for i, one in enumerate(records) if one.event.name == "post" and one.actor.kind == "HYPERVISOR")
    left = records[: got + 1]
    flows = flows_of(left, (0, 1))
    flow = flows.flows[flows.of_record(records[got])]
    sender = flow.steps[0].record.actor
    assert sender.kind != "HYPERVISOR"

    assert f"hypervisor owes {sender.name} the handling of {flow.name} ({flow.id})" in owed(left)


def test_work_that_waits_is_its_queues(records: list[TraceRecord]) -> None:
    """Queued, and its worker has not begun."""
    work = records[index_of(records, "work_queue", 2)].values
    left = [one for one in records if one.event.name not in ("work_run", "work_done") or one.values != work]

    (debt,) = owed(left)
    assert debt == f"kworker/pri_chan owes kworker/work the work of OFFERCHANNEL (h{work[2]})"


def test_holder_of_a_mutex_owes_it_to_who_sleeps(records: list[TraceRecord]) -> None:
    """Who has it is named, and the mutex."""
    taken = index_of(records, "lock")
    lock = records[taken]
    wait, words = EVENTS["wait"], (int(WaitedFor.MUTEX), lock.values[0], lock.values[2])
    sleeper = next(one for one in records if one.actor != lock.actor and one.actor.kind == "WORKER")
    records = [*records[: taken + 1], replace(lock, actor=sleeper.actor, event=wait, values=words)]

    assert f"{lock.actor.name} owes {sleeper.actor.name} {lock.shown['name']}" in owed(records)


def test_guest_that_is_gone_is_owed_nothing(records: list[TraceRecord]) -> None:
    """Wherever it was killed: a request under way, work queued, a mutex taken, a packet sent, no room in a ring."""
    host = next(one for one in records if one.actor.kind == "HYPERVISOR")
    near = next(one for one in records if one.event.name == "ring_publish")
    lock = next(one for one in records if one.event.name == "lock")
    sleeps = replace(lock, actor=near.actor, event=EVENTS["wait"], values=(int(WaitedFor.MUTEX), *lock.values[:3:2]))
    wishes = replace(near, event=EVENTS["pending_size"], values=(near.values[0], near.values[1], 4096))
    sends = replace(near, event=EVENTS["request_start"], values=(near.values[0], 1))
    for end in range(1, len(records), 97):
        begun = [*records[:end], lock, sleeps, wishes, sends]
        gone = replace(host, t_ns=begun[-1].t_ns, seq=1 << 30, event=EVENTS["reset"], values=(0,))
        assert len(owed(begun)) >= 3
        assert owed([*begun, gone]) == []


def test_end_of_a_guest_is_in_the_story_of_what_it_held(records: list[TraceRecord]) -> None:
    """While it has the relid; behind its release, or before its offer, the end of a guest is another's story."""
    host = next(one for one in records if one.actor.kind == "HYPERVISOR")
    states = [index for index, one in enumerate(records) if one.event.name == "host_state" and one.values[0] == 4]
    offered, again = [index for index in states if records[index].values[3] == ChannelState.CLOSED][:2]
    in_use = next(index for index in states if records[index].values[2] == ChannelState.OPEN)  # and about to end
    assert offered < in_use < again
    told = []
    for end in (offered, in_use, again):
        gone = replace(host, t_ns=records[end].t_ns, seq=1 << 30, event=EVENTS["reset"], values=(0,))
        left = [*records[:end], gone]
        told.append(any(one.record is gone for one in story_of_relid(left, flows_of(left, (0, 1)), 4)))

    assert told == [False, True, False]


def without_the_answer(records: list[TraceRecord], msgtype: MessageType) -> list[TraceRecord]:
    """The records without the last message of this type of the host's: nobody posted it, nobody had it."""
    serial = records[index_of(records, "message_post", 0, 2, msgtype)].values[3]
    flow = flows_of(records, (0, 1)).get(f"h{serial}")
    assert flow is not None
    steps = {(step.record.actor.slot, step.record.seq) for step in flow.steps}
    return [one for one in records if (one.actor.slot, one.seq) not in steps]


def debts_after(records: list[TraceRecord]) -> list[Debt]:
    """All debts but those that the rest of the way into the guest leaves."""
    return [debt for debt in debts_of(records, flows_of(records, (0, 1))) if debt.who == "the host"]


def test_answer_that_its_asker_waited_for_in_vain_stays_owed(records: list[TraceRecord]) -> None:
    """GPADL_TORNDOWN never came, and the guest went on when its time was over: the debt says so, and for how long."""
    left = without_the_answer(records, MessageType.GPADL_TORNDOWN)
    asked, freed = index_of(left, "req_alloc", MessageType.GPADL_TEARDOWN), index_of(left, "req_free")

    (debt,) = debts_after(left)
    assert (debt.given_up, debt.since_ns, debt.now_ns) == (True, left[asked].t_ns, left[freed].t_ns)
    assert debt.text.startswith(f"the host never gave {left[asked].actor.name} the answer to GPADL_TEARDOWN (relid ")
    assert debt.text.endswith(f"; then {left[asked].actor.name} gave up")


def test_unload_that_is_not_answered_is_owed(records: list[TraceRecord]) -> None:
    """It is no request of the kernel's list; that the host took it and posted nothing is enough."""
    left = without_the_answer(records, MessageType.UNLOAD_RESPONSE)
    (unload,) = [flow.id for flow in flows_of(left, (0, 1)) if flow.msgtype == MessageType.UNLOAD]

    (debt,) = debts_after(left)
    assert (debt.what, debt.messages, debt.given_up) == ("the answer to UNLOAD", (unload,), False)


def test_offers_that_are_never_all_there_are_owed_until_the_connection_ends(records: list[TraceRecord]) -> None:
    """From when the host took REQUESTOFFERS, to who sent it, whatever other messages came since."""
    left = without_the_answer(records, MessageType.ALLOFFERS_DELIVERED)
    taken = left[index_of(left, "message_take", MessageType.REQUESTOFFERS)]
    unload = index_of(left, "message_take", MessageType.UNLOAD)

    (debt,) = debts_after(left[:unload])
    assert (debt.what, debt.since_ns) == ("the answer to REQUESTOFFERS", taken.t_ns)
    assert debt.whom == "vcpu0"
    assert debts_after(left) == []


def test_contact_that_is_not_answered_is_owed_once(records: list[TraceRecord]) -> None:
    """By who keeps a list of requests; and also by a guest that keeps none and goes on as if it had been answered."""
    left = without_the_answer(records, MessageType.VERSION_RESPONSE)
    contact = index_of(left, "message_take", MessageType.INITIATE_CONTACT)
    offers = index_of(left, "message_take", MessageType.REQUESTOFFERS)
    without_a_list = [one for one in left[: offers + 1] if not one.event.name.startswith("req_")]

    owed_once, owed_by_host = debts_after(left[: contact + 1]), debts_after(without_a_list)
    assert [debt.what.partition(" (")[0] for debt in owed_once] == ["the answer to INITIATE_CONTACT"]
    assert [debt.what for debt in owed_by_host] == ["the answer to INITIATE_CONTACT", "the answer to REQUESTOFFERS"]


def test_answer_that_is_owed_is_a_debt_of_each_of_its_messages(records: list[TraceRecord]) -> None:
    """A GPADL is asked for by a header and a body; whose work sleeps for the answer has the debt in its story, too."""
    taken = index_of(records, "message_take", MessageType.GPADL_BODY)
    left = records[: taken + 1]
    flows = flows_of(left, (0, 1))
    body = flows.of_record(records[taken])

    (debt,) = [debt for debt in debts_after(left) if body in debt.messages]
    header, *bodies = [flows.flows[one] for one in debt.messages]
    assert (header.name, [one.name for one in bodies]) == ("GPADL_HEADER", ["GPADL_BODY"])
    assert debt.report()["message"] == header.id


def test_fault_is_told_where_it_struck(records: list[TraceRecord]) -> None:
    """A fault of the host's is a step of the message that it was handling."""
    taken = index_of(records, "message_take", MessageType.GPADL_TEARDOWN)
    values = (int(FaultKind.REPLY_DROP), 0, 0, 1)
    hit = replace(records[taken], event=EVENTS["fault_hit"], values=values, seq=records[taken].seq + 1_000_000)
    edited = [*records[: taken + 1], hit, *records[taken + 1 :]]
    flow = flows_of(edited, (0, 1)).get(f"g{records[taken].values[1]}")

    assert flow is not None
    assert "is made to go wrong here: fault REPLY_DROP" in [one.text for one in story_of_flow(edited, flow)]


def test_packet_that_its_device_forgot_is_owed(records: list[TraceRecord]) -> None:
    """Three were sent, two answered: the last is owed until the channel closes, and is given up then."""
    closed = index_of(records, "close")
    relid, near = records[closed].values[0], records[closed]
    sent, answered = EVENTS["request_start"], EVENTS["request_end"]
    told = [
        replace(near, event=event, values=values, t_ns=near.t_ns - 10 + number)
        for number, (event, values) in enumerate(
            [(sent, (relid, 1)), (sent, (relid, 1)), (answered, (relid, 1, 2)), (sent, (relid, 1))]
        )
    ]
    left = [*records[:closed], *told]

    (debt,) = [debt for debt in debts_of(left, flows_of(left, (0, 1))) if debt.who == f"the device of relid {relid}"]
    assert (debt.what, debt.since_ns, debt.given_up) == ("the answer to 1 packet", told[-1].t_ns, False)
    left += records[closed:]
    (debt,) = debts_of(left, flows_of(left, (0, 1)))
    assert (debt.now_ns, debt.given_up) == (near.t_ns, True)


def test_flight_that_begins_late_owes_nothing_that_can_be_read(run_cli: RunCli, tmp_path: Path) -> None:
    """What was asked before it began is not in it, and so nobody says that all is answered."""
    scenario = Scenario.default().with_overrides(devices=[parse_device("echo:1")])
    with launch(scenario, record=True) as running, pytest.MonkeyPatch.context() as patch:
        running.wait_ready()
        patch.setenv("XDG_STATE_HOME", str(tmp_path))
        path = save_flight(running.machine, 1e-9, "test")
    assert path is not None
    done = run_cli("explain", path)

    assert done.stdout.splitlines()[-1] == (
        "nobody owes anybody anything in what can be read: a flight recorder keeps the last records only"
    )


def traffic(records: list[TraceRecord], *told: tuple[str, tuple[int, ...]]) -> list[TraceRecord]:
    """The records up to the first close, and behind them events of the guest's first processor, and of the host for a
    release to it and a publish of its own; one each millisecond."""
    before = records[: index_of(records, "close")]
    vcpu, host = (next(one for one in before if one.actor.name == name) for name in ("vcpu0", "hypervisor"))
    end_ns = before[-1].t_ns
    made = []
    for number, (event, values) in enumerate(told, 1):
        by_host = (event, values[1]) in (("ring_release", 0), ("ring_publish", 1))
        one = replace(host if by_host else vcpu, event=EVENTS[event], values=values, t_ns=end_ns + number * 1_000_000)
        made.append(one)
    return before + made


def looks(records: list[TraceRecord]) -> list[tuple[str, int]]:
    """Who owes a look at bytes of relid 77, without how long; and the millisecond since when, from the first one on."""
    debts = [debt for debt in debts_of(records, flows_of(records, (0, 1))) if debt.relid == 77]
    first_ns = next(one.t_ns for one in records if one.values[:1] == (77,))
    return [(debt.text.rsplit(", for ", 1)[0], (debt.since_ns - first_ns) // 1_000_000) for debt in debts]


ATTACHED = ("ring_attach", (77, 0, 4096, 0, 0))


@pytest.mark.parametrize(
    ("told", "owed_bytes", "since_ms"),
    [
        ([("ring_publish", (77, 0, 88, 88))], "88", 1),
        ([("ring_publish", (77, 0, 88, 88)), ("ring_release", (77, 0, 88, 88))], None, 0),
        ([("ring_publish", (77, 0, 88, 88)), ("ring_release", (77, 0, 24, 24))], "64", 1),
        ([("ring_publish", (77, 0, 88, 88)), ("ring_publish", (77, 0, 1088, 1000))], "1,088", 1),
        (
            [("ring_publish", (77, 0, 88, 88)), ("ring_publish", (77, 0, 176, 88)), ("ring_release", (77, 0, 88, 88))],
            "88",
            2,
        ),
        (
            # Over the end of the data, in two releases that end where no publish does.
            [
                ("ring_publish", (77, 0, 4000, 4000)),
                ("ring_release", (77, 0, 3000, 3000)),
                ("ring_publish", (77, 0, 904, 1000)),
                ("ring_release", (77, 0, 104, 1200)),
            ],
            "800",
            3,
        ),
        ([("ring_publish", (77, 0, 88, 88)), ("close", (77, 0))], None, 0),
    ],
)
def test_bytes_that_the_host_has_not_read_are_owed(
    records: list[TraceRecord], told: list[tuple[str, tuple[int, ...]]], owed_bytes: str | None, since_ms: int
) -> None:
    """Of any program: by publishes and releases alone, since the oldest that is not read whole; not of a closed one."""
    left = traffic(records, ATTACHED, *told)

    told_of = f"the host owes {left[-len(told)].actor.name} a look at {owed_bytes} bytes of relid 77"
    assert looks(left) == ([] if owed_bytes is None else [(told_of, since_ms)])


def test_bytes_that_the_guest_has_not_read_are_owed(records: list[TraceRecord]) -> None:
    """The other way as well; but of a guest that records nothing nobody knows what it has read."""
    left = traffic(records, ("ring_publish", (77, 1, 88, 88)))

    assert looks(left) == [("the guest owes hypervisor a look at 88 bytes of relid 77", 0)]
    assert looks([one for one in left if one.actor.kind == "HYPERVISOR"]) == []


def test_recording_that_begins_late_tells_what_is_unread(records: list[TraceRecord]) -> None:
    """Its ring's size is not in it, nor what was published before; a reader that catches up says where it stands."""
    publishes = [("ring_publish", (77, 0, 1000 + 88 * number, 88)) for number in (1, 2)]
    early, late = ("ring_release", (77, 0, 1088, 588)), ("ring_release", (77, 0, 1176, 88))

    assert looks(traffic(records, publishes[0], early, publishes[1])) == [
        ("the host owes vcpu0 a look at 88 bytes of relid 77", 2)
    ]
    assert looks(traffic(records, *publishes, late)) == []


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("closed", [True, False])
def test_room_that_a_writer_waits_for_is_owed_until_its_channel_is_closed(
    records: list[TraceRecord], side: int, closed: bool
) -> None:
    """Of either ring; with the channel the wish has gone."""
    left = traffic(records, ("pending_size", (77, side, 4096)), *[("close", (77, 0))] * closed)
    waiter = left[-1 - closed].actor.name

    told = [text for text in owed(left) if "relid 77" in text]
    assert told == ([] if closed else [f"the reader owes {waiter} 4096 bytes of room in a ring of relid 77"])


def test_size_makes_up_for_publishes_that_are_missing(records: list[TraceRecord]) -> None:
    """A release of more bytes than the recording knows of takes none of those that lie behind its index."""
    left = traffic(records, ATTACHED, ("ring_publish", (77, 0, 588, 88)), ("ring_release", (77, 0, 500, 500)))

    assert looks(left) == [("the host owes vcpu0 a look at 88 bytes of relid 77", 1)]
