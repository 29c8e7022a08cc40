"""The pending-request table (`chn_msg_list`): which reply belongs to which request, and what it came to.

The functions over the list run under channelmsg_lock (reference 3.12). A request is entered before its
message is posted, so that a reply can never come first; a reply that matches nothing is ignored.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TypeVar

from emu.wire.messages import (
    HEADER,
    GpadlCreated,
    GpadlTorndown,
    Message,
    MessageType,
    ModifyChannelResponse,
    OpenChannelResult,
    VersionResponse,
)
from guestproc.kernel.layout import Channel, KernelTables, Request
from guestproc.kernel.records import Fields

M = TypeVar("M", bound=Message)

_OPENCHANNEL = int(MessageType.OPENCHANNEL)
_GPADL_HEADER = int(MessageType.GPADL_HEADER)
_GPADL_TEARDOWN = int(MessageType.GPADL_TEARDOWN)
_MODIFYCHANNEL = int(MessageType.MODIFYCHANNEL)
_STATUS = Struct(f"<{HEADER.size + 8}xI")
_REQUEST = Fields(Request, "msgtype", "child_relid", "openid", "gpadl", "waiting_channel", "entered_ns")


def new_request(
    tables: KernelTables,
    msgtype: MessageType,
    *,
    child_relid: int = 0,
    openid: int = 0,
    gpadl: int = 0,
    channel: int = 0,
    now_ns: int = 0,
) -> Request | None:
    """A request record, not entered yet; None when all 512 are in use. `channel` is a handle, 0 for none."""
    request: Request | None = tables.requests.alloc()
    if request is not None:
        _REQUEST.write(request, msgtype, child_relid, openid, gpadl, channel, now_ns)
    return request


def enter(tables: KernelTables, request: Request) -> None:
    """Put a request behind the others."""
    tables.chn_msg_list.append(request)


def leave(tables: KernelTables, request: Request) -> None:
    """Take a request off, answered or given up."""
    tables.chn_msg_list.remove(request)


# -- which request a reply answers --------------------------------------------------------------------


def answered_by(tables: KernelTables, reply: Message) -> list[Request]:
    """The requests that a reply answers: the first that matches, of INITIATE_CONTACT every one."""
    if isinstance(reply, VersionResponse):
        return [request for request in tables.chn_msg_list if request.msgtype == MessageType.INITIATE_CONTACT]
    # None: the reply does not say.
    wanted_type, wanted_relid, wanted_openid, wanted_gpadl = _wanted(reply)
    for request in tables.chn_msg_list:
        msgtype, child_relid, openid, gpadl, _channel, _entered_ns = _REQUEST.read(request)
        if (
            msgtype == wanted_type
            and wanted_relid in (None, child_relid)
            and wanted_openid in (None, openid)
            and wanted_gpadl in (None, gpadl)
        ):
            return [request]
    return []


def waiting_on(tables: KernelTables, channel: Channel) -> list[Request]:
    """The requests that wait on behalf of a channel, in the order in which they were entered (a rescind ends them)."""
    handle = channel.handle
    return [request for request in tables.chn_msg_list if request.waiting_channel == handle]


def is_moving(tables: KernelTables, relid: int) -> bool:
    """Whether a MODIFYCHANNEL of this relid waits for its answer."""
    return any(request.msgtype == _MODIFYCHANNEL and request.child_relid == relid for request in tables.chn_msg_list)


def answer(request: Request, payload: bytes) -> None:
    """Keep the reply with its request; the size is what says that one came."""
    request.response = payload
    request.response_size = len(payload)


def _wanted(reply: Message) -> tuple[int, int | None, int | None, int | None]:
    """Type, relid, openid and GPADL of the request that a reply answers."""
    match reply:
        case OpenChannelResult():
            return _OPENCHANNEL, reply.child_relid, reply.openid, None
        case GpadlCreated():
            return _GPADL_HEADER, reply.child_relid, None, reply.gpadl
        case GpadlTorndown():
            return _GPADL_TEARDOWN, None, None, reply.gpadl
        case ModifyChannelResponse():
            return _MODIFYCHANNEL, reply.child_relid, None, None
    raise AssertionError(f"{type(reply).__name__} answers no request")


# -- what it came to, for the one who waited ----------------------------------------------------------


def gpadl_result(request: Request, *, rescinded: bool) -> int:
    """0, -EDQUOT when the host refused the pages, -ENODEV when the channel was taken back meanwhile."""
    status = _status(request)
    if status:
        return -errno.EDQUOT
    return -errno.ENODEV if rescinded or status is None else 0


def open_result(request: Request, *, rescinded: bool) -> int:
    """0, -ENODEV when the channel was taken back meanwhile, -EAGAIN when the host refused to open it."""
    status = _status(request)
    if rescinded or status is None:
        return -errno.ENODEV
    return -errno.EAGAIN if status else 0


def modify_result(request: Request) -> int:
    """0, -EAGAIN when the host refused, -ENODEV when the channel was taken back before it answered."""
    reply = _reply(request, ModifyChannelResponse)
    if reply is None:
        return -errno.ENODEV
    return -errno.EAGAIN if reply.status else 0


def version_reply(request: Request) -> VersionResponse | None:
    """The answer to an INITIATE_CONTACT; None when there is none."""
    return _reply(request, VersionResponse)


def creation_status(request: Request) -> int:
    """Status in a GPADL_CREATED, for the log."""
    return _status(request) or 0


def _status(request: Request) -> int | None:
    """Status of the GPADL_CREATED or OPENCHANNEL_RESULT that was kept; both have it in the same place."""
    if not request.response_size:
        return None
    status: int = _STATUS.unpack_from(request.response)[0]
    return status


def _reply(request: Request, expected: type[M]) -> M | None:
    """The reply that was kept; None when the wait ended without one (a rescind ended it)."""
    size = request.response_size
    # `answer` kept what `parse` had taken for this type, so it is as long as it must be.
    return expected.unpack(request.response[:size]) if size else None
