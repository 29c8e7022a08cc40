"""Hypercalls: call codes, the control word, the inputs of HvCallPostMessage and HvCallSignalEvent, statuses.

A hypercall's status is a value (`HvStatus`), as on the machine: nothing here raises for a bad input.
The control word (RCX) holds the call code in bits 15:0, `fast` in 16, the variable header size in
26:17, `nested` in 31, the rep count in 43:32 and the rep start in 59:48; the result (RAX) holds the
status in 15:0 and the reps done in 43:32.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import ClassVar, Final, Self

from emu.values import valueclass

HVCALL_POST_MESSAGE: Final = 0x5C
HVCALL_SIGNAL_EVENT: Final = 0x5D
HVCALL_SIGNAL_EVENT_DIRECT: Final = 0xC0
HVCALL_POST_MESSAGE_DIRECT: Final = 0xC1

HV_HYPERCALL_CODE_MASK: Final = 0xFFFF
HV_HYPERCALL_FAST: Final = 1 << 16
HV_HYPERCALL_VARHEAD_MASK: Final = 0x3FF << 17
HV_HYPERCALL_NESTED: Final = 1 << 31
HV_HYPERCALL_REP_COUNT_MASK: Final = 0xFFF << 32
HV_HYPERCALL_REP_START_MASK: Final = 0xFFF << 48
HV_HYPERCALL_RESERVED_MASK: Final = (0xF << 27) | (0xF << 44) | (0xF << 60)
HV_HYPERCALL_STATUS_MASK: Final = 0xFFFF

FAST_SIGNAL_EVENT: Final = HVCALL_SIGNAL_EVENT | HV_HYPERCALL_FAST
"""The whole control word of the SignalEvent that drivers make: 0x1005D."""

HV_VP_INDEX_SELF: Final = 0xFFFF_FFFE
HV_ANY_VP: Final = 0xFFFF_FFFF

CONNECTION_ID_MASK: Final = 0x00FF_FFFF
"""Connection and port ids have 24 bits; the other 8 are reserved."""
VMBUS_MESSAGE_CONNECTION_ID: Final = 1
VMBUS_EVENT_CONNECTION_ID: Final = 2
VMBUS_MONITOR_CONNECTION_ID: Final = 3
VMBUS_MESSAGE_CONNECTION_ID_4: Final = 4
VMBUS_MESSAGE_CONNECTION_ID_REDIRECT: Final = 0x80_0074
VMBUS_MESSAGE_PORT_ID: Final = 1
VMBUS_EVENT_PORT_ID: Final = 2
VMBUS_MONITOR_PORT_ID: Final = 3

PORT_MESSAGE_BUFFERS: Final = 16
"""Guest message buffers of a port: so many may be queued before INSUFFICIENT_BUFFERS."""


class HvStatus(IntEnum):
    """The status in bits 15:0 of a hypercall's result (TLFS, "Hypercall Status Codes")."""

    SUCCESS = 0x00
    INVALID_HYPERCALL_CODE = 0x02
    INVALID_HYPERCALL_INPUT = 0x03
    INVALID_ALIGNMENT = 0x04
    INVALID_PARAMETER = 0x05
    ACCESS_DENIED = 0x06
    INVALID_PARTITION_STATE = 0x07
    OPERATION_DENIED = 0x08
    UNKNOWN_PROPERTY = 0x09
    PROPERTY_VALUE_OUT_OF_RANGE = 0x0A
    INSUFFICIENT_MEMORY = 0x0B
    INVALID_PARTITION_ID = 0x0D
    INVALID_VP_INDEX = 0x0E
    INVALID_PORT_ID = 0x11
    INVALID_CONNECTION_ID = 0x12
    INSUFFICIENT_BUFFERS = 0x13
    NOT_ACKNOWLEDGED = 0x14
    INVALID_VP_STATE = 0x15
    INVALID_SYNIC_STATE = 0x18
    OBJECT_IN_USE = 0x19
    NO_RESOURCES = 0x1D
    FEATURE_UNAVAILABLE = 0x1E
    INSUFFICIENT_BUFFER = 0x33
    INVALID_REGISTER_VALUE = 0x50
    INVALID_VTL_STATE = 0x51
    OPERATION_FAILED = 0x71
    TIME_OUT = 0x78
    VTL_ALREADY_ENABLED = 0x86


def call_code(control: int) -> int:
    """Bits 15:0 of a control word."""
    return control & HV_HYPERCALL_CODE_MASK


def is_fast(control: int) -> bool:
    """Whether the input is in registers (RDX, R8) instead of memory."""
    return bool(control & HV_HYPERCALL_FAST)


def is_simple(control: int) -> bool:
    """Whether only code and fast bit are set: no reps, no variable header, not nested, nothing reserved."""
    return not control & ~(HV_HYPERCALL_CODE_MASK | HV_HYPERCALL_FAST)


def rep_count(control: int) -> int:
    """Bits 43:32 of a control word."""
    return (control & HV_HYPERCALL_REP_COUNT_MASK) >> 32


def rep_start(control: int) -> int:
    """Bits 59:48 of a control word."""
    return (control & HV_HYPERCALL_REP_START_MASK) >> 48


def result_status(result: int) -> int:
    """Bits 15:0 of a result; a plain int, since the host may send what HvStatus does not know."""
    return result & HV_HYPERCALL_STATUS_MASK


def signal_event_input(connection_id: int, flag_number: int = 0) -> int:
    """Build the one u64 that HvCallSignalEvent takes; the flag counts from the port's base flag."""
    return connection_id | flag_number << 32


def split_signal_event(value: int) -> tuple[int, int, int]:
    """Take that u64 apart: connection id (31:0), flag number (47:32), the reserved rest (63:48)."""
    return value & 0xFFFF_FFFF, value >> 32 & 0xFFFF, value >> 48


@valueclass()
class PostMessageInput:
    """`hv_input_post_message`: 256 bytes of memory that HvCallPostMessage reads.

    `payload_size` is what the caller says and may be nonsense; `payload` holds min(payload_size, 240) bytes.
    """

    LAYOUT: ClassVar[Struct] = Struct("<IIII240s")
    MAX_PAYLOAD: ClassVar[int] = 240

    connectionid: int
    message_type: int
    payload_size: int
    payload: bytes
    reserved: int = 0

    @classmethod
    def of(cls, connectionid: int, message_type: int, payload: bytes) -> Self:
        """Make the input for a payload of at most 240 bytes."""
        assert len(payload) <= cls.MAX_PAYLOAD, len(payload)
        return cls(connectionid, message_type, len(payload), payload)

    def pack(self) -> bytes:
        """Write 256 bytes, filled up with zeros."""
        return self.LAYOUT.pack(self.connectionid, self.reserved, self.message_type, self.payload_size, self.payload)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read 256 bytes as they lie in guest memory; `status` says whether they are a message."""
        connectionid, reserved, message_type, size, payload = cls.LAYOUT.unpack(data)
        return cls(connectionid, message_type, size, payload[:size], reserved)

    @property
    def status(self) -> HvStatus:
        """INVALID_PARAMETER for type 0, a hypervisor's type (bit 31), or a size beyond 240; else SUCCESS."""
        if self.message_type == 0 or self.message_type >> 31 or self.payload_size > self.MAX_PAYLOAD:
            return HvStatus.INVALID_PARAMETER
        return HvStatus.SUCCESS
