"""Options that several commands share, each spelled in one place so that it reads the same everywhere."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource

from emu.control import MIRROR_CHANNELS
from emu.errors import UserError
from tools.machines import MACHINE_VARIABLE, FromVariable
from tools.named_files import check_writable

F = TypeVar("F", bound=Callable[..., Any])
FLIGHT_VARIABLE: Final = "VMBUS_EMU_FLIGHT"
"""Environment variable that stands for `--flight` where that is not said."""


def relid_of(_context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Callback of an argument or option that is a channel's number; UserError says what a relid is."""
    if value is None or (value.isascii() and value.isdecimal() and 1 <= int(value) < MIRROR_CHANNELS):
        return None if value is None else int(value)
    name = parameter.opts[0]
    raise UserError(f"{name}: {value} is no relid, a channel's number from 1 to 2047; `vmbus-emu ls` shows them")


class Seconds(click.FloatRange):
    """A time within its bounds; what is no number of seconds is refused, which no comparison with bounds does (nan)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a usage error for one that no clock reaches."""
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


class FileToWrite(click.Path):
    """A file that will be written: whatever is the matter with its name is told before anything is done.

    `-` is stdout where a command takes that for its output (`allow_dash`), and no name of a file anywhere.
    """

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(path_type=Path, allow_dash=allow_dash)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; UserError when no file of this name can be written."""
        text = os.fspath(value)
        option = param.opts[0] if param is not None else ""
        if text == "-":
            if self.allow_dash:
                return Path(text)
            raise UserError(
                f"{option} -: this goes into a file, not to stdout; name it (./- if it is to be called that)"
            )
        if not text:
            raise UserError(f"{option} {text}: that is no name; name a file")
        if text.endswith(("/", "/.", "/..")):  # which a Path forgets
            raise UserError(f"{option} {text}: that names a folder; name the file in it")
        path = Path(text)
        check_writable(path, option)
        return path


def json_option(function: F) -> F:
    """`--json`: one object on stdout instead of text (parameter `as_json`)."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def _with_its_source(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    source = context.get_parameter_source(parameter.name or "")
    return FromVariable(value) if value is not None and source is ParameterSource.ENVIRONMENT else value


def machine_option(function: F) -> F:
    """`--machine NAME`: which running machine (parameter `machine_name`, None for the only one)."""
    return click.option(
        "--machine",
        "machine_name",
        metavar="NAME",
        envvar=MACHINE_VARIABLE,
        callback=_with_its_source,
        help="Which running machine; default: the only one (or $VMBUS_EMU_MACHINE).",
    )(function)


def plugin_option(function: F) -> F:
    """`--plugin FILE.py`, repeatable (parameter `plugin_paths`); `tools.plugins.scenario_of` loads them."""
    return click.option(
        "--plugin",
        "plugin_paths",
        metavar="FILE.py",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Load devices and drivers of your own (repeatable; docs/writing-a-driver.md).",
    )(function)


def fault_option(function: F) -> F:
    """`--fault FAULT`, repeatable (parameter `fault_texts`); `Scenario.with_overrides` reads it."""
    return click.option(
        "--fault",
        "fault_texts",
        metavar="NAME[=VALUE][@KEY=VALUE,…]",
        multiple=True,
        help="Let something go wrong, such as delay_irq=200us@relid=7 (repeatable; docs/faults.md).",
    )(function)


def record_option(function: F) -> F:
    """`--record FILE` (parameter `record_path`)."""
    return click.option(
        "--record",
        "record_path",
        metavar="FILE",
        type=FileToWrite(),
        help="Record every event into this file.",
    )(function)


def flight_option(default: float | None, shown: str | bool = True) -> Callable[[F], F]:
    """`--flight SECONDS` (parameter `flight_s`, 0: off; None: nobody said anything, see `tools.flight.usual_s`)."""
    return click.option(
        "--flight",
        "flight_s",
        metavar="SECONDS",
        type=Seconds(0, 3600),
        default=default,
        envvar=FLIGHT_VARIABLE,
        show_envvar=True,
        show_default=shown,
        help="Record into the processes' rings; save the last seconds when something goes wrong. 0: off.",
    )


def scenario_argument(function: F) -> F:
    """`[SCENARIO.toml]` (parameter `scenario_path`, None for the default one); `Scenario.load` checks it."""
    return click.argument("scenario_path", metavar="[SCENARIO.toml]", required=False, type=click.Path(path_type=Path))(
        function
    )
