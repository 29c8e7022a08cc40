"""The whole state of a machine as one tree, both ends joined: what `inspect` shows and a crash record keeps.

    machine  connection  channels/RELID/{host,guest,ring,gpadls}  vps/INDEX/{irr,isr,sint,slot,…}  queues/NAME
    gpadls/RELID  ports  requests  devices/INSTANCE  drivers/NAME  processes/NAME  tasks  counters
    faults  refused  ignored

All of it is read from shared memory, without a lock and without a word to anybody: the host's half from its
mirror, the guest's from its records in RAM. So each word is as it was when it was read, and the machine goes on
meanwhile. Of a guest that is not ours there is no `guest`, for its RAM is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from struct import Struct
from typing import Any, Final

from emu import plugin
from emu.control import ActorKind, ActorRow
from emu.doorbells import unannounced
from emu.fault_plan import FaultPlan
from emu.host_tables import HostGpadl, HostTables, HostTimer
from emu.ipc.atomics import ACQUIRE
from emu.layout import (
    EXIT_SLOT,
    EXIT_SLOTS,
    VECTOR_WORDS,
    VP_AUTO_EOI,
    VP_EXIT_SLOT,
    VP_IN_SERVICE,
    VP_REQUEST,
    VP_RUN_STATE,
    X_ARGUMENTS,
    X_CLAIMER,
    X_OPERATION,
    X_STATE,
    ExitOperation,
    ExitState,
    RunState,
    vp_page_offset,
)
from emu.machine import Machine
from emu.memory import reserve_ram
from emu.mirror import Left, Mirror, MirrorChannel
from emu.task_board import TaskBoard
from emu.wire.device_classes import class_of
from emu.wire.messages import MessageType
from emu.wire.ring_layout import (
    CONTROL_PAGE_SIZE,
    FEATURE_BITS,
    PENDING_SEND_SZ,
)
from emu.wire.synic import (
    HV_MESSAGE_FLAG_PENDING,
    HV_STIMER_AUTOENABLE,
    HV_STIMER_ENABLE,
    HV_STIMER_LAZY,
    HV_STIMER_PERIODIC,
    HV_SYNIC_SINT_AUTO_EOI,
    HV_SYNIC_SINT_COUNT,
    HV_SYNIC_SINT_MASKED,
    HV_SYNIC_SINT_POLLING,
    HVMSG_CHANNEL_MESSAGE,
    MESSAGE_FLAGS_OFFSET,
    MESSAGE_PAYLOAD_OFFSET,
    message_slot,
    page_register_enabled,
    page_register_gpa,
    sint_vector,
    stimer_sint,
)
from emu.wire.versions import version_text
from guestproc.drivers import table as _drivers  # noqa: F401 (registers names of functions)
from guestproc.kernel.functions import WORK_FUNCTIONS
from guestproc.kernel.layout import BOOT_MAGIC, BOOT_RECORD_GPA, Channel, Device, KernelTables
from guestproc.kernel.rqstor import Requestor
from guestproc.kernel.workqueue import WORKERS, QueueNumber
from guestproc.protocol.devices import is_registered, name_of
from guestproc.view import INBOUND, OUTBOUND, GuestView
from guestproc.vmbus import message_dpc as _message_dpc  # noqa: F401 (registers names of functions)
from hostproc.protocol.states import ChannelState, GpadlState
from tools.state_node import Node
from tools.state_records import record_values
from tools.sysfs_guest import instance_of

FLAG_BYTES: Final = 256
SHOWN_RUNS: Final = 8
"""Runs of pages that are shown of a GPADL."""
"""Event flags of one SINT in SIEFP's page."""
_U32: Final = Struct("<I")
_U64: Final = Struct("<Q")


def _numbered(values: Sequence[Any]) -> dict[str, Node]:
    """As a branch, the oldest first."""
    return {str(number): value for number, value in enumerate(values)}


