"""The kernel's own VMBus tools: `tools/hv` of its source package, unpacked once into the cache, with its tracepoints.

`lsvmbus`, `vmbus_testing`, the daemons and the user-space ring are what we are measured against and listed
by, so they are the kernel's, unmodified. Debian ships them in `linux-source-*`; only they are unpacked.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite
from tools.paths import cache_dir, made

SOURCES: Final = Path("/usr/src")
_CURE: Final = "apt install linux-source-6.12 xz-utils"


def tools_hv() -> Path:
    """The directory with the kernel's `tools/hv`, and `drivers/hv/hv_trace.h`; takes about 15 s the first time.

    MissingPrerequisite when no kernel source package is installed, or it cannot be unpacked.
    """
    archive = source_archive()
    place = cache_dir() / "kernel-hv" / f"{archive.name.removesuffix('.tar.xz')}-{archive.stat().st_mtime_ns:x}"
    if not place.is_dir():
        _unpack(archive, place)
    return place


def source_archive() -> Path:
    """The newest kernel source archive that is installed."""
    archives = sorted(SOURCES.glob("linux-source-*.tar.xz"), key=lambda path: path.stat().st_mtime_ns)
    if not archives:
        raise MissingPrerequisite(f"no kernel source in {SOURCES}: {_CURE}")
    return archives[-1]


def _unpack(archive: Path, place: Path) -> None:
    """Unpack beside the place, then rename: nobody sees half of it, and two at a time do no harm."""
    parent = made(place.parent)
    fresh = Path(tempfile.mkdtemp(prefix="unpacking-", dir=parent))
    try:
        command = ["tar", "-xJf", str(archive), "-C", str(fresh), "--strip-components=3", "--wildcards"]
        command += ["*/tools/hv/*", "*/drivers/hv/hv_trace.h"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (fresh / "lsvmbus").is_file():
            reason = " ".join(done.stderr.split()) or "it holds no tools/hv/lsvmbus"
            raise MissingPrerequisite(f"cannot unpack {archive}: {reason}; {_CURE}")
        try:
            fresh.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    except FileNotFoundError as error:
        raise MissingPrerequisite(f"cannot unpack {archive}: no {error.filename} command; {_CURE}") from None
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh)
