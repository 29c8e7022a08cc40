"""The pending-request table (`chn_msg_list`): which reply belongs to which request (reference 3.12).

All functions run under channelmsg_lock. A request is entered before its message is posted, so that a reply
can never come first; a reply that matches nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from emu.wire.messages import MessageType
from guestproc.kernel.layout import Channel, KernelTables, Request


def new_request(
    tables: KernelTables, msgtype: MessageType, *, child_relid: int = 0, openid: int = 0, gpadl: int = 0, channel: int = 0
) -> Request | None:
    """A request record, not entered yet; None when all 512 are in use. `channel` is a handle, 0 for none."""
    request: Request | None = tables.requests.alloc()
    if request is not None:
        request.msgtype = msgtype
        request.child_relid = child_relid
        request.openid = openid
        request.gpadl = gpadl
        request.waiting_channel = channel
    return request


def enter(tables: KernelTables, request: Request) -> None:
    """Put a request behind the others."""
    tables.chn_msg_list.append(request)


def leave(tables: KernelTables, request: Request) -> None:
    """Take a request off, answered or given up."""
    tables.chn_msg_list.remove(request)


def open_requests(tables: KernelTables, child_relid: int, openid: int) -> Iterator[Request]:
    """The request that an OPENCHANNEL_RESULT answers, if any."""
    return _first(
        tables,
        lambda r: r.msgtype == MessageType.OPENCHANNEL and r.child_relid == child_relid and r.openid == openid,
    )


def gpadl_requests(tables: KernelTables, child_relid: int, gpadl: int) -> Iterator[Request]:
    """The request that a GPADL_CREATED answers, if any."""
    return _first(
        tables,
        lambda r: r.msgtype == MessageType.GPADL_HEADER and r.child_relid == child_relid and r.gpadl == gpadl,
    )


def teardown_requests(tables: KernelTables, gpadl: int) -> Iterator[Request]:
    """The request that a GPADL_TORNDOWN answers, if any."""
    return _first(tables, lambda r: r.msgtype == MessageType.GPADL_TEARDOWN and r.gpadl == gpadl)


def modify_requests(tables: KernelTables, child_relid: int) -> Iterator[Request]:
    """The request that a MODIFYCHANNEL_RESPONSE answers, if any."""
    return _first(tables, lambda r: r.msgtype == MessageType.MODIFYCHANNEL and r.child_relid == child_relid)


def version_requests(tables: KernelTables) -> Iterator[Request]:
    """Every INITIATE_CONTACT that waits: a VERSION_RESPONSE answers all of them."""
    return (r for r in tables.chn_msg_list if r.msgtype == MessageType.INITIATE_CONTACT)


def first_waiting_on(tables: KernelTables, channel: Channel) -> Request | None:
    """The first request that waits on behalf of a channel (a rescind completes it)."""
    return next(_first(tables, lambda r: r.waiting_channel == channel.handle), None)


def answer(request: Request, payload: bytes) -> None:
    """Keep the reply with its request; the size is what says that one came."""
    request.response = payload
    request.response_size = len(payload)


def _first(tables: KernelTables, matches: Callable[[Request], bool]) -> Iterator[Request]:
    for request in tables.chn_msg_list:
        if matches(request):
            yield request
            return
