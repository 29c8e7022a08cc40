"""What a command inherits from whoever starts it: signals he ignores, his directory, the variables of his Python."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.commands import (
    COMMAND,
    ROOT,
    assert_gone,
    ended,
    inner_pids,
    report,
    start,
    start_any,
    wait_until_open,
)
from tools.zygote import Zygote

IGNORE = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
DEAF = [sys.executable, "-c", IGNORE]
"""Runs what follows with SIGCHLD ignored, as some supervisors do: such a process's children leave no status."""


def test_a_death_is_told_also_where_sigchld_was_ignored(tmp_path: Path) -> None:
    """Who died of which signal, exit status 4: the zygote hears how its children end whatever its ancestors ignore."""
    with ended(start_any(tmp_path, *DEAF, *COMMAND, "run", "--name", "t-deaf", "--json")) as process:
        wait_until_open("t-deaf", process)
        os.kill(inner_pids("t-deaf")["vcpu1"], signal.SIGKILL)
        output, errors = process.communicate(timeout=20)

    assert process.returncode == 4, errors
    assert "vcpu1" in errors and "SIGKILL" in errors and "Traceback" not in errors
    assert any("vcpu1" in death for death in report(output)["deaths"])
    assert_gone("t-deaf")


def test_whoever_ignores_sigchld_does_not_wait_for_ever() -> None:
    """A command that waits for its child by that signal (`sysfs`) has it back before it starts one."""
    script = "import signal; from tools import entry; entry.main(); print(signal.getsignal(signal.SIGCHLD).name)"
    words = [*DEAF, sys.executable, "-c", script, "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.stdout.splitlines()[-1:] == ["SIG_DFL"], done.stderr


def test_a_zygote_whose_launcher_was_killed_says_nothing() -> None:
    """Not even where something that it had sent was never read, which its end of the socket is told as an error."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        words = [sys.executable, "-W", "error", "-m", "tools.zygote", str(theirs.fileno()), str(os.getpid())]
        zygote = subprocess.Popen(words, cwd=ROOT, pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE, text=True)
        theirs.close()
        warm = select.poll()
        warm.register(ours, select.POLLIN)
        assert warm.poll(60_000)

        ours.close()
        _, errors = zygote.communicate(timeout=20)

    assert (zygote.returncode, errors) == (0, "")


def test_a_process_whose_launcher_was_killed_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """It may report how far it has come just before the kernel ends it: no traceback on the launcher's terminal."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.close()
        zygote = Zygote(theirs, os.getpid())

        def body() -> int:
            zygote._report("stage", "hypervisor", 1)
            return 0

        child = os.fork()
        if child == 0:
            zygote._child("hypervisor", body, os.getppid(), detached=True)
        _pid, status = os.waitpid(child, 0)

    assert (os.waitstatus_to_exitcode(status), capfd.readouterr().err) == (0, "")


NOT_OURS = ("emu", "guestproc", "hostproc", "msgpack", "random", "signal", "struct", "tools")
"""Names of modules of ours, of others' and of Python's that a user may have in his directory."""


@pytest.mark.parametrize(
    "words", [("run", "--duration", "0"), ("profile", "--", "run", "--duration", "0")], ids=["run", "profile"]
)
def test_modules_in_the_users_directory_are_not_ours(tmp_path: Path, words: tuple[str, ...]) -> None:
    """A directory is no place to import from: the script does not, nor does any Python that it starts."""
    for name in NOT_OURS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')\n", encoding="utf-8")
    script = [sys.executable, "-P", *COMMAND[1:]]  # as installed: `python -m` would look there

    with ended(start_any(tmp_path, *script, *words)) as process:
        output, errors = process.communicate(timeout=60)

    assert (process.returncode, "was imported" in errors + output) == (0, False), errors


@pytest.mark.parametrize("level", ["1", "2"])
def test_assertions_stay_whatever_the_environment_says(
    tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exhibit that only an assertion shows is broken as ever; without them its processor spins."""
    monkeypatch.setenv("PYTHONOPTIMIZE", level)
    words = ("races", "run", "nomem-spins", "--fix", "off")

    with ended(start(tmp_path, *words)) as process:
        output, errors = process.communicate(timeout=60)

    assert process.returncode == 1, errors
    assert "violated INV-29, as expected" in output


def test_the_command_line_itself_asserts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in its own process (`explore`) does so with assertions, and with the arguments it was given."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    script = "import sys; from tools import entry; entry.main(); print(sys.flags.optimize, sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, "--version", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.stdout.splitlines()[-1:] == ["0 ['--version', '--json']"], done.stderr
