"""Which vmbus-emu this is, and on what it runs: `--version`, and the head of every report."""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from emu.build_kind import BUILD
from emu.layout import ABI_MAJOR, ABI_MINOR
from emu.scenario import ERAS
from emu.wire.versions import KNOWN_VERSIONS, version_text
from tools.output import print_json

_SOURCES = Path(__file__).resolve().parent.parent


def program_version() -> str:
    """Version of these sources: of the project file beside them, or of the package installed with them."""
    project = _SOURCES / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("vmbus-emu")


def commit() -> str | None:
    """Commit of these sources, None when they are no working copy of ours or git does not say."""
    if not (_SOURCES / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(_SOURCES), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def version_report() -> dict[str, Any]:
    """Everything that a report of a bug should say about where it was seen."""
    return {
        "version": program_version(),
        "commit": commit(),
        "build": BUILD,
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "abi": f"{ABI_MAJOR}.{ABI_MINOR}",
        "vmbus_versions": [version_text(version) for version in KNOWN_VERSIONS],
        "eras": list(ERAS),
    }


def print_version(as_json: bool) -> None:
    """Print the version as `NAME VERSION (BUILD)`, or the whole report as JSON."""
    if as_json:
        print_json("version", 1, version_report())
    else:
        sys.stdout.write(f"vmbus-emu {program_version()} ({BUILD})\n")
