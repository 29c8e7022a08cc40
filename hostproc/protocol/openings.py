"""What a guest asks for with OPENCHANNEL, judged before a device sees it.

Every number in the message is the guest's choice and ends up as an index or an address on the host, so each
is bounded here, once (the ring's indices are the ring's to check).
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from emu.errors import ProtocolViolation
from emu.values import valueclass
from emu.wire.messages import VP_INDEX_DISABLE_INTERRUPT, OpenChannel
from emu.wire.versions import FeatureFlags
from hostproc.protocol.offers import LAST_RELID, Channel, event_connection_id
from hostproc.protocol.session import Session
from hostproc.protocol.states import GpadlState
from hostproc.protocol.versions import SHARED_DOORBELL_CONNECTION_ID

_FIRST_FREE_CONNECTION_ID: Final = 5
"""Below are the ones with a meaning: messages, the shared doorbell, the monitor port."""
_LAST_CONNECTION_ID: Final = 0x00FF_FFFF


@valueclass()
class Opening:
    """An OPENCHANNEL that can be carried out, in whatever version it came.

    `target_vp` None: the guest polls. `shared_interrupt`: flag 0 of VP 0, after a bit of the interrupt page
    (below 2.4).
    """

    ring_gpadl: int
    ring_pages: int
    downstream_page_offset: int
    target_vp: int | None
    event_flag: int
    shared_interrupt: bool
    connection_id: int
    userdata: bytes


def judge_opening(channel: Channel, request: OpenChannel, session: Session, doorbells: Container[int]) -> Opening:
    """Read a request; `doorbells` are the connection ids that other channels use.

    ProtocolViolation: `open-unknown-gpadl`, `open-ring-shape`, `open-ring-offset`, `open-target-vp`,
    `open-event-flag`, `open-connection-id`.
    """
    handle = request.ringbuffer_gpadlhandle
    gpadl = channel.gpadls.get(handle)
    if gpadl is None:
        raise _fault(channel, "open-unknown-gpadl", "ringbuffer_gpadlhandle", handle, "the channel has no such GPADL")
    if gpadl.state is not GpadlState.ACCEPTED:
        why = f"that GPADL is {gpadl.state.name}"
        if gpadl.state in (GpadlState.IN_PROGRESS, GpadlState.OFFERED):
            why += ": wait for GPADL_CREATED"
        raise _fault(channel, "open-unknown-gpadl", "ringbuffer_gpadlhandle", handle, why)
    if not gpadl.ring_pages:
        why = "that GPADL is not one range of whole pages"
        raise _fault(channel, "open-ring-shape", "ringbuffer_gpadlhandle", handle, why)
    offset = request.downstream_ringbuffer_pageoffset
    # Each ring is a control page and at least one page of data.
    if not 2 <= offset <= gpadl.ring_pages - 2:
        why = f"each of the two rings has two pages at least, and the GPADL has {gpadl.ring_pages}"
        raise _fault(channel, "open-ring-offset", "downstream_ringbuffer_pageoffset", offset, why)
    flag, connection_id = _signals(channel, request, session)
    # Below 1.1 one connection is everybody's.
    possible = _FIRST_FREE_CONNECTION_ID <= connection_id <= _LAST_CONNECTION_ID
    if session.version.dedicated_doorbell and (not possible or connection_id in doorbells):
        why = "another channel has it" if possible else f"it must be {_FIRST_FREE_CONNECTION_ID} to 0xffffff"
        raise _fault(channel, "open-connection-id", "connection_id", connection_id, why)
    return Opening(
        ring_gpadl=handle,
        ring_pages=gpadl.ring_pages,
        downstream_page_offset=offset,
        target_vp=_target_vp(channel, request, session),
        event_flag=flag,
        shared_interrupt=not session.version.event_flags,
        connection_id=connection_id,
        userdata=request.userdata,
    )


def _target_vp(channel: Channel, request: OpenChannel, session: Session) -> int | None:
    """Return the VP to interrupt; guests below 2.4 have only VP 0."""
    if not session.version.event_flags:
        return 0
    target_vp = request.target_vp
    if target_vp == VP_INDEX_DISABLE_INTERRUPT:
        return None
    if target_vp >= session.limits.vp_count:
        why = f"VP indices are 0 to {session.limits.vp_count - 1}"
        raise _fault(channel, "open-target-vp", "target_vp", target_vp, why)
    return target_vp


def _signals(channel: Channel, request: OpenChannel, session: Session) -> tuple[int, int]:
    """Return the guest's event flag and the connection id that rings the host."""
    if not session.version.dedicated_doorbell:
        return 0, SHARED_DOORBELL_CONNECTION_ID
    if not session.version.event_flags:
        return 0, event_connection_id(channel.relid)
    own_choice = FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS in session.features
    if request.connection_id is None or not own_choice:
        return channel.relid, event_connection_id(channel.relid)
    if not 0 < request.event_flag <= LAST_RELID:
        raise _fault(channel, "open-event-flag", "event_flag", request.event_flag, f"it must be 1 to {LAST_RELID}")
    return request.event_flag, request.connection_id


def _fault(channel: Channel, rule: str, field: str, value: int, why: str) -> ProtocolViolation:
    text = f"OPENCHANNEL of {channel.relid}: {field} {value:#x}: {why}"
    return ProtocolViolation(text, rule=rule, field=field, value=value)
