"""VMBus protocol versions and the feature flags of 6.0.

A version is a u32, `major << 16 | minor`, compared as a number. Which versions a guest tries and a host
speaks is their own policy; here are only the names (the kernel's, from hyperv.h; OpenVMM's "Copper" is 6.0).
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

VERSION_WS2008: Final = 0x0000_000D
VERSION_WIN7: Final = 0x0001_0001
VERSION_WIN8: Final = 0x0002_0004
VERSION_WIN8_1: Final = 0x0003_0000
VERSION_WIN10: Final = 0x0004_0000
VERSION_WIN10_V4_1: Final = 0x0004_0001
VERSION_WIN10_V5: Final = 0x0005_0000
VERSION_WIN10_V5_1: Final = 0x0005_0001
VERSION_WIN10_V5_2: Final = 0x0005_0002
VERSION_WIN10_V5_3: Final = 0x0005_0003
VERSION_COPPER: Final = 0x0006_0000

KNOWN_VERSIONS: Final[tuple[int, ...]] = (
    VERSION_WS2008,
    VERSION_WIN7,
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5_2,
    VERSION_WIN10_V5_3,
    VERSION_COPPER,
)
"""Every version there is, oldest first."""


class FeatureFlags(IntFlag):
    """What a 6.0 guest asks for in INITIATE_CONTACT, and the subset that the host grants."""

    GUEST_SPECIFIED_SIGNAL_PARAMETERS = 0x01
    CHANNEL_INTERRUPT_REDIRECTION = 0x02
    MODIFY_CONNECTION = 0x04
    CLIENT_ID = 0x08
    CONFIDENTIAL_CHANNELS = 0x10
    PAUSE_RESUME = 0x20
    SERVER_SPECIFIED_MONITOR_PAGES = 0x40
    GPA_PINNING = 0x80


def version_text(version: int) -> str:
    """Say a version the way the kernel logs it: `0x50003` is "5.3"."""
    return f"{version >> 16}.{version & 0xFFFF}"


def version_from_text(text: str) -> int:
    """Read "5.3" back; ValueError if it is no version that VMBus has."""
    for version in KNOWN_VERSIONS:
        if version_text(version) == text:
            return version
    known = ", ".join(version_text(version) for version in KNOWN_VERSIONS)
    raise ValueError(f"{text!r} is no VMBus version; there are {known}")
