"""The back ends by name, and what the host offers for a device of a scenario.

A device is a line in each of two tables: its class in `emu.wire.device_classes`, its back end here. A plugin
adds its lines when the process attaches (`add_plugins`).
"""

from __future__ import annotations

from struct import pack
from typing import Final
from uuid import UUID

from emu.errors import UserError
from emu.plugin import Plugins
from emu.wire.device_classes import CLASSES, DeviceClass
from hostproc.devices.backend import Backend
from hostproc.devices.echo import Echo
from hostproc.devices.netlike import Netlike
from hostproc.protocol.offers import OfferParameters

BACKENDS: Final[dict[str, type[Backend]]] = {backend.name: backend for backend in (Echo, Netlike)}
"""Back ends, by the name that a scenario gives them."""

DEVICES: Final[dict[str, DeviceClass]] = {kind.name: kind for kind in CLASSES}
"""Device classes, by the name that a scenario gives them; any back end may stand behind any of them."""


def check_plugins(plugins: Plugins) -> None:
    """UserError for a plugin's back end that has the name of one of ours, or is none."""
    for name, backend in plugins.backends.items():
        path = plugins.path_of("back end", name)
        if name in BACKENDS:
            raise UserError(f"plugin {path}: back end {name} is one of ours; choose another name")
        if not issubclass(backend, Backend):
            raise UserError(f"plugin {path}: back end {name} is none; derive it from hostproc.devices.backend.Backend")


def add_plugins(plugins: Plugins) -> None:
    """Add what plugins register to this process."""
    check_plugins(plugins)
    BACKENDS.update(plugins.backends)
    DEVICES.update(plugins.classes)


def new_backend(name: str, *, subchannels: int = 0, seed: int = 0) -> Backend:
    """Make a back end for one device; KeyError when there is none of that name, UserError when a plugin's raises."""
    make = BACKENDS[name]
    try:
        backend = make()
    except Exception as error:
        raise UserError(f"back end {name}: {type(error).__name__} while it was made: {error}") from error
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
