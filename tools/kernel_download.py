"""The kernel's `tools/hv` where no source package is installed: downloaded, unpacked into the cache, the rest
deleted.

Debian's package is asked of the machine's own mirror: first by apt as it is configured, then, if that does
not know the package, by an apt state of our own that also looks at the backports and at the release that has
it. The system's sources and lists are not changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite
from tools.paths import cache_dir, made

PACKAGE: Final = "linux-source-6.12"
_RELEASE: Final = "trixie"  # the Debian release whose kernel this is
_TIMEOUT_S: Final = 600
_NEEDED: Final = ("apt-get", "dpkg-deb", "tar", "xz")
_CURE: Final = f"install {PACKAGE} and xz-utils by hand"


def downloaded_tools_hv(*, fetch: bool) -> Path:
    """The directory with the kernel's `tools/hv`; the first time that is a download of about 150 MB, if it may `fetch`.

    MissingPrerequisite when it may not, or this is no Debian, or there is no network, or no such package.
    """
    place = cache_dir() / "tools-hv" / PACKAGE
    if not place.is_dir():
        if not fetch:
            raise MissingPrerequisite(f"no kernel source here: apt install {PACKAGE} xz-utils")
        missing = [name for name in _NEEDED if shutil.which(name) is None]
        if missing:
            raise MissingPrerequisite(f"no {missing[0]} here to fetch {PACKAGE} with: {_CURE}")
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=made(place.parent)) as name:
            _unpack(_fetch(Path(name)), Path(name), place)
    return place


def _fetch(scratch: Path) -> Path:
    """Download the package into `scratch`."""
    private = _private_state(scratch)
    said = ""
    for attempt in ([], private):
        if attempt:
            # Not every suite asked for need exist; what counts is whether the package is found.
            _run(["apt-get", *attempt, "-qq", "update"], scratch)
        said = _run(["apt-get", *attempt, "-qq", "download", PACKAGE], scratch)
        packages = sorted(scratch.glob(f"{PACKAGE}_*.deb"))
        if packages:
            return packages[-1]
    raise MissingPrerequisite(f"apt cannot get {PACKAGE} ({said or 'no reason given'}): {_CURE}")


def _private_state(scratch: Path) -> list[str]:
    """Options that give apt lists, caches and sources of its own in `scratch`."""
    sources = scratch / "sources.list"
    sources.write_text("\n".join(_sources()) + "\n", encoding="utf-8")
    for part in ("state/lists/partial", "cache/archives/partial"):
        (scratch / part).mkdir(parents=True)
    status = scratch / "status"
    status.touch()
    options = {
        "Dir::State": scratch / "state",
        "Dir::State::status": status,
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def _sources() -> list[str]:
    """One-line sources for the suites that may have the package, on the mirrors that apt already uses."""
    asked = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(SIGNED_BY)",
        "Created-By: Packages",
    ]
    try:
        text = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    lines = []
    for line in dict.fromkeys(text.splitlines()):
        uri, suite, *keyring = line.split()
        if "-" in suite:  # a pocket (updates, security) of a release that has a line of its own
            continue
        signed = [word for word in keyring if word.startswith("/")]
        option = f"[signed-by={signed[0]}] " if signed else ""
        lines += [f"deb {option}{uri} {name} main" for name in (suite, f"{suite}-backports", _RELEASE)]
    return list(dict.fromkeys(lines))


def _unpack(package: Path, scratch: Path, place: Path) -> None:
    """Take `tools/hv` out of the archive in the package; nothing else touches the disk."""
    fresh = scratch / "tools-hv"
    fresh.mkdir()
    directory = f"{PACKAGE}/tools/hv"
    # tar stops behind the directory it was asked for, and those before it in the pipe end by SIGPIPE.
    stages: list[Sequence[str]] = [
        ("dpkg-deb", "--fsys-tarfile", str(package)),
        ("tar", "-xO", f"./usr/src/{PACKAGE}.tar.xz"),
        ("tar", "-xJ", "-C", str(fresh), "--strip-components=3", "--occurrence=1", directory),
    ]
    running: list[subprocess.Popen[bytes]] = []
    for stage in stages:
        source = running[-1].stdout if running else subprocess.DEVNULL
        last = len(running) == len(stages) - 1
        running.append(
            subprocess.Popen(
                stage,
                stdin=source,
                stdout=subprocess.DEVNULL if last else subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        )
        if running[:-1] and running[-2].stdout:
            running[-2].stdout.close()
    try:
        for process in running:
            process.wait(_TIMEOUT_S)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if not (fresh / "lsvmbus").is_file():
        raise MissingPrerequisite(f"{package.name} holds no tools/hv as it used to: {_CURE}")
    try:
        fresh.rename(place)
    except OSError:
        if not place.is_dir():  # somebody else was quicker, which is as good
            raise


def _run(command: Sequence[str], directory: Path) -> str:
    """Run a command in `directory`; return the last line of what it complained about."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    return complaints[-1] if complaints else ""
