"""Claims about tickets: who takes one, who is told, and that machine time stands still meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emu.control import Control
from emu.fault_plan import FaultPlan, Faults
from emu.faults import FaultKind, parse
from emu.ipc.segments import object_name, unlink_segment
from emu.syncpoint import BY_TEXT, NOT_ARMED, TICKETS, Action, Point, PointAction, Ticket, Tickets

ACTOR = 1 << 12 | 7
OTHER = 1 << 12 | 8


@pytest.fixture
def tickets() -> Iterator[Tickets]:
    """A table of tickets in a segment of its own."""
    name = object_name("points", "control")
    control = Control.create(name, {})
    try:
        yield Tickets(control)
    finally:
        control.close()
        unlink_segment(name)


def armed_byte(tickets: Tickets, point: Point) -> int:
    """What an actor looks at."""
    with tickets.armed() as view:
        return view[point]


def held(tickets: Tickets) -> bool:
    """Whether machine time stands still."""
    return tickets.clock.held


def test_points_have_numbers_within_their_bytes_and_names_of_their_own() -> None:
    """Every point has a byte to be armed in, and no two share a name."""
    assert all(0 < point < len(NOT_ARMED) for point in Point)
    assert len(BY_TEXT) == len(Point)


def test_a_ticket_goes_round(tickets: Tickets) -> None:
    """Armed, taken, told to go, given back: the byte is up while it is armed, time stands still while it is held."""
    number = tickets.arm(Point.ISR_ENTER)
    assert armed_byte(tickets, Point.ISR_ENTER) == 1
    assert tickets.take(Point.ISR_ENTER, ACTOR, 0, 5) == number
    assert held(tickets)
    assert tickets.arrived(number) == (ACTOR, 5)
    assert tickets.parked() == {number: ACTOR}
    assert not tickets.may_go(number)
    tickets.go(number)
    assert tickets.may_go(number)
    assert not held(tickets)
    assert armed_byte(tickets, Point.ISR_ENTER) == 0
    tickets.give_back(number)
    assert tickets.state(number) is Ticket.FREE


@pytest.mark.parametrize(
    ("wanted", "comes", "fits"),
    [
        ({"actor": 7}, (ACTOR, 0, 1), True),
        ({"actor": 7}, (OTHER, 0, 1), False),
        ({"cpu": 0}, (ACTOR, 0, 1), True),
        ({"cpu": 1}, (ACTOR, 0, 1), False),
        ({"relid": 1}, (ACTOR, 0, 1), True),
        ({"relid": 2}, (ACTOR, 0, 1), False),
        ({"actor": 7, "cpu": 0, "relid": 1}, (ACTOR, 0, 1), True),
    ],
)
def test_a_ticket_is_taken_by_whom_it_is_for(
    tickets: Tickets, wanted: dict[str, int], comes: tuple[int, int, int], fits: bool
) -> None:
    """Each filter alone lets the right one through and no other."""
    number = tickets.arm(Point.OPEN_BEFORE_POST, **wanted)  # type: ignore[arg-type]
    assert tickets.take(Point.OPEN_BEFORE_POST, *comes) == (number if fits else None)


def test_the_nth_hit_takes_it(tickets: Tickets) -> None:
    """`skip` hits pass unheld."""
    number = tickets.arm(Point.ISR_ENTER, skip=2)
    assert [tickets.take(Point.ISR_ENTER, ACTOR, 0, 0) for _ in range(3)] == [None, None, number]


def test_of_two_workers_at_one_point_one_is_held(tickets: Tickets) -> None:
    """A ticket is for one actor: the second at the same point passes."""
    number = tickets.arm(Point.RESCIND_AFTER_LOOKUP)
    assert tickets.take(Point.RESCIND_AFTER_LOOKUP, ACTOR, 0, 7) == number
    assert tickets.take(Point.RESCIND_AFTER_LOOKUP, OTHER, 0, 7) is None


def test_another_point_takes_nothing(tickets: Tickets) -> None:
    """A ticket is for its point alone."""
    tickets.arm(Point.ISR_ENTER)
    assert tickets.take(Point.ISR_AFTER_FLAG_LOAD, ACTOR, 0, 0) is None


def test_a_ticket_that_nobody_took_is_taken_back(tickets: Tickets) -> None:
    """Disarming says whether somebody was faster."""
    first, second = tickets.arm(Point.ISR_ENTER), tickets.arm(Point.ISR_ENTER)
    assert armed_byte(tickets, Point.ISR_ENTER) == 2
    tickets.take(Point.ISR_ENTER, ACTOR, 0, 0)
    assert not tickets.disarm(first)
    assert tickets.disarm(second)
    assert armed_byte(tickets, Point.ISR_ENTER) == 0


def test_time_stands_still_until_the_last_goes_on(tickets: Tickets) -> None:
    """Two actors held: machine time waits for both."""
    numbers = [tickets.arm(Point.ISR_ENTER), tickets.arm(Point.OPEN_WAITING)]
    tickets.take(Point.ISR_ENTER, ACTOR, 0, 0)
    tickets.take(Point.OPEN_WAITING, OTHER, 0, 0)
    before = tickets.clock.now()
    tickets.go(numbers[0])
    assert tickets.clock.now() == before
    tickets.go(numbers[1])
    assert not tickets.clock.held


def test_clearing_frees_everything(tickets: Tickets) -> None:
    """Behind a run all tickets are free, no byte is up, time goes on."""
    tickets.arm(Point.ISR_ENTER)
    tickets.take(Point.ISR_ENTER, ACTOR, 0, 0)
    tickets.arm(Point.ISR_ENTER)
    tickets.clear()
    assert all(tickets.state(number) is Ticket.FREE for number in range(TICKETS))
    assert armed_byte(tickets, Point.ISR_ENTER) == 0
    assert not tickets.clock.held


def test_a_thirty_third_ticket_is_our_mistake(tickets: Tickets) -> None:
    """There are so many tickets and no more."""
    for _ in range(TICKETS):
        tickets.arm(Point.ISR_ENTER)
    with pytest.raises(AssertionError, match="in use"):
        tickets.arm(Point.ISR_ENTER)


def test_who_is_only_to_be_seen_goes_on(tickets: Tickets) -> None:
    """It is said who came, time goes on, and the next one is not seen."""
    number = tickets.arm(Point.ISR_ENTER, action=Action.SEE)
    assert tickets.take(Point.ISR_ENTER, ACTOR, 0, 5) == number
    assert not held(tickets)
    assert tickets.passes(number) is PointAction.SEEN
    assert tickets.arrived(number) == (ACTOR, 5)
    assert tickets.state(number) is Ticket.PASSED
    assert tickets.take(Point.ISR_ENTER, OTHER, 0, 5) is None
    assert tickets.parked() == {}


def test_who_comes_turns_a_fault_on(tickets: Tickets) -> None:
    """A fault that was put down strikes from the moment at which somebody came to the point, and not before."""
    plan, faults = FaultPlan(tickets.control), Faults(tickets.control)
    planned = plan.add(parse("alloc.fail=message_work"), on=False)
    number = tickets.arm(Point.MSG_BEFORE_ALLOC, action=Action.FAULT, fault=planned)
    assert not strikes(faults)
    assert tickets.take(Point.MSG_BEFORE_ALLOC, ACTOR, 0, 0) == number
    assert tickets.passes(number) is PointAction.FAULT
    assert strikes(faults)
    assert not plan.turn_on(planned.index, planned.serial), "it is on"
    assert plan.off(planned)


def strikes(faults: Faults) -> bool:
    """Whether an allocation may fail now."""
    return bool(faults.on(FaultKind.ALLOC_FAIL))


def test_who_is_held_does_not_pass(tickets: Tickets) -> None:
    """A ticket that holds says so."""
    number = tickets.arm(Point.ISR_ENTER)
    tickets.take(Point.ISR_ENTER, ACTOR, 0, 0)
    assert tickets.passes(number) is None
