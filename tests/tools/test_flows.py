"""Flows of a real recording: every message from its post to its last effect, and none that is guessed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emu.recording import TraceRecord
from emu.tracing import EVENTS
from emu.wire.messages import MessageType
from emu.wire.synic import HVMSG_TIMER_EXPIRED
from tests.tools.recorded import Edited
from tools.flows import Flow, Flows, Role, flows_of

VPS = (0, 1)
OFFER_ROLES = [
    Role.POSTED,
    Role.SLOT_WRITE,
    Role.IRQ,
    Role.KICK,
    Role.ISR,
    Role.TASKLET_SCHED,
    Role.DPC,
    Role.WORK_QUEUED,
    Role.WORK_RUN,
]


@pytest.fixture(scope="session")
def flows(records: list[TraceRecord]) -> Flows:
    """Of the machine that all these tests read."""
    return flows_of(records, VPS)


def named(flows: Flows, name: str) -> list[Flow]:
    """All messages of a type."""
    return [flow for flow in flows if flow.name == name]


def test_every_message_is_in_a_flow_that_came_to_its_end(records: list[TraceRecord], flows: Flows) -> None:
    """As many flows as messages were posted, both ways, each ended when the machine did."""
    posted = sum(record.event.name in ("message_post", "post_begin") for record in records)

    assert len(flows) == posted
    assert [flow.id for flow in flows if not flow.ended] == []
    assert [flow.id for flow in flows if flow.id.startswith("g?")] == []


def test_offer_flows_from_its_post_to_its_probe(flows: Flows) -> None:
    """A hot-added device's offer: the path of the article, step by step; whoever acts next acts later."""
    offer = named(flows, "OFFERCHANNEL")[-1]

    roles = [step.role for step in offer.steps]
    # A processor that was awake may be in its ISR before the host has said how it reached it.
    assert sorted(set(roles) & set(OFFER_ROLES)) == sorted(OFFER_ROLES)
    assert {Role.HANDLER, Role.PROBE_START, Role.PROBE, Role.SLOT_FREE, Role.WORK_DONE} <= set(roles)
    path = [role for role in roles if role in (Role.POSTED, Role.SLOT_WRITE, Role.ISR, Role.DPC, Role.PROBE_START)]
    assert path == [Role.POSTED, Role.SLOT_WRITE, Role.ISR, Role.DPC, Role.PROBE_START]
    times = [step.record.t_ns for step in offer.path]
    assert times == sorted(times)
    assert offer.relid and offer in flows.of_relid(offer.relid)


def test_what_a_probe_posts_is_caused_by_its_offer_and_answered(flows: Flows) -> None:
    """OPENCHANNEL came in the course of the offer; OPENCHANNEL_RESULT is the host's answer, and completes a request."""
    for opening in named(flows, "OPENCHANNEL"):
        offer = flows.get(opening.cause)
        assert offer is not None and (offer.name, offer.relid) == ("OFFERCHANNEL", opening.relid)
        (answer_id,) = opening.answers
        answer = flows.get(answer_id)
        assert answer is not None and (answer.name, answer.cause) == ("OPENCHANNEL_RESULT", opening.id)
        assert answer.step(Role.COMPLETES) is not None


def test_guests_post_is_one_flow_with_what_the_host_saw_of_it(flows: Flows) -> None:
    """Who posted it, the host that was posted it, and the control plane that took it."""
    for flow in flows:
        if flow.to_guest:
            continue
        assert [step.role for step in flow.steps][:2] == [Role.POSTED, Role.RECEIVED]
        actors = [step.record.actor.kind for step in flow.steps]
        assert actors[0] in ("VCPU", "WORKER") and actors[1] == "HYPERVISOR"
        assert flow.step(Role.HOST_TAKE) is not None


def test_posts_that_the_host_says_nothing_of_are_a_flow_each(records: list[TraceRecord]) -> None:
    """Its record gives them their serial; without it they are told apart all the same."""
    left = [record for record in records if record.event.name != "post" or record.actor.kind != "HYPERVISOR"]
    posts = [record for record in left if record.event.name == "post_begin"]
    flows = [flow for flow in flows_of(left, VPS) if flow.step(Role.POSTED) and not flow.to_guest]

    assert len(flows) == len({flow.id for flow in flows}) == len(posts) > 1


