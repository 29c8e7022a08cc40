"""Rules about messages: their slots, the end of message, posts, work that they became, and what was refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from emu.control import slot_of
from emu.recording import TraceRecord
from tools.invariants import Feed, Machine, Rule, is_host

_LEGAL: Final = frozenset(
    {
        "port-insufficient-buffers",  # the guest tries again; recordings of before say it so
        "contact-version",  # so it is found out which version both speak,
        "unknown-message-connection",  # and by which connection
        "general-protection",  # a register is probed: the processor says it, not VMBus
        "hypercall-page-off",
    }
)
"""What is refused and was asked for in good faith."""


def is_in_good_faith(rule: str) -> bool:
    """Whether what broke this rule of its receiver's is nobody's fault: so is what crosses a rescind on its way."""
    return rule in _LEGAL or "revoked" in rule


class SlotsInOrder(Rule):
    """What was written into a slot is read before the next, and emptied by whoever read exactly that message."""

    NUMBER = 7
    TITLE = "A slot is overwritten only when it is empty, and emptied only by who has a copy of that message"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._written: dict[tuple[int, int], deque[TraceRecord]] = {}
        self._read: dict[tuple[int, int], TraceRecord] = {}
        self._positions: dict[int, int] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Writes of the host, reads and frees of the guest."""
        return {"slot_write": self._slot_write, "slot_read": self._slot_read, "slot_free": self._slot_free}

    def guest_died(self) -> None:
        """Whatever lay in its slots went with them."""
        self._written.clear()
        self._read.clear()

    def _slot_write(self, record: TraceRecord) -> None:
        # The hypervisor's own (a timer's) have no serial: who frees them says which they were by their type alone.
        if record.values[4]:
            self._written.setdefault((record.values[0], record.values[1]), deque()).append(record)

    def _slot_read(self, record: TraceRecord) -> None:
        sint, serial = record.values[0], record.values[3]
        key = record.actor.slot, sint
        before = self._read.get(key)
        if before is not None and before.values[3] != serial:
            self.violate(f"message {serial} is read while message {before.values[3]} was not freed", before, record)
        self._read[key] = record
        written = self._written.get((self.machine.position(record), sint), deque())
        # A slot that was not freed is read again; otherwise what is read is the oldest that was written.
        while written and written[0].values[4] < serial:
            lost = written.popleft()
            self.violate(f"message {lost.values[4]} was overwritten before it was read", lost, record)
        if written and written[0].values[4] == serial:
            written.popleft()

    def _slot_free(self, record: TraceRecord) -> None:
        sint, _type, serial, _pending = record.values
        read = self._read.pop((record.actor.slot, sint), None)
        # A timer's message is freed in the interrupt, by its type alone: it has no serial.
        if serial and (read is None or read.values[3] != serial):
            shown = (record,) if read is None else (read, record)
            self.violate(f"message {serial} is freed by who had not read it", *shown)