class StateTree:
    """The tree of one machine that is attached to; branches are looked at when they are asked for."""

    def __init__(self, machine: Machine) -> None:
        plugin.known_from(machine.config)
        self._machine: Final = machine
        self._control: Final = machine.control
        self._mirror: Final = Mirror(machine.control)
        self._tables: Final = HostTables(machine.control)
        self._view: Final = _guest_of(machine)

    @property
    def guest(self) -> GuestView | None:
        """The guest's records; None of a foreign guest, or before ours has laid out RAM."""
        return self._view

    def root(self) -> dict[str, Node]:
        """The branches of the tree."""
        return {
            "machine": self._of_machine,
            "connection": self._connection,
            "channels": self._channels,
            "vps": self._vps,
            "queues": self._queues,
            "gpadls": self._gpadls,
            "ports": self._ports,
            "requests": self._requests,
            "devices": self._devices,
            "drivers": self._drivers,
            "processes": self._processes,
            "tasks": self._tasks,
            "counters": self._control.counter_totals,
            "faults": self._faults,
            "refused": lambda: dict(self._control.refusals()[0]),
            "refusals": lambda: _numbered(self._control.refusals()[1]),
            "ignored": self._control.ignored,
            "log": lambda: _numbered(self._control.log()),
        }

    def _faults(self) -> dict[str, Node]:
        """The fault plan, by the row of each fault."""
        return {str(row.index): dict(row.report()) for row in FaultPlan(self._control).rows()}

    # -- the machine ---------------------------------------------------------------------------------

    def _of_machine(self) -> Node:
        machine, config = self._machine, self._machine.config
        return {
            "name": machine.name,
            "state": machine.state.name,
            "ready": self._control.ready.name,
            "machine_ns": machine.clock.now(),
            "vcpus": machine.vp_count,
            "ram_bytes": machine.ram.size,
            "era": None if self._view is None else self._view.tables.era.name.lower(),
            "guest": "foreign" if config["no_guest"] else "ours",
            "seed": config.get("seed", 0),
            "recording": self._control.recording,
            "shutdown_requested": self._control.shutdown_requested,
            "leaked": self._control.leaked,
        }

    def _connection(self) -> Node:
        head = self._mirror.head()
        partition = self._tables.partition()
        host = {
            "version": version_text(head.version) if head.version else None,
            "offers": head.offers,
            "open": head.open,
            "gpadls": head.gpadls,
            "to_slots": head.to_slots,
            "outgoing": head.outgoing,
            "incoming": head.incoming,
            "attached_pid": head.attached_pid,
            "disconnects": head.disconnects,
            "guest_left": Left(head.left).name.lower() if head.left else None,
            "guest_os_id": hex(partition.guest_os_id),
            "hypercall": hex(partition.hypercall),
            "unannounced_doorbells": [hex(connection) for connection in unannounced(self._machine.doorbells.view)],
        }
        if self._view is None:
            return {"host": host}
        return {"host": host, "guest": self._values(self._view.tables.connection)}

    # -- channels ------------------------------------------------------------------------------------

    def _channels(self) -> Node:
        hosts = {channel.relid: channel for channel in self._mirror.channels()}
        guests = {} if self._view is None else {one.relid: one for one in self._view.tables.channels.live()}
        # Read once for all channels, and only if somebody asks for any of them.
        gpadls = cache(self._gpadls)
        return {
            str(relid): (lambda relid=relid: self._channel(hosts.get(relid), guests.get(relid), gpadls))
            for relid in sorted(hosts.keys() | guests.keys())
        }

    def _channel(
        self, host: MirrorChannel | None, guest: Channel | None, gpadls: Callable[[], dict[str, Node]]
    ) -> Node:
        found: dict[str, Node] = {}
        if host is not None:
            found["host"] = _host_channel(host)
        if guest is not None and self._view is not None:
            view = self._view
            found["guest"] = lambda: {**self._values(guest), "outstanding": outstanding(view, guest)}
            found["ring"] = lambda: rings_of(view, guest)
        relid = host.relid if host is not None else guest.relid if guest is not None else 0
        found["gpadls"] = lambda: gpadls().get(str(relid), {})
        return found

    def _gpadls(self) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for one in self._tables.gpadls():
            found.setdefault(str(one.relid), {})[hex(one.gpadl)] = _gpadl(one)
        return found

    def _ports(self) -> Node:
        partition = self._tables.partition()
        opened = [channel for channel in self._mirror.channels() if channel.connection_id]
        return {
            "guest": {
                "vp": self._machine.vp_index(partition.guest_position),
                "sint": partition.guest_sint,
                "buffers_in_use": partition.guest_in_use,
            },
            "messages": {str(number): {"waiting": waiting} for number, waiting in partition.ports.items()},
            "events": {
                hex(channel.connection_id): {"relid": channel.relid, "state": ChannelState(channel.state).name}
                for channel in opened
            },
        }

    # -- processors ----------------------------------------------------------------------------------

    def _vps(self) -> Node:
        indices = {self._machine.vp_index(position): position for position in range(self._machine.vp_count)}
        return {
            str(index): (lambda position=position: self._vp(position)) for index, position in sorted(indices.items())
        }

    def _vp(self, position: int) -> Node:
        page, vps = vp_page_offset(position), self._machine.vps.view
        cpu = self._machine.config.get("cpu_positions", list(range(self._machine.vp_count))).index(position)
        registers = self._tables.vp(position)
        run_state = vps.load_u32(page + VP_RUN_STATE)
        found: dict[str, Node] = {
            "position": position,
            "cpu": cpu,
            "run_state": RunState(run_state).name if run_state in set(RunState) else f"?{run_state}",
            "irr": self._vectors(page + VP_REQUEST),
            "isr": self._vectors(page + VP_IN_SERVICE),
            "auto_eoi": self._vectors(page + VP_AUTO_EOI),
            "scontrol": hex(registers.scontrol),
            "simp": _page_register(registers.simp),
            "siefp": _page_register(registers.siefp),
            "sint": {str(n): _sint(registers.sint[n], registers.waiting[n]) for n in range(HV_SYNIC_SINT_COUNT)},
            "stimer": {str(n): _stimer(timer) for n, timer in enumerate(registers.stimer)},
            "slot": lambda: self._slots(position, registers.simp),
            "flags": lambda: self._flags(registers.siefp),
            "exits": lambda: self._exits(page),
        }
        if self._view is not None and cpu < self._view.tables.layout.ncpus:
            guest = self._view.tables.cpus.at(cpu)
            found["guest"] = lambda: self._values(guest)
        return found

    def _vectors(self, offset: int) -> list[str]:
        words = [self._machine.vps.view.load_u64(offset + 8 * word) for word in range(VECTOR_WORDS)]
        bits = sum(word << 64 * number for number, word in enumerate(words))
        return [hex(vector) for vector in _bits(bits)]

    def _slots(self, position: int, simp: int) -> Node:
        """The message slots that are not empty, in a page that lies in RAM."""
        gpa = self._page(simp)
        if gpa is None:
            return {}
        found: dict[str, Node] = {}
        memory = self._machine.ram.memory
        for sint in range(HV_SYNIC_SINT_COUNT):
            at = gpa + message_slot(sint)
            message_type = _U32.unpack_from(memory, at)[0]
            if not message_type:
                continue
            msgtype = _U32.unpack_from(memory, at + MESSAGE_PAYLOAD_OFFSET)[0]
            known = message_type == HVMSG_CHANNEL_MESSAGE and msgtype in set(MessageType)
            found[str(sint)] = {
                "message_type": hex(message_type),
                "msg_pending": bool(memory[at + MESSAGE_FLAGS_OFFSET] & HV_MESSAGE_FLAG_PENDING),
                "msgtype": MessageType(msgtype).name if known else msgtype,
                "serial": self._control.view.load_u64(self._control.serial_offset(position, sint)),
            }
        return found

    def _flags(self, siefp: int) -> Node:
        """The event flags that are set, by SINT."""
        gpa = self._page(siefp)
        if gpa is None:
            return {}
        words = bytes(self._machine.ram.memory[gpa : gpa + HV_SYNIC_SINT_COUNT * FLAG_BYTES])
        pages = {n: words[n * FLAG_BYTES : (n + 1) * FLAG_BYTES] for n in range(HV_SYNIC_SINT_COUNT)}
        return {str(n): list(_bits(int.from_bytes(page, "little"))) for n, page in pages.items() if any(page)}

    def _page(self, register: int) -> int | None:
        """GPA of an overlay page, None while it is off."""
        gpa = page_register_gpa(register)
        inside = gpa + CONTROL_PAGE_SIZE <= self._machine.ram.size
        # The RAM of somebody else's guest is not ours to touch: it may have no page to hold it.
        return gpa if page_register_enabled(register) and inside and self._view is not None else None

    def _exits(self, page: int) -> Node:
        """The exit slots that are in use."""
        vps = self._machine.vps.view
        found: dict[str, Node] = {}
        for slot in range(EXIT_SLOTS):
            at = page + VP_EXIT_SLOT + slot * EXIT_SLOT.size
            state, operation = vps.load_u32(at + X_STATE), vps.load_u32(at + X_OPERATION)
            if state == ExitState.FREE:
                continue
            found[str(slot)] = {
                "state": ExitState(state).name if state in set(ExitState) else f"?{state}",
                "claimer": vps.load_u32(at + X_CLAIMER),
                "operation": ExitOperation(operation).name if operation in set(ExitOperation) else f"?{operation}",
                "argument": hex(vps.load_u64(at + X_ARGUMENTS)),
            }
        return found

    # -- the guest's own -----------------------------------------------------------------------------

    def _queues(self) -> Node:
        if self._view is None:
            return {}
        return {queue.name.lower(): (lambda queue=queue: self._queue(queue)) for queue in QueueNumber}

    def _queue(self, number: QueueNumber) -> Node:
        assert self._view is not None
        tables = self._view.tables
        queue = tables.queues.at(number)
        now, work = self._machine.clock.now(), {}
        for item in tables.work.live():
            if item.queue == number and item.sequence:
                work[str(item.sequence)] = {
                    "function": WORK_FUNCTIONS.name_of(item.function),
                    "serial": item.serial,
                    "age_us": max(0, now - item.queued_ns) // 1000,
                }
        workers = range(WORKERS[number])
        return {
            "length": queue.queued - queue.finished,
            "queued": queue.queued,
            "finished": queue.finished,
            "running": [queue.running[worker] for worker in workers],
            "workers": [self._actor(queue.worker_actors[worker]) for worker in workers],
            "lock": self._actor(queue.lock.owner) if queue.lock.owner else "free",
            "work": dict(sorted(work.items(), key=lambda row: int(row[0]))),
        }

    def _requests(self) -> Node:
        """Requests to the host that await their reply (`chn_msg_list`), by the index of their record."""
        if self._view is None:
            return {}
        tables = self._view.tables
        return {str(one.index): (lambda one=one: self._values(one)) for one in tables.requests.live()}

    def _devices(self) -> Node:
        if self._view is None:
            return {}
        return {instance_of(one): (lambda one=one: self._device(one)) for one in self._view.devices()}

    def _device(self, device: Device) -> Node:
        assert self._view is not None
        primary = self._view.primary(device)
        relids = [] if primary is None else [channel.relid for channel in self._view.channels(primary)]
        return {"channels": relids, **self._values(device), "driver": self._view.driver_of(device) or None}

    def _drivers(self) -> Node:
        if self._view is None:
            return {}
        return {
            name_of(one): (lambda one=one: {"registered": is_registered(one), **self._values(one)})
            for one in self._view.tables.drivers.live()
        }

    # -- the harness's -------------------------------------------------------------------------------

    def _processes(self) -> Node:
        return {
            row.name: {
                "pid": row.pid,
                "kind": row.kind.name.lower(),
                "state": row.state.name,
                "actor": hex(row.number),
                **_place(row),
                "counters": {name: count for name, count in self._control.counter_values(row.slot).items() if count},
            }
            for row in self._control.rows()
        }

    def _tasks(self) -> Node:
        board = TaskBoard(self._control)
        return {
            str(row.index): {
                "program": row.program.name,
                "cpu": row.cpu,
                "state": row.state.name,
                "packets": row.packets,
                "errors": row.errors,
            }
            for row in board.rows()
        }

    def _actor(self, number: int) -> str:
        return self._control.name_of(number)

    def _values(self, record: Any) -> dict[str, Node]:
        assert self._view is not None
        return dict(record_values(record, self._actor, self._view.tables.waiters))


