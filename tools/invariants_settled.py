"""The invariants that are judged over the shared state of a settled machine: what a rule is, and all of them at once.

Where nobody will do anything more, whatever should have been done by now and was not is a finding: a message in its
slot, a flag that is set, bytes in a ring, a request without its answer. Rules look through a `LiveView` and change
nothing. They are in one table with those that a recording decides (`tools.invariant_table`).

While the machine moves their answers mean nothing: ask `tools.settled` first. `judged` does both, also for a machine
whose threads do not say when they sleep: there a finding has to stay for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from emu.machine import Machine
from guestproc.view import ATTEMPTS
from tools.invariants import Finding
from tools.live_view import LiveView
from tools.settled import Parked, Settlement, SettleTest, parked_at_points

PERSISTS_S: Final = 0.05
"""For how long a finding is there, at least, in a machine whose threads do not say when they sleep."""
SETTLE_S: Final = 2.0
"""How long a command waits for its machine to settle before it ends it, unjudged."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A settled machine as the rules see it; `parked` are the numbers of the actors that somebody holds."""

    view: LiveView
    parked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class StateRule:
    """One invariant over state: `look` yields what breaks it."""

    number: int
    title: str
    look: Callable[[Scene], Iterable[Finding]]

    @property
    def name(self) -> str:
        """The rule as the catalogue calls it."""
        return f"INV-{self.number:02}"


def judge(view: LiveView, parked: Parked | None = None, rules: Sequence[StateRule] | None = None) -> list[Finding]:
    """What breaks a rule now, in the order of the rules; right only of a machine that is settled.

    `parked` as of `SettleTest`: what is theirs to do is not left undone.
    """
    from tools.invariant_table import STATE_RULES

    slots = set((parked or parked_at_points(view.machine))())
    scene = Scene(view, frozenset(row.number for row in view.actors() if row.slot in slots))
    return [finding for rule in rules or STATE_RULES for finding in _looked(rule, scene)]


def _looked(rule: StateRule, scene: Scene) -> list[Finding]:
    """What one rule finds; a record that goes meanwhile, in a machine that moves after all, means another look."""
    for _ in range(ATTEMPTS - 1):
        try:
            return list(rule.look(scene))
        except AssertionError:
            continue
    return list(rule.look(scene))


def judged(
    machine: Machine, timeout_s: float, pump: Callable[[float], object] | None = None
) -> tuple[Settlement, list[Finding]]:
    """Wait until a machine is settled, then judge it; no findings of one that does not settle in time."""
    test = SettleTest(machine)
    end = time.monotonic() + timeout_s
    while True:
        settlement = test.wait(max(0.0, end - time.monotonic()), pump)
        if not settlement.settled:
            return settlement, []
        findings = judge(test.view)
        if not findings or _persists(test, findings, pump):
            return settlement, findings
        if time.monotonic() >= end:
            return Settlement(("what was found did not stay",)), []


def _persists(test: SettleTest, findings: list[Finding], pump: Callable[[float], object] | None) -> bool:
    """Whether it stays so, settled and with the same findings."""
    steps, end = test.steps(), time.monotonic() + PERSISTS_S
    while time.monotonic() < end:
        if test.steps() != steps or not test.take().settled:
            return False
        if pump is not None:
            pump(0.0)
        os.sched_yield()
    return judge(test.view) == findings


def state_report(
    machine: Machine, pump: Callable[[float], object] | None = None, *, unjudged: str = ""
) -> dict[str, list[str] | str]:
    """What a command's report says of a machine that has done its work: its violations, or why it is not judged.

    `unjudged` is for who knows already: where somebody ordered faults, what they leave behind is none of these rules'.
    """
    if unjudged:
        return {"state_violations": [], "unjudged": unjudged}
    settlement, found = judged(machine, SETTLE_S, pump)
    texts = [f"{one.name}: {one.text}" for one in found]
    return {"state_violations": texts, "unjudged": "" if settlement.settled else settlement.text()}
