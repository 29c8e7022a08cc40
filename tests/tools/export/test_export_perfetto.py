"""The `perfetto` format, as Perfetto's own trace processor answers SQL about it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from emu.recording import Recording
from emu.tracing import HYPERV_EVENTS
from tests.tools.export.readers import ask, written
from tools.export.perfetto import lane_of
from tools.export.rings import Rings
from tools.export.spans import PAIRS
from tools.export.threads import Threads
from tools.flows import flows_in
from tools.latency_stages import Step, stages_of


def stage(begin: str, end: str) -> str:
    """How many messages went from one event to another, and how many ns they took together."""
    return f"""with one as (select ts, name, extract_arg(arg_set_id, 'debug.serial') as serial from slice
        where category = 'record' and name in ('{begin}', '{end}'))
        select count(*), sum(b.ts - a.ts) from one a join one b using (serial)
        where a.name = '{begin}' and b.name = '{end}'"""


SQL = {
    "counts": "select name, count(*) from slice where category = 'record' group by name",
    "problems": "select name, value from stats where severity != 'info' and value != 0",
    "ftrace": "select name, count(*) from ftrace_event group by name",
    "spans": "select name, count(*), min(dur) from slice where category = 'span' group by name",
    "depth": "select max(depth) from slice where category = 'span'",
    "arrows": """select a.name, b.name, count(*) from flow f
        join slice a on f.slice_out = a.id join slice b on f.slice_in = b.id group by 1, 2""",
    "tracks": """select p.name, t.name, k.name from thread_track k join thread t using (utid)
        join process p using (upid) where k.name is not null group by 1, 2, 3""",
    "fill": "select t.name, max(c.value) from counter c join counter_track t on c.track_id = t.id group by t.name",
    "offers": """select extract_arg(arg_set_id, 'debug.child_relid') from slice
        where name = 'vmbus_onoffer' and extract_arg(arg_set_id, 'debug.if_type') is not null order by ts""",
    "post_to_slot": stage("message_post", "slot_write"),
    "slot_to_dpc": stage("slot_write", "slot_read"),
    "posts": """select extract_arg(arg_set_id, 'debug.msgtype_name'), count(*) from slice
        where name = 'message_post' group by 1""",
}

Answers = dict[str, list[list[Any]]]


@pytest.fixture(scope="module")
def answers(
    trace_processor: Path, real_recording: Path, every_event: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Answers, Answers]:
    """What the trace processor says of the two recordings."""
    home = tmp_path_factory.mktemp("perfetto")
    files = [written("perfetto", one, home / one.name) for one in (real_recording, every_event)]
    real, every = ask(trace_processor, files, SQL)
    return real, every


def test_every_record_is_counted(answers: tuple[Answers, Answers], real_recording: Path, every_event: Path) -> None:
    """Each event as often as the recording counts it, and Perfetto complains about nothing."""
    for answer, path in zip(answers, (real_recording, every_event), strict=True):
        with Recording(path) as recording:
            assert dict(map(tuple, answer["counts"])) == recording.counts()
        assert answer["problems"] == []


def test_kernels_tracepoints_and_interrupts_are_ftrace_events(
    answers: tuple[Answers, Answers], real_recording: Path
) -> None:
    """Those of the system hyperv, under their names; each interrupt as irq_handler_entry and _exit."""
    with Recording(real_recording) as recording:
        counts = recording.counts()
    names = {spec.name for spec in HYPERV_EVENTS}
    expected = {name: count for name, count in counts.items() if name in names}
    expected |= dict.fromkeys(("irq_handler_entry", "irq_handler_exit"), counts["isr_enter"])

    assert dict(map(tuple, answers[0]["ftrace"])) == expected


def test_what_begins_is_a_slice(answers: tuple[Answers, Answers], real_recording: Path) -> None:
    """As many slices as begins; none of them ends before it began, and they lie in each other."""
    with Recording(real_recording) as recording:
        counts = recording.counts()
    spans = answers[0]["spans"]

    assert sum(count for _name, count, _shortest in spans) == sum(counts[begin] for begin in PAIRS)
    assert min(shortest for _name, _count, shortest in spans) >= 0
    assert {"vmbus_on_msg_dpc", "vmbus_onmessage_work", "vmbus_add_channel_work", "OPENCHANNEL", "probe relid 1"} <= {
        name for name, _count, _shortest in spans
    }


def test_arrows_follow_each_message(answers: tuple[Answers, Answers], real_recording: Path) -> None:
    """From every step of a message's path to the next: post, slot, interrupt, ISR, DPC, work, probe; take, answer."""
    with Recording(real_recording) as recording:
        paths = [[step.record.event.name for step in flow.path] for flow in flows_in(recording)]
    expected = Counter(pair for path in paths for pair in zip(path, path[1:], strict=False))
    drawn = {(out, into): count for out, into, count in answers[0]["arrows"]}

    assert drawn == expected
    for pair in (
        ("message_post", "slot_write"),
        ("irq_raise", "isr_enter"),
        ("isr_enter", "slot_read"),
        ("slot_read", "work_queue"),
        ("work_queue", "work_run"),
        ("work_run", "probe_start"),
        ("message_take", "message_post"),
    ):
        assert drawn[pair] >= 8, pair


