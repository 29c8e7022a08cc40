"""Starting the zygote: an interpreter that imports what inner processes need, while the caller goes on.

A command that will launch a machine starts it before it has read its own arguments: its imports (100 ms) then
run beside ours. Nothing heavy is imported here for the same reason.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
from dataclasses import dataclass
from typing import Any

from emu.errors import MissingPrerequisite
from emu.limits import not_started, too_tight
from tools.own_python import own_environment, own_python
from tools.paths import cache_dir


@dataclass(slots=True)
class Link:
    """The zygote: its process and the SEQPACKET socket to it."""

    process: subprocess.Popen[bytes]
    socket: socket.socket

    def send(self, *message: Any) -> None:
        """One order."""
        import msgpack

        self.socket.send(msgpack.packb(message))

    def discard(self) -> None:
        """Nobody needs it: end it."""
        self.process.kill()
        self.process.wait()
        self.socket.close()


_started: list[Link] = []


def start_zygote() -> Link:
    """A zygote of this process: the one that was started early, or a new one."""
    return _started.pop() if _started else _start()


def start_early() -> None:
    """Start a zygote that `start_zygote` will hand out; it ends with this process when nobody asks for it."""
    if too_tight():  # `launch` says so in one line, a zygote in a traceback
        return
    with contextlib.suppress(MissingPrerequisite):  # whoever asks for it is told
        _started.append(_start())
    atexit.register(discard_unused)


def discard_unused() -> None:
    """End a zygote that was started early and not needed (a usage error, `--help`)."""
    while _started:
        _started.pop().discard()


def _with_bytecode() -> dict[str, str]:
    """The environment, with a place for bytecode where the user wants none beside the sources.

    Compiling what a zygote imports takes longer than booting a machine does.
    """
    environment = own_environment()
    if environment.pop("PYTHONDONTWRITEBYTECODE", "") and "PYTHONPYCACHEPREFIX" not in environment:
        environment["PYTHONPYCACHEPREFIX"] = str(cache_dir() / "bytecode")
    return environment


def _start() -> Link:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            process = subprocess.Popen(
                own_python("tools.zygote", str(theirs.fileno()), str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_with_bytecode(),
                # From its first moment: Ctrl-C while it imports is for the launcher alone.
                process_group=0,
            )
        except OSError as error:
            ours.close()
            raise not_started("the zygote", error.strerror) from None
    return Link(process, ours)
