"""A user and mount namespace of this process's own, and places in `/sys` where a tree can be mounted.

What `unshare -rm` does: this user becomes root there, over nothing but what the namespace holds; mounts made
in it are seen by nobody outside, and end with its last process. sysfs itself takes no new directory, so one
that lacks the place is covered by a tmpfs in which every old entry is mounted again, in its old place.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
STRICT: Final = MS_NOSUID | MS_NODEV | MS_NOEXEC

_CURE: Final = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces above 0; on "
    "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in a container a seccomp profile that lets "
    "unshare and mount through)"
)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)


def enter_namespaces() -> None:
    """Leave for namespaces of one's own; for a process of one thread.

    MissingPrerequisite where that is forbidden.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        _call(_libc.unshare, _CLONE_NEWUSER | _CLONE_NEWNS)
        # Groups could be dropped to gain access; without this the kernel lets nobody map one.
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
        mount("none", "/", "", MS_REC | MS_PRIVATE)
    except OSError as error:
        raise MissingPrerequisite(f"no mount namespace of one's own ({error.strerror}): {_CURE}") from None


def mount(source: str, target: str | Path, kind: str, flags: int, data: str = "") -> None:
    """mount(2); OSError with its errno and the target."""
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode())
    _call(_libc.mount, *arguments, name=str(target))


def mount_point(place: Path) -> None:
    """Make `place` a directory that can be mounted over, if its parent is one that takes no new entry.

    MissingPrerequisite when there is no such parent.
    """
    if place.is_dir():
        return
    parent = place.parent
    try:
        before = os.open(".", os.O_PATH | os.O_DIRECTORY)
        old = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            mount("tmpfs", parent, "tmpfs", STRICT, "mode=0755")
            # The old directory is covered, but not gone: names relative to it still lead there.
            os.fchdir(old)
            for entry in os.scandir(old):
                _mount_again(entry, parent)
            place.mkdir()
            mount("none", parent, "", MS_BIND | MS_REMOUNT | MS_RDONLY | STRICT)
        finally:
            os.fchdir(before)
            os.close(before)
            os.close(old)
    except OSError as error:
        raise MissingPrerequisite(f"cannot make {place}: {error.strerror}; {_CURE}") from None


def _mount_again(entry: os.DirEntry[str], parent: Path) -> None:
    """Put an entry of the working directory back into the tmpfs that covers it."""
    target = parent / entry.name
    if entry.is_symlink():
        target.symlink_to(Path(entry.name).readlink())
        return
    if entry.is_dir():
        target.mkdir()
    else:
        target.touch()
    # With all that is mounted below: the kernel refuses to uncover any of it.
    mount(entry.name, target, "", MS_BIND | MS_REC)


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own."""
    _call(_libc.prctl, _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(signum: int, parent: int) -> None:
    """Get `signum` when the parent dies; at once when it has died already."""
    _call(_libc.prctl, _PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def _call(function: Callable[..., int], *arguments: object, name: str | None = None) -> None:
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
