"""The demo's steps: which records are told, in which words, and what they took."""

from __future__ import annotations

from emu.recording import RecordedActor, TraceRecord
from emu.tracing import EVENTS
from tools.demo_steps import RULES, milestones, steps_of

HOST = RecordedActor(2, "hypervisor", "HYPERVISOR", 100, 0)
VCPU = RecordedActor(3, "vcpu0", "VCPU", 101, 0)
WORKER = RecordedActor(6, "kworker/pri_chan", "WORKER", 102, 0)
VECTOR = 0xF3
OFFERCHANNEL = 1


def record(t_us: int, actor: RecordedActor, context: str, event: str, *values: int) -> TraceRecord:
    """One record at `t_us`."""
    return TraceRecord(t_us * 1_000, t_us, actor, 0, context, EVENTS[event], values)


def offered(t_us: int, relid: int, serial: int, *, written_us: int) -> list[TraceRecord]:
    """What the host records of an offer: it is posted at `t_us`, and in its slot at `written_us`."""
    return [
        record(t_us, HOST, "HOST", "offer", relid, 1, 0x2000 + relid, 0),
        record(t_us, HOST, "HOST", "message_post", 0, 2, OFFERCHANNEL, serial, 0, relid),
        record(written_us, HOST, "HOST", "slot_write", 0, 2, 1, OFFERCHANNEL, serial, 0),
    ]


def test_a_step_has_its_time_its_process_its_context_and_its_words() -> None:
    """Times count from the first step that is told; a worker's process is the workqueue's."""
    steps = steps_of(
        [
            record(10, VCPU, "ISR", "isr_exit", VECTOR),  # of something before: no rule
            *offered(20, 5, 8, written_us=21),
            record(25, VCPU, "ISR", "isr_enter", VECTOR),
            record(29, WORKER, "QUEUE", "probe", 5, 1, 0),
        ],
        5,
        "probe",
    )

    assert [(step.at_ns, step.took_ns, step.process, step.pid, step.context, step.text) for step in steps] == [
        (0, 0, "hypervisor", 100, "host", "OFFERCHANNEL for relid 5"),
        (1_000, 1_000, "hypervisor", 100, "host", "message slot: OFFERCHANNEL"),
        (5_000, 4_000, "vcpu0", 101, "ISR", "hyperv_vector_handler"),
        (9_000, 4_000, "workqueue", 102, "queue pri_chan", "vmbus_probe: the driver has it"),
    ]


def test_a_story_has_its_beginning_and_its_end() -> None:
    """A tasklet that is late frees its slot in the story of the next device, or after the end of its own."""
    steps = steps_of(
        [
            record(1, VCPU, "TASKLET", "slot_free", 2, 1, 7, 0),
            record(2, HOST, "HOST", "offer", 5, 1, 0x2005, 0),
            record(9, WORKER, "QUEUE", "probe", 5, 1, 0),
            record(11, VCPU, "TASKLET", "slot_free", 2, 1, 8, 0),
        ],
        5,
        "probe",
    )

    assert [(step.event, step.at_ns) for step in steps] == [("offer", 0), ("probe", 7_000)]


def test_a_tasklet_that_is_late_with_its_last_message_is_another_story() -> None:
    """It may have emptied the slot before the offer and say so after it, or empty it for the offer to go in."""
    offer, posted, written = offered(10, 5, 8, written_us=13)
    steps = steps_of(
        [
            record(9, HOST, "HOST", "unmask", 5, 0, 0),  # about the device, but not its offer
            offer,
            posted,
            record(11, VCPU, "TASKLET", "slot_free", 2, 1, 7, 1),
            record(12, VCPU, "ISR", "isr_enter", VECTOR),
            written,
            record(14, VCPU, "TASKLET", "slot_free", 2, 1, 7, 0),
            record(15, VCPU, "ISR", "isr_enter", VECTOR),
            record(16, VCPU, "TASKLET", "slot_read", 2, 1, OFFERCHANNEL, 8),
            record(19, WORKER, "QUEUE", "probe", 5, 1, 0),
        ],
        5,
        "probe",
    )

    assert [(step.event, step.at_ns) for step in steps] == [
        ("offer", 0),
        ("slot_write", 3_000),
        ("isr_enter", 5_000),
        ("slot_read", 6_000),
        ("probe", 9_000),
    ]


def test_other_devices_and_what_failed_are_not_told() -> None:
    """A record of another relid is another story; a probe that failed is not told as one that took the device."""
    records = [
        record(1, HOST, "HOST", "offer", 6, 1, 0x2006, 0),
        record(2, WORKER, "QUEUE", "probe", 5, 1, 2),
        record(3, VCPU, "ISR", "isr_enter", 0xEC),
    ]

    assert steps_of(records, 5, "probe") == []


def test_a_milestone_took_the_time_since_the_one_before_it() -> None:
    """Leaving lines out leaves no time out."""
    steps = steps_of(
        [
            *offered(0, 5, 8, written_us=2),
            record(7, VCPU, "ISR", "isr_enter", VECTOR),
            record(9, WORKER, "QUEUE", "open", 5, 1, 0xE1E10, 0),
        ],
        5,
        "probe",
    )

    assert [(step.at_ns, step.took_ns) for step in milestones(steps)] == [(0, 0), (9_000, 9_000)]


def test_rules_name_events_and_arguments_that_there_are() -> None:
    """A rule that fits nothing would silently tell nothing."""
    for rule in RULES:
        assert rule.wanted.keys() <= set(EVENTS[rule.event].arguments), rule


def test_every_text_has_its_place_in_80_columns() -> None:
    """36 columns are left for it; RESCIND_CHANNELOFFER is the longest message that a slot is told to hold."""
    values = {"relid": 2047, "msgtype": 2, "vector": 0xF3, "pages": 8190}

    texts = [rule.text if isinstance(rule.text, str) else rule.text(values) for rule in RULES]
    assert [text for text in texts if len(text) > 36] == []
