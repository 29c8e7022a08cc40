"""Plugins as the launcher takes them: loaded and checked before anything of a machine is made.

The launcher executes each file once, to know its classes and back ends and to refuse what cannot be; the
machine's processes do so again, each for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from emu.plugin import Plugins
from emu.scenario import Scenario


def scenario_of(path: Path | None, plugins: Iterable[Path] = ()) -> Scenario:
    """The scenario of a file, or the default one, with these plugins behind the file's own; UserError."""
    scenario = Scenario.load(path, plugins) if path else Scenario.default(plugins)
    check_plugins(scenario.plugins)
    return scenario


def check_plugins(plugins: Plugins) -> None:
    """Refuse what would stop one of the machine's processes; costs nothing without plugins."""
    if not plugins:
        return
    from guestproc.drivers import table as drivers
    from hostproc.devices import table as devices

    devices.check_plugins(plugins)
    drivers.check_plugins(plugins)
