"""Replies and pending requests: each reply against each request, and what a wait came to."""

from __future__ import annotations

import errno
from itertools import product

import pytest

from emu.wire.messages import (
    AllOffersDelivered,
    GpadlCreated,
    GpadlTorndown,
    Message,
    MessageType,
    ModifyChannelResponse,
    OpenChannelResult,
    VersionResponse,
)
from guestproc.kernel.layout import Channel, KernelTables, Request
from guestproc.protocol import pending

T = MessageType

REPLIES: dict[str, tuple[Message, set[str]]] = {
    "open result": (OpenChannelResult(7, 70, 0), {"open 7"}),
    "open result, wrong openid": (OpenChannelResult(7, 71, 0), set()),
    "open result, wrong relid": (OpenChannelResult(9, 70, 0), set()),
    "created": (GpadlCreated(7, 0xE1E10, 0), {"gpadl 7"}),
    "created for another relid": (GpadlCreated(8, 0xE1E10, 0), set()),
    "torn down": (GpadlTorndown(0xE1E10), {"teardown 7"}),
    "torn down, never established": (GpadlTorndown(0xE1E11), set()),
    "modified": (ModifyChannelResponse(7, 0), {"modify 7"}),
    "modified, another": (ModifyChannelResponse(8, 0), set()),
    "version": (VersionResponse(1), {"contact", "contact again"}),
}


def all_requests(tables: KernelTables) -> dict[str, Request]:
    """One pending request of each kind, INITIATE_CONTACT twice; the same keys where they may be confused."""
    asked = {
        "open 7": pending.new_request(tables, T.OPENCHANNEL, child_relid=7, openid=70),
        "gpadl 7": pending.new_request(tables, T.GPADL_HEADER, child_relid=7, gpadl=0xE1E10),
        "teardown 7": pending.new_request(tables, T.GPADL_TEARDOWN, child_relid=7, gpadl=0xE1E10),
        "modify 7": pending.new_request(tables, T.MODIFYCHANNEL, child_relid=7),
        "contact": pending.new_request(tables, T.INITIATE_CONTACT),
        "contact again": pending.new_request(tables, T.INITIATE_CONTACT),
    }
    requests = {}
    for name, request in asked.items():
        assert request is not None
        pending.enter(tables, request)
        requests[name] = request
    return requests


@pytest.mark.parametrize("reply_name", REPLIES)
def test_each_reply_answers_its_request_and_no_other(tables: KernelTables, reply_name: str) -> None:
    """With every kind of request pending, a reply answers the ones with its keys; one of no request, none."""
    requests = all_requests(tables)
    reply, expected = REPLIES[reply_name]

    answered = pending.answered_by(tables, reply)

    assert answered == [requests[name] for name in requests if name in expected]


@pytest.mark.parametrize("reply_name", REPLIES)
def test_reply_without_any_request_is_ignored(tables: KernelTables, reply_name: str) -> None:
    """Nobody waits: nothing is answered."""
    assert pending.answered_by(tables, REPLIES[reply_name][0]) == []


def test_first_of_two_equal_requests_is_answered(tables: KernelTables) -> None:
    """A second reply answers the second one, once the first has left."""
    requests = []
    for _ in range(2):
        request = pending.new_request(tables, T.GPADL_TEARDOWN, gpadl=5)
        assert request is not None
        pending.enter(tables, request)
        requests.append(request)
    reply = GpadlTorndown(5)

    assert pending.answered_by(tables, reply) == requests[:1]
    pending.leave(tables, requests[0])
    assert pending.answered_by(tables, reply) == requests[1:]


def test_message_that_is_no_reply_is_our_mistake(tables: KernelTables) -> None:
    """The table of handlers hands over replies only."""
    with pytest.raises(AssertionError, match="answers no request"):
        pending.answered_by(tables, AllOffersDelivered())


def test_rescind_finds_all_who_wait_on_its_channel(tables: KernelTables) -> None:
    """By the channel's record, not by its relid: a successor of the same relid is another channel."""
    channels: list[Channel] = []
    for _ in range(2):
        channel = tables.channels.alloc()
        assert channel is not None
        channel.relid = 7
        channels.append(channel)
    requests = []
    for channel in (channels[1], channels[0], channels[0]):
        request = pending.new_request(tables, T.OPENCHANNEL, child_relid=7, channel=channel.handle)
        assert request is not None
        pending.enter(tables, request)
        requests.append(request)

    assert pending.waiting_on(tables, channels[0]) == requests[1:]
    assert pending.waiting_on(tables, channels[1]) == requests[:1]


def test_table_of_requests_has_an_end(tables: KernelTables) -> None:
    """512 at once; the next one is told that there is no memory."""
    taken = [pending.new_request(tables, T.OPENCHANNEL) for _ in range(513)]

    assert taken[:512].count(None) == 0
    assert taken[512] is None


def new_request(tables: KernelTables, reply: Message | None) -> Request:
    """A request that was completed: with this reply, or without one (a rescind)."""
    request = pending.new_request(tables, T.OPENCHANNEL)
    assert request is not None
    if reply is not None:
        pending.answer(request, reply.pack())
    return request


@pytest.mark.parametrize(("status", "rescinded"), list(product((None, 0, 0x8000FFFF), (False, True))))
def test_result_of_an_open(tables: KernelTables, status: int | None, rescinded: bool) -> None:
    """Rescinded, or ended without a reply: -ENODEV, whatever the host said before; refused: -EAGAIN."""
    request = new_request(tables, None if status is None else OpenChannelResult(7, 7, status))

    result = pending.open_result(request, rescinded=rescinded)

    assert result == (-errno.ENODEV if rescinded or status is None else -errno.EAGAIN if status else 0)


@pytest.mark.parametrize(("status", "rescinded"), list(product((None, 0, 0x8000FFFF), (False, True))))
def test_result_of_a_gpadl(tables: KernelTables, status: int | None, rescinded: bool) -> None:
    """A refusal is -EDQUOT also for a channel that is rescinded by then; no reply, or rescinded: -ENODEV."""
    request = new_request(tables, None if status is None else GpadlCreated(7, 1, status))

    result = pending.gpadl_result(request, rescinded=rescinded)

    assert result == (-errno.EDQUOT if status else -errno.ENODEV if rescinded or status is None else 0)
    assert pending.creation_status(request) == (status or 0)


def test_reply_to_a_contact(tables: KernelTables) -> None:
    """What the host said, or nothing."""
    assert pending.version_reply(new_request(tables, VersionResponse(1, msg_conn_id=9))) == VersionResponse(
        1, msg_conn_id=9
    )
    assert pending.version_reply(new_request(tables, None)) is None
