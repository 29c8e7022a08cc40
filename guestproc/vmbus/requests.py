"""A request to the host and the wait for its reply, as the functions that open, establish and negotiate share it.

    enter, look whether the channel was rescinded, post, wait, leave: on every way out

The kernel waits for replies without limit. Every wait here has a deadline, behind which the operation fails
with -ETIMEDOUT; pages that the host may hold by then are not given back (races.md E2).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from emu.tracing import E_REQ_ALLOC, E_REQ_FREE
from emu.wire.messages import MessageType
from guestproc.kernel.layout import Channel, Request
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import faults, pending

if TYPE_CHECKING:
    from guestproc.current import Current

REPLY_TIMEOUT_NS: Final = 45 * SECOND_NS
"""Below the deadline of a mutex, as some of these waits hold channel_mutex."""


def enter_request(
    current: Current, msgtype: MessageType, *, child_relid: int = 0, openid: int = 0, gpadl: int = 0, channel: int = 0
) -> Request | None:
    """A request on chn_msg_list, before its message is posted; None when there is no record for it (-ENOMEM)."""
    if faults.strikes(current.faults, "request", child_relid):
        return None
    request = pending.new_request(
        current.tables,
        msgtype,
        child_relid=child_relid,
        openid=openid,
        gpadl=gpadl,
        channel=channel,
        now_ns=current.actor.now(),
    )
    if request is None:
        return None
    with current.connection.channelmsg_lock.hold(current.actor):
        pending.enter(current.tables, request)
    current.record(E_REQ_ALLOC, msgtype, openid or gpadl, request.index, child_relid)
    return request


def taken_back(current: Current, channel: Channel) -> bool:
    """Whether the host took the channel back, so that it answers nothing: asked by who is on the list already.

    The rescind's handler sets the flag and then walks the list. Without this look behind the entry (races.md A4, wrong
    on purpose) who enters behind that walk is woken by nobody.
    """
    return current.fix.recheck_rescind_after_enlist and channel.rescind.load() != 0


def wait_for_reply(current: Current, request: Request, timeout_ns: int = REPLY_TIMEOUT_NS) -> int:
    """Wait until the request is completed, by a reply or by a rescind: 0, or -ETIMEDOUT."""
    if request.waitevent.wait_timeout(current.actor, timeout_ns):
        return 0
    name = MessageType(request.msgtype).name
    seconds = timeout_ns // SECOND_NS
    about = [f"relid {request.child_relid}"] if request.child_relid else []
    about += [f"gpadl {request.gpadl:#x}"] if request.gpadl else []
    beside = f" ({', '.join(about)})" if about else ""
    current.log(f"{name}: no answer within {seconds} s{beside}")
    return -errno.ETIMEDOUT


def leave_request(current: Current, request: Request, *, unlink: bool = True) -> None:
    """Off the list, and its record free. Without `unlink` it stays on the list, which is wrong on purpose."""
    if unlink:
        with current.connection.channelmsg_lock.hold(current.actor):
            pending.leave(current.tables, request)
    if current.trace:
        key = request.openid or request.gpadl
        current.record(E_REQ_FREE, request.msgtype, key, request.index, request.child_relid)
    current.tables.requests.free(request)
