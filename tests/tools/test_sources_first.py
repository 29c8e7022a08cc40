"""`tools.sources_first`: the sources of a compiled build are imported in place of what is compiled; only ours."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES, SourceFileLoader
from pathlib import Path

import pytest

from tools.own_python import own_environment, own_python
from tools.sources_first import PURE, SourcesFirst


def test_source_is_found_beside_what_is_compiled(tmp_path: Path) -> None:
    """Python itself would take the other one."""
    (tmp_path / "fast.py").write_text("SLOW = True\n")
    (tmp_path / f"fast{EXTENSION_SUFFIXES[0]}").touch()

    spec = SourcesFirst.find_spec("emu.fast", [str(tmp_path / "elsewhere"), str(tmp_path)])

    assert spec is not None and isinstance(spec.loader, SourceFileLoader)
    assert spec.origin == str(tmp_path / "fast.py")


@pytest.mark.parametrize(
    ("name", "path"), [("other.fast", True), ("emu.none", True), ("emu", False)], ids=["others", "none", "top"]
)
def test_everything_else_is_left_to_python(tmp_path: Path, name: str, path: bool) -> None:
    """Other packages, what has no source, and packages at the top."""
    (tmp_path / "fast.py").touch()

    assert SourcesFirst.find_spec(name, [str(tmp_path)] if path else None) is None


def test_programs_of_ours_do_so_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the variable is set, whatever a command starts takes the sources too, and is the program it was."""
    monkeypatch.setenv(PURE, "1")
    words = own_python("tools.entry", "--version")

    done = subprocess.run(
        words, env=own_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
    )

    assert words[1:] == ["-P", "-m", "tools.sources_first", "tools.entry", "--version"]
    assert words[0] == sys.executable
    assert done.stdout.startswith("vmbus-emu ") and "pure Python" in done.stdout


def test_explorer_looks_into_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compiled: it saves and compares the objects of a whole guest and host."""
    code = (
        "import sys; sys.argv[1:] = ['explore', '--depth', '1']; from tools.entry import main; status = main();"
        " print(sys.meta_path[0].__name__); sys.exit(status)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "SourcesFirst"
