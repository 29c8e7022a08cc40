"""What a host answers where real hosts differ: a message for a channel behind which there is no open device.

Two rows are about no state of a channel but about a moment: what the guest had asked before the revoke and was not
answered yet, and whatever it says after its UNLOAD.

A table, so that a scenario may choose another host. The defaults are what guests were seen to rely on: a
Linux guest waits for ever for an answer that it is refused, unless its own rescind handling wakes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from itertools import product
from types import MappingProxyType
from typing import Final

from emu.wire.messages import MessageType
from hostproc.protocol.states import ChannelState


class Answer(Enum):
    """How a host treats such a message."""

    SILENT = "silent"
    """Drop it."""
    REFUSE = "refuse"
    """Answer with a failure, where the message has an answer."""
    ACCEPT = "accept"
    """Answer as if it had been done, where the message has an answer."""


class Moment(Enum):
    """When a message meets the host, where that is no state of a channel."""

    REVOKING = "revoking"
    """Its request was taken, and before it is answered the channel is revoked: the answer, if any, precedes RESCIND."""
    UNLOADED = "unloaded"
    """The guest has said UNLOAD, and nobody has made contact since."""


Policy = Mapping[tuple[MessageType, ChannelState | Moment], Answer]

_GONE: Final = (ChannelState.REVOKED, ChannelState.REOFFERED)
_NOT_OPEN: Final = (
    ChannelState.CLOSED,
    ChannelState.OPENING,
    ChannelState.CLOSING,
    ChannelState.CLOSING_REOPEN,
)
_REVOKING: Final = (Moment.REVOKING,)
_UNLOADED: Final = (Moment.UNLOADED,)
_ANSWERED: Final = (
    MessageType.OPENCHANNEL,
    MessageType.GPADL_HEADER,
    MessageType.GPADL_TEARDOWN,
    MessageType.MODIFYCHANNEL,
    MessageType.REQUESTOFFERS,
    MessageType.TL_CONNECT_REQUEST,
    MessageType.MODIFY_CONNECTION,
    MessageType.PAUSE,
    MessageType.UNLOAD,
)
"""What has an answer, and belongs to the connection: all but INITIATE_CONTACT, which begins another one."""


def _defaults() -> dict[tuple[MessageType, ChannelState | Moment], Answer]:
    rows: tuple[tuple[MessageType, tuple[ChannelState | Moment, ...], Answer], ...] = (
        # It crossed our RESCIND, which wakes whoever waits for the result.
        (MessageType.OPENCHANNEL, _GONE, Answer.SILENT),
        (MessageType.CLOSECHANNEL, _GONE, Answer.SILENT),
        # Answered, since the guest's memory is at stake: a waiter that is told nothing leaks it.
        (MessageType.GPADL_HEADER, _GONE, Answer.ACCEPT),
        (MessageType.GPADL_TEARDOWN, _GONE, Answer.ACCEPT),
        (MessageType.MODIFYCHANNEL, _GONE, Answer.SILENT),
        (MessageType.MODIFYCHANNEL, _NOT_OPEN, Answer.SILENT),
        # What was taken before the revoke is still answered; but the open that waits is woken by the RESCIND.
        (MessageType.OPENCHANNEL, _REVOKING, Answer.SILENT),
        (MessageType.GPADL_HEADER, _REVOKING, Answer.REFUSE),
        (MessageType.GPADL_TEARDOWN, _REVOKING, Answer.ACCEPT),
        (MessageType.MODIFYCHANNEL, _REVOKING, Answer.REFUSE),
        # Nobody is connected who could be told anything (races.md G1).
        *((message, _UNLOADED, Answer.SILENT) for message in _ANSWERED),
    )
    return {pair: answer for message, states, answer in rows for pair in product((message,), states)}


DEFAULT_POLICY: Final[Policy] = MappingProxyType(_defaults())


def policy_of(cells: Mapping[str, str]) -> Policy:
    """The defaults with what a scenario says instead (`emu.host_policy` checked it): `KIND.STATE` to an answer."""
    policy = dict(DEFAULT_POLICY)
    for cell, answer in cells.items():
        kind, _, state = cell.partition(".")
        name = state.upper()
        when = Moment[name] if name in Moment.__members__ else ChannelState[name]
        pair = MessageType[kind.upper()], when
        assert pair in policy, cell
        policy[pair] = Answer(answer)
    return MappingProxyType(policy)
