"""GUIDs: sixteen bytes on the wire, lower-case text for people.

The wire form is u32, u16, u16 little-endian, then eight bytes in order: `uuid.UUID.bytes_le`. Both directions
are cached: a bus of 2,000 devices meets the same few class GUIDs in every offer.
"""

from __future__ import annotations

from functools import lru_cache
from uuid import UUID

GUID_SIZE = 16

NULL_GUID = UUID(int=0)


@lru_cache(maxsize=4096)
def guid_from_wire(data: bytes) -> UUID:
    """Read the 16 bytes of a `guid_t`."""
    return UUID(bytes_le=data)


@lru_cache(maxsize=4096)
def guid_to_wire(guid: UUID) -> bytes:
    """Write the 16 bytes of a `guid_t`."""
    return guid.bytes_le


def braced(guid: UUID) -> str:
    """Say a GUID as sysfs does in `class_id` and `device_id`: `{%pUl}`."""
    return f"{{{guid}}}"


def modalias(guid: UUID) -> str:
    """Say a class GUID as the kernel's module alias: `vmbus:` and the 16 wire bytes in hex."""
    return f"vmbus:{guid.bytes_le.hex()}"
