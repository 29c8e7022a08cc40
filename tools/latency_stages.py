"""Where the time of a round trip goes: records of a machine, cut into stages.

Two paths are followed, each from one record to the next of the same packet or message:

    data      (due ->) publish -> host took it -> host answered -> flag set -> interrupt requested -> ISR -> tasklet
              -> callback took it -> the sender has it
    control   posted -> in the slot -> ISR -> DPC -> queued -> handler begins

Packets of one channel come back in the order in which they were sent, each as long as it went. So where the records
tell of each packet (those of PING do) every one is followed, also with several under way: the bytes that an end has
taken or published say how far it has come. Who left out those behind a packet that was held up would leave out just
what waited for it. Elsewhere a publish may be of any number of packets: only one that is alone on its channel is
followed, as a stage that was guessed is worse than none. Messages are told apart by their serials. A step whose
record is missing (it was overwritten, or the step did not happen: the processor looked by itself) ends the path;
the stages before it count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from emu.tracing import (
    E_FLAG_SET,
    E_IRQ_RAISE,
    E_ISR_ENTER,
    E_MESSAGE_POST,
    E_REQUEST_START,
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

DUE_STAGE: Final = "due_to_send"
"""From when a round trip was due to its publish; the records do not say it, whoever measured does."""
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

    due: list[int] = field(default_factory=list)
    data: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in DATA_STAGES})
    control: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in CONTROL_STAGES})

    def all(self) -> dict[str, list[int]]:
        """Every stage that has a sample."""
        named = {DUE_STAGE: self.due, **self.data, **self.control}
        return {name: samples for name, samples in named.items() if samples}


@dataclass(slots=True)
class _Packet:
    """A packet under way: when it was published, and when the newest of its stages ended.

    `end` counts its channel's bytes up to its own last one, as the sender published them.
    """

    end: int
    published_ns: int
    since_ns: int
    followed: bool = True
    """Whether no step was left out: what follows one cannot be told apart."""


@dataclass(slots=True)
class _Channel:
    """Packets of one channel by the stage that they are in, and how many bytes each end has behind it.

    The counts begin again whenever nothing is under way, so that a record that is missing does no harm behind that.
    """

    stages: tuple[deque[_Packet], ...] = field(default_factory=lambda: tuple(deque() for _ in DATA_STAGES))
    each: bool = False
    """Whether each packet is published by itself, and its taking recorded."""
    known: bool = True
    """Whether what is published can be told apart."""
    position: int = -1
    """VP page of the newest flag."""
    sent: int = 0
    taken: int = 0
    answered: int = 0
    called: int = 0

    @property
    def under_way(self) -> bool:
        """Whether a packet has not come back to its sender."""
        return any(self.stages)

    def begin_again(self) -> None:
        """Nothing is under way."""
        for packets in self.stages:
            packets.clear()
        self.sent = self.taken = self.answered = self.called = 0


class DataPath:
    """Follows packets; feed it records in the order of time.

    `dues` are when the round trips were due (ns), in their order; none if nobody knows, or records are missing.
    """

    def __init__(self, samples: dict[str, list[int]], due: list[int] | None = None, dues: Iterable[int] = ()) -> None:
        self._samples = samples
        self._due_samples = [] if due is None else due
        self._dues: Iterator[int] = iter(dues)
        self._channels: dict[int, _Channel] = {}
        self._signaled: set[int] = set()
        """Channels with packets between flag and ISR."""

    def feed(self, step: Step) -> None:
        """Take one record."""
        event, values = step.event, step.values
        if event in (E_IRQ_RAISE, E_ISR_ENTER):
            self._interrupt(step)
        elif event in (E_RING_PUBLISH, E_RING_RELEASE):
            self._moved(step, event == E_RING_PUBLISH)
        elif event == E_FLAG_SET:
            self._flag(step, values[0], values[2])
        elif event == E_TASKLET_RUN and values[0] == ON_EVENT:
            if channel := self._channels.get(values[1]):
                self._reach(channel, 5, step.t_ns)
        elif event == E_REQUEST_START:
            self._channel(values[0]).each = True
        elif event == E_TASK_TAKE:
            self._task_took(step, *values[:2])

    def _channel(self, relid: int) -> _Channel:
        return self._channels.setdefault(relid, _Channel())

    def _moved(self, step: Step, publish: bool) -> None:
        """Bytes of a ring were published, or released by its reader."""
        relid, side, _index, count = step.values
        channel = self._channel(relid)
        if publish and side == TO_HOST:
            self._sent(channel, step.t_ns, count)
        elif not channel.known:
            return
        elif side == TO_HOST:
            channel.taken += count
            self._reach(channel, 0, step.t_ns, channel.taken)
        elif publish:
            channel.answered += count
            self._left_out(channel, 0, 2, channel.answered)
            self._reach(channel, 1, step.t_ns, channel.answered)
        else:
            channel.called += count
            self._reach(channel, 6, step.t_ns, channel.called)
            for stage in range(5, -1, -1):
                self._left_out(channel, stage, 7, channel.called)

    def _sent(self, channel: _Channel, t_ns: int, count: int) -> None:
        if not channel.each and (channel.under_way or not channel.known):
            # A second one before the first has come back, and whose answer is whose cannot be seen.
            channel.begin_again()
            channel.known = False
            return
        channel.known = True
        channel.sent += count
        channel.stages[0].append(_Packet(channel.sent, t_ns, t_ns))

    def _flag(self, step: Step, position: int, relid: int) -> None:
        channel = self._channels.get(relid)
        if channel is None:
            return
        if channel.position != position:
            # It was moved: interrupts that are still to come for these are another processor's.
            for packet in (*channel.stages[3], *channel.stages[4]):
                packet.followed = False
            channel.position = position
        self._reach(channel, 2, step.t_ns)
        if channel.stages[3]:
            self._signaled.add(relid)

    def _interrupt(self, step: Step) -> None:
        """An interrupt belongs to every channel whose flag is up on that VP and that waits for it."""
        if step.values[-1] != HYPERVISOR_CALLBACK_VECTOR or not self._signaled:
            return
        position, stage = (step.values[0], 3) if step.event == E_IRQ_RAISE else (step.position, 4)
        for relid in list(self._signaled):
            channel = self._channels[relid]
            if channel.position == position:
                self._reach(channel, stage, step.t_ns)
            if not channel.stages[3] and not channel.stages[4]:
                self._signaled.discard(relid)

    def _task_took(self, step: Step, relid: int, count: int) -> None:
        channel = self._channels.get(relid)
        if channel is None:
            return
        for _ in range(count):
            due_ns = next(self._dues, None)  # also of one that was not followed
            stage = next((stage for stage in range(7, -1, -1) if channel.stages[stage]), None)
            if stage is None:
                continue
            packet = channel.stages[stage].popleft()
            if due_ns is not None:
                self._due_samples.append(packet.published_ns - due_ns)
            if stage == 7:
                self._sample(packet, 7, step.t_ns)
        if not channel.under_way:
            channel.begin_again()

    def _reach(self, channel: _Channel, stage: int, t_ns: int, end: int | None = None) -> None:
        """The packets of this channel that are in a stage have come to its end; if `end` is said, those up to there."""
        packets, behind = channel.stages[stage : stage + 2]
        while packets and (end is None or packets[0].end <= end):
            packet = packets.popleft()
            self._sample(packet, stage, t_ns)
            behind.append(packet)

    def _left_out(self, channel: _Channel, stage: int, reached: int, end: int) -> None:
        """The packets up to `end` that are in `stage` have come to another: steps are missing."""
        packets = channel.stages[stage]
        while packets and packets[0].end <= end:
            packet = packets.popleft()
            packet.followed = False
            channel.stages[reached].append(packet)

    def _sample(self, packet: _Packet, stage: int, t_ns: int) -> None:
        if packet.followed:
            self._samples[DATA_STAGES[stage]].append(t_ns - packet.since_ns)
        packet.since_ns = t_ns


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


def stages_of(steps: Iterable[Step], dues: Iterable[int] = ()) -> Stages:
    """Cut records, in the order of time, into stages; `dues` as `DataPath` wants them."""
    stages = Stages()
    data, control = DataPath(stages.data, stages.due, dues), ControlPath(stages.control)
    for step in steps:
        data.feed(step)
        control.feed(step)
    return stages
