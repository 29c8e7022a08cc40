"""The back ends by name, and what the host offers for a device of a scenario.

A device is a line in each of two tables: its class in `emu.wire.device_classes`, its back end here.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import pack
from types import MappingProxyType
from typing import Final
from uuid import UUID

from emu.wire.device_classes import CLASSES, DeviceClass
from hostproc.devices.backend import Backend
from hostproc.devices.echo import Echo
from hostproc.devices.netlike import Netlike
from hostproc.protocol.offers import OfferParameters

BACKENDS: Final[Mapping[str, type[Backend]]] = MappingProxyType({backend.name: backend for backend in (Echo, Netlike)})
"""Back ends, by the name that a scenario gives them."""

DEVICES: Final[Mapping[str, DeviceClass]] = MappingProxyType({kind.name: kind for kind in CLASSES})
"""Device classes, by the name that a scenario gives them; any back end may stand behind any of them."""


def new_backend(name: str, *, subchannels: int = 0, seed: int = 0) -> Backend:
    """Make a back end for one device; KeyError when there is none of that name."""
    backend = BACKENDS[name]()
    backend.subchannels = subchannels
    backend.seed = seed
    return backend


def offer_of(class_name: str, instance: UUID, *, sub_channel_index: int = 0) -> OfferParameters:
    """Describe a device's channel as its class wants it: flags, and the pipe mode where it is a pipe."""
    kind = DEVICES[class_name]
    return OfferParameters(
        if_type=kind.guid,
        if_instance=instance,
        sub_channel_index=sub_channel_index,
        chn_flags=int(kind.chn_flags),
        user_def=b"" if kind.pipe_mode is None else pack("<I", kind.pipe_mode),
    )
