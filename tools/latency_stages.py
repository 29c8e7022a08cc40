"""Where the time of a round trip goes: records of a machine, cut into stages.

Two paths are followed, each from one record to the next of the same packet or message:

    data      publish -> host took it -> host answered -> flag set -> interrupt requested -> ISR -> tasklet
              -> callback took it -> the sender has it
    control   posted -> in the slot -> ISR -> DPC -> queued -> handler begins

A packet is followed only while it is alone on its channel: with several under way an interrupt may mean any of
them, and a stage that was guessed is worse than none. Messages are told apart by their serials. A step whose
record is missing (it was overwritten, or the step did not happen: the processor looked by itself) ends the path;
the stages before it count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from emu.tracing import (
    E_FLAG_SET,
    E_IRQ_RAISE,
    E_ISR_ENTER,
    E_MESSAGE_POST,
    E_RING_PUBLISH,
    E_RING_RELEASE,
    E_SLOT_READ,
    E_SLOT_WRITE,
    E_TASK_TAKE,
    E_TASKLET_RUN,
    E_WORK_QUEUE,
    E_WORK_RUN,
)
from emu.wire.synic import HYPERVISOR_CALLBACK_VECTOR

TO_HOST: Final = 0
TO_GUEST: Final = 1

DATA_STAGES: Final = (
    "send_to_host",
    "host_service",
    "answer_to_signal",
    "signal_to_request",
    "request_to_isr",
    "isr_to_tasklet",
    "tasklet_to_callback",
    "callback_to_task",
)
CONTROL_STAGES: Final = ("post_to_slot", "slot_to_isr", "isr_to_dpc", "dpc_to_queue", "queue_to_handler")
ON_EVENT: Final = 2
"""Number of the tasklet `vmbus_on_event` in records (1 is the message tasklet)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One record as the stages need it: when, which event, its arguments, and the VP page it is about or of."""

    t_ns: int
    event: int
    values: tuple[int, ...]
    position: int


@dataclass(slots=True)
class Stages:
    """Samples in ns by stage."""

    data: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in DATA_STAGES})
    control: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in CONTROL_STAGES})

    def all(self) -> dict[str, list[int]]:
        """Every stage that has a sample."""
        return {name: samples for name, samples in {**self.data, **self.control}.items() if samples}


@dataclass(slots=True)
class _Packet:
    """A packet under way: how many of its stages are behind it, and when the last one ended."""

    stage: int
    since_ns: int
    position: int = -1
    alone: bool = True


class DataPath:
    """Follows single packets; feed it records in the order of time."""

    def __init__(self, samples: dict[str, list[int]]) -> None:
        self._samples = samples
        self._packets: dict[int, _Packet] = {}
        self._under_way: Counter[int] = Counter()

    def feed(self, step: Step) -> None:
        """Take one record."""
        event, values = step.event, step.values
        if event == E_RING_PUBLISH:
            self._published(step, *values[:2])
        elif event == E_RING_RELEASE:
            # The host's release is its taking, the guest's is its callback.
            relid, side = values[:2]
            self._reach(relid, 0 if side == TO_HOST else 6, step)
        elif event == E_FLAG_SET:
            packet = self._packets.get(values[2])
            if packet is not None:
                packet.position = values[0]
            self._reach(values[2], 2, step)
        elif event == E_TASK_TAKE:
            relid, taken = values[:2]
            self._reach(relid, 7, step)
            self._packets.pop(relid, None)
            self._under_way[relid] = max(0, self._under_way[relid] - taken)
        elif event == E_TASKLET_RUN and values[0] == ON_EVENT:
            self._reach(values[1], 5, step)
        elif event in (E_IRQ_RAISE, E_ISR_ENTER):
            self._interrupt(step)

    def _published(self, step: Step, relid: int, side: int) -> None:
        if side == TO_GUEST:
            self._reach(relid, 1, step)
            return
        # A second packet before the first has come back: neither is followed.
        self._packets[relid] = _Packet(0, step.t_ns, alone=self._under_way[relid] == 0)
        self._under_way[relid] += 1

    def _interrupt(self, step: Step) -> None:
        """An interrupt belongs to every channel whose flag is up on that VP and that waits for it."""
        if step.values[-1] != HYPERVISOR_CALLBACK_VECTOR:
            return
        position, stage = (step.values[0], 3) if step.event == E_IRQ_RAISE else (step.position, 4)
        for relid, packet in list(self._packets.items()):
            if packet.position == position and packet.stage == stage:
                self._reach(relid, stage, step)

    def _reach(self, relid: int, stage: int, step: Step) -> None:
        """The packet of this channel has come to the end of a stage."""
        packet = self._packets.get(relid)
        if packet is None:
            return
        if packet.stage != stage:
            # A step was left out: what follows cannot be told apart any more.
            if stage > packet.stage:
                packet.alone = False
            return
        if packet.alone:
            self._samples[DATA_STAGES[stage]].append(step.t_ns - packet.since_ns)
        packet.stage, packet.since_ns = stage + 1, step.t_ns


class ControlPath:
    """Follows messages of the host by their serials; feed it records in the order of time."""

    def __init__(self, samples: dict[str, list[int]]) -> None:
        self._samples = samples
        self._at: dict[int, tuple[int, int]] = {}
        self._in_slot: dict[int, int] = {}

    def feed(self, step: Step) -> None:
        """Take one record."""
        event, values = step.event, step.values
        if event == E_MESSAGE_POST:
            self._at[values[3]] = (0, step.t_ns)
        elif event == E_SLOT_WRITE:
            self._in_slot[values[0]] = values[4]
            self._reach(values[4], 0, step)
        elif event == E_ISR_ENTER and values[0] == HYPERVISOR_CALLBACK_VECTOR:
            self._reach(self._in_slot.get(step.position, 0), 1, step)
        elif event == E_SLOT_READ:
            self._reach(values[3], 2, step)
        elif event == E_WORK_QUEUE:
            self._reach(values[2], 3, step)
        elif event == E_WORK_RUN:
            self._reach(values[2], 4, step)

    def _reach(self, serial: int, stage: int, step: Step) -> None:
        reached, since_ns = self._at.get(serial, (-1, 0))
        if not serial or reached != stage:
            return
        self._samples[CONTROL_STAGES[stage]].append(step.t_ns - since_ns)
        self._at[serial] = (stage + 1, step.t_ns)


def stages_of(steps: Iterable[Step]) -> Stages:
    """Cut records, in the order of time, into stages."""
    stages = Stages()
    data, control = DataPath(stages.data), ControlPath(stages.control)
    for step in steps:
        data.feed(step)
        control.feed(step)
    return stages
