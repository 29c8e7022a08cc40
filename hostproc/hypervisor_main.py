"""The hypervisor process: one thread, one loop over VM exits, doorbells, timers and tasks.

It owns everything that is the host's: registers, ports, queues, the VMBus server, the devices. A guest
reaches it through exit slots and doorbells only, and whatever it writes there, this process goes on.
"""

from __future__ import annotations

import gc
import os
import select
from collections.abc import Callable
from functools import partial
from typing import Final

from emu import cpuid, plugin
from emu.control import ActorKind, Ready
from emu.doorbells import DoorbellServer
from emu.errors import UserError
from emu.fault_plan import Faults
from emu.gpadl import MapBudget
from emu.interrupt_trace import halt_of, requester_of
from emu.interrupts import Halt, InterruptRequester, PollPolicy
from emu.layout import (
    D_HOST_RUN_STATE,
    VP_AUTO_EOI,
    VP_IN_SERVICE,
    VP_REQUEST,
    MachineState,
    vp_page_offset,
)
from emu.machine import Machine, VpKick
from emu.memory import GuestMemory
from emu.mirror import Left
from emu.ring_memory import RingMemory, RingWords
from emu.ring_trace import recorded
from emu.scenario import Scenario
from emu.switches import Fix
from emu.tracing import E_DOORBELL, E_FAULT, E_FREEZE, E_THAW, Bound, Context, Recorder
from emu.vmexit import ExitServer
from hostproc.control_plane import ControlPlane, GuestPorts
from hostproc.devices.table import add_plugins, new_backend, offer_of
from hostproc.fault_bus import FaultyBus
from hostproc.fault_interrupts import FaultyInterrupts, FaultyQueues
from hostproc.live_faults import LiveFaults
from hostproc.loop import LOOK_AGAIN_S, OWED_TOKEN_S, Loop
from hostproc.message_queues import MessageQueues
from hostproc.orders import HostOrders
from hostproc.partition import Partition
from hostproc.points import HostPoints, NoPoints
from hostproc.protocol.effects import Refused
from hostproc.protocol.offers import event_connection_id, relid_of_event_connection
from hostproc.protocol.policy import policy_of
from hostproc.protocol.server import Server
from hostproc.protocol.versions import Limits
from hostproc.state_trace import StateTrace
from hostproc.throttle import FREEZE_NS, Throttle
from hostproc.undelivered import undelivered
from hostproc.upkeep import UPKEEP_NS, Upkeep

Report = Callable[..., None]

STOPPING: Final = int(MachineState.STOPPING)
PUBLISH_NS: Final = 1_000_000
PUBLISH_BUSY_NS: Final = 5_000_000
"""While the guest's next message is expected: what is published then makes that message wait. So it is published behind
the answer that opens a channel, if one comes in as long again: the guest has most to do by itself then."""
TRAFFIC_NS: Final = 200_000_000
LOOKED_AT_NS: Final = 900_000_000
"""How often the host looks whether anybody wants to see its traffic."""
HELD_HALT_NS: Final = 10_000_000
"""How soon the host notices that machine time goes on again, for its timers."""
MOST_BOUND: Final = 4_096
"""Doorbells whose records are kept at hand."""
EXPECTING_NS: Final = 2_000_000
"""For so long after a control message the guest's next one is expected, and polled for."""


