"""What system tests share: the command line as a real process, and what must be left when it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.testing import assert_gone, inner_pids, objects, processes, wait_for

__all__ = [
    "COMMAND",
    "ROOT",
    "assert_gone",
    "call",
    "ended",
    "environment",
    "inner_pids",
    "objects",
    "processes",
    "report",
    "start",
    "wait_for",
    "wait_until_open",
]

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
    return start_any(home, *COMMAND, *arguments)


def start_any(home: Path, *command: str) -> subprocess.Popen[str]:
    """As `start`, of any program."""
    return subprocess.Popen(
        command,
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


def wait_until_open(name: str, process: subprocess.Popen[Any]) -> None:
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
