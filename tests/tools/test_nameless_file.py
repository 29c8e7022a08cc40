"""Files without a name: others find them, and nothing is left of them when their command is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.commands import assert_gone, ended, start, wait_for
from tools.nameless_file import nameless_file


def test_other_process_writes_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the path, which is in no folder, for as long as the block runs."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with nameless_file() as path:
        subprocess.run([sys.executable, "-c", f"open({str(path)!r}, 'ab').write(b'told')"], check=True)

        assert path.read_bytes() == b"told"
        assert list(tmp_path.iterdir()) == []
    assert not path.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("races", "run", "A1", "--times", "1000"),
        ("races", "show", "A1"),
        ("races", "board", "A4xA5"),
        ("bench", "doorbell"),
        ("bench", "echo"),
        ("bench", "scale"),
        ("bench", "record"),
    ],
    ids="-".join,
)
def test_command_that_is_killed_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """While it measures or records: `kill -9` of the launcher as soon as it has a file or a folder for that."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with ended(start(tmp_path, *words)) as process:
        wait_for(lambda: _in_use(process.pid, temporary) or process.poll() is not None, f"{words} to measure")
        assert process.poll() is None, process.communicate()
        os.kill(process.pid, signal.SIGKILL)
    assert_gone(f"vm{process.pid}")

    assert list(temporary.iterdir()) == []


def _in_use(pid: int, temporary: Path) -> bool:
    """Whether a process has something of its own in a folder, by a name or without."""
    if any(temporary.iterdir()):
        return True
    with suppress(OSError):
        for one in Path("/proc", str(pid), "fd").iterdir():
            with suppress(OSError):
                if str(one.readlink()).startswith(f"{temporary}/"):
                    return True
    return False
