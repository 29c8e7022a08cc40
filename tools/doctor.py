"""`vmbus-emu doctor`: what this computer has of what a machine needs, and what to do about the rest.

Each check looks at one thing and gives a `Finding`. What is *necessary* decides the exit status (3 when it is
absent); the rest says which command will do without it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import click

from emu.build_kind import BUILD
from emu.errors import MissingPrerequisite, VmbusError
from emu.limits import check_memory_limits
from emu.scenario import MachineSpec
from tools.exit_status import ExitStatus
from tools.kernel_source import source_archive
from tools.options import json_option
from tools.output import print_json, print_table

SHM: Final = Path("/dev/shm")
LEAST_SHM_BYTES: Final = 64 << 20
GOOD_SHM_BYTES: Final = 512 << 20
LEAST_FILES: Final = 1024
FAST_CLOCKS: Final = frozenset({"tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter"})

OK: Final = "ok"
WEAK: Final = "weak"
ABSENT: Final = "absent"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw: `status` is ok, weak (works, but worse) or absent; `cure` is what to do."""

    name: str
    status: str
    found: str
    cure: str = ""
    necessary: bool = False


Check = Callable[[], Finding]


def python() -> Finding:
    """The interpreter: 3.11 or later."""
    found = f"{platform.python_version()} ({sys.implementation.name})"
    good = sys.version_info >= (3, 11)
    return Finding("python", OK if good else ABSENT, found, "" if good else "use Python 3.11 or later", necessary=True)


def build() -> Finding:
    """Which build this is; either is good."""
    return Finding("build", OK, BUILD)


def system() -> Finding:
    """Linux on a processor whose memory order the atomics know, with pidfds (5.3)."""
    found = f"{platform.system()} {platform.release()} on {platform.machine()}"
    cure = "use Linux 5.4 or later on x86-64 or arm64"
    good = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Finding("system", ABSENT, f"{found}, no pidfd ({error.strerror})", cure, necessary=True)
    return Finding("system", OK if good else ABSENT, found, "" if good else cure, necessary=True)


def atomics() -> Finding:
    """Atomic instructions on shared memory: one is tried on an anonymous page."""
    try:
        from emu.ipc.atomics import AtomicView

        with mmap.mmap(-1, mmap.PAGESIZE) as page, contextlib.closing(AtomicView(page)) as view:
            view.fetch_or_u64(0, 1)
            good = view.load_u64(0) == 1
    except (ImportError, OSError) as error:
        cure = "install vmbus-emu with its dependencies again (pip install .)"
        return Finding("atomics", ABSENT, str(error), cure, necessary=True)
    return Finding("atomics", OK if good else ABSENT, f"atomicshm {metadata.version('atomicshm')}", necessary=True)


def shared_memory() -> Finding:
    """The tmpfs that holds guest RAM: mounted, writable, with room."""
    cure = f"mount a tmpfs on {SHM} (in a container: --shm-size=1g)"
    try:
        space = os.statvfs(SHM)
    except OSError as error:
        return Finding("shared memory", ABSENT, f"{SHM}: {error.strerror}", cure, necessary=True)
    size, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    found = f"{size >> 20} MiB, {free >> 20} MiB free"
    if not os.access(SHM, os.W_OK | os.X_OK):
        return Finding("shared memory", ABSENT, f"{SHM} is not writable", f"chmod 1777 {SHM}", necessary=True)
    if free < LEAST_SHM_BYTES:
        return Finding("shared memory", ABSENT, found, "free some of it, or make it larger", necessary=True)
    if free < GOOD_SHM_BYTES:
        return Finding("shared memory", WEAK, found, "many devices or large rings may not fit", necessary=True)
    return Finding("shared memory", OK, found, necessary=True)


def semaphores() -> Finding:
    """Named POSIX semaphores with timed waits: one is made, posted, taken and removed."""
    import posix_ipc

    from emu.ipc.segments import object_name, unlink_semaphore
    from emu.ipc.semaphores import Wakeup

    name = object_name(f"doctor-{os.getpid()}", "host")
    try:
        wakeup = Wakeup.create(name)
        try:
            wakeup.post()
            works = posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED and wakeup.block(1.0)
        finally:
            wakeup.close()
            unlink_semaphore(name)
    except VmbusError as error:
        return Finding("semaphores", ABSENT, str(error), f"make {SHM} writable", necessary=True)
    found = f"named, timed; at most {posix_ipc.SEMAPHORE_VALUE_MAX} tokens"
    return Finding("semaphores", OK if works else ABSENT, found, necessary=True)


