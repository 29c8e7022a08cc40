"""The guest of the explorer: the whole guest kernel in one process, one input at a time, and what makes two states one.

An input is a message of the host's, or something that the guest's administrator does. The guest runs until
nobody in it can go on; what it posted meanwhile is the output. A state in which a thread is in the middle of
something cannot be copied, as part of it is where that thread waits (`explore_world`): it is reached again by doing
again what led to it (`explore_cores.Core`).
What makes two states one is `explore_digest`'s.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from emu.machine import Machine
from emu.wire.hypercalls import HvStatus
from emu.wire.messages import MessageType
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, HVMSG_NONE, VMBUS_MESSAGE_SINT, message_slot
from guestproc.current import Current
from guestproc.kernel.layout import ChannelState
from guestproc.kernel.records import Table
from guestproc.protocol.triage import MESSAGE_BYTES
from guestproc.vmbus.bus import vmbus_exit, vmbus_start
from guestproc.vmbus.device import bind_store, find_driver, held_device, unbind_store
from hostproc.partition import Partition
from hostproc.ports import HostMessagePort, MessagePort
from tools.explore_cores import FLAT, Setting
from tools.explore_digest import Names
from tools.explore_events import CLASS
from tools.explore_messages import GpadlNames
from tools.explore_world import CopiedWorld, Saved
from tools.guest_world import Task

MESSAGE_CONNECTIONS: Final = (1, 4)
RING_PAGES: Final = 2
PROCESSOR: Final = "vcpu0"


class Wire:
    """The other end of the guest: what comes goes into its slot, what it posts is kept."""

    def __init__(self, partition: Partition, machine: Machine) -> None:
        self._synic = partition.synics[0]
        self._ram = machine.ram.memory
        self.outbox: list[bytes] = []
        self.posted: list[bytes] = []
        self._port = MessagePort(partition.queues, 1, 0, VMBUS_MESSAGE_SINT)
        for connection_id in MESSAGE_CONNECTIONS:
            partition.connections.messages[connection_id] = _Post(connection_id, self)

    def step(self) -> bool:
        """Put the next message into the slot, once that is empty.

        What an earlier message left behind a shorter one is cleared: it decides nothing, and tells states apart.
        """
        if not self.outbox:
            return False
        slot = (self._synic.simp.gpa or 0) + message_slot(VMBUS_MESSAGE_SINT)
        if self._synic.slot_type(VMBUS_MESSAGE_SINT) == HVMSG_NONE:
            self._ram[slot : slot + MESSAGE_BYTES] = bytes(MESSAGE_BYTES)
        if self._port.post(HVMSG_CHANNEL_MESSAGE, self.outbox[0]):
            return False
        self.outbox.pop(0)
        return True


class _Post(HostMessagePort):
    """Takes everything."""

    def __init__(self, connection_id: int, wire: Wire) -> None:
        super().__init__(connection_id, lambda: None)
        self._wire = wire

    def post(self, message_type: int, payload: bytes, serial: int = 0) -> HvStatus:
        self._wire.posted.append(payload)
        return HvStatus.SUCCESS


@dataclass(frozen=True, slots=True)
class GuestChannel:
    """A channel as the guest has it; `gpadl` by its name on the wire, `pages`: for rings; `sub`: a sub-channel."""

    state: ChannelState
    rescinded: bool
    gpadl: int
    pages: bool
    sub: bool


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What the invariants ask of a state of the guest; `requests`: type, relid and GPADL of what awaits an answer."""

    channels: Mapping[int, GuestChannel]
    requests: tuple[tuple[str, int, int], ...]
    busy: tuple[str, ...]
    unloaded: bool
    leaks: tuple[str, ...]
    runnable: bool
    """Whether a thread can go on."""
    held: Mapping[str, str]
    """Which thread is at which sync point."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """A state that can be put back; `task` has ended."""

    world: Saved
    names: GpadlNames
    task: Task[Any] | None
    used: tuple[str, ...]


class Guest:
    """One guest, booted by `boot`, then driven by `do`."""

    def __init__(self, setting: Setting) -> None:
        spec = {"class": CLASS, "ring_pages": RING_PAGES, "count": 1}
        specs = [{**spec, "subchannels": 0 if n else setting.subchannels} for n in range(setting.devices)]
        self._threads = setting.threads
        self.world = CopiedWorld(Wire, cpus=1, era=setting.era, devices=specs, switches=setting.switches)
        wire = self.world.host
        assert isinstance(wire, Wire)
        self._wire = wire
        self._names = GpadlNames()
        self._task: Task[Any] | None = None
        self._used: list[str] = []

    def boot(self) -> list[bytes]:
        """Up to the first message to the host."""
        self.world.boot_bus()
        self._task = self.world.start(vmbus_start)
        return self._settle()

    def begin(self) -> None:
        """The boot is over: from now on its threads take turns, if that is explored."""
        self.world.stepping = self._threads

    def do(self, kind: str, argument: Any) -> tuple[list[bytes], list[str]]:
        """Do one input; what was posted, and what was wrong in the guest."""
        problems: list[str] = []
        try:
            self._order(kind, argument)
            posted = self._settle()
        except AssertionError as error:
            return [], [f"the guest broke down: {str(error).strip().splitlines()[-1]}"]
        if any(current.refused for current in self.world.everybody()):
            refused = self.world.refused()
            problems.append(f"INV-30: the guest refused the host's message ({', '.join(sorted(refused))})")
        problems += [f"INV-13: {line}" for line in self.world.tables.damage()]
        return posted, problems

    def again(self, kind: str, argument: Any) -> None:
        """Do an input of which it is known what comes of it: nobody looks for damage."""
        self._order(kind, argument)
        self._settle()

    def _order(self, kind: str, argument: Any) -> None:
        """Bring an input in: a message into its slot, a task to its processor, a turn to whoever has it."""
        world = self.world
        if kind == "run":
            world.go_on(argument)
            return
        if kind == "deliver":
            self._wire.outbox.append(self._names.to_guest(argument))
            moved = self._wire.step()
            assert moved, "the slot of the last message was not emptied"
        else:
            self._used.append(f"{kind} {argument}")
            self._task = world.start(_ACTIONS[kind](argument))
        if world.stepping:
            world.interrupt(PROCESSOR)

    def save(self) -> _Saved | None:
        """The state, unless somebody in the guest is in the middle of something."""
        world = self.world.save()
        return None if world is None else _Saved(world, self._names.copy(), self._task, tuple(self._used))

    def restore(self, saved: _Saved) -> None:
        """Be in that state."""
        self._wire.outbox.clear()
        self._wire.posted.clear()
        self._names, self._task, self._used = saved.names.copy(), saved.task, list(saved.used)
        self.world.restore(saved.world)

    def close(self) -> None:
        """End its threads."""
        self.world.close()

    def _settle(self) -> list[bytes]:
        if not self.world.stepping:
            self.world.settle()
        posted, self._wire.posted = self._wire.posted, []
        return [self._names.to_wire(payload) for payload in posted]

    # -- looking --------------------------------------------------------------------------------------------

    def actions(self) -> list[tuple[str, Any]]:
        """What its administrator may do now: each of it once, and one thing at a time."""
        found: list[tuple[str, Any]] = []
        if self.world.stepping:
            found += [("run", name) for name in self.world.runnable()]
        if self._task is None or not self._task.ended() or "unload 0" in self._used:
            return found
        found.append(("unload", 0))
        for device in self.world.tables.devices.live():
            channel = self.world.tables.channels.find(device.channel)
            if channel is None:
                continue
            kind = "unbind" if device.driver else "bind"
            if f"{kind} {channel.relid}" not in self._used:
                found.append((kind, channel.relid))
        return sorted(found)

    def facts(self) -> GuestFacts:
        """See `GuestFacts`."""
        tables = self.world.tables
        channels = {
            one.relid: GuestChannel(
                ChannelState(one.state.load()),
                one.rescind.load() != 0,
                self._names.wire(one.ringbuffer_gpadlhandle),
                one.ring_gpa != 0,
                one.primary_channel != 0,
            )
            for one in tables.channels.live()
        }
        requests = tuple(
            sorted(
                (MessageType(one.msgtype).name, one.child_relid, self._names.wire(one.gpadl))
                for one in tables.requests.live()
            )
        )
        busy = [f"queue {queue.index}" for queue in tables.queues.live() if queue.head or any(queue.running)]
        if self._task is not None and not self._task.ended():
            busy.append("a task")
        unloaded = "unload 0" in self._used and not busy
        leaks = tuple(f"{count} {name}" for name, count in tables.leaks().items()) if unloaded else ()
        world = self.world
        return GuestFacts(channels, requests, tuple(busy), unloaded, leaks, bool(world.runnable()), world.held())

    def digest(self) -> bytes:
        """What this state has in common with those that are equal to it."""
        tables = self.world.tables
        names = Names(self.world, self._names)
        parts: list[Any] = [
            tuple(sorted(self._used)),
            self._names.counts(),
            [names.of(one) for one in tables.chn_list],
            [[names.of(sub) for sub in tables.sc_list(one)] for one in tables.chn_list],
            [names.of(one) for one in tables.chn_msg_list],
            tuple(tables.relids.load(relid) != 0 for relid in range(8)),
        ]
        fixed: tuple[Table[Any], ...] = (tables.connections, tables.cpus, tables.queues, tables.drivers)
        parts += [[names.record(one) for one in table.live()] for table in fixed]
        others: tuple[Table[Any], ...] = (tables.channels, tables.devices, tables.requests, tables.net_channels)
        parts += [sorted(marshal.dumps(names.record(one), FLAT) for one in table.live()) for table in others]
        work = sorted(tables.work.live(), key=lambda one: (one.queue, one.sequence))
        parts.append([names.record(one) for one in work])
        parts += [names.stack(lane.frame) for lane in self.world.lanes]
        parts.append(self.world.runnable())
        return hashlib.blake2b(marshal.dumps(parts, FLAT), digest_size=16).digest()


def _unload(_argument: int) -> Any:
    return vmbus_exit


def _unbind(relid: int) -> Any:
    def unbind(current: Current) -> int:
        with held_device(current, relid, b"") as device:
            return -1 if device is None else unbind_store(current, device)

    return unbind


def _bind(relid: int) -> Any:
    def bind(current: Current) -> int:
        record = find_driver(current, "hv_echo")
        with held_device(current, relid, b"") as device:
            return -1 if device is None or record is None else bind_store(current, device, record)

    return bind


_ACTIONS: Final = {"unload": _unload, "unbind": _unbind, "bind": _bind}