class Hypervisor:
    """The parts of the process, put together on one machine."""

    def __init__(self, machine: Machine, report: Report) -> None:
        self.machine = machine
        self.report = report
        row, self.counters = machine.enlist(ActorKind.HYPERVISOR, "hypervisor")
        self.trace = machine.recorder(row, context=Context.HOST)
        self._rung: dict[int, Bound] = {}
        """By connection id: what records its doorbell."""
        if self.trace:
            self.trace.start(row.pid, row.kind, row.cpu, row.name)
        self.memory = GuestMemory(machine.ram.fd, machine.ram.memory, machine.ram.size, there=machine.ram_reserved)
        parts = ("machine", "device", "policy")
        self.scenario = Scenario.from_config({key: machine.config[key] for key in parts if key in machine.config})
        leaves = cpuid.leaves(deprecate_auto_eoi=self.scenario.machine.deprecate_auto_eoi)
        self._vps = machine.vps.view
        self._requesters = [self._requester(position) for position in range(machine.vp_count)]
        self._guest_pidfd = -1
        self.fix = Fix.of(machine.config)
        self.points = HostPoints(machine, row.number, self.trace) if machine.races else NoPoints()
        self._changed = True
        self._delivered = 0
        self._published_ns = 0
        self._opened = 0
        """Channels that were open when the host halted last."""
        self._expecting_until = 0
        self._wakes_ns = machine.control.host_wakes_ns
        self._state_word = machine.control.state_word.load
        self.faults = Faults(machine.control, self.trace.record if self.trace else None)
        vp_indices: list[int] = machine.config["vp_indices"]
        # Whether faults of packets and interrupts may be is decided here, once.
        packets = bool(machine.config.get("faults"))
        interrupts = FaultyInterrupts(self.faults, vp_indices, self.request_interrupt, self._call_later)
        make_queues: Callable[..., MessageQueues] = MessageQueues
        if packets:
            make_queues = partial(FaultyQueues, self.faults, interrupts, self.memory, vp_indices)
        self.partition = Partition(
            self.memory,
            vp_indices,
            cpuid=leaves,
            reference_time=machine.clock.reference_time,
            request_interrupt=self.request_interrupt,
            set_auto_eoi=self._set_auto_eoi,
            reset_words=self._reset_words,
            note_serial=self._note_serial,
            attached=self._attached,
            detached=self._guest_gone,
            trace=self.trace,
            points=self.points,
            fix=self.fix,
            queues=make_queues,
        )
        self._timers = self.partition.timers
        self.exits = ExitServer(
            self._vps,
            machine.vps_memory,
            machine.doorbells.view,
            machine.vp_count,
            lambda position, slot: machine.wakeup(f"exit.{position}.{slot}"),
        )
        self.doorbells = DoorbellServer(machine.doorbells.view)
        self.upkeep = Upkeep(machine, leaves)
        self._serve_inner = self._serve_with_faults if packets else self.serve
        self.loop = Loop(
            serve=self._serve_held if machine.races else self._serve_inner,
            halt=self._halt_for,
            stopping=self._stopping,
            now=machine.clock.now,
        )
        self._halt = self._made_halt()
        guest_ports = GuestPorts(self.partition, vp_indices, lambda: self.control_plane.wake())
        guest_ports.bind_interrupt = lambda position, vector: self._requesters[position].bound(vector)
        if packets:
            guest_ports.event_interrupt = interrupts.of_event
        self.bus = self._made_bus(guest_ports, packets=packets)
        guest_ports.cause = lambda: self.bus.cause
        self._frozen: list[VpKick] = []
        if machine.races:
            self.bus.throttle = Throttle(self.points, self._freeze)
        self.control_plane = ControlPlane(
            self.partition,
            guest_ports,
            self.bus,
            self.loop,
            machine.control,
            self.scenario.machine.host_version,
            self.points,
        )
        self.orders = HostOrders(machine.control, self.bus)
        self._looks: tuple[Callable[[], int], ...] = (*self.exits.loads, *self.doorbells.loads, *self.orders.loads)
        if isinstance(self.points, HostPoints):
            self._looks = (*self._looks, *self.points.loads)
        if packets:
            self.live_faults = LiveFaults(self.faults, self.bus, interrupts, self.partition)
            self._looks = (*self._looks, self.live_faults.changed)
        self._ordered = self.orders.loads[0]
        self._exit_loads = self.exits.loads

    def _made_halt(self) -> Halt:
        """What it waits by, until one of its sources has something (see `_look`)."""
        machine = self.machine
        return halt_of(
            self.trace,
            machine.doorbells.view,
            D_HOST_RUN_STATE,
            machine.wakeup("host"),
            self._look,
            PollPolicy(machine.config["machine"]["poll"], self._expecting),
            self.counters,
            # The doorbells of channels, and the exits of the first VPs: what comes while a machine is at work.
            glance=self.doorbells.loads[event_connection_id(0) >> 12],
            glance_too=self.exits.loads[0],
            # Guests may write the host's run state: nobody may have meant to post.
            owed_s=OWED_TOKEN_S,
            look_again_s=LOOK_AGAIN_S,
        )

    def _made_bus(self, guest_ports: GuestPorts, *, packets: bool) -> FaultyBus:
        """The server's core, and the bus that carries out what it decides."""
        machine, report = self.machine, self.report
        limits = Limits(
            vp_count=machine.vp_count,
            ram_bytes=machine.ram.size,
            max_version=self.scenario.machine.host_version,
            features=self.scenario.machine.features,
        )
        server = Server(limits, policy_of(self.scenario.policy))
        if self.trace:
            server.watch(StateTrace(self.trace))
        bus = FaultyBus(
            server,
            guest_ports,
            self.loop,
            self.memory,
            budget=MapBudget.of_system(),
            trace=self.trace,
            instrument=self._recorded if self.trace else None,
            log=lambda text: report("log", "hypervisor", text),
            points=self.points,
            fix=self.fix,
            refusals=self.partition.refusals,
        )
        bus.arm(self.faults, call_later=self._call_later, now=machine.clock.now, packets=packets)
        return bus

    def _requester(self, position: int) -> InterruptRequester:
        cpu = self.machine.config["cpu_positions"].index(position)
        kick = VpKick(self.machine, position, cpu)
        return requester_of(self.trace, self._vps, position, kick, self.counters)

    # -- sources of work ----------------------------------------------------------------------------

    def serve(self) -> bool:
        """Answer every exit that was rung, hand every doorbell to its device; whether there was any."""
        busy = False
        # A round costs little where nothing came: a load for each word that a source is announced in.
        if rung := self.doorbells.take():
            self._serve_doorbells(rung)
            busy = True
        for exits in self._exit_loads:
            if exits():
                self._serve_exits()
                busy = True
                break
        # Behind the exits: a one-shot whose time is past when it is written expires at once.
        if self._timers.armed and self._timers.run_due():
            self._changed = busy = True
        if self._ordered() and self.orders.serve():
            self._changed = busy = True
        return busy

    def _serve_held(self) -> bool:
        """As `serve`, in a machine that runs schedules: also what a director lets go on."""
        assert isinstance(self.points, HostPoints)
        resumed = self.points.serve()
        self._changed |= resumed
        return self._serve_inner() or resumed

    def _serve_with_faults(self) -> bool:
        """The same, and what follows from a fault that was turned on or off."""
        changed = self.live_faults.changed()
        if changed:
            self.live_faults.take_in()
        return self.serve() or changed

    def _call_later(self, delay_ns: int, action: Callable[[], None]) -> None:
        self.loop.call_at(self.machine.clock.now() + delay_ns, action)

    def _serve_exits(self) -> None:
        requests = self.exits.take()
        for request in requests:
            result, fault = self.partition.execute(
                request.position, request.operation, request.arguments, request.claimer
            )
            if fault and self.trace:
                self.trace.record(E_FAULT, request.operation, fault, request.arguments[0])
            self.exits.answer(request, result, fault)
        if requests:
            self._changed = True
            self.counters.exits += len(requests)
            delivered = self.control_plane.delivered
            if delivered != self._delivered:
                self._delivered = delivered
                self._expecting_until = self.machine.clock.now() + EXPECTING_NS

    def _serve_doorbells(self, rung: list[int]) -> None:
        events, trace = self.partition.connections.events, self.trace
        for connection_id in rung:
            if trace:
                (self._rung.get(connection_id) or self._bind_doorbell(trace, connection_id))()
            port = events.get(connection_id)
            if port is None or port.flag_count != 1:
                self._rung_in_vain(connection_id)
            else:
                port.signal(0)
        self.counters.doorbells += len(rung)

    def _bind_doorbell(self, trace: Recorder, connection_id: int) -> Bound:
        if len(self._rung) >= MOST_BOUND:
            self._rung.clear()  # a guest may ring any
        bound = self._rung[connection_id] = trace.bind(E_DOORBELL, connection_id)
        return bound

    def _rung_in_vain(self, connection_id: int) -> None:
        """Nobody listens: legal where it crossed our closing of a channel that the guest still holds."""
        if self.bus.server.holds(relid_of_event_connection(connection_id)):
            self.bus.refusals.ignored["doorbell-of-closed-channel"] += 1
        else:
            text = f"doorbell of connection {connection_id:#x}, which is nobody's"
            self.bus.refusals.add(Refused("unknown-doorbell", text, "connection", connection_id))

    def _look(self) -> bool:
        for load in self._looks:
            if load():
                return True
        if self._timers.armed and self._timers.due():
            return True
        return self.loop.has_work() or self._stopping()

    def _stopping(self) -> bool:
        return self._state_word() == STOPPING

    def _expecting(self) -> bool:
        """Whether the guest's next control message is due."""
        if self._expecting_until and self.machine.clock.now() >= self._expecting_until:
            self._expecting_until = 0
        return self._expecting_until > 0

    def _halt_for(self, timeout_ns: int) -> None:
        if self.bus.likely[1]:
            self.bus.reserve_ahead()
        if self._timers.armed:
            timeout_ns = min(timeout_ns, max(0, self._timers.next_expiration * 100 - self.machine.clock.now()))
        due_ns = timeout_ns
        if self.machine.clock.held:
            # No deadline comes nearer until whoever holds the clock lets it go, and that one wants to see the state.
            timeout_ns = HELD_HALT_NS
            if self._changed:
                self._changed = False
                self.control_plane.publish()
        if self._changed or self.machine.races:
            # Not at each halt of a busy host: at most every millisecond, and never later than that; in the middle of
            # a conversation when it pauses, or every five.
            now = self.machine.clock.now()
            due = self._published_ns + PUBLISH_NS - now
            if now < self._expecting_until:
                opened = self.bus.server.open_channels
                busy_ns = PUBLISH_BUSY_NS if opened > self._opened else 2 * PUBLISH_BUSY_NS
                self._opened = opened
                due = max(due, min(self._published_ns + busy_ns, self._expecting_until) - now)
            if due <= 0 or self.machine.races:
                self._changed = False
                self._published_ns = now
                self.control_plane.publish()
            else:
                timeout_ns = min(timeout_ns, due)
        if self.machine.races:
            # Whoever asks whether the machine is settled reads the mirror while the host is halted. Of a clock that is
            # held somebody may push the hands: what is due then is due, however late the host gets a core to notice.
            self._wakes_ns.store(self.machine.clock.now() + due_ns)
        self._halt.halt(timeout_ns)

    def _recorded(self, relid: int, side: str, memory: RingMemory) -> RingWords:
        assert self.trace is not None
        return recorded(memory, self.trace, relid, int(side == "outgoing"), masks=side == "incoming", sole=True)

    # -- what the partition asks for ----------------------------------------------------------------

    def request_interrupt(self, position: int, vector: int) -> None:
        """Request an interrupt of one VP, and kick it if it would not look."""
        self._requesters[position].request(vector)

    def _set_auto_eoi(self, position: int, vectors: list[int]) -> None:
        words = [0, 0, 0, 0]
        for vector in vectors:
            words[vector >> 6] |= 1 << (vector & 63)
        for number, word in enumerate(words):
            self._vps.store_u64(vp_page_offset(position) + VP_AUTO_EOI + 8 * number, word)

    def _reset_words(self, position: int) -> None:
        base = vp_page_offset(position)
        for offset in (VP_REQUEST, VP_IN_SERVICE, VP_AUTO_EOI):
            for word in range(4):
                self._vps.store_u64(base + offset + 8 * word, 0)

    def _note_serial(self, position: int, sint: int, serial: int) -> None:
        self.machine.control.view.store_u64(self.machine.control.serial_offset(position, sint), serial)

    # -- the guest held -----------------------------------------------------------------------------

    def _freeze(self, relid: int, signals: int) -> None:
        """Hold every processor of the guest for a while."""
        if self._frozen:
            return
        for position in range(self.machine.vp_count):
            kick = VpKick(self.machine, position, self.machine.config["cpu_positions"].index(position))
            if kick.freeze():
                self._frozen.append(kick)
                if self.trace:
                    self.trace.record(E_FREEZE, position, relid, signals)
        self._call_later(FREEZE_NS, self._thaw)

    def _thaw(self) -> None:
        """Let them run on."""
        for kick in self._frozen:
            if self.trace:
                self.trace.record(E_THAW, kick.position)
            kick.thaw()
        self._frozen.clear()

    # -- the guest's life ---------------------------------------------------------------------------

    def _attached(self, pid: int) -> int:
        """A guest attached: remember it, and watch its life if it is not one of our own processes."""
        if self._guest_died():
            # Its successor was faster than our timer: the end is the same.
            self._bury_guest()
        if self.control_plane.attached_pid not in (0, pid):
            # The one before is gone without a word: its threads do not free their exit slots any more.
            self.exits.reclaim()
        # What the one before had posted, and what waits to be sent to it, is nobody's.
        self.control_plane.forget_messages()
        self.bus.forget_outgoing()
        self.control_plane.attached_pid = pid
        if self.machine.config["no_guest"]:
            # What somebody spoilt who was gone already: the next one reads its VP pages right behind this exit.
            self._set_right()
            self._watch_guest(pid)
        return self.upkeep.attached()

    def _watch_guest(self, pid: int) -> None:
        self._forget_pidfd()
        try:
            self._guest_pidfd = os.pidfd_open(pid)
        except OSError:
            # Dead already, or a number that a hostile guest made up: nothing to watch.
            text = f"ATTACH with pid {pid}, of which nothing is to be seen"
            self.bus.refusals.add(Refused("attach-pid", text, "pid", pid))

    def watch_guest(self) -> None:
        """A timer: a foreign guest that died is as good as detached, and what it spoilt is set right."""
        if self._guest_died():
            self._bury_guest()
        self._set_right()
        # A guest may keep the host from ever halting, and a doorbell alone is no reason to publish.
        self.control_plane.publish()
        self.loop.call_at(self.machine.clock.now() + UPKEEP_NS, self.watch_guest)

    def show_traffic(self) -> None:
        """A timer: publish what goes through the channels, for as long as somebody looks."""
        again_ns = TRAFFIC_NS if self.control_plane.publish_traffic() else LOOKED_AT_NS
        self.loop.call_at(self.machine.clock.now() + again_ns, self.show_traffic)

    def _set_right(self) -> None:
        pages, slots = self.upkeep.look(self.counters.exits, watched=self._watched())
        counts = {"vps-page-written": pages, "exit-slot-lost": slots}
        counts["exit-bell-without-exit"], self.exits.unknown_bells = self.exits.unknown_bells, 0
        for rule, count in counts.items():
            if count:
                text = f"{rule.replace('-', ' ')}: {count} since the last look"
                self.bus.refusals.add(Refused(rule, text, "count", count), count)

    def _watched(self) -> bool:
        """Whether a guest is attached whose end will be seen."""
        return self.control_plane.attached_pid != 0 and self._guest_pidfd >= 0

    def _guest_died(self) -> bool:
        if self._guest_pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._guest_pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _bury_guest(self) -> None:
        """The guest died: as DETACH, and its threads do not free their exit slots any more."""
        if not (self.control_plane.attached_pid or self.bus.server.head()[0]):
            self._forget_pidfd()  # it had detached, and nothing has come of it since
            return
        self._guest_gone(Left.DIED)
        self._forget_pidfd()
        self.exits.reclaim()

    def _guest_gone(self, how: Left = Left.DETACHED) -> None:
        """DETACH, or the guest's death: reset the partition, disconnect, go on.

        Who detaches is watched still: it may contact the host again without another ATTACH, and then die.
        """
        self._changed = True
        self.control_plane.attached_pid = 0
        if self.machine.config["no_guest"]:
            self._note_undelivered()
        self.partition.reset()
        self.control_plane.forget_messages()
        self.bus.guest_gone(how)
        if self.machine.config["no_guest"]:
            self._set_right()
        # Whoever waits for the end of the guest reads the mirror right behind this exit.
        self.control_plane.publish()

    def _note_undelivered(self) -> None:
        """Somebody else's guest is gone: tell what it never took out of its slot, and why."""
        port = self.control_plane.guest_port
        waiting = port.in_use + self.bus.outgoing
        if self.control_plane.attached_pid and self.bus.left is Left.UNLOADED and not waiting:
            return  # the machine ends first: it may just be taking the answer to its UNLOAD
        vp = self.partition.vps[port.position]
        at = vp_page_offset(port.position)
        found = undelivered(
            vp.synic,
            vp.vp_index,
            port.sint,
            waiting,
            requested=self._vectors(at + VP_REQUEST),
            in_service=self._vectors(at + VP_IN_SERVICE),
        )
        if found is not None:
            self.bus.refusals.add(*found)

    def _vectors(self, offset: int) -> int:
        """Four words of vectors as one number."""
        return sum(self._vps.load_u64(offset + 8 * word) << 64 * word for word in range(4))

    def _forget_pidfd(self) -> None:
        if self._guest_pidfd >= 0:
            os.close(self._guest_pidfd)
            self._guest_pidfd = -1

    # -- running ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Offer the devices, then serve until the machine stops."""
        for device in self.scenario.devices():
            try:
                backend = new_backend(device.backend, subchannels=device.subchannels, seed=self.machine.config["seed"])
            except UserError as error:
                self.bus.backend_error(device.backend, f"making device {device.instance}", error.__cause__ or error)
                continue
            self.bus.add(offer_of(device.class_name, device.instance), backend)
        if self.machine.config["no_guest"]:
            self.bus.tells_left_over = True
            self.watch_guest()
        self.show_traffic()
        self.machine.control.reach(Ready.HOST_RUNS)
        self.report("stage", "hypervisor", int(Ready.HOST_RUNS))
        # They stay as long as the machine: a collection that walks 2,000 of them answers no guest for 12 ms.
        gc.freeze()
        self.loop.run()
        self._thaw()
        if self.machine.config["no_guest"] and self.control_plane.attached_pid:
            self._note_undelivered()
            self.bus.tell_left_over()
        self.control_plane.publish()
        self.bus.close()
        self.counters.flush()
        if self.trace:
            self.trace.stop(os.getpid(), "hypervisor")
        return 0


def run(machine: Machine, report: Report) -> int:
    """Be the machine's hypervisor; the process's exit status."""
    add_plugins(plugin.attach(machine.config))
    return Hypervisor(machine, report).run()
