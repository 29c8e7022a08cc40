"""What makes two states of the explorer's guest one: what is in its records, by meaning, and where its threads wait.

records   every field of every live one, but for those of `NAMES`; a record that is named, by what it is
lists     their orders
threads   functions, instructions, and the values of their variables
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from types import FrameType
from typing import Any, Final

from guestproc.kernel.locks import Mutex
from guestproc.kernel.records import Record, Table, Word
from guestproc.kernel.tasklet import Tasklet
from guestproc.kernel.wait import Completion, WaitQueue
from guestproc.kernel.workqueue import WorkQueues
from tools.explore_messages import GpadlNames
from tools.guest_world import World

# Fields that are names, or that only count: no decision of the bus driver's depends on them.
NAMES: Final = frozenset(
    {
        # times, serials, places in a sequence
        "since_ns", "until_ns", "subject", "entered_ns", "queued_ns", "serial", "offer_serial", "sequence", "queued",
        "finished", "running", "flush_target", "uevent_seqnum", "isr_sequence", "next_gpadl_handle",
        # counters
        "interrupts", "irq_hv_callback_count", "sig_events", "intr_in_full", "intr_out_empty",
        # links of lists, whose order is in the digest by itself
        "next", "head", "tail", "chn_list", "chn_msg_list", "listentry", "sc_list", "sc_link", "hash_next",
        "msglistentry", "percpu_list",
        # pages, of which there are always enough
        "ring_gpa", "ring_pfns_gpa", "ring_generation", "rqstor_gpa",
    }
)  # fmt: skip
_HANDLES: Final = frozenset({"primary_channel", "device_obj", "channel", "channel_callback_context", "waiting_channel"})
_GPADLS: Final = frozenset({"gpadl", "ringbuffer_gpadlhandle"})
_REFERRING: Final = (Mutex, Completion, WaitQueue, Tasklet, memoryview)
"""Parts of a record that name other records."""
_NOT_STATE: Final = frozenset({"self", "current", "actor", "sequence", "index", "position", "word", "newest", "last"})
"""Variables that name an object of the program, or a record's place."""
_FLUSH: Final = WorkQueues.flush.__code__


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the records of a class are read: fields whose bytes are their meaning in one go, the others by name."""

    plain: Struct
    others: tuple[str, ...]


_PLANS: Final[dict[type[Record], _Plan]] = {}


def _plan(record: Record) -> _Plan:
    layout, at, others = "<", 0, []
    for field in sorted(record.FIELDS, key=lambda one: one.offset):
        name = field.name
        if name in NAMES:
            continue
        if name in _GPADLS or name in _HANDLES or name == "response" or isinstance(getattr(record, name), _REFERRING):
            others.append(name)
            continue
        code = {1: "B", 4: "I", 8: "Q"}[field.size] if isinstance(field, Word) else f"{field.size}s"
        layout += f"{field.offset - at}x{code}"
        at = field.offset + field.size
    return _Plan(Struct(layout), tuple(others))


class Names:
    """Values of one state, with records and GPADLs by what they are instead of where they lie."""

    def __init__(self, world: World, gpadls: GpadlNames) -> None:
        self._world = world
        self._gpadls = gpadls
        tables = world.tables
        self._channels = {one.handle: f"channel {one.relid}" for one in tables.channels.live()}
        self._devices = {
            one.handle: f"device {self._channels.get(one.channel, one.dev_instance)}" for one in tables.devices.live()
        }

    def of(self, record: Record) -> str:
        """A record's name."""
        match record.table.name:
            case "channels":
                return self._channels.get(record.handle, "gone")
            case "devices":
                return self._devices.get(record.handle, "gone")
            case "requests" if record.alive():
                one: Any = record
                return f"request {one.msgtype} {one.child_relid} {self._gpadls.wire(one.gpadl)}"
            case "work" | "waiters" | "requests":
                return record.table.name
            case name:
                return f"{name} {record.index}"

    def record(self, record: Record) -> tuple[Any, ...]:
        """Every field that is state."""
        plan = _PLANS.get(type(record))
        if plan is None:
            plan = _PLANS[type(record)] = _plan(record)
        return (*plan.plain.unpack_from(record._octets), *[self._field(record, name) for name in plan.others])

    def _field(self, record: Record, name: str) -> Any:
        value: Any = getattr(record, name)
        if name == "response":
            return self._gpadls.renamed(value)
        if name in _GPADLS:
            return self._gpadls.wire(value)
        if name in _HANDLES:
            return self._handle(value)
        if isinstance(value, Mutex):
            return value.owner, value._chain.waiters(self._waiters)
        if isinstance(value, Completion):
            return value.done, value.waiters(self._waiters)
        if isinstance(value, WaitQueue):
            return value.waiters(self._waiters)
        if isinstance(value, Tasklet):
            return value.word.load(), value.function, self._handle(value.argument)
        return [self._handle(word) for word in value]

    @property
    def _waiters(self) -> Table[Any]:
        return self._world.tables.waiters

    def _handle(self, value: int) -> Any:
        """Handles are at least 2^32; which table one is of says the field, so both names are said."""
        if value < 1 << 32:
            return value
        found = (self._channels.get(value), self._devices.get(value))
        return found if any(found) else value if value >> 56 else "gone"

    # -- threads ----------------------------------------------------------------------------------------------

    def stack(self, frame: FrameType | None) -> list[Any]:
        """Where a thread waits, innermost first."""
        found: list[Any] = []
        while frame is not None:
            code = frame.f_code
            if "guestproc" in code.co_filename:
                variables = [
                    (name, self._value(name, value, 2))
                    for name, value in frame.f_locals.items()
                    if name not in _NOT_STATE and not name.endswith("_ns")
                ]
                if code is _FLUSH and "last" in frame.f_locals:
                    # How much of what is queued it waits for; the numbers themselves only count.
                    variables.append(("behind", frame.f_locals["queue"].queued - frame.f_locals["last"]))
                found.append((code.co_qualname, frame.f_lasti, variables))
            frame = frame.f_back
        return found

    def _value(self, name: str, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, (bool, str, bytes)):
            return value
        if isinstance(value, int):
            return self._gpadls.wire(value) if self._gpadls.known(value) else self._handle(int(value))
        if isinstance(value, Record):
            return self.of(value)
        if isinstance(value, (list, tuple)):
            return [self._value(name, one, depth) for one in value]
        cells = getattr(value, "__closure__", None)
        if cells and depth:
            return [self._value(name, cell.cell_contents, depth - 1) for cell in cells]
        return type(value).__name__
