"""What system tests share: the command line as a real process, and what must be left when it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tools.entry"]


def environment(home: Path) -> dict[str, str]:
    """An environment whose XDG directories are in a test's own directory."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        "XDG_CONFIG_HOME": str(home / "config"),
        "COLUMNS": "100",
    }


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in a session of its own; its output is piped."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=home,
        env=environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def call(home: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=home,
        env=environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def objects(name: str) -> list[str]:
    """Shared objects of a machine."""
    return sorted(one.name for one in Path("/dev/shm").iterdir() if f"vmbus-emu.{name}." in one.name)


def processes(name: str) -> list[psutil.Process]:
    """Inner processes of a machine: those that map its RAM."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if f"vmbus-emu.{name}." in Path(f"/proc/{process.pid}/maps").read_text():
                found.append(process)
    return found


def inner_pids(name: str) -> dict[str, int]:
    """Names and pids of a machine's actors, read from its process table."""
    from emu.control import ActorState, Control
    from emu.ipc.segments import object_name

    control = Control.attach(object_name(name, "control"))
    try:
        return {row.name: row.pid for row in control.rows() if row.state == ActorState.ALIVE}
    finally:
        control.close()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Poll a condition of other processes; AssertionError when it stays false."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, os.getpid(), os.WNOHANG | os.WEXITED)
        _pause()


def _pause() -> None:
    """Look again in 10 ms; what is waited for is the condition, not the time."""
    import select

    select.select([], [], [], 0.01)


def wait_until_open(name: str, process: subprocess.Popen[str]) -> None:
    """Wait until all channels of a machine are open; AssertionError when its launcher ends before."""
    from emu.control import Control, Ready
    from emu.errors import UserError
    from emu.ipc.segments import object_name

    def opened() -> bool:
        assert process.poll() is None, (process.returncode, process.communicate())
        try:
            control = Control.attach(object_name(name, "control"))
        except UserError:
            return False
        try:
            return control.made and control.ready >= Ready.CHANNELS_OPEN
        finally:
            control.close()

    wait_for(opened, f"machine {name} to open its channels")


def assert_gone(name: str, timeout_s: float = 10) -> None:
    """Nothing of a machine is left: no process, no shared object."""
    wait_for(lambda: not processes(name) and not objects(name), f"machine {name} to be gone", timeout_s)


def report(output: str) -> dict[str, Any]:
    """The one JSON object that a command printed."""
    value: dict[str, Any] = json.loads(output)
    return value


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Whatever a test does, the process it started does not outlive it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
