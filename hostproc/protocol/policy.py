"""What a host answers where real hosts differ: a message for a channel behind which there is no open device.

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


Policy = Mapping[tuple[MessageType, ChannelState], Answer]

_GONE: Final = (ChannelState.REVOKED, ChannelState.REOFFERED)
_NOT_OPEN: Final = (
    ChannelState.CLOSED,
    ChannelState.OPENING,
    ChannelState.CLOSING,
    ChannelState.CLOSING_REOPEN,
)


def _defaults() -> dict[tuple[MessageType, ChannelState], Answer]:
    rows = (
        # It crossed our RESCIND, which wakes whoever waits for the result.
        (MessageType.OPENCHANNEL, _GONE, Answer.SILENT),
        (MessageType.CLOSECHANNEL, _GONE, Answer.SILENT),
        # Answered, since the guest's memory is at stake: a waiter that is told nothing leaks it.
        (MessageType.GPADL_HEADER, _GONE, Answer.ACCEPT),
        (MessageType.GPADL_TEARDOWN, _GONE, Answer.ACCEPT),
        (MessageType.MODIFYCHANNEL, _GONE, Answer.SILENT),
        (MessageType.MODIFYCHANNEL, _NOT_OPEN, Answer.SILENT),
    )
    return {pair: answer for message, states, answer in rows for pair in product((message,), states)}


DEFAULT_POLICY: Final[Policy] = MappingProxyType(_defaults())


def policy_of(cells: Mapping[str, str]) -> Policy:
    """The defaults with what a scenario says instead (`emu.host_policy` checked it): `KIND.STATE` to an answer."""
    policy = dict(DEFAULT_POLICY)
    for cell, answer in cells.items():
        kind, _, state = cell.partition(".")
        pair = MessageType[kind.upper()], ChannelState[state.upper()]
        assert pair in policy, cell
        policy[pair] = Answer(answer)
    return MappingProxyType(policy)
