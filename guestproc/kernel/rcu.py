"""Waiting for readers without locks: a grace period ends when no ISR that began before it still runs.

A processor's `isr_sequence` is odd while it is in an ISR. Who unpublishes a channel calls `synchronize`
before freeing it: each ISR either began before (it is waited for) or looks the channel up after the
unpublishing and does not find it. Both sides write, then read across a full barrier:

    ISR:      sequence += 1 (odd); look the relid up ...; sequence += 1 (even); is anybody waiting?
    remover:  unpublish; read the sequences; announce that it waits; read them again; sleep
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from emu.errors import DeadlinePassed
from emu.ipc.atomics import AtomicU32, fence
from guestproc.kernel.actors import Actor
from guestproc.kernel.wait import SECOND_NS, WaitQueue, assert_may_wait

GRACE_TIMEOUT_NS: Final = 10 * SECOND_NS


def isr_enter(sequence: AtomicU32) -> None:
    """First line of an ISR (interrupts are off, so they do not nest). The addition is a full barrier."""
    assert not sequence.fetch_add(1) & 1, "an ISR began inside an ISR"


def isr_exit(actor: Actor, sequence: AtomicU32, grace_wait: WaitQueue) -> None:
    """Last line of an ISR: it reads no published record any more."""
    assert sequence.fetch_add(1) & 1, "an ISR ended that did not begin"
    if grace_wait._word.load():  # `announced`, without the call
        grace_wait.wake_all(actor)


def synchronize(
    actor: Actor, sequences: Sequence[AtomicU32], grace_wait: WaitQueue, timeout_ns: int = GRACE_TIMEOUT_NS
) -> None:
    """`synchronize_rcu`: wait for every ISR that runs now; raises DeadlinePassed, MachineStopping."""
    assert_may_wait(actor, "a grace period")
    fence()
    seen = [(sequence, value) for sequence in sequences if (value := sequence.load()) & 1]
    if not seen:
        return

    def ended() -> bool:
        return all(sequence.load() != value for sequence, value in seen)

    if not grace_wait.wait_until_timeout(actor, ended, timeout_ns):
        stuck = [position for position, sequence in enumerate(sequences) if (sequence, sequence.load()) in seen]
        raise DeadlinePassed(f"grace period, ISRs of CPUs {stuck}", timeout_ns)
