"""The guest's share of the fault plan: which allocation or step shall fail, how often, for which relid.

The real kernel has its error exits for allocations and registrations that hardly ever fail; here they fail when
they are told to, by `--fault alloc.fail=PLACE`, a scenario, a director, or `ctl fail`. All of them are rows of the
one plan (`emu.fault_plan`); here is what `ctl fail` means in its terms, where a new wish for a place replaces the
one before.
"""

from __future__ import annotations

from typing import Final

from emu.fault_plan import FaultPlan, Faults, Hit, PlannedFault
from emu.faults import MOST_TIMES, PLACES, Fault, FaultKind, spec_of

__all__ = ["MOST_TIMES", "PLACES", "forget_all", "plan", "planned", "strikes"]

_ALLOC_FAIL: Final = FaultKind.ALLOC_FAIL


def strikes(faults: Faults, place: str, relid: int) -> Hit | None:
    """Whether it happens here and now; counted if it does. What hangs goes on when the `Hit` is over."""
    # Nothing is on, nearly always, and a channel asks ten times: one look.
    if not faults.rows and faults.generation() == faults.known:
        return None
    return faults.hit(_ALLOC_FAIL, place, relid=relid)


def plan(plan_: FaultPlan, place: str, times: int, relid: int = 0) -> None:
    """Let it happen the next `times` times, for this relid only unless that is 0; replaces what was planned there.

    0 times take it back, and let go of what hangs there.
    """
    assert place in PLACES and 0 <= times <= MOST_TIMES, (place, times)
    for row in _rows(plan_):
        if row.fault.word == place and (not times or not row.spent):
            plan_.off(row)
    if times:
        wanted = Fault(spec_of(_ALLOC_FAIL), word=place, has_value=True, relid=relid or None, times=times)
        plan_.add(wanted)


def planned(plan_: FaultPlan) -> list[tuple[str, int | None, int]]:
    """What is still to happen: where, how often (None: every time), and for which relid (0: any)."""
    return [(row.fault.word, row.left, row.fault.relid or 0) for row in _rows(plan_) if not row.spent]


def forget_all(plan_: FaultPlan) -> None:
    """Nothing fails any more, and what hangs goes on; the caller wakes state_wait."""
    for row in _rows(plan_):
        plan_.off(row)


def _rows(plan_: FaultPlan) -> list[PlannedFault]:
    return [row for row in plan_.rows() if row.on and row.fault.spec.kind is _ALLOC_FAIL]