def _guest_of(machine: Machine) -> GuestView | None:
    # The RAM of somebody else's guest is not ours to read: it may hold anything, or have no page to hold it.
    if machine.config["no_guest"] or machine.ram.view.load_u64(BOOT_RECORD_GPA, ACQUIRE) != BOOT_MAGIC:
        return None
    return GuestView(KernelTables.attach(machine.ram.apart, partial(reserve_ram, machine.ram.fd)))


def ring_of(view: GuestView, channel: Channel, side: int) -> dict[str, Node] | None:
    """The control page of a channel's OUTBOUND or INBOUND ring in the guest's eyes; None while it has none."""
    figures = view.ring(channel, side)
    gpa = view.ring_gpa(channel, side)
    if figures is None or gpa is None:
        return None
    octets = view.tables.ram.octets

    def word(offset: int) -> int:
        value: int = _U32.unpack_from(octets, gpa + offset)[0]
        return value

    return {
        "write_index": figures.write_index,
        "read_index": figures.read_index,
        "interrupt_mask": figures.interrupt_mask,
        "pending_send_sz": word(PENDING_SEND_SZ),
        "feature_bits": hex(word(FEATURE_BITS)),
        "data_size": figures.data_size,
        "bytes_to_read": figures.bytes_to_read,
        "bytes_to_write": figures.bytes_to_write,
        "gpa": hex(gpa),
    }


