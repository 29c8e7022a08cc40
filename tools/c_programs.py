"""Small C programs that benches compare with: compiled on the spot, once for each version, and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite
from tools.paths import cache_dir, made

C_SOURCES: Final = Path(__file__).parent / "c"
_SHARED: Final = C_SOURCES / "two_cores.h"
_TIMEOUT_S: Final = 60


def built(what: str, sources: Sequence[Path], headers: Sequence[Path] = (), include: Path = C_SOURCES) -> Path:
    """Compile a program of one or more sources; `what` is its name in messages.

    `headers` count as part of its version, as `two_cores.h` always does. MissingPrerequisite says what lacks.
    """
    if not sources[0].is_file():
        raise MissingPrerequisite(f"{sources[0]} was not installed: run from a clone of the sources")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, *headers, _SHARED))).hexdigest()[:16]
    program = made(cache_dir() / "c-programs") / f"{sources[0].stem}-{digest}"
    if not program.is_file():
        with tempfile.TemporaryDirectory(prefix="building-", dir=program.parent) as name:
            fresh = Path(name) / "program"
            _compile(what, [str(path) for path in sources], include, fresh)
            fresh.rename(program)
    return program


def _compile(what: str, files: list[str], include: Path, program: Path) -> None:
    """As the kernel's own Makefile of tools/hv compiles, `-O2`; warnings of sources that are not ours are theirs."""
    compiler = os.environ.get("CC") or "gcc"
    command = [compiler, "-O2", "-w", "-pthread", f"-I{include}", "-o", str(program), *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise MissingPrerequisite(f"no C compiler {compiler}: apt install gcc libc6-dev") from None
    if done.returncode:
        raise MissingPrerequisite(f"{compiler} cannot compile {what}: {(done.stderr.splitlines() or ['?'])[0]}")
