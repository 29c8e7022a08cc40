"""The fault plan in `control`: rows that are taken and given up, counts that several keep, looks that cost a load."""

from __future__ import annotations

from uuid import UUID

import pytest

from emu.control import FAULT_ROWS, Control
from emu.errors import UserError
from emu.event_fields import EventSpec
from emu.fault_plan import FaultPlan, Faults
from emu.faults import FaultKind, parse
from emu.tracing import BY_NUMBER
from tests.emu.bare_control import bare_control

K = FaultKind


@pytest.fixture
def control() -> Control:
    """A `control` on memory of the test's own."""
    return bare_control()


@pytest.fixture
def plan(control: Control) -> FaultPlan:
    """Its fault plan."""
    return FaultPlan(control)


def test_fault_is_seen_at_the_next_look_and_gone_when_off(control: Control, plan: FaultPlan) -> None:
    """Nothing; then it strikes; then nothing again, and the row still tells how often it did."""
    faults = Faults(control)
    assert faults.hit(K.VSP_STALL, relid=7) is None

    planned = plan.add(parse("vsp.stall@relid=7"))
    assert faults.hit(K.VSP_STALL, relid=6) is None
    hit = faults.hit(K.VSP_STALL, relid=7)
    assert hit is not None
    over = [hit.over]
    assert plan.off(planned) and not plan.off(planned)
    over.append(hit.over)

    assert over == [False, True]
    assert faults.hit(K.VSP_STALL, relid=7) is None
    assert plan.report() == [{"fault": "vsp.stall@relid=7", "on": False, "seen": 1, "hits": 1}]


def test_occasions_are_counted_over_all_who_look(control: Control, plan: FaultPlan) -> None:
    """The third time that anybody passes the filters is the third time."""
    plan.add(parse("reply.drop@kind=openchannel_result,nth=3"))
    looks = [Faults(control), Faults(control)]

    struck = [bool(looks[n % 2].hit(K.REPLY_DROP, message=6)) for n in range(5)]

    assert struck == [False, False, True, False, False]
    assert [(row.seen, row.hits, row.left, row.spent) for row in plan.rows()] == [(5, 1, 0, True)]


@pytest.mark.parametrize(
    ("text", "strikes"),
    [
        ("delay_irq=1us@vp=1", False),
        ("delay_irq=1us@vp=0", True),
        ("delay_irq=1us@sint=3", False),
        ("delay_irq=1us@sint=2,relid=5", True),
    ],
)
def test_filters_of_interrupts(control: Control, plan: FaultPlan, text: str, strikes: bool) -> None:
    """A fault is of one VP, one SINT, one channel, or of all that its text does not say."""
    plan.add(parse(text))

    assert bool(Faults(control).hit(K.DELAY_IRQ, relid=5, vp=0, sint=2)) is strikes


def test_filters_of_devices(control: Control, plan: FaultPlan) -> None:
    """Class and instance are asked for only by a fault that is about them; nobody's device is no device."""
    instance = UUID(int=5)
    plan.add(parse(f"vsp.stall@class=echo,device={instance}"))
    faults = Faults(control)

    assert faults.hit(K.VSP_STALL) is None
    assert faults.hit(K.VSP_STALL, identity=lambda: None) is None
    assert faults.hit(K.VSP_STALL, identity=lambda: ("echo", UUID(int=6))) is None
    assert faults.hit(K.VSP_STALL, identity=lambda: ("netlike", instance)) is None
    assert faults.hit(K.VSP_STALL, identity=lambda: ("echo", instance)) is not None


def test_quiet_is_that_nothing_is_on(control: Control, plan: FaultPlan) -> None:
    """Of whatever kind; what was turned off is nothing."""
    faults = Faults(control)
    seen = [faults.quiet]
    planned = plan.add(parse("host.dup_rescind"))
    seen.append(faults.quiet)
    plan.off(planned)
    seen.append(faults.quiet)

    assert seen == [True, False, True]


def test_hit_is_recorded(control: Control, plan: FaultPlan) -> None:
    """Kind, channel, value, and how often by now."""
    records: list[tuple[int, ...]] = []
    plan.add(parse("delay_irq=200us@relid=7"))
    faults = Faults(control, lambda *words: records.append(words))
    faults.hit(K.DELAY_IRQ, relid=7)
    faults.hit(K.DELAY_IRQ, relid=7)

    spec: EventSpec = BY_NUMBER[records[1][0]]
    assert spec.name == "fault_hit"
    assert records[1][1:] == (K.DELAY_IRQ, 7, 200_000, 2)


def test_rows_are_given_to_those_who_need_them(plan: FaultPlan) -> None:
    """64 that may still strike are all; one that is off, or spent, makes room for another."""
    rows = [plan.add(parse(f"vsp.stall@relid={n}")) for n in range(1, FAULT_ROWS + 1)]
    with pytest.raises(UserError, match="all 64 faults of this machine are on"):
        plan.add(parse("host.dup_rescind"))
    plan.off(rows[5])

    planned = plan.add(parse("host.dup_rescind"))

    assert planned.index == rows[5].index and planned.serial == FAULT_ROWS + 1
    assert not plan.off(rows[5])  # that row is another's
    assert [row.fault.text for row in plan.rows()][-1] == "host.dup_rescind"


def test_new_faults_are_told_once(control: Control, plan: FaultPlan) -> None:
    """Whoever watches a running machine hears of each kind that was turned on since it asked last."""
    plan.add(parse("vsp.stall"))
    faults = Faults(control)
    kinds, serial = faults.take_new(0)
    assert kinds == [K.VSP_STALL]
    plan.add(parse("irq.spurious=1ms"))
    plan.add(parse("irq.spurious=2ms"))

    kinds, serial = faults.take_new(serial)
    assert kinds == [K.IRQ_SPURIOUS]
    assert faults.take_new(serial)[0] == []
    assert [fault.number for fault in faults.on(K.IRQ_SPURIOUS)] == [1_000_000, 2_000_000]