def rings_of(view: GuestView, channel: Channel) -> dict[str, Node]:
    """Those that the channel has: what the guest reads is `in`."""
    rings = {"in": ring_of(view, channel, INBOUND), "out": ring_of(view, channel, OUTBOUND)}
    return {name: ring for name, ring in rings.items() if ring is not None}


def outstanding(view: GuestView, channel: Channel) -> int | None:
    """Requests of a channel's requestor that the host has not answered; None without a requestor."""
    gpa, size = channel.rqstor_gpa, channel.rqstor_size
    if not gpa or not size or gpa + Requestor.footprint(size) > view.tables.ram.size:
        return None
    return Requestor(view.tables.ram, gpa, size).outstanding()


def _host_channel(channel: MirrorChannel) -> dict[str, Node]:
    known = class_of(channel.if_type)
    return {
        "state": ChannelState(channel.state).name if channel.state in set(ChannelState) else f"?{channel.state}",
        "generation": channel.generation,
        "class": known.name if known else "unknown",
        "if_type": str(channel.if_type),
        "if_instance": str(channel.if_instance),
        "sub_channel_index": channel.sub_channel_index,
        "ring_gpadl": hex(channel.ring_gpadl),
        "gpadl_count": channel.gpadl_count,
        "target_vp": channel.target_vp if channel.target_vp != 0xFFFFFFFF else None,
        "connection_id": hex(channel.connection_id),
        "flags": hex(channel.flags),
    }


