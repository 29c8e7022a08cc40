"""The command line for tests: a process that has imported it, and forks for each call, as the zygote does.

A call is a process of its own, with its own arguments, environment, directory and pipes; what it saves is the start of
an interpreter and the imports, half a second each on a slow computer. What those two do is tested where `python -m
tools.entry` is started (`tests.system.commands`).

    test   -> server  [arguments, environment, directory] with the writing ends of two pipes
    server -> test    [pid], then [wait status]
"""

from __future__ import annotations

import array
import atexit
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import msgpack

SOURCES = Path(__file__).resolve().parent.parent
START_S = 60.0


class CommandServer:
    """The test's end: started at the first call, ended by `close` or with the test's process."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.settimeout(START_S)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server", str(theirs.fileno())],
            cwd=SOURCES,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def close(self) -> None:
        """End it."""
        self._link.close()
        self._process.wait(START_S)

    def run(
        self, arguments: list[str], environment: dict[str, str], directory: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end; TimeoutExpired, and the command is killed, when that takes too long."""
        pipes = [os.pipe() for _ in range(2)]
        message = msgpack.packb([arguments, environment, str(directory)])
        writers = array.array("i", [writer for _reader, writer in pipes])
        self._link.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, writers)])
        for writer in writers:
            os.close(writer)
        (pid,) = self._hear()
        output, over = _read_all([reader for reader, _writer in pipes], time.monotonic() + timeout_s)
        if over:
            os.kill(pid, signal.SIGKILL)
        (status,) = self._hear()
        command = ["vmbus-emu", *arguments]
        if over:
            raise subprocess.TimeoutExpired(command, timeout_s, *output)
        texts = [data.decode() for data in output]
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *texts)

    def _hear(self) -> Any:
        data = self._link.recv(65_536)
        assert data, "the command server died"
        return msgpack.unpackb(data)


def _read_all(readers: list[int], end: float) -> tuple[list[bytes], bool]:
    """What comes out of some pipes until all are closed, and whether that took too long."""
    parts: dict[int, list[bytes]] = {reader: [] for reader in readers}
    over = False
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader, selectors.EVENT_READ)
        while selector.get_map() and not over:
            left = end - time.monotonic()
            over = left <= 0
            for key, _events in selector.select(max(left, 0)):
                data = os.read(key.fd, 1 << 16)
                parts[key.fd].append(data)
                if not data:
                    selector.unregister(key.fd)
    for reader in readers:
        os.close(reader)
    return [b"".join(parts[reader]) for reader in readers], over


# -- the server -------------------------------------------------------------------------------------------


def serve(link: socket.socket) -> None:
    """One call after the other, until the test hangs up."""
    while True:
        data, descriptors, _flags, _address = socket.recv_fds(link, 1 << 20, 2)
        if not data:
            return
        arguments, environment, directory = msgpack.unpackb(data)
        pid = os.fork()
        if pid == 0:
            _be_command(link, arguments, environment, directory, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        link.send(msgpack.packb([pid]))
        _pid, status = os.waitpid(pid, 0)
        link.send(msgpack.packb([status]))


def _be_command(
    link: socket.socket, arguments: list[str], environment: dict[str, str], directory: str, descriptors: list[int]
) -> NoReturn:
    """Never returns: be the process that `python -m tools.cli ARGUMENTS…` would be."""
    status = 1
    try:
        link.close()
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.argv = ["vmbus-emu", *arguments]
        from tools.cli import main

        status = main(arguments)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> int:
    """`python -m tests.command_server FD`: import every command, then serve."""
    from tools.cli import COMMANDS

    link = socket.socket(fileno=int(sys.argv[1]))
    for name in COMMANDS:
        import_module(f"tools.{name}")
    gc.collect()
    gc.freeze()
    serve(link)
    return 0


if __name__ == "__main__":
    sys.exit(main())
