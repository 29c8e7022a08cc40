"""The `ftrace` format: the kernel's line."""

from __future__ import annotations

import pytest

from emu.recording import RecordedActor, TraceRecord
from emu.tracing import EVENTS
from tools.export.ftrace import line
from tools.export.threads import Threads

VCPU = RecordedActor(3, "vcpu1", "VCPU", 4711, 1)


def shown(context: str, t_ns: int) -> str:
    """The line of a mask record."""
    record = TraceRecord(t_ns, 9, VCPU, 0, context, EVENTS["mask"], (7, 1))
    return line(record, Threads([VCPU]).of(VCPU))


def test_line_is_the_kernels() -> None:
    """Thread and number in columns, processor, flags, seconds, event, arguments."""
    assert (
        shown("TASK", 261_001_734_100)
        == "           vcpu1-4711    [001] .....   261.001734: mask: relid=7 side=TO_GUEST\n"
    )


def test_number_without_a_name_is_shown_in_hex() -> None:
    """As the kernel's `__print_symbolic` does, and so trace-cmd."""
    record = TraceRecord(0, 9, VCPU, 0, "HOST", EVENTS["host_state"], (7, 1, 8, 255))

    assert line(record, Threads([VCPU]).of(VCPU)).endswith(
        ": host_state: relid=7 generation=1 old=CLOSING_CLIENT_RELEASE new=0xff\n"
    )


@pytest.mark.parametrize(
    ("context", "flags"), [("ISR", "d.h.."), ("TASKLET", "..s.."), ("QUEUE", "....."), ("HOST", ".....")]
)
def test_flags_say_the_context(context: str, flags: str) -> None:
    """Interrupts are off in an ISR; a tasklet is a softirq."""
    assert f" {flags} " in shown(context, 0)


@pytest.mark.parametrize(("t_ns", "text"), [(1_499, "0.000001"), (1_500, "0.000002"), (999_999_500, "1.000000")])
def test_time_is_rounded_to_microseconds(t_ns: int, text: str) -> None:
    """To the nearest, as ns2usecs does, and seconds carry."""
    assert f" {text}: " in shown("TASK", t_ns)