@pytest.mark.parametrize("pending", [0, 1])
def test_eom_belongs_to_the_message_whose_slot_it_follows(records: list[TraceRecord], pending: int) -> None:
    """If the pending bit was set behind the freeing; any other EOM is nobody's."""
    edited = Edited(records)
    freed = edited.where("slot_free", last=True)
    edited.change(freed, pending=pending)
    eom = replace(edited.records[freed], event=EVENTS["eom"], values=(0, 2, 0))
    edited.records.insert(freed + 1, eom)
    flow = flows_of(edited.records, VPS).get(f"h{edited.records[freed].arguments['serial']}")

    assert flow is not None
    assert [step.record for step in flow.steps if step.role is Role.EOM] == [eom] * pending


def test_records_know_their_flows(flows: Flows) -> None:
    """An exporter finds the flow of any record; one that answers belongs to the answer."""
    for flow in flows:
        for step in flow.steps:
            assert flows.of_record(step.record) in (flow.id, *flow.answers)


def test_messages_of_a_foreign_guest_flow_as_far_as_the_host_sees_them(records: list[TraceRecord]) -> None:
    """With the host's records alone: posts, slots, interrupts, and what the host did with each of the guest's."""
    host = [record for record in records if record.actor.kind == "HYPERVISOR"]
    flows = flows_of(host, VPS)

    offers = named(flows, "OFFERCHANNEL")
    assert offers and all(offer.step(Role.SLOT_WRITE) and offer.step(Role.IRQ) for offer in offers)
    # Whoever took them out did not say so; but the next one found the slot empty.
    assert all(offer.ended and offer.step(Role.TAKEN) for offer in offers)
    opened = named(flows, "OPENCHANNEL")
    assert len(opened) == len(offers)
    for flow in opened:
        assert flow.ended and flow.answers
        assert flow.steps[0].role is Role.RECEIVED


def test_message_whose_post_is_missing_begins_in_its_slot(records: list[TraceRecord]) -> None:
    """What was overwritten is left out, and the rest still belongs together."""
    offer = named(flows_of(records, VPS), "OFFERCHANNEL")[0]
    left = [record for record in records if record.event.name not in ("message_post", "pending_set")]
    flow = flows_of(left, VPS).get(offer.id)

    assert flow is not None and flow.steps[0].role is Role.SLOT_WRITE
    assert flow.msgtype == MessageType.OFFERCHANNEL
    assert flow.step(Role.PROBE) is not None


def test_message_that_is_not_read_has_not_ended(records: list[TraceRecord]) -> None:
    """The last message of a machine that stood still."""
    last = max(index for index, record in enumerate(records) if record.event.name == "slot_write")
    flow = flows_of(records[: last + 1], VPS).get(f"h{records[last].values[4]}")

    assert flow is not None and not flow.ended


@pytest.mark.parametrize("whose", ["both", "the host's"])
def test_timer_message_is_nobodys_flow(records: list[TraceRecord], whose: str) -> None:
    """One between two others in a slot: no flow more, no step in theirs, and every one has ended as before."""
    if whose == "the host's":
        records = [record for record in records if record.actor.kind == "HYPERVISOR"]
    edited = Edited(records)
    last = edited.where("slot_write", last=True)
    edited.insert(last, last, message_type=HVMSG_TIMER_EXPIRED, msgtype=0, serial=0)
    flows, before = flows_of(edited.records, VPS), flows_of(records, VPS)

    assert {flow.id: [step.role for step in flow.steps] for flow in flows} == {
        flow.id: [step.role for step in flow.steps] for flow in before
    }


def test_whoever_says_that_it_starts_says_that_it_stops(records: list[TraceRecord]) -> None:
    """Of a machine that ended in order: processes, workers, and the threads of the guest's user space."""
    begun = [record.actor.name for record in records if record.event.name == "process_start"]
    ended = [record.actor.name for record in records if record.event.name == "process_stop"]

    assert {"hypervisor", "vcpu0", "vcpu1", "kworker/work", "user", "user/1", "user/2"} <= set(begun)
    assert sorted(begun) == sorted(ended)
