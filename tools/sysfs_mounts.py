"""The two ways to put a tree under a path: FUSE, and a tmpfs kept current.

A write to FUSE goes to the guest's kernel, which does it or says an errno; a tmpfs is mounted read-only. Each says
which descriptors to watch, and after how long it wants to be called anyway.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite
from tools.sysfs_fuse import REQUEST_BYTES, FuseServer, Pending
from tools.sysfs_namespace import MS_BIND, MS_RDONLY, MS_REMOUNT, STRICT, mount
from tools.sysfs_nodes import Directory
from tools.sysfs_tmpfs import TmpfsCopy

FUSE_DEVICE: Final = "/dev/fuse"
REQUESTS_AT_ONCE: Final = 64
WRITES_AT_ONCE: Final = 8
REFRESH_S: Final = 0.1
REFRESH_SHARE: Final = 10
"""A refresh is followed by at least this many times its own duration of rest."""


class Mounts(ABC):
    """Trees that are mounted and served for as long as this process lives."""

    @abstractmethod
    def descriptors(self) -> list[int]:
        """What becomes readable when somebody wants something."""

    @abstractmethod
    def serve(self, descriptor: int) -> None:
        """Do what is wanted."""

    @abstractmethod
    def tick(self) -> float | None:
        """Do what is due; seconds until something is due again, None for never."""

    @abstractmethod
    def close(self) -> None:
        """Serve no more: whoever waits for an answer gets an error at once."""


class FuseMounts(Mounts):
    """A FUSE connection for each place; every read is answered from the guest's records."""

    def __init__(self, trees: Mapping[Path, Directory]) -> None:
        self._servers: Final[dict[int, FuseServer]] = {}
        self._writes: Final = threading.Semaphore(WRITES_AT_ONCE)
        now_s = int(time.time())
        for place, tree in trees.items():
            try:
                # Opened here, behind the namespace's door: the kernel takes no descriptor from outside.
                descriptor = os.open(FUSE_DEVICE, os.O_RDWR | os.O_NONBLOCK)
                self._servers[descriptor] = FuseServer(tree, now_s=now_s)
                options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,default_permissions"
                mount("vmbus-emu", place, "fuse", STRICT, options)
            except OSError as error:
                for descriptor in self._servers:
                    os.close(descriptor)
                cure = f"modprobe fuse, chmod 666 {FUSE_DEVICE}, or use --technique tmpfs"
                raise MissingPrerequisite(f"no FUSE ({FUSE_DEVICE}: {error.strerror}): {cure}") from None

    def descriptors(self) -> list[int]:
        """The connections."""
        return list(self._servers)

    def serve(self, descriptor: int) -> None:
        """Answer what waits at a connection, a bounded number; forget the connection when its mount is gone."""
        for _ in range(REQUESTS_AT_ONCE):
            try:
                request = os.read(descriptor, REQUEST_BYTES)
            except BlockingIOError:
                return
            except (FileNotFoundError, InterruptedError):  # the request was taken back meanwhile
                continue
            except OSError:
                del self._servers[descriptor]
                os.close(descriptor)
                return
            reply = self._servers[descriptor].answer(request)
            if isinstance(reply, Pending):
                # A guest may take its time with a write; who reads meanwhile is not to wait for that.
                self._writes.acquire()
                threading.Thread(target=self._finish, args=(descriptor, reply), daemon=True).start()
            elif reply is not None:
                with suppress(FileNotFoundError):  # who asked was killed meanwhile
                    os.write(descriptor, reply)

    def _finish(self, descriptor: int, write: Pending) -> None:
        """A write, to its end, in a thread of its own."""
        try:
            reply = write.finish()
            with suppress(OSError):  # who asked was killed, or the connection is closed
                os.write(descriptor, reply)
        finally:
            self._writes.release()

    def tick(self) -> float | None:
        """Nothing is due."""
        return None

    def close(self) -> None:
        """Abort the connections. Who waits for a reply to a request that was read cannot even be killed before."""
        while self._servers:
            descriptor, _ = self._servers.popitem()
            os.close(descriptor)


class TmpfsMounts(Mounts):
    """One tmpfs with a copy of every tree, each seen at its place."""

    def __init__(self, trees: Mapping[Path, Directory]) -> None:
        first = next(iter(trees))
        names = {place: str(number) for number, place in enumerate(trees)}
        try:
            mount("vmbus-emu", first, "tmpfs", STRICT, "mode=0755")
            self._root: Final = os.open(first, os.O_RDONLY | os.O_DIRECTORY)
            self._copy: Final = TmpfsCopy(self._root, {names[place]: tree for place, tree in trees.items()})
            self._copy.refresh()
            # The first place last: it covers the directory where the copies are found until then.
            for place in reversed(list(trees)):
                mount(str(first / names[place]), place, "", MS_BIND)
                mount("none", place, "", MS_BIND | MS_REMOUNT | MS_RDONLY | STRICT)
        except OSError as error:
            raise MissingPrerequisite(f"cannot mount a tmpfs on {first}: {error.strerror}") from None
        self._due = time.monotonic() + REFRESH_S

    def descriptors(self) -> list[int]:
        """None: nobody asks."""
        return []

    def serve(self, descriptor: int) -> None:
        """Nobody asks."""
        raise AssertionError(f"nobody asks a tmpfs, but descriptor {descriptor}")

    def tick(self) -> float | None:
        """Make the copy current when it is time."""
        began = time.monotonic()
        if began >= self._due:
            self._copy.refresh()
            ended = time.monotonic()
            self._due = ended + max(REFRESH_S, REFRESH_SHARE * (ended - began))
            return self._due - ended
        return self._due - began

    def close(self) -> None:
        """Nobody waits for a tmpfs."""
