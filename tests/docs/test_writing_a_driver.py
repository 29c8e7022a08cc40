"""docs/writing-a-driver.md does what it says: its files are written, its commands are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

from tools.testing import assert_gone

SOURCES: Final = Path(__file__).resolve().parents[2]
PAGE: Final = SOURCES / "docs" / "writing-a-driver.md"
BLOCK: Final = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
SECONDS: Final = re.compile(r"\d+\.\d+(?= s\b|s$)")
"""What differs from run to run."""


def blocks() -> list[tuple[str, str, str]]:
    """Every block of the page: the file it belongs to ("" for none), its kind, its text."""
    text = PAGE.read_text(encoding="utf-8")
    return [(found["file"] or "", found["kind"], found["text"]) for found in BLOCK.finditer(text)]


def write_files(directory: Path) -> None:
    """Write the page's files; blocks of one file follow each other."""
    for name, _kind, text in blocks():
        if name:
            path = directory / name
            before = path.read_text(encoding="utf-8") + "\n\n" if path.exists() else ""
            path.write_text(before + text, encoding="utf-8")


def typed() -> list[tuple[str, list[str]]]:
    """Every command of the page, in order, with the output that is shown behind it."""
    commands: list[tuple[str, list[str]]] = []
    for _name, kind, text in blocks():
        for line in text.splitlines() if kind == "console" else ():
            if line.startswith("$ "):
                commands.append((line[2:], []))
            else:
                commands[-1][1].append(line)
    return commands


def run(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the page as who has installed the package would."""
    words = shlex.split(command)
    program = {"vmbus-emu": [sys.executable, "-m", "tools.entry"], "python": [sys.executable]}[words[0]]
    return subprocess.run(
        [*program, *words[1:]],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(SOURCES), "XDG_STATE_HOME": str(directory / "state")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def same(line: str) -> str:
    """A line of output without what differs from run to run."""
    return SECONDS.sub("…", line).rstrip()


def test_every_block_is_run() -> None:
    """No block of the page is mere decoration: it is (part of) a file, or commands."""
    assert [kind for name, kind, _text in blocks() if not name and kind != "console"] == []
    assert {name for name, _kind, _text in blocks()} >= {"tempsensor.py", "test_tempsensor.py", "machine.toml"}


def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """Its commands, run in its order on its files, end well and print the lines that it shows."""
    write_files(tmp_path)

    for command, shown in typed():
        done = run(command, tmp_path)

        assert done.returncode == 0, (command, done.stdout, done.stderr)
        printed = {same(line) for line in done.stdout.splitlines()}
        assert [line for line in shown if same(line) not in printed] == [], (command, done.stdout)
        if command.startswith("vmbus-emu ls"):
            assert [same(line) for line in shown] == [same(line) for line in done.stdout.splitlines()], (
                "what ls prints is shown whole"
            )
        if "--duration" in command:
            assert "tempsensor: 21.0 degrees" in done.stderr
    assert_gone("thermo")
