"""Which versions our guests ask for, and so which hosts they can connect to."""

from __future__ import annotations

from typing import Final

from emu.errors import UserError
from emu.scenario import ERAS, Scenario
from emu.wire.versions import (
    KNOWN_VERSIONS,
    VERSION_WIN8,
    VERSION_WIN10,
    VERSION_WIN10_V5_3,
    VERSION_WS2008,
    version_text,
)

ASKED_FOR: Final = {"seed": (VERSION_WS2008, VERSION_WIN10), "current": (VERSION_WIN8, VERSION_WIN10_V5_3)}
"""The oldest and the newest version that each era's guest asks for (reference 2.3)."""


def predicted(era: str, host_version: int) -> int | None:
    """The newest version that both speak; None: the guest is refused."""
    oldest, newest = ASKED_FOR[era]
    spoken = [version for version in KNOWN_VERSIONS if oldest <= version <= min(newest, host_version)]
    return max(spoken, default=None)


def check_versions(scenario: Scenario) -> None:
    """UserError where the scenario's guest would only be refused by its host (`vmbus_connect`: -EDOM)."""
    era, version = scenario.machine.era, scenario.machine.host_version
    if predicted(era, version) is not None:
        return
    others = [other for other in ERAS if predicted(other, version) is not None]
    cure = f"raise it to {version_text(ASKED_FOR[era][0])}" + "".join(f', or set era = "{other}"' for other in others)
    raise UserError(
        f"{scenario.source}: machine.host_version: the guest of era {era} speaks no version that a host of "
        f"{version_text(version)} has; {cure}"
    )
