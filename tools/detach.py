"""`run --detach`: the launcher goes on in the background; the command returns when all channels are open."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import IO, Final

import click

from emu.errors import VmbusError
from tools import output
from tools.early_signals import raise_noted
from tools.exit_status import ExitStatus
from tools.output import print_json, say
from tools.paths import made, state_dir
from tools.run_machine import Options, run_here

KEPT: Final = 10
"""Logs of launchers that ended badly, or were killed."""
NOT_UP: Final = "the launcher ended before its machine was up"


def run_detached(options: Options) -> int:
    """Fork the launcher into a session of its own and wait for its word, or for its end.

    Whoever interrupts that does not want the machine, and who cannot be told its name does not get it (OSError).
    VmbusError where somebody killed the launcher.
    """
    raise_noted()
    reader, writer = os.pipe()
    log = made(state_dir()) / f"detached-{os.getpid()}.log"
    # What a program asked for is an object, and not among what the launcher says.
    asked_for = os.memfd_create("vmbus-emu-detached") if options.as_json else None
    _drop_old_logs()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _become_launcher(options, writer, log, asked_for)
    os.close(writer)
    try:
        with os.fdopen(reader) as word:
            name = word.readline().strip()
        if name and options.as_json:
            print_json("run-detached", 1, {"machine": name, "pid": pid})
        elif name:
            click.echo(name)
    except (KeyboardInterrupt, SystemExit, OSError):
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        log.unlink(missing_ok=True)
        raise
    if not name:
        _pid, status = os.waitpid(pid, 0)
        said = log.read_text().rstrip() if log.exists() else ""
        log.unlink(missing_ok=True)
        code = os.waitstatus_to_exitcode(status)
        if said or code > 0:
            say(said or f"vmbus-emu: {NOT_UP}")
        # Behind it: a stdout that is full or closed takes nothing of what was said.
        if asked_for is not None and (told := os.pread(asked_for, os.fstat(asked_for).st_size, 0)):
            output.told = True
            click.echo(told, nl=False)
        if code > 0:
            return code
        raise VmbusError(NOT_UP)
    return ExitStatus.FINE


def _drop_old_logs() -> None:
    """All but the newest ten; the log of a launcher that lives is locked by it, and stays."""
    logs: list[tuple[float, Path]] = []
    for path in state_dir().glob("detached-*.log"):
        with contextlib.suppress(OSError):  # another one that drops them was quicker
            logs.append((path.stat().st_mtime, path))
    for _written, path in sorted(logs)[:-KEPT]:
        with contextlib.suppress(OSError), path.open("rb") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _become_launcher(options: Options, writer: int, log: Path, asked_for: int | None) -> None:
    """In the child: no terminal, output to the log, run, leave.

    An object that tells why the machine did not come up goes to `asked_for`, of which the command makes its own.
    """
    # Here, as it is the table of all commands; who types this one has imported it.
    from tools.cli import status_of

    status = int(ExitStatus.FAILED)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    fcntl.flock(out, fcntl.LOCK_EX)
    os.dup2(null, 0)
    os.dup2(out if asked_for is None else asked_for, 1)
    os.dup2(out, 2)
    asked = ["run", "--detach", *(["--json"] if options.as_json else [])]
    try:
        with os.fdopen(writer, "w") as pipe:
            status = status_of(asked, partial(run_here, options, partial(_tell_name, pipe, out)))
        if status in (ExitStatus.FINE, ExitStatus.TERMINATED):
            log.unlink(missing_ok=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _tell_name(pipe: IO[str], log: int, name: str) -> None:
    """The machine is up: who waits for it hears its name, and whatever is said from here on is for the log."""
    sys.stdout.flush()
    os.dup2(log, 1)
    pipe.write(f"{name}\n")
    pipe.flush()
