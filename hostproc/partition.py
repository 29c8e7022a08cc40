"""The partition: what every VM exit does, as logic over guest memory.

Hypercalls, MSRs and CPUID leaves with the checks and statuses of the TLFS (reference 1.1 to 1.6). The
hypervisor process takes exits from their slots, calls `execute`, and stores the answer; nothing here waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from struct import Struct
from typing import Final

from emu.errors import GeneralProtection, OutOfMemory, ProtocolViolation
from emu.layout import ABI_MAJOR, PAGE_SIZE, ExitOperation, Fault
from emu.memory import GuestMemory
from emu.switches import ALL_FIXED, Fix
from emu.synic import Overlays, Synic
from emu.tracing import E_EOM, E_POST, Recorder
from emu.wire.hypercalls import (
    HVCALL_POST_MESSAGE,
    HVCALL_SIGNAL_EVENT,
    HvStatus,
    PostMessageInput,
    call_code,
    is_fast,
    is_simple,
    split_signal_event,
)
from emu.wire.synic import (
    HV_X64_MSR_EOM,
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_HYPERCALL_ENABLE,
    HV_X64_MSR_HYPERCALL_LOCKED,
    HV_X64_MSR_RESET,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SINT15,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_STIMER3_COUNT,
    HV_X64_MSR_TIME_REF_COUNT,
    HV_X64_MSR_VP_INDEX,
    page_register_enabled,
    page_register_gpa,
)
from hostproc.message_queues import MessageQueues
from hostproc.points import NoPoints
from hostproc.ports import Connections
from hostproc.protocol.effects import Refused
from hostproc.protocol.refusals import Refusals
from hostproc.refusal_trace import RecordedCounter, RecordedRefusals
from hostproc.synthetic_timers import SyntheticTimers

_POST_BYTES: Final = PostMessageInput.LAYOUT.size
_SIGNAL: Final = Struct("<Q")
_LARGEST_PID: Final = (1 << 31) - 1

Answer = tuple[tuple[int, int], int]
"""Two result words and a fault."""

_OK: Final[Answer] = ((0, 0), Fault.NONE)
_GP: Final[Answer] = ((0, 0), Fault.GENERAL_PROTECTION)
_UD: Final[Answer] = ((0, 0), Fault.INVALID_OPCODE)


class VpState:
    """What the partition keeps of one VP besides its SynIC."""

    __slots__ = ("position", "synic", "vp_index")

    def __init__(self, position: int, vp_index: int, synic: Synic) -> None:
        self.position = position
        self.vp_index = vp_index
        self.synic = synic


class Partition:
    """Registers and hypercalls of a partition; see `execute`.

    `set_auto_eoi(position, vectors)` publishes a VP's auto-EOI words, `reset_words(position)` clears its
    interrupt words, `attached(pid)` and `detached()` tell the hypervisor process about the guest. `queues` makes the
    message queues: plain ones, or some that are told what is to go wrong.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vp_indices: list[int],
        *,
        cpuid: list[tuple[int, int, int, int, int]],
        reference_time: Callable[[], int],
        request_interrupt: Callable[[int, int], None],
        set_auto_eoi: Callable[[int, list[int]], None],
        reset_words: Callable[[int], None],
        note_serial: Callable[[int, int, int], None],
        attached: Callable[[int], int],
        detached: Callable[[], None],
        trace: Recorder | None = None,
        points: NoPoints | None = None,
        fix: Fix = ALL_FIXED,
        queues: Callable[..., MessageQueues] = MessageQueues,
    ) -> None:
        self.memory = memory
        overlays: Overlays = {}
        self.vps = [VpState(position, index, Synic(memory, overlays)) for position, index in enumerate(vp_indices)]
        self.synics = [vp.synic for vp in self.vps]
        self.queues = queues(self.synics, request_interrupt, note_serial, trace, points or NoPoints(), fix)
        self.timers = SyntheticTimers(
            len(vp_indices),
            self.queues,
            reference_time,
            lambda position: self.changed_vps.add(position),
            trace,
            points,
            fix,
        )
        self.connections = Connections()
        self.request_interrupt = request_interrupt
        self._cpuid = {leaf: (eax | ebx << 32, ecx | edx << 32) for leaf, eax, ebx, ecx, edx in cpuid}
        self._reference_time = reference_time
        self._set_auto_eoi = set_auto_eoi
        self._reset_words = reset_words
        self._attached = attached
        self._detached = detached
        self.trace = trace
        self._guest_os_id = 0
        self._hypercall = 0
        self.refusals = RecordedRefusals(trace) if trace else Refusals()
        """Of the bus as well, so that the newest are the newest of both."""
        self.ignored: Counter[str] = RecordedCounter(trace) if trace else Counter()
        """Legal, and led to nothing; by rule."""
        self._posts = 0
        self.changed_vps = set(range(len(vp_indices)))
        """Positions of the VPs whose registers were written since somebody emptied this set."""

    # -- one exit -----------------------------------------------------------------------------------

    def execute(self, position: int, operation: int, arguments: tuple[int, int, int], claimer: int = 0) -> Answer:
        """Carry out one exit of the VP at `position`; unknown operations are a #UD.

        `claimer` is who exits, as the slot says: for the trace alone.
        """
        a0, a1, _a2 = arguments
        try:
            if operation == ExitOperation.HYPERCALL:
                if not page_register_enabled(self._hypercall):
                    text = f"hypercall {a0:#x} on VP page {position}, while HYPERCALL is {self._hypercall:#x}"
                    self._note("hypercall-page-off", text, "control", a0)
                    return _UD
                return (int(self.hypercall(a0, a1, claimer)), 0), Fault.NONE
            if operation == ExitOperation.WRMSR:
                self.write_msr(position, a0, a1)
                return _OK
            if operation == ExitOperation.RDMSR:
                return (self.read_msr(position, a0), 0), Fault.NONE
            if operation == ExitOperation.CPUID:
                return self._cpuid.get(a0, (0, 0)), Fault.NONE
            if operation == ExitOperation.ATTACH:
                return self._attach(a0, a1)
            if operation == ExitOperation.DETACH:
                self._detached()
                return _OK
        except GeneralProtection as fault:
            self._note("general-protection", f"{fault} on VP page {position}", "msr", fault.register)
            return _GP
        text = f"exit operation {operation} on VP page {position}"
        self._note("unknown-exit-operation", text, "operation", operation)
        return _UD

    def _attach(self, pid: int, version: int) -> Answer:
        """A guest comes: another ABI major, or no pid, is a #GP; otherwise every VP starts afresh."""
        if version >> 16 != ABI_MAJOR:
            self._note("attach-abi-version", f"ATTACH with ABI version {version:#x}", "version", version)
            return _GP
        if not 0 < pid <= _LARGEST_PID:
            self._note("attach-pid", f"ATTACH with pid {pid}", "pid", pid)
            return _GP
        self.reset()
        return (self._attached(pid), 0), Fault.NONE

    def reset(self) -> None:
        """Reset every VP: registers, interrupt words, overlays; queued messages are dropped."""
        self._guest_os_id = 0
        self._hypercall = 0
        for vp in self.vps:
            vp.synic.reset()
            self._reset_words(vp.position)
            self.changed_vps.add(vp.position)
        self.timers.reset()
        self.queues.clear()

    @property
    def refused(self) -> Counter[str]:
        """What a guest broke, by rule."""
        return self.refusals.refused

    def _note(self, rule: str, text: str, field: str, value: int) -> None:
        """Count a refusal, and say why: who writes a guest has only this to go by."""
        self.refusals.add(Refused(rule, text, field, value))

    # -- registers ----------------------------------------------------------------------------------

    @property
    def guest_os_id(self) -> int:
        """HV_X64_MSR_GUEST_OS_ID."""
        return self._guest_os_id

    @property
    def hypercall_register(self) -> int:
        """HV_X64_MSR_HYPERCALL."""
        return self._hypercall

    def read_msr(self, position: int, msr: int) -> int:
        """Value of a register; GeneralProtection for one that does not exist."""
        if HV_X64_MSR_SCONTROL <= msr <= HV_X64_MSR_EOM or HV_X64_MSR_SINT0 <= msr <= HV_X64_MSR_SINT15:
            return self.synics[position].read_msr(msr)
        if HV_X64_MSR_STIMER0_CONFIG <= msr <= HV_X64_MSR_STIMER3_COUNT:
            return self.timers.read_msr(position, msr)
        if msr == HV_X64_MSR_VP_INDEX:
            return self.vps[position].vp_index
        if msr == HV_X64_MSR_TIME_REF_COUNT:
            return self._reference_time()
        if msr == HV_X64_MSR_GUEST_OS_ID:
            return self._guest_os_id
        if msr == HV_X64_MSR_HYPERCALL:
            return self._hypercall
        if msr == HV_X64_MSR_RESET:
            return 0
        raise GeneralProtection("read", msr)

    def write_msr(self, position: int, msr: int, value: int) -> None:
        """Write a register; GeneralProtection where the processor refuses."""
        if msr == HV_X64_MSR_EOM:
            self._end_of_message(position)
        elif HV_X64_MSR_SCONTROL <= msr < HV_X64_MSR_EOM or HV_X64_MSR_SINT0 <= msr <= HV_X64_MSR_SINT15:
            synic = self.synics[position]
            synic.write_msr(msr, value)
            self.changed_vps.add(position)
            if msr >= HV_X64_MSR_SINT0:
                self._set_auto_eoi(position, synic.auto_eoi_vectors())
            # Whatever waited for a page, for SCONTROL or for this slot may go now.
            self.queues.pump_vp(position)
        elif HV_X64_MSR_STIMER0_CONFIG <= msr <= HV_X64_MSR_STIMER3_COUNT:
            self.timers.write_msr(position, msr, value)
        elif msr == HV_X64_MSR_GUEST_OS_ID:
            self._guest_os_id = value
            if value == 0:
                self._hypercall &= ~HV_X64_MSR_HYPERCALL_ENABLE
        elif msr == HV_X64_MSR_HYPERCALL:
            self._write_hypercall(value)
        elif msr == HV_X64_MSR_RESET:
            if value & 1:
                self.reset()
        else:
            raise GeneralProtection("write", msr, value)

    def _write_hypercall(self, value: int) -> None:
        if self._hypercall & HV_X64_MSR_HYPERCALL_LOCKED:
            return  # writes are ignored until reset
        if page_register_enabled(value):
            if self._guest_os_id == 0:
                value &= ~HV_X64_MSR_HYPERCALL_ENABLE
            elif page_register_gpa(value) + PAGE_SIZE > self.memory.size:
                raise GeneralProtection("write of HYPERCALL", HV_X64_MSR_HYPERCALL, value)
        self._hypercall = value

    def _end_of_message(self, position: int) -> None:
        delivered = self.queues.pump_vp(position)
        if self.trace:
            self.trace.record(E_EOM, position, 0, delivered)

    # -- hypercalls ---------------------------------------------------------------------------------

    def hypercall(self, control: int, argument: int, claimer: int = 0) -> HvStatus:
        """HvCallPostMessage and HvCallSignalEvent; `argument` is the input's GPA, or a fast call's input."""
        if control == HVCALL_POST_MESSAGE and argument % PAGE_SIZE + _POST_BYTES <= PAGE_SIZE and not argument % 8:
            data = self._input(argument, _POST_BYTES)
            return data if isinstance(data, HvStatus) else self.post_message(data, claimer)
        code = call_code(control)
        if code not in (HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT):
            return self._refuse("hypercall-code", HvStatus.INVALID_HYPERCALL_CODE, "control", control)
        if not is_simple(control):
            return self._refuse("hypercall-control", HvStatus.INVALID_HYPERCALL_INPUT, "control", control)
        if is_fast(control):
            if code == HVCALL_POST_MESSAGE:
                return self._refuse("fast-post-message", HvStatus.INVALID_HYPERCALL_INPUT, "control", control)
            return self.signal_event(argument)
        size = _POST_BYTES if code == HVCALL_POST_MESSAGE else _SIGNAL.size
        if argument % 8 or argument % PAGE_SIZE + size > PAGE_SIZE:
            return self._refuse("hypercall-input-alignment", HvStatus.INVALID_ALIGNMENT, "input GPA", argument)
        data = self._input(argument, size)
        if isinstance(data, HvStatus):
            return data
        if code == HVCALL_SIGNAL_EVENT:
            return self.signal_event(_SIGNAL.unpack(data)[0])
        return self.post_message(data, claimer)

    def _input(self, gpa: int, size: int) -> bytes | HvStatus:
        """A private copy of a hypercall's input, or why there is none."""
        try:
            # Even a read makes a page that was never touched, and on a full tmpfs dies of it.
            self.memory.reserve(gpa, size)
            # Copied once: the guest may change its page at any moment.
            return self.memory.read(gpa, size)
        except ProtocolViolation:
            # TLFS "Hypercall Status Codes": a pointer beyond the GPA space is INVALID_ALIGNMENT, too.
            return self._refuse("hypercall-input-gpa", HvStatus.INVALID_ALIGNMENT, "input GPA", gpa)
        except OutOfMemory:
            return self._refuse("hypercall-input-memory", HvStatus.INSUFFICIENT_MEMORY, "input GPA", gpa)

    def post_message(self, data: bytes, claimer: int = 0) -> HvStatus:
        """HvCallPostMessage on a private copy of its 256 input bytes."""
        message = PostMessageInput.unpack(data)
        status = message.status
        if status or message.reserved:
            return self._refuse("post-message-parameter", HvStatus.INVALID_PARAMETER, *_wrong_field(message))
        port = self.connections.messages.get(message.connectionid)
        serial = 0
        if port is None:
            rule, number = "unknown-message-connection", message.connectionid
            status = self._refuse(rule, HvStatus.INVALID_CONNECTION_ID, "connectionid", number)
        else:
            # Our guests number no posts, and a foreign one may write what it likes there: ours are counted here.
            self._posts = serial = self._posts + 1
            status = port.post(message.message_type, message.payload, serial)
            if status == HvStatus.INSUFFICIENT_BUFFERS:
                # How the host slows a guest down that posts faster than it takes messages out of its slot: the guest
                # posts again later. Nobody broke a rule.
                self.ignored["port-insufficient-buffers"] += 1
        if self.trace:
            msgtype = int.from_bytes(message.payload[:4], "little")
            self.trace.record(E_POST, message.connectionid, msgtype, message.payload_size, status, serial, claimer)
            self.trace.keep(message.payload)
        return status

    def signal_event(self, argument: int) -> HvStatus:
        """HvCallSignalEvent: connection id (31:0), flag number (47:32), reserved 0."""
        connection_id, flag_number, reserved = split_signal_event(argument)
        if reserved:
            return self._refuse("signal-event-reserved", HvStatus.INVALID_PARAMETER, "reserved", reserved)
        port = self.connections.events.get(connection_id)
        if port is None:
            rule = "unknown-event-connection"
            return self._refuse(rule, HvStatus.INVALID_CONNECTION_ID, "connectionid", connection_id)
        status = port.signal(flag_number)
        if status:
            rule = "event-" + status.name.lower().replace("_", "-")
            self._refuse(rule, status, "flag_number", flag_number)
        return status

    def _refuse(self, rule: str, status: HvStatus, field: str, value: int) -> HvStatus:
        """A hypercall's status that is no success, with the field that was wrong."""
        self._note(rule, f"hypercall with {field} {value:#x}: {status.name}", field, value)
        return status


def _wrong_field(message: PostMessageInput) -> tuple[str, int]:
    """Which field of a HvCallPostMessage is none, and what it holds."""
    if message.reserved:
        return "reserved", message.reserved
    if message.payload_size > PostMessageInput.MAX_PAYLOAD:
        return "payload_size", message.payload_size
    return "message_type", message.message_type
