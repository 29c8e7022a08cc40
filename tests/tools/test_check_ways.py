"""A rule may be broken in more ways than one: what `test_check`'s edits leave of them, each with what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from emu.recording import TraceRecord
from emu.tracing import EVENTS, Side
from emu.wire.messages import MessageType
from guestproc.kernel.layout import ChannelState
from hostproc.protocol.states import ChannelState as HostState
from hostproc.state_trace import REMOVED
from tests.tools.recorded import Edited
from tools.check import violations_of
from tools.invariant_table import RULES
from tools.invariants import Machine, judge

MACHINE = Machine((0, 1))
HOST = "HYPERVISOR"


def broken(records: list[TraceRecord], *, settled: bool = False) -> set[tuple[int, str]]:
    """What the rules find: numbers and texts."""
    found = violations_of(judge(RULES, records, MACHINE, settled=settled))
    return {(one.number, one.text) for one in found}


def lives_of_a_relid(edited: Edited, *generations: int) -> None:
    """The host offers relid 77 with these generations, and has it back each time."""
    at = edited.where("process_stop", actor=HOST)
    offer, state = edited.where("offer", actor=HOST), edited.where("host_state")
    for generation in generations:
        old = HostState.CLOSED
        edited.insert(at, state, relid=77, generation=generation, old=old, new=REMOVED)
        edited.insert(at, offer, relid=77, generation=generation)
        at += 2


def generation_that_is_left_out(edited: Edited) -> None:
    """The third life of a relid behind its first."""
    lives_of_a_relid(edited, 1, 3)


def released_while_open(edited: Edited) -> None:
    """A channel is opened, and given up before it is closed."""
    release = edited.where("release", actor="WORKER")
    opened = edited.where("state", new=ChannelState.OPENED_STATE)
    edited.insert(release, opened, relid=edited.records[release].values[0])


def host_is_told_twice(edited: Edited) -> None:
    """A RELID_RELEASED is posted again."""
    first = edited.where("message_take", msgtype=MessageType.RELID_RELEASED)
    edited.insert(first + 1, first)


def rescind_without_effect(edited: Edited) -> None:
    """Its handler begins, and does not look for the channel."""
    first = edited.where("vmbus_onoffer_rescind")
    edited.insert(first + 1, first, child_relid=999)


def rescind_of_what_was_given_up(edited: Edited) -> None:
    """The host has the relid back, and takes it back."""
    lives_of_a_relid(edited, 1)
    at = edited.where("process_stop", actor=HOST)
    edited.insert(at, edited.where("rescind", actor=HOST), relid=77, generation=1)


def second_copy_before_the_first_is_freed(edited: Edited) -> None:
    """Somebody reads two messages and frees one."""
    first = edited.where("slot_read", msgtype=MessageType.OPENCHANNEL_RESULT)
    edited.insert(first, first, serial=1)


def message_that_was_overwritten(edited: Edited) -> None:
    """A message is written and never read, and the next one is."""
    first = edited.where("slot_write", msgtype=MessageType.OPENCHANNEL_RESULT)
    edited.insert(first + 1, first)


def eom_of_nothing(edited: Edited) -> None:
    """EOM is written where no slot was freed since the last read."""
    read = edited.where("slot_read", msgtype=MessageType.OPENCHANNEL_RESULT)
    edited.records.insert(read + 1, replace(edited.records[read], event=EVENTS["eom"], values=(0, 2, 0)))


def eom_that_nobody_wants(edited: Edited) -> None:
    """The pending bit was not set behind the free."""
    freed = edited.where("slot_free", pending=0)
    edited.records.insert(freed + 1, replace(edited.records[freed], event=EVENTS["eom"], values=(0, 2, 0)))


def post_that_never_came(edited: Edited) -> None:
    """The guest says that it has posted, the host has seen nothing."""
    last = edited.where("post", actor="WORKER", last=True)
    edited.insert(last + 1, last)


def post_of_nobody(edited: Edited) -> None:
    """The host sees one post twice."""
    last = edited.where("post", actor=HOST, last=True)
    edited.insert(last + 1, last)


def request_used_twice(edited: Edited) -> None:
    """A request is made where another one still lies."""
    first = edited.where("req_alloc", msgtype=MessageType.OPENCHANNEL)
    edited.insert(first + 1, first)


def completed_out_of_nothing(edited: Edited) -> None:
    """Nobody had asked."""
    first = edited.where("req_complete", msgtype=MessageType.OPENCHANNEL)
    edited.insert(first, first, request=999)


def completed_twice(edited: Edited) -> None:
    """One question, two replies."""
    first = edited.where("req_complete", msgtype=MessageType.OPENCHANNEL)
    edited.insert(first + 1, first)


def given_up_out_of_nothing(edited: Edited) -> None:
    """Nobody had asked, nobody waits any more."""
    first = edited.where("req_free", msgtype=MessageType.OPENCHANNEL)
    edited.insert(first, first, request=999)


def without_an_answer(edited: Edited) -> None:
    """A request was posted, and is given up before its reply; its channel is there."""
    del edited.records[edited.where("req_complete", msgtype=MessageType.OPENCHANNEL)]


def request_that_stays(edited: Edited) -> None:
    """It is outstanding at the end."""
    first = edited.where("req_alloc", msgtype=MessageType.OPENCHANNEL)
    edited.insert(first + 1, first, request=999)


def flag_that_stays(edited: Edited) -> None:
    """An interrupt came after the flag went up, and left it there: to VP 0, messages come later."""
    del edited.records[
        next(at for at, one in enumerate(edited.records) if one.event.name == "flag_clear" and not one.vp)
    ]


def bytes_that_are_lost(edited: Edited) -> None:
    """More is published than lies between the indices: before anybody looked how large the ring is."""
    mapped = edited.where("map", relid=1)
    published = edited.where("ring_publish", actor="VCPU", relid=1, side=Side.TO_HOST)
    edited.insert(mapped + 1, published, write_index=0, bytes=64)


def target_that_went(edited: Edited) -> None:
    """A channel is opened for a processor that was there once."""
    opened = edited.where("vmbus_open", last=True)
    target_vp = edited.records[opened].arguments["target_vp"]
    edited.insert(opened, edited.where("cpu_offline"), vp_index=target_vp)


WAYS: list[tuple[int, str, Callable[[Edited], None]]] = [
    (1, "generation 3 of relid 77 follows 1", generation_that_is_left_out),
    (2, "is released while its channel is open", released_while_open),
    (2, "the host is told twice that relid", host_is_told_twice),
    (3, "the rescind of relid 999 was begun and has had no effect", rescind_without_effect),
    (5, "relid 77 is rescinded, and is not offered", rescind_of_what_was_given_up),
    (7, "is read while message 1 was not freed", second_copy_before_the_first_is_freed),
    (7, "was overwritten before it was read", message_that_was_overwritten),
    (8, "EOM without a slot that was freed", eom_of_nothing),
    (8, "whose pending bit was not set", eom_that_nobody_wants),
    (11, "the host has not seen this post", post_that_never_came),
    (11, "the host was posted what its sender has no record of", post_of_nobody),
    (15, "is used twice", request_used_twice),
    (15, "request 999 is completed and is not outstanding", completed_out_of_nothing),
    (15, "is completed twice", completed_twice),
    (15, "request 999 is given up and was not outstanding", given_up_out_of_nothing),
    (15, "got no answer, and the channel was not rescinded", without_an_answer),
    (15, "request 999 is outstanding at the end", request_that_stays),
    (16, "was set and never cleared, and an interrupt came after it", flag_that_stays),
    (24, "between the indices", bytes_that_are_lost),
    (26, "as its target, which is not online", target_that_went),
]


@pytest.mark.parametrize(("number", "text", "edit"), WAYS, ids=[edit.__name__ for _, _, edit in WAYS])
def test_way_to_break_a_rule_is_told_by_itself(
    records: list[TraceRecord], number: int, text: str, edit: Callable[[Edited], None]
) -> None:
    """One thing is wrong, and that one is told, once, in its own words; no other rule says anything."""
    edited = Edited(records)
    edit(edited)

    [(rule, told)] = broken(edited.records)

    assert rule == number
    assert text in told


def test_relid_that_lives_again_has_the_next_generation(records: list[TraceRecord]) -> None:
    """INV-01 and INV-05: the host that counts, and had each life back before the next, breaks nothing."""
    edited = Edited(records)
    lives_of_a_relid(edited, 1, 2, 3)

    assert broken(edited.records) == set()


@pytest.mark.parametrize(("settled", "told"), [(True, {19, 20}), (False, set())])
def test_sleeper_of_a_machine_at_rest_is_told_at_once(
    records: list[TraceRecord], settled: bool, told: set[int]
) -> None:
    """INV-19 and INV-20: nothing more will happen, so nobody has to sleep for seconds first; elsewhere he may wake."""
    edited = Edited(records[: Edited(records).where("close", actor="VCPU", relid=1)])
    end = len(edited.records) - 1
    for side, event in ((Side.TO_GUEST, "unmask"), (Side.TO_HOST, "pending_size")):
        published = edited.where("ring_publish", relid=1, side=side, last=True)
        size = edited.records[edited.where("ring_attach", relid=1, side=side)].values[2]
        if event == "unmask":
            index = (edited.records[published].values[2] + 64) % size
            edited.insert(end, published, write_index=index, bytes=64)
            edited.insert(end, edited.where("unmask", actor="VCPU", relid=1), bytes_to_read=0)
        else:
            wish = replace(edited.records[published], event=EVENTS["pending_size"], values=(1, side, size - 8))
            edited.records.insert(published + 1, wish)

    numbers = {number for number, text in broken(edited.records, settled=settled) if "relid 1, " in text}

    assert numbers & {19, 20} == told


def test_first_packet_begins_at_index_0(records: list[TraceRecord]) -> None:
    """INV-24: also what is published first has to lie where the last one ended, which is the ring's beginning."""
    edited = Edited(records)
    at = edited.where("ring_publish", relid=1, side=Side.TO_GUEST)
    nbytes = edited.records[at].arguments["bytes"]
    edited.change(at, bytes=nbytes + 8)

    assert (24, f"index {nbytes:#x} follows 0x0 by {nbytes + 8} bytes") in broken(edited.records)
