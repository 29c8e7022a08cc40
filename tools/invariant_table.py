"""Every rule by number: those that a recording can decide, and those over the state of a settled machine."""

from __future__ import annotations

from collections.abc import Mapping
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
from tools.invariants_settled import StateRule
from tools.invariants_settled_channels import (
    counts_are_right,
    lists_are_whole,
    names_are_live,
    nobody_waits_for_the_rescinded,
    relids_agree,
)
from tools.invariants_settled_idle import nothing_is_left
from tools.invariants_settled_interrupts import (
    flags_are_taken,
    full_slot_is_read,
    masked_is_served,
    pending_is_served,
    targets_are_online,
    tasklets_run,
)
from tools.invariants_settled_rings import (
    frames_came_whole,
    lent_pages_are_taken,
    pools_and_queues,
    readers_look,
    writers_are_woken,
)
from tools.invariants_settled_waits import no_wait_is_in_vain
from tools.invariants_waits import NobodyWaitsInACircle

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
    NobodyWaitsInACircle,
    WorkIsDone,
    Progress,
    NothingIllegal,
)
"""In the order of their numbers: what a recording alone decides."""

STATE_RULES: Final[tuple[StateRule, ...]] = (
    StateRule(1, "Both ends have the same relids, and a rescinded one is released", relids_agree),
    StateRule(4, "The counts of offers and of channels that a suspend waits for are right", counts_are_right),
    StateRule(6, "Nobody waits on a rescinded channel without a reply under way", nobody_waits_for_the_rescinded),
    StateRule(9, "An empty slot has no pending bit", pending_is_served),
    StateRule(10, "A message in a slot has its tasklet scheduled, or an interrupt pending", full_slot_is_read),
    StateRule(12, "A page that the host has is in no free list", lent_pages_are_taken),
    StateRule(13, "A record that is named is there, and nobody wrote into a free one", names_are_live),
    StateRule(16, "An event flag that is set has an interrupt that takes it", flags_are_taken),
    StateRule(17, "A masked ring has its consumer scheduled or running", masked_is_served),
    StateRule(18, "No tasklet is left disabled, and a scheduled one runs", tasklets_run),
    StateRule(19, "No reader sleeps over bytes that nobody will tell it of", readers_look),
    StateRule(20, "No writer sleeps over room that nobody will tell it of", writers_are_woken),
    StateRule(22, "A pool is what is free and what is taken of it; a stopped queue will be woken", pools_and_queues),
    StateRule(23, "Frames come to a NIC without gap, repeat or damage", frames_came_whole),
    StateRule(25, "Each channel is on one CPU's list (era seed)", lists_are_whole),
    StateRule(26, "The target of an open channel is online", targets_are_online),
    StateRule(27, "No wait is in vain: no cycle, and a producer for each", no_wait_is_in_vain),
    StateRule(28, "With everybody asleep nothing is left to do", nothing_is_left),
)
"""In the order of their numbers: what a settled machine must not show."""

_MORE_TITLES: Final[Mapping[str, str]] = {
    "INV-29": "Nothing is tried for ever: whatever is repeated has a bound",
    "INV-30": "No process dies, and nobody does what the state of a channel forbids",
}
"""Those that assertions guard, where no rule of a table does."""


def titles() -> dict[str, str]:
    """What each invariant says, by its name."""
    found = dict(_MORE_TITLES)
    found |= {one.name: one.title for one in STATE_RULES}
    return found | {f"INV-{rule.NUMBER:02}": rule.TITLE for rule in RULES}
