"""The script's first moments, before the command line is there to catch anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools import entry
from tools.exit_status import ExitStatus

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", ["run", "demo"])
def test_an_interrupt_before_the_command_line_is_there_is_no_traceback(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the zygote is started, or while click is imported, ends like any other."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["vmbus-emu", command])
    monkeypatch.setattr("tools.zygote_start.start_early", interrupted)

    assert entry.main() == entry.INTERRUPTED == ExitStatus.INTERRUPTED


EARLY = """
import os, signal, sys
from tools import entry
signal.signal(signal.SIGHUP, signal.SIG_DFL)
numbers = [int(number) for number in sys.argv.pop(1).split(",")]
entry.replace_closed_streams = lambda: [os.kill(os.getpid(), number) for number in numbers]
sys.exit(entry.main())
"""
"""The script that gets signals when it has noted nothing but its arguments: the command line is not imported yet.

Behind `nohup` a hangup is ignored, by everything that the tests start, too; it is not what they are about.
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("words", "schema"),
    [
        (["run", "--duration", "5"], "run"),
        (["run", "--detach"], "interrupted"),
        (["record", "-o", "early.rec"], "run"),
        (["matrix"], "matrix"),
        (["stress"], "stress"),
        (["latency"], "latency"),
        (["bench", "idle"], "bench"),
        (["ls"], "interrupted"),
    ],
)
def test_a_signal_before_the_command_is_there_is_told_like_a_later_one(
    number: signal.Signals, words: list[str], schema: str, tmp_path: Path
) -> None:
    """Exit status 128 + its number, and one JSON object: the command's own, where it has something to tell."""
    done = subprocess.run(
        [sys.executable, "-c", EARLY, str(int(number)), *words, "--json"],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 128 + number, done.stderr
    assert json.loads(done.stdout)["schema"]["name"] == f"vmbus-emu.{schema}"
    assert "Traceback" not in done.stderr and list(tmp_path.rglob("*.log")) == []


WHILE_IMPORTED = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

module = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupting())
runpy.run_module("tools.entry", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["tools.early_signals", "emu.assertions", "tools.cli", "click"])
def test_an_interrupt_while_the_script_imports_is_no_traceback(module: str) -> None:
    """Ctrl-C at its first import already, which is what notes the later ones: exit 130, and nothing is printed."""
    words = [sys.executable, "-c", WHILE_IMPORTED, module, "ps"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (ExitStatus.INTERRUPTED, "", "")


def test_the_second_signal_does_not_wait_for_the_command() -> None:
    """Who has no patience is obeyed at once: nothing is imported, nothing told."""
    words = [sys.executable, "-c", EARLY, "2,2", "run", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (ExitStatus.INTERRUPTED, "", "")


def in_shell(streams: str) -> subprocess.CompletedProcess[str]:
    """`vmbus-emu --version` with its streams as a shell redirects them."""
    line = f'"$0" -m tools.entry --version {streams}'
    return subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("closed", "heard"), [("<&-", True), (">&-", False), ("2>&-", True), ("<&- >&- 2>&-", False)])
def test_a_closed_stream_is_as_good_as_dev_null(closed: str, heard: bool) -> None:
    """The command does its work, silently where nobody hears it, and without a traceback."""
    done = in_shell(closed)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vmbus-emu ") == heard


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    """Exit 2 and no traceback, also when the interpreter flushes once more at its end."""
    done = in_shell(">/dev/full")

    assert done.returncode == ExitStatus.USAGE
    assert done.stderr == (
        "vmbus-emu: cannot write to stdout: No space left on device; make room, or send it somewhere else\n"
    )


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", b"? ?"), ("latin-1", b"? \xfc"), ("utf-8", "→ ü".encode()), ("UTF-8", b"\xff")]
)
def test_what_a_locale_lacks_is_no_end(encoding: str, written: bytes) -> None:
    """A table with an arrow is whole also where there are no arrows; a file's name that is no text keeps its bytes."""
    said = "\udcff" if encoding == "UTF-8" else "→ ü"
    script = f"from tools import entry; entry.write_every_character(); print({said!a}, end='')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, written, b"")