class EndOfMessage(Rule):
    """EOM is written if, and only if, the pending bit was set when the slot was freed."""

    NUMBER = 8
    TITLE = "EOM is written exactly when the pending bit was set behind the slot's freeing"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._freed: dict[int, TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Frees, EOMs, and the next read, by which an EOM is late."""
        return {"slot_free": self._slot_free, "eom": self._eom, "slot_read": self._next, "process_stop": self._next}

    def _slot_free(self, record: TraceRecord) -> None:
        self._next(record)
        self._freed[record.actor.slot] = record

    def _eom(self, record: TraceRecord) -> None:
        if is_host(record):
            return
        freed = self._freed.pop(record.actor.slot, None)
        if freed is None:
            self.violate("EOM without a slot that was freed", record)
        elif not freed.values[3]:
            self.violate(f"EOM behind message {freed.values[2]}, whose pending bit was not set", freed, record)

    def _next(self, record: TraceRecord) -> None:
        freed = self._freed.pop(record.actor.slot, None)
        if freed is not None and freed.values[3]:
            self.violate(f"no EOM behind message {freed.values[2]}, whose pending bit was set", freed, record)


class PendingIsServed(Rule):
    """Whatever a pending bit was set for has come into its slot."""

    NUMBER = 9
    TITLE = "What waits behind a pending bit is delivered"
    AT_END = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._pending: dict[tuple[int, int], TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """The bit, and the delivery that it is for."""
        return {
            "pending_set": self._pending_set,
            "slot_write": self._slot_write,
            "timer_withdrawn": self._timer_withdrawn,
            "reset": self._reset,
        }

    def _pending_set(self, record: TraceRecord) -> None:
        self._pending.setdefault((record.values[0], record.values[1]), record)

    def _slot_write(self, record: TraceRecord) -> None:
        self._pending.pop((record.values[0], record.values[1]), None)

    def _timer_withdrawn(self, record: TraceRecord) -> None:
        self._pending.pop((record.values[0], record.values[2]), None)

    def _reset(self, _record: TraceRecord) -> None:
        self._pending.clear()

    def end(self) -> None:
        """Nothing waits any more."""
        for (position, sint), record in self._pending.items():
            self.violate(f"SINT {sint} of VP page {position}: what the pending bit was set for never came", record)


class MessagesAreRead(Rule):
    """A message in a slot has somebody who takes it out."""

    NUMBER = 10
    TITLE = "A full slot has its tasklet coming: every message that was delivered is read"
    AT_END = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._written: dict[int, TraceRecord] = {}
        self._guest = False

    def feeds(self) -> Mapping[str, Feed]:
        """Deliveries and reads by serial."""
        return {"slot_write": self._slot_write, "slot_read": self._slot_read}

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._written.clear()

    def _slot_write(self, record: TraceRecord) -> None:
        if record.values[4]:  # a timer's message is taken by the interrupt itself
            self._written[record.values[4]] = record

    def _slot_read(self, record: TraceRecord) -> None:
        self._guest = True
        self._written.pop(record.values[3], None)

    def end(self) -> None:
        """All of them, by a guest that records."""
        if self._guest:
            for serial, record in self._written.items():
                self.violate(f"message {serial} stayed in its slot", record)


class PostsAreSeen(Rule):
    """What a thread of the guest posted is what the host was posted by it, in content and order."""

    NUMBER = 11
    TITLE = "The host sees each post of the guest exactly once, with its content"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._seen: dict[int, deque[TraceRecord]] = {}
        self._ours: set[int] = set()

    def feeds(self) -> Mapping[str, Feed]:
        """Both sides' records of posts: the host's comes first."""
        return {"post": self._post, "post_begin": self._post_begin}

    def guest_died(self) -> None:
        """It may have been killed between its post and the record of that."""
        self._seen.clear()
        self._ours.clear()

    def _post(self, record: TraceRecord) -> None:
        if is_host(record):
            self._seen.setdefault(slot_of(record.values[5]), deque()).append(record)
            return
        seen = self._seen.get(record.actor.slot)
        if not seen:
            self.violate("the host has not seen this post", record)
        elif (host := seen.popleft()).values[:4] != record.values[:4]:
            self.violate("the host was posted something else", host, record)

    def _post_begin(self, record: TraceRecord) -> None:
        self._ours.add(record.actor.slot)

    def end(self) -> None:
        """Nothing more than that, by actors that record their posts; a foreign guest does not."""
        for slot in self._ours & self._seen.keys():
            for record in self._seen[slot]:
                self.violate("the host was posted what its sender has no record of", record)


class WorkIsDone(Rule):
    """Work that was queued has run, to its end."""

    NUMBER = 28
    TITLE = "At the end nothing is left over: all work that was queued is done"
    AT_END = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._queued: dict[tuple[int, ...], TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Queued and done, by queue, function and serial."""
        return {"work_queue": self._work_queue, "work_done": self._work_done}

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._queued.clear()

    def _work_queue(self, record: TraceRecord) -> None:
        self._queued[record.values] = record

    def _work_done(self, record: TraceRecord) -> None:
        self._queued.pop(record.values, None)

    def end(self) -> None:
        """None is left."""
        for record in self._queued.values():
            self.violate(f"work of message {record.values[2]} was queued and never done", record)


class Progress(Rule):
    """Nobody goes round in a circle while nothing else happens."""

    NUMBER = 29
    TITLE = "No actor repeats one step a thousand times while nobody else does anything"
    NEEDS_ALL = False
    MOST: Final = 1_000
    PATIENCE_NS: Final = 1_000_000_000
    """For so long a tasklet may come back: it polls for what somebody else does, who may be waiting for a core (a NIC's
    poll, for room in a ring: a thousand times are 12 ms)."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._last: tuple[int, int, tuple[int, ...]] = (-1, 0, ())
        self._times = 0
        self._since_ns = 0
        self._told = False

    def feeds(self) -> Mapping[str, Feed]:
        """Every record that changes or asks something; who waits may wait for long."""
        names = (
            "post", "slot_write", "slot_read", "slot_free", "eom", "pending_set", "flag_set", "flag_clear", "irq_raise",
            "isr_enter", "tasklet_run", "work_run", "ring_publish", "ring_release", "signal", "message_take",
            "timer_expired",
        )  # fmt: skip
        return dict.fromkeys(names, self._step)

    def _step(self, record: TraceRecord) -> None:
        step = record.actor.slot, record.event.number, record.values
        if step != self._last:
            self._last, self._times, self._since_ns, self._told = step, 0, record.t_ns, False
        self._times += 1
        if self._times < self.MOST or self._told:
            return
        if record.event.name != "tasklet_run" or record.t_ns - self._since_ns >= self.PATIENCE_NS:
            self._told = True
            self.violate(f"{record.actor.name} did this {self._times} times, and nothing else happened", record)


class NothingIllegal(Rule):
    """No message, packet or index broke a rule of its receiver."""

    NUMBER = 30
    TITLE = "Each message is legal in its sender's state: nothing was refused"
    NEEDS_ALL = False

    def feeds(self) -> Mapping[str, Feed]:
        """Refusals of both sides."""
        return {"refused": self._refused}

    def _refused(self, record: TraceRecord) -> None:
        rule = str(record.shown["rule"])
        if not is_in_good_faith(rule):
            self.violate(f"{'the host' if is_host(record) else 'the guest'} refused something: {rule}", record)
