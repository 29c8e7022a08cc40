"""Faults that are turned on in a running host: what they do at once, and what is let go when one is turned off.

The loop looks at the plan's generation in each round, on a machine that may have faults. Those that it began with
strike where their table says; one that comes later strikes what is there already as well.
"""

from __future__ import annotations

from emu.fault_plan import Faults
from emu.faults import FaultKind
from hostproc.fault_bus import FaultyBus
from hostproc.fault_interrupts import FaultyInterrupts, FaultyQueues
from hostproc.partition import Partition


class LiveFaults:
    """The plan as the host's loop watches it."""

    def __init__(self, faults: Faults, bus: FaultyBus, interrupts: FaultyInterrupts, partition: Partition) -> None:
        self._faults = faults
        self._bus = bus
        self._interrupts = interrupts
        self._partition = partition
        self._generation = faults.plan.generation.load
        self._known = self._generation()
        _kinds, self._serial = faults.take_new(0)
        interrupts.begin_spurious(partition.synics)

    def changed(self) -> bool:
        """Whether something was turned on or off since `take_in`."""
        return self._generation() != self._known

    def take_in(self) -> None:
        """Let go of what waited for its fault to end, then let new faults strike what is there."""
        self._known = self._generation()
        self._bus.plan_changed()
        kinds, self._serial = self._faults.take_new(self._serial)
        for kind in kinds:
            self._strike(kind)

    def _strike(self, kind: FaultKind) -> None:
        match kind:
            case FaultKind.IRQ_SPURIOUS:
                self._interrupts.begin_spurious(self._partition.synics)
            case FaultKind.HOST_MUTATE_SLOT:
                queues = self._partition.queues
                assert isinstance(queues, FaultyQueues)
                queues.mutate_residents()
            case FaultKind.HOST_MUTATE_PKT | FaultKind.HOST_MUTATE_INDEX:
                for channel in self._bus.faulty_channels():
                    channel.mutate()
            case FaultKind.VSP_COMPLETE_UNSENT:
                for channel in self._bus.faulty_channels():
                    channel.send_unasked()
            case _:
                pass  # it strikes at its next occasion
