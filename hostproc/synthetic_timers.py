"""Synthetic timers: four for each VP, one-shot or periodic, in message mode (TLFS "Synthetic Timers", reference 1.5).

A timer that expires posts HVMSG_TIMER_EXPIRED to its SINT, and there *the slot rule* holds (`_signal`): the message
goes into an empty slot only. A one-shot's waits for the slot, like any message: the resident one gets its pending
bit, and the guest's EOM brings it in. A periodic tick that finds the slot busy is dropped; the next one comes anyway.
Nothing is tried again by time. Each timer has one buffer, so no more than one of its messages is ever outstanding.

Time is partition reference time, handed in: so timers stand still while the machine's clock is held, and jump with it.
Whoever drives this calls `run_due` when `next_expiration` has come; when no timer is armed that is NEVER.

Direct mode (an interrupt in place of the message) is not announced in CPUID, so asking for it is a #GP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from emu.errors import GeneralProtection
from emu.switches import ALL_FIXED, Fix
from emu.syncpoint import Point
from emu.tracing import (
    E_TIMER_ARMED,
    E_TIMER_DELIVERED,
    E_TIMER_DROPPED,
    E_TIMER_EXPIRED,
    E_TIMER_WITHDRAWN,
    Recorder,
)
from emu.wire.hv_message import HvMessage
from emu.wire.synic import (
    HV_STIMER_AUTOENABLE,
    HV_STIMER_DIRECT_MODE,
    HV_STIMER_ENABLE,
    HV_STIMER_LAZY,
    HV_STIMER_PERIODIC,
    HV_STIMER_RESERVED,
    HV_SYNIC_STIMER_COUNT,
    HV_X64_MSR_STIMER0_CONFIG,
    HVMSG_TIMER_EXPIRED,
    TIMER_PAYLOAD,
    stimer_sint,
)
from hostproc.message_queues import MessageQueues, QueuedMessage
from hostproc.points import NoPoints

_TIMER_RETRY: Final = int(Point.HOST_TIMER_RETRY)

NEVER: Final = 1 << 80
"""Later than any expiry: a count has 64 bits."""
SHORTEST_PERIOD: Final = 1_000
"""100 µs: a shorter period is honoured as this one, so that no guest keeps the host busy with ticks alone."""
MOST_STEPS: Final = 1_024
"""Far more than all timers of a machine can expire in one look at the clock (INV-29)."""


class TimerMessage(QueuedMessage):
    """The one buffer of a timer, on its way: it says when it should have come, and when it did."""

    __slots__ = ("_delivered", "_index", "expiration_time")

    def __init__(self, index: int, expiration_time: int, delivered: Callable[[], int], dropped: Callable[[], None]):
        super().__init__(_message(index, expiration_time, 0), 0, dropped)
        self._index = index
        self._delivered = delivered
        self.expiration_time = expiration_time

    def taken(self) -> bytes:
        """With the time of delivery, which is now."""
        return _message(self._index, self.expiration_time, self._delivered())


class SyntheticTimer:
    """Registers of one timer, when it expires next (NEVER: it does not run), and its message while that waits."""

    __slots__ = ("config", "count", "expiration_time", "index", "message", "position")

    def __init__(self, position: int, index: int) -> None:
        self.position: Final = position
        self.index: Final = index
        self.config = 0
        self.count = 0
        self.expiration_time = NEVER
        self.message: TimerMessage | None = None

    @property
    def sint(self) -> int:
        """SINTx: where its messages go."""
        return stimer_sint(self.config)

    @property
    def periodic(self) -> bool:
        """Whether it expires again and again."""
        return bool(self.config & HV_STIMER_PERIODIC)

    @property
    def period(self) -> int:
        """Of a periodic timer, in 100 ns."""
        return max(self.count, SHORTEST_PERIOD)


class SyntheticTimers:
    """The timers of all VPs; `changed(position)` is called when a register of that VP changes by itself, too."""

    def __init__(
        self,
        vp_count: int,
        queues: MessageQueues,
        reference_time: Callable[[], int],
        changed: Callable[[int], None],
        trace: Recorder | None = None,
        points: NoPoints | None = None,
        fix: Fix = ALL_FIXED,
    ) -> None:
        self._points: Final = points or NoPoints()
        self._fix: Final = fix
        self._timers: Final = [
            [SyntheticTimer(position, index) for index in range(HV_SYNIC_STIMER_COUNT)] for position in range(vp_count)
        ]
        self.armed: Final[dict[SyntheticTimer, None]] = {}
        """Those that run; nearly always there are none, and then nobody need look at the clock."""
        self._queues: Final = queues
        self._reference_time: Final = reference_time
        self._changed: Final = changed
        self._trace: Final = trace
        self.next_expiration = NEVER
        """Reference time at which `run_due` is due."""

    # -- registers ----------------------------------------------------------------------------------

    def of_vp(self, position: int) -> list[SyntheticTimer]:
        """The four timers of a VP."""
        return self._timers[position]

    def read_msr(self, position: int, msr: int) -> int:
        """Value of STIMERn_CONFIG or STIMERn_COUNT: as written, but that Enable tells whether it is enabled now."""
        timer, is_count = self._find(position, msr)
        return timer.count if is_count else timer.config

    def write_msr(self, position: int, msr: int, value: int) -> None:
        """Write STIMERn_CONFIG or STIMERn_COUNT: what ran, or waited, is over. GeneralProtection for a bad value."""
        timer, is_count = self._find(position, msr)
        if not is_count and value & (HV_STIMER_RESERVED | HV_STIMER_DIRECT_MODE):
            raise GeneralProtection("write of STIMER_CONFIG", msr, value)
        self._stop(timer)
        if not is_count:
            timer.config = value
        else:
            timer.count = value
            if value == 0:
                timer.config &= ~HV_STIMER_ENABLE
            elif timer.config & HV_STIMER_AUTOENABLE:
                timer.config |= HV_STIMER_ENABLE
        if timer.sint == 0:
            # No enabled timer has SINT 0: it is disabled at once.
            timer.config &= ~HV_STIMER_ENABLE
        self._start(timer)
        self._changed(position)

    def reset(self) -> None:
        """VP reset, of all VPs: every register 0, nothing runs or waits."""
        for timer in (timer for timers in self._timers for timer in timers):
            self._stop(timer)
            timer.config = timer.count = 0

    def _find(self, position: int, msr: int) -> tuple[SyntheticTimer, bool]:
        number, is_count = divmod(msr - HV_X64_MSR_STIMER0_CONFIG, 2)
        return self._timers[position][number], bool(is_count)

    def _start(self, timer: SyntheticTimer) -> None:
        """Let an enabled timer that has a count run: a one-shot until that time, a periodic one from now on."""
        if not timer.config & HV_STIMER_ENABLE or timer.count == 0:
            return
        timer.expiration_time = self._reference_time() + timer.period if timer.periodic else timer.count
        self.armed[timer] = None
        self._look_ahead()
        if self._trace:
            self._trace.record(
                E_TIMER_ARMED,
                timer.position,
                timer.index,
                timer.sint,
                timer.periodic,
                timer.count,
                timer.expiration_time,
            )

    def _stop(self, timer: SyntheticTimer) -> None:
        """Let it run no more, and take back what it had to say."""
        self._disarm(timer)
        if timer.message is not None:
            self._queues.withdraw(timer.position, timer.sint, timer.message)
            self._record(E_TIMER_WITHDRAWN, timer, timer.message.expiration_time)
            timer.message = None

    def _disarm(self, timer: SyntheticTimer) -> None:
        timer.expiration_time = NEVER
        self.armed.pop(timer, None)
        self._look_ahead()

    def _look_ahead(self) -> None:
        self.next_expiration = min((timer.expiration_time for timer in self.armed), default=NEVER)

    # -- expiry -------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether a timer expires now."""
        return self.next_expiration <= self._reference_time()

    def run_due(self) -> bool:
        """Let every timer expire whose time has come, the earliest first; whether there was any."""
        now = self._reference_time()
        steps = 0
        while self.next_expiration <= now:
            self._expire(min(self.armed, key=lambda timer: timer.expiration_time), now)
            steps += 1
            # Each expiry either ends a timer or moves it behind `now`: no guest can run meanwhile, so one that did
            # neither would come back for ever.
            assert steps <= MOST_STEPS, f"INV-29: {steps} timers expired, and neither guest nor clock moved"
        return steps > 0

    def _expire(self, timer: SyntheticTimer, now: int) -> None:
        """A one-shot is disabled by it; a periodic one goes on in step with its start, whatever it missed."""
        expiration_time, missed = timer.expiration_time, 0
        if timer.periodic:
            missed = (now - expiration_time) // timer.period
            expiration_time += missed * timer.period
            timer.expiration_time = expiration_time + timer.period
            self._look_ahead()
        else:
            timer.config &= ~HV_STIMER_ENABLE
            self._disarm(timer)
        self._changed(timer.position)
        self._record(E_TIMER_EXPIRED, timer, expiration_time, missed)
        self._signal(timer, expiration_time, now)

    def _signal(self, timer: SyntheticTimer, expiration_time: int, now: int) -> None:
        """The slot rule: see the module's docstring."""
        if timer.periodic and (
            self._queues.would_wait(timer.position, timer.sint) or self._too_late(timer, expiration_time, now)
        ):
            self._record(E_TIMER_DROPPED, timer, expiration_time)
            return
        if not self._fix.timer_waits_for_slot and self._queues.would_wait(timer.position, timer.sint):
            if not self._points.armed[_TIMER_RETRY] or not self._points.hold(
                _TIMER_RETRY, 0, partial(self._retry, timer)
            ):
                self._retry(timer)
            return
        timer.message = TimerMessage(
            timer.index, expiration_time, lambda: self._delivered(timer, expiration_time), lambda: self._gone(timer)
        )
        self._queues.post(timer.position, timer.sint, timer.message)

    def _retry(self, timer: SyntheticTimer) -> None:
        """Wrong on purpose (races.md B5): armed again for now, and asked again before the guest may empty the slot."""
        timer.config |= HV_STIMER_ENABLE
        timer.expiration_time = self._reference_time()
        self.armed[timer] = None
        self._look_ahead()

    @staticmethod
    def _too_late(timer: SyntheticTimer, expiration_time: int, now: int) -> bool:
        """A lazy timer leaves a tick out that comes nearer to the next one than to its own time."""
        return bool(timer.config & HV_STIMER_LAZY) and 2 * (now - expiration_time) > timer.period

    def _delivered(self, timer: SyntheticTimer, expiration_time: int) -> int:
        now = self._reference_time()
        self._record(E_TIMER_DELIVERED, timer, expiration_time, now)
        return now

    @staticmethod
    def _gone(timer: SyntheticTimer) -> None:
        """The buffer is free again."""
        timer.message = None

    def _record(self, event: int, timer: SyntheticTimer, *values: int) -> None:
        if self._trace:
            self._trace.record(event, timer.position, timer.index, timer.sint, *values)


def _message(index: int, expiration_time: int, delivery_time: int) -> bytes:
    payload = TIMER_PAYLOAD.pack(index, expiration_time % (1 << 64), delivery_time % (1 << 64))
    return HvMessage(HVMSG_TIMER_EXPIRED, payload).pack()