def _place(row: ActorRow) -> Mapping[str, Node]:
    """Of a vCPU which CPU it is; of a worker, which is no processor, on which semaphore it sleeps."""
    if row.kind == ActorKind.VCPU:
        return {"cpu": row.cpu}
    return {"semaphore": f"actor.{row.cpu}"} if row.kind == ActorKind.WORKER else {}


def _gpadl(one: HostGpadl) -> Mapping[str, Node]:
    state = GpadlState(one.state).name if one.state in set(GpadlState) else f"?{one.state}"
    runs = [f"{first:#x}+{count}" for first, count in one.runs[:SHOWN_RUNS]]
    more = ["…"] if len(one.runs) > SHOWN_RUNS else []
    return {"state": state, "pages": one.pages, "ring": one.ring, "pfns": ",".join(runs + more)}


def _page_register(value: int) -> Mapping[str, Node]:
    return {"enabled": page_register_enabled(value), "gpa": hex(page_register_gpa(value)), "value": hex(value)}


def _sint(value: int, waiting: int) -> Mapping[str, Node]:
    return {
        "vector": hex(sint_vector(value)),
        "masked": bool(value & HV_SYNIC_SINT_MASKED),
        "auto_eoi": bool(value & HV_SYNIC_SINT_AUTO_EOI),
        "polling": bool(value & HV_SYNIC_SINT_POLLING),
        "value": hex(value),
        "waiting": waiting,
    }


def _stimer(timer: HostTimer) -> Mapping[str, Node]:
    return {
        "enabled": bool(timer.config & HV_STIMER_ENABLE),
        "periodic": bool(timer.config & HV_STIMER_PERIODIC),
        "lazy": bool(timer.config & HV_STIMER_LAZY),
        "auto_enable": bool(timer.config & HV_STIMER_AUTOENABLE),
        "sint": stimer_sint(timer.config),
        "config": hex(timer.config),
        "count": timer.count,
        "expiration_time": timer.expiration_time or None,
    }


def _bits(word: int) -> Iterator[int]:
    while word:
        low = word & -word
        yield low.bit_length() - 1
        word ^= low
