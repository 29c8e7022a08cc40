"""Every rule that a recording can decide, by number."""

from __future__ import annotations

from typing import Final

from tools.invariants import Rule
from tools.invariants_channels import (
    NobodyWaitsForTheRescinded,
    OffersBeforeRescinds,
    PagesOfTheHost,
    ReleasedOnce,
    RelidLife,
    RepliesMatch,
    RescindsHaveEffect,
    RescindsOfTheLiving,
    TargetsAreOnline,
)
from tools.invariants_interrupts import FlagsAreTaken, MaskedIsServed, SignalsHaveACause, TaskletsRun
from tools.invariants_messages import (
    EndOfMessage,
    MessagesAreRead,
    NothingIllegal,
    PendingIsServed,
    PostsAreSeen,
    Progress,
    SlotsInOrder,
    WorkIsDone,
)
from tools.invariants_rings import IndicesAddUp, ReadersLook, WritersAreWoken

RULES: Final[tuple[type[Rule], ...]] = (
    RelidLife,
    ReleasedOnce,
    RescindsHaveEffect,
    OffersBeforeRescinds,
    RescindsOfTheLiving,
    NobodyWaitsForTheRescinded,
    SlotsInOrder,
    EndOfMessage,
    PendingIsServed,
    MessagesAreRead,
    PostsAreSeen,
    PagesOfTheHost,
    RepliesMatch,
    FlagsAreTaken,
    MaskedIsServed,
    TaskletsRun,
    ReadersLook,
    WritersAreWoken,
    SignalsHaveACause,
    IndicesAddUp,
    TargetsAreOnline,
    WorkIsDone,
    Progress,
    NothingIllegal,
)
"""In the order of their numbers; the catalogue's others need more than a trace, or more than one."""
