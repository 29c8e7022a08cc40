"""What a death says of a run: a finding, or nothing at all."""

from __future__ import annotations

import signal

import pytest

from tools.launch import Death
from tools.race_run import outcome_of

ASSERTED = Death("vcpu1", 7, 4 << 8, "Traceback\nAssertionError: INV-13: channel[3]: stale, generation 2")


def test_death_of_an_assertion_is_a_finding() -> None:
    """By the invariant that its last line names."""
    (broken,), reason = outcome_of([ASSERTED])

    assert (broken.invariant, reason) == ("INV-13", "")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_process_that_somebody_killed_says_nothing(signum: signal.Signals) -> None:
    """The run is inconclusive, and says who was killed; beside another death it is not what matters."""
    killed = Death("workqueue", 8, int(signum))

    assert outcome_of([killed]) == ([], f"workqueue was killed by {signum.name} from outside")
    assert [one.invariant for one in outcome_of([killed, ASSERTED])[0]] == ["INV-30", "INV-13"]


def test_crash_of_the_interpreter_is_a_finding() -> None:
    """SIGSEGV comes from inside."""
    (broken,), reason = outcome_of([Death("hypervisor", 9, int(signal.SIGSEGV))])

    assert (broken.invariant, broken.text, reason) == ("INV-30", "hypervisor died: killed by SIGSEGV", "")
