"""Names for the numbers in events: each enum that the table of events (`emu.tracing.EVENTS`) names, and a look-up.

The table lies below host and guest and so can only name their enums; here they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from emu.control import ActorKind
from emu.event_fields import Argument
from emu.faults import FaultKind
from emu.layout import ExitOperation, Fault
from emu.recording import TraceRecord
from emu.syncpoint import Point, PointAction
from emu.task_board import Program, TaskState
from emu.tracing import Kick, Side, WaitedFor
from emu.wire.hypercalls import HvStatus
from emu.wire.messages import MessageType
from guestproc.kernel.layout import ChannelState, ConnectionState
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Tasklets, Works
from guestproc.protocol.uevents import Action, Subject
from hostproc.protocol import states as host

ENUMS: Final[Mapping[str, type[IntEnum]]] = {
    "Action": Action,
    "ActorKind": ActorKind,
    "ChannelState": ChannelState,
    "ConnectionState": ConnectionState,
    "ExitOperation": ExitOperation,
    "Fault": Fault,
    "FaultKind": FaultKind,
    "GpadlState": host.GpadlState,
    "HostChannelState": host.ChannelState,
    "HvStatus": HvStatus,
    "Kick": Kick,
    "MessageType": MessageType,
    "Point": Point,
    "PointAction": PointAction,
    "Program": Program,
    "QueueNumber": QueueNumber,
    "Side": Side,
    "Subject": Subject,
    "TaskState": TaskState,
    "Tasklets": Tasklets,
    "WaitedFor": WaitedFor,
    "Works": Works,
}


def name_of(argument: Argument, value: int) -> str:
    """The name of a value in its argument's enum; "" when it has none."""
    names = ENUMS.get(argument.enum)
    if names is None:
        return ""
    try:
        return names(value).name
    except ValueError:
        return ""


def shown_text(record: TraceRecord) -> str:
    """A record's arguments for people: the kernel's line for its events, else `name=value` with names for numbers."""
    if record.event.format:
        return record.event.text(record.values)
    words = (
        f"{field.name}={name_of(field, value) or field.show(value)}"
        for field, value in record.event.pairs(record.values)
    )
    return " ".join(words)