def open_files() -> Finding:
    """Descriptors that one process may have open."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES and soft != resource.RLIM_INFINITY:
        return Finding("open files", WEAK, str(soft), f"ulimit -n {LEAST_FILES}")
    return Finding("open files", OK, "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def memory_limits() -> Finding:
    """What one process may map, and how large a file may be: guest RAM is mapped twice, and is a file."""
    try:
        check_memory_limits(MachineSpec().ram_bytes)
    except MissingPrerequisite as lack:
        found, cure = str(lack).split("; ")
        return Finding("memory limits", WEAK, found, cure)
    return Finding("memory limits", OK, f"enough for {MachineSpec().ram_bytes >> 20} MiB of RAM")


def cores() -> Finding:
    """Processors that this process may use."""
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return Finding("cores", WEAK, str(count), "host and guest take turns: figures of speed mean little")
    return Finding("cores", OK, str(count))


def clock_source() -> Finding:
    """What CLOCK_MONOTONIC reads: a slow one costs a system call each time."""
    try:
        path = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        found = path.read_text(encoding="ascii").strip()
    except OSError:
        return Finding("clock source", OK, "not told")
    if found not in FAST_CLOCKS:
        return Finding("clock source", WEAK, found, "reading the time is slow here: latencies look longer")
    return Finding("clock source", OK, found)


def user_namespaces() -> Finding:
    """A mount namespace of one's own without privilege: what `vmbus-emu sysfs` stands on."""
    cure = "`vmbus-emu sysfs` needs it: install util-linux, allow kernel.unprivileged_userns_clone"
    unshare = shutil.which("unshare")
    if unshare is None:
        return Finding("user namespaces", ABSENT, "no unshare command", cure)
    try:
        tried = subprocess.run([unshare, "-rm", "true"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("user namespaces", ABSENT, str(error), cure)
    if tried.returncode:
        return Finding("user namespaces", ABSENT, " ".join(tried.stderr.split()), cure)
    return Finding("user namespaces", OK, "unshare -rm works")


def fuse() -> Finding:
    """FUSE, by which `vmbus-emu sysfs` shows a live tree; spoken directly, so the device is all it takes."""
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        return Finding("fuse", OK, "/dev/fuse")
    return Finding("fuse", WEAK, "no access to /dev/fuse", "optional: sysfs uses a tmpfs that is kept current")


def kernel_tools() -> Finding:
    """The kernel source package, of which lsvmbus and the C ring of `bench` are taken."""
    try:
        return Finding("kernel's tools/hv", OK, str(source_archive()))
    except MissingPrerequisite:
        cure = "optional, for its lsvmbus and its C ring: apt install linux-source-6.12"
        return Finding("kernel's tools/hv", ABSENT, "no linux-source package", cure)


def command(name: str, purpose: str, package: str) -> Check:
    """A check for an outside program on the PATH."""

    def check() -> Finding:
        found = shutil.which(name)
        if found is None:
            return Finding(name, ABSENT, "not found", f"optional, {purpose}: apt install {package}")
        return Finding(name, OK, found)

    return check


READERS: Final[Mapping[str, tuple[str, str]]] = {
    "trace-cmd": ("to read `trace --to trace-cmd`", "trace-cmd"),
    "tshark": ("to read `trace --to pcapng`", "tshark"),
    "node": ("for the tests that have Perfetto's trace processor read `trace --to perfetto`", "nodejs"),
    "chromium": ("for the tests that open a `report`; any browser shows it", "chromium"),
}
"""Programs that read what we write, with what for and Debian's package."""

CHECKS: Final[tuple[Check, ...]] = (
    python,
    build,
    system,
    atomics,
    shared_memory,
    semaphores,
    open_files,
    memory_limits,
    cores,
    clock_source,
    user_namespaces,
    fuse,
    command("gcc", "for guests in C and the C figures of `bench`", "gcc libc6-dev"),
    kernel_tools,
    command("git", "to name the commit in reports", "git"),
    *(command(name, purpose, package) for name, (purpose, package) in READERS.items()),
)


def examine(checks: tuple[Check, ...] = CHECKS) -> Iterator[Finding]:
    """Do the checks in order."""
    for check in checks:
        yield check()


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Check what this computer has of what a machine needs.

    Exit status 3 when something necessary is missing; the last column says what to do.

    \b
    Example:
      vmbus-emu doctor
      vmbus-emu doctor --json | jq '.checks[] | select(.status != "ok")'
    """
    findings = list(examine())
    ready = not any(finding.necessary and finding.status == ABSENT for finding in findings)
    if as_json:
        print_json("doctor", 1, {"ready": ready, "checks": [asdict(finding) for finding in findings]})
    else:
        rows = [(finding.name, finding.status, finding.found, finding.cure) for finding in findings]
        print_table(("what", "status", "found", "what to do"), rows)
    return ExitStatus.FINE if ready else ExitStatus.MISSING
