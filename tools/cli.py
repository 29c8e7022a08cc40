"""`vmbus-emu`: one table of commands, and what every one of them does when something goes wrong.

A command is a click command NAME in module `tools.NAME`, imported only when it is called. It returns its exit
status (None is 0) or raises; here, and nowhere else, an exception becomes an `ExitStatus`.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import click

from emu.errors import DeadlinePassed, MissingPrerequisite, NotOpened, UserError, VmbusError
from emu.limits import limit_behind
from tools import output
from tools.early_signals import catch_signals, raise_noted
from tools.exit_status import ExitStatus
from tools.options import json_option

PROGRAM: Final = "vmbus-emu"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of `vmbus-emu --help`: under which heading, and what the command does."""

    section: str
    summary: str


HEADINGS: Final = ("Machines", "Look", "Measure", "This computer")


COMMANDS: Final[Mapping[str, Entry]] = {
    "demo": Entry("Machines", "Watch a machine boot and its devices appear, one step at a time."),
    "run": Entry("Machines", "Boot a machine, show its devices appear, exchange packets, clean up."),
    "record": Entry("Machines", "Boot a machine, record every event of it, clean up."),
    "ps": Entry("Machines", "List the machines that run, and those that died and left something."),
    "stop": Entry("Machines", "Stop a running machine and wait until nothing of it is left."),
    "clean": Entry("Machines", "Remove what killed machines left behind; running machines are not touched."),
    "ctl": Entry("Machines", "Offer and rescind devices, bind drivers, move interrupts, let steps of the guest fail."),
    "ls": Entry("Look", "List a machine's devices as the kernel's lsvmbus does."),
    "inspect": Entry("Look", "Show a machine's whole state as a tree, live or as it died."),
    "matrix": Entry("Look", "Boot every era of the guest on every version of the host."),
    "top": Entry("Look", "Watch a machine's channels, processors and processes."),
    "report": Entry("Look", "Make a page of a recording that opens in any browser."),
    "trace": Entry("Look", "Write a recording in a format that other tools read."),
    "explain": Entry("Look", "Tell what happened to a device or a message, step by step."),
    "check": Entry("Look", "Check a recording against the invariants of VMBus."),
    "races": Entry("Look", "Show the races that cost this field years, each the same way every time."),
    "explore": Entry("Look", "Try every order in which host and guest may act, and check each state."),
    "wireshark": Entry("Look", "Give Wireshark and tshark the dissector of our captures."),
    "latency": Entry("Measure", "Measure round trips and the stages in which their time goes."),
    "stress": Entry(
        "Measure", "Send everything that may be sent, from every CPU, while devices come and go; check every byte."
    ),
    "profile": Entry("Measure", "Watch what a machine's processes cost, and per packet and interrupt."),
    "bench": Entry("Measure", "Measure, print medians, ratios and goals."),
    "sysfs": Entry("Look", "Run a command that sees the machine's live tree at /sys/bus/vmbus."),
    "doctor": Entry("This computer", "Check what this computer has of what a machine needs."),
}


TELL_INTERRUPTIONS: Final = frozenset({"run", "record", "matrix", "latency", "stress", "bench"})
"""Commands that have something to tell when they are interrupted, from their first moment (`noting_interruption`)."""


class CommandTable(click.Group):
    """The commands of `COMMANDS`; help is printed from the table, without importing a single one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command = getattr(import_module(f"tools.{name}"), name)
        assert isinstance(command, click.Command), f"tools.{name}.{name} is no command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; from here on signals are raised, and those that came while it was imported."""
        name, command, rest = super().resolve_command(ctx, args)
        catch_signals()
        if name not in TELL_INTERRUPTIONS:
            raise_noted()
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands under their headings."""
        for heading in HEADINGS:
            rows = [(name, entry.summary) for name, entry in COMMANDS.items() if entry.section == heading]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


@click.group(cls=CommandTable, invoke_without_command=True, subcommand_metavar="COMMAND …")
@click.option("--version", is_flag=True, help="Print the version; with --json also what it was built on.")
@json_option
@click.pass_context
def vmbus_emu(ctx: click.Context, version: bool, as_json: bool) -> int:
    """Both ends of Hyper-V's VMBus over real processes, without a hypervisor.

    \b
    Example:
      vmbus-emu doctor
      vmbus-emu COMMAND --help
    """
    if version:
        from tools.version import print_version

        print_version(as_json)
        ctx.exit(0)
    if as_json:
        raise click.UsageError("--json comes after a command, or with --version", ctx)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    return 0


_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_INTERRUPTIONS: Final = frozenset({ExitStatus.HANGUP, ExitStatus.INTERRUPTED, ExitStatus.TERMINATED})
_BEYOND: Final = frozenset({errno.ENOMEM, errno.EMFILE})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; nothing passes but a SystemExit that is no signal's."""
    asked = list(sys.argv[1:] if arguments is None else arguments)
    return status_of(asked, lambda: 0 if _completes() else _carry_out(asked))


