"""`vmbus-emu wireshark`: gives Wireshark and tshark the dissector of our captures (tools/lua/vmbus.lua)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import click

from emu.errors import UserError
from tools.options import json_option
from tools.output import print_json

DISSECTOR: Final = Path(__file__).with_name("lua") / "vmbus.lua"
PROGRAMS: Final = ("tshark", "wireshark")
FOLDER: Final = "Personal Lua Plugins"
ASK_TIMEOUT_S: Final = 20


@click.group(invoke_without_command=True)
@click.pass_context
def wireshark(ctx: click.Context) -> None:
    """Give Wireshark and tshark the dissector of our captures.

    \b
    Example:
      vmbus-emu trace boot.rec --to pcapng -o boot.pcapng
      vmbus-emu wireshark install
      tshark -r boot.pcapng -Y 'vmbus.child_relid == 3'
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@wireshark.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to; default: the user's folder for Lua plugins, as `tshark -G folders` says.",
)
@json_option
def install(directory: Path | None, as_json: bool) -> None:
    """Copy the dissector into the user's folder for plugins.

    \b
    Example:
      vmbus-emu wireshark install
      vmbus-emu wireshark install --dir ~/.config/wireshark/plugins
    """
    target = (directory or plugin_folder()) / DISSECTOR.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DISSECTOR, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose a folder with --dir") from None
    if as_json:
        print_json("wireshark", 1, {"installed": str(target)})
    else:
        click.echo(target)


@wireshark.command()
@json_option
def show(as_json: bool) -> None:
    """Print where the dissector is, for a run without installing it.

    \b
    Example:
      tshark -X lua_script:$(vmbus-emu wireshark show) -r boot.pcapng
    """
    if as_json:
        print_json("wireshark", 1, {"dissector": str(DISSECTOR)})
    else:
        click.echo(DISSECTOR)


def plugin_folder() -> Path:
    """The user's folder for Lua plugins: what Wireshark says, else where it has been since 4.0."""
    for program in PROGRAMS:
        folder = folder_of(program)
        if folder is not None:
            return folder
    return Path.home() / ".local" / "lib" / "wireshark" / "plugins"


def folder_of(program: str) -> Path | None:
    """What `PROGRAM -G folders` says; None when there is no such program, or it says nothing of it."""
    try:
        done = subprocess.run(
            [program, "-G", "folders"], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in done.stdout.splitlines():
        name, _, folder = line.partition(":")
        if name.strip() == FOLDER and folder.strip():
            return Path(folder.strip())
    return None