def test_every_thread_and_context_has_its_track(answers: tuple[Answers, Answers], real_recording: Path) -> None:
    """Below its process; threads of one process are told apart by their names."""
    tracks = {tuple(row) for row in answers[0]["tracks"]}
    with Recording(real_recording) as recording:
        threads = Threads.of_recording(recording)
        seen = {(record.actor, lane_of(record).lower()) for record in recording.records()}
        expected = set()
        for actor, context in seen:
            thread = threads.of(actor)
            process = threads.process_of(thread)
            name = context if process == thread.name else f"{thread.name} {context}"
            expected.add((process, thread.name, name))

    assert tracks == expected
    assert ("hypervisor", "hypervisor", "host") in tracks
    assert ("vcpu0", "vcpu0", "isr") in tracks
    assert ("workqueue", "kworker/pri_chan", "kworker/pri_chan queue") in tracks
    assert ("workqueue", "kworker/pri_chan", "kworker/pri_chan driver") in tracks


def test_counters_show_how_full_rings_are(answers: tuple[Answers, Answers], real_recording: Path) -> None:
    """For both rings of each channel the bytes that wait."""
    rings, most = Rings(), Counter[str]()
    with Recording(real_recording) as recording:
        for record in recording.records():
            for relid, side in rings.feed(record):
                name = f"channel {relid} {('to host', 'to guest')[side]}"
                most[name] = max(most[name], rings.rings[relid, side].fill)

    assert {name: int(value) for name, value in answers[0]["fill"]} == most
    assert max(most.values()) > 0


def test_arguments_have_types_and_names(answers: tuple[Answers, Answers]) -> None:
    """Numbers are numbers, GUIDs texts, and what has a name has it beside the number."""
    assert sorted(relid for (relid,) in answers[0]["offers"]) == list(range(1, 9))
    posts = dict(map(tuple, answers[0]["posts"]))
    assert (posts["OFFERCHANNEL"], posts["VERSION_RESPONSE"], posts["OPENCHANNEL_RESULT"]) == (8, 1, 8)


def test_stages_by_sql_are_those_of_latency(answers: tuple[Answers, Answers], real_recording: Path) -> None:
    """How long messages waited for a slot and for the DPC: what `latency` makes of the same records, to the ns."""
    with Recording(real_recording) as recording:
        positions = {vp_index: position for position, vp_index in enumerate(recording.head["vp_indices"])}
        stages = stages_of(
            Step(
                record.t_ns,
                record.event.number,
                record.values,
                positions.get(-1 if record.vp is None else record.vp, -1),
            )
            for record in recording.records()
        )
    post_to_slot, slot_to_isr, isr_to_dpc = (
        stages.control[name] for name in ("post_to_slot", "slot_to_isr", "isr_to_dpc")
    )

    assert answers[0]["post_to_slot"] == [[len(post_to_slot), sum(post_to_slot)]]
    assert answers[0]["slot_to_dpc"] == [[len(isr_to_dpc), sum(slot_to_isr) + sum(isr_to_dpc)]]