def status_of(asked: list[str], work: Callable[[], int]) -> int:
    """The exit status of what these words ask for; what ended `work` is told, on stderr and to who asked for JSON."""
    output.told = False
    try:
        status = work()
        sys.stdout.flush()
        return _interrupted(asked, status) if status in _INTERRUPTIONS else status
    except click.ClickException as error:
        return _complain(_usage(error, asked), ExitStatus.USAGE)
    except UserError as error:
        return _complain(str(error), ExitStatus.USAGE)
    except MissingPrerequisite as error:
        return _complain(str(error), ExitStatus.MISSING)
    except DeadlinePassed as error:
        _tell_failure(asked, error)
        return _complain(str(error), ExitStatus.TIME_LIMIT)
    except NotOpened as error:
        _tell_failure(asked, error)
        return _complain(str(error), ExitStatus.FINDING)
    except VmbusError as error:
        _tell_failure(asked, error)
        return _complain(str(error), ExitStatus.FAILED, one_line=False)
    except (KeyboardInterrupt, click.Abort):
        return _interrupted(asked, ExitStatus.INTERRUPTED)
    except SystemExit as leave:
        if leave.code not in (ExitStatus.TERMINATED, ExitStatus.HANGUP):
            raise
        return _interrupted(asked, ExitStatus(leave.code))
    except BrokenPipeError:
        output.silence(sys.stdout)
        return ExitStatus.READER_LEFT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM and _stdout_fails():
            output.silence(sys.stdout)
            said = f"cannot write to stdout: {error.strerror}; make room, or send it somewhere else"
            return _complain(said, ExitStatus.USAGE)
        if _beyond_a_limit(error):
            said = getattr(error, "strerror", None) or str(error) or "out of memory"
            return _complain(f"{said}; {limit_behind(error)}", ExitStatus.MISSING)
        _tell_failure(asked, error)
        return _complain(f"internal error\n{traceback.format_exc()}", ExitStatus.FAILED, one_line=False)


def _beyond_a_limit(error: Exception) -> bool:
    """Whether this process has met a limit of its own, which nobody has told in better words."""
    short_of_memory = isinstance(error, (MemoryError, ImportError))
    return (short_of_memory or getattr(error, "errno", None) in _BEYOND) and limit_behind(error) is not None


def _carry_out(arguments: list[str]) -> int:
    """The command's exit status; --help and --version leave early with theirs."""
    try:
        with vmbus_emu.make_context(PROGRAM, arguments) as ctx:
            status = vmbus_emu.invoke(ctx)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    return status if isinstance(status, int) else 0


def _interrupted(asked: list[str], status: int) -> int:
    """A command was ended that had nothing to tell."""
    _give_object(asked, "interrupted", lambda: {"interrupted": True})
    return status


def _tell_failure(asked: list[str], error: Exception) -> None:
    """A command failed that has told nothing of it itself: what was waited for, who died, or what went wrong."""

    def body() -> dict[str, Any]:
        from tools.crash import failure_report

        return failure_report(error)

    _give_object(asked, "failed", body)


def _give_object(asked: list[str], name: str, body: Callable[[], dict[str, Any]]) -> None:
    """A program that asked for an object gets one, also if the command came to none."""
    options = asked[: asked.index("--")] if "--" in asked else asked
    if "--json" not in options or output.told:
        return
    try:
        output.print_json(name, 1, body())
    except OSError:  # nobody reads it, or there is no room: what ended the command is told all the same
        output.silence(sys.stdout)


def _stdout_fails() -> bool:
    """Whether it was stdout that had no room: then it has none for a line's end, which otherwise does no harm."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _complain(text: str, status: int, *, one_line: bool = True) -> int:
    """Say what went wrong on stderr, in one line if it is the user's to mend; gives the exit status back."""
    said = re.sub(r"\s*[\n\t]\s*", " ", text) if one_line else text
    try:
        output.say(f"{PROGRAM}: {said.rstrip()}")
    except BrokenPipeError:  # nobody hears it: the status tells it all the same
        output.silence(sys.stderr)
    return status


_NUMBERS: Final = {"integer": "is no whole number", "float": "is no number"}


def _usage(error: click.ClickException, asked: Sequence[str]) -> str:
    """click's complaint in one line that says where the help is."""
    path = PROGRAM
    if isinstance(error, click.UsageError) and error.ctx is not None:
        path = error.ctx.command_path
    elif asked and asked[0] in COMMANDS:
        path = f"{PROGRAM} {asked[0]}"  # click's parser does not say whose option lacks its argument
    # click has the names of its own types for what somebody has to write.
    said = re.sub(r"is not a valid (integer|float)( range)?", lambda of: _NUMBERS[of[1]], error.format_message())
    return f"{said.rstrip('.')}; see `{path} --help`"


def _completes() -> bool:
    """Answer a shell that asks for completions (`_VMBUS_EMU_COMPLETE=bash_source vmbus-emu`: its script)."""
    variable = "_VMBUS_EMU_COMPLETE"
    instruction = os.environ.get(variable)
    if not instruction:
        return False
    from click.shell_completion import shell_complete

    return shell_complete(vmbus_emu, {}, PROGRAM, variable, instruction) == 0


if __name__ == "__main__":
    sys.exit(main())
