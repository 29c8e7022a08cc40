"""A tree served over the kernel's FUSE protocol: one request's bytes in, one reply's bytes out.

Only what a tree of small texts needs is spoken (version 7.31, include/uapi/linux/fuse.h), so
neither libfuse nor a mount helper nor a binding is wanted: whoever holds /dev/fuse reads requests from it,
asks `answer`, and writes back what that returns.

As kernfs does, an attribute's text is made by the read that begins at its start, and the rest of that read
goes on with the same text; no name is cached by the kernel, so that what went away is gone at the next look. Each
write is a store of its own, whatever its offset. A store may take its time, so it is handed back as a `Pending`, for
somebody to finish while other requests are answered. What would make, remove or rename an entry is refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final

from tools.sysfs_nodes import Attribute, Directory, Link, Node

REQUEST_BYTES: Final = 1 << 16
"""What one read of /dev/fuse must have room for (at least 8 KiB)."""
MAJOR: Final = 7
MINOR: Final = 31
ATTRIBUTE_BYTES: Final = 4096
"""What sysfs gives as the size of every file."""

_ROOT: Final = 1
_MAX_WRITE: Final = 4096
_DIRECT_IO: Final = 1
_FOREVER_S: Final = 3600
_UNKNOWN_INO: Final = 0xFFFFFFFF
_DT_UNKNOWN: Final = 0
"""Who lists a directory and wants to know more looks the entry up, and is told then."""
_DT_DIR: Final = stat.S_IFDIR >> 12

_IN_HEADER: Final = Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, length of extensions, padding."""
_OUT_HEADER: Final = Struct("=IiQ")
"""len, negative errno, unique."""
_INIT_IN: Final = Struct("=II")
_INIT_OUT: Final = Struct("=IIIIHHIIHH32x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment."""
_ATTR: Final = Struct("=QQQQQQIIIIIIIIII")
"""ino, size, blocks, three times and their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags."""
_ENTRY_OUT: Final = Struct("=QQQQII")
"""nodeid, generation, seconds that entry and attributes stay true, and their nanoseconds."""
_ATTR_OUT: Final = Struct("=QII")
_OPEN_IN: Final = Struct("=II")
_OPEN_OUT: Final = Struct("=QIi")
_READ_IN: Final = Struct("=QQIIQII")
"""fh, offset, size, read flags, lock owner, flags, padding."""
_WRITE_IN: Final = Struct("=QQIIQII")
"""fh, offset, size, write flags, lock owner, flags, padding; then the bytes."""
_WRITE_OUT: Final = Struct("=II")
_SETATTR_IN: Final = Struct("=II")
_FATTR_SIZE: Final = 1 << 3
_FATTR_HARMLESS: Final = _FATTR_SIZE | 1 << 6 | 1 << 9 | 1 << 10
"""Size, with the handle and lock owner that may come with it, and the time of change: a shell's `>` sends those."""
_RELEASE_IN: Final = Struct("=QIIQ")
_FORGET_IN: Final = Struct("=Q")
_BATCH_FORGET_IN: Final = Struct("=II")
_FORGET_ONE: Final = Struct("=QQ")
_DIRENT: Final = Struct("=QQII")
"""ino, offset of the next entry, length of the name, type; then the name, padded to 8 bytes."""
_STATFS_OUT: Final = Struct("=QQQQQIIII24x")


class Opcode(IntEnum):
    """What the kernel may ask of us; anything else is ENOSYS, and of some it then asks no more."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    DESTROY = 38
    BATCH_FORGET = 42
    RENAME2 = 45


REFUSED: Final = {
    **dict.fromkeys((Opcode.CREATE, Opcode.MKNOD), errno.EACCES),
    **dict.fromkeys(
        (
            Opcode.SYMLINK,
            Opcode.MKDIR,
            Opcode.UNLINK,
            Opcode.RMDIR,
            Opcode.RENAME,
            Opcode.RENAME2,
            Opcode.LINK,
        ),
        errno.EPERM,
    ),
}
"""What sysfs does not let anybody do, and the errno that it says so with."""


@dataclass(slots=True)
class OpenFile:
    """An attribute that somebody has open, and the text that its last read from the start made."""

    attribute: Attribute
    text: bytes = b""


class Pending:
    """A write whose store has not run yet."""

    def __init__(self, unique: int, size: int, store: Callable[[], None]) -> None:
        self._unique: Final = unique
        self._size: Final = size
        self._store: Final = store

    def finish(self) -> bytes:
        """Run it: the reply."""
        try:
            self._store()
        except OSError as error:
            return _failed(self._unique, error)
        return _OUT_HEADER.pack(_OUT_HEADER.size + _WRITE_OUT.size, 0, self._unique) + _WRITE_OUT.pack(self._size, 0)


@dataclass(slots=True)
class KnownName:
    """A node that the kernel knows by its number: where it is, and how many look-ups it counts."""

    path: tuple[str, ...]
    lookups: int


class FuseServer:
    """One mounted tree: which numbers the kernel knows, which files are open."""

    def __init__(self, root: Directory, *, now_s: int) -> None:
        self._root: Final = root
        self._now_s: Final = now_s
        self._known: Final[dict[int, KnownName]] = {_ROOT: KnownName((), 1)}
        self._numbers: Final[dict[tuple[str, ...], int]] = {(): _ROOT}
        self._files: Final[dict[int, OpenFile]] = {}
        self._listings: Final[dict[int, list[tuple[bytes, int]]]] = {}
        self._last_number = _ROOT
        self._last_handle = 0
        self._handlers: Final[dict[int, Callable[[int, bytes], bytes]]] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.DESTROY: lambda nodeid, body: b"",
        }

    @property
    def known(self) -> int:
        """How many nodes the kernel knows, and how many are open: what is held for it."""
        return len(self._known) + len(self._files) + len(self._listings)

    def answer(self, request: bytes) -> bytes | Pending | None:
        """The reply to a request, or a write that is to be finished; None for those that want none."""
        length, opcode, unique, nodeid, *_ = _IN_HEADER.unpack_from(request)
        body = request[_IN_HEADER.size : length]
        if opcode == Opcode.FORGET:
            self._forget(nodeid, *_FORGET_IN.unpack_from(body))
            return None
        if opcode == Opcode.BATCH_FORGET:
            count, _ = _BATCH_FORGET_IN.unpack_from(body)
            for number in range(count):
                place = _BATCH_FORGET_IN.size + number * _FORGET_ONE.size
                self._forget(*_FORGET_ONE.unpack_from(body, place))
            return None
        try:
            if opcode == Opcode.WRITE:
                return self._write(unique, body)
            handler = self._handlers.get(opcode)
            if handler is None:
                raise _error(REFUSED.get(opcode, errno.ENOSYS))
            reply = handler(nodeid, body)
        except OSError as error:
            return _failed(unique, error)
        return _OUT_HEADER.pack(_OUT_HEADER.size + len(reply), 0, unique) + reply

    # -- nodes --------------------------------------------------------------------------------------

    def _node(self, nodeid: int) -> Node:
        """What a number stands for now; ENOENT when it is gone."""
        node: Node | None = self._root
        for name in self._known[nodeid].path:
            node = node.find(name) if isinstance(node, Directory) else None
        if node is None:
            raise _error(errno.ENOENT)
        return node

    def _lookup(self, nodeid: int, body: bytes) -> bytes:
        name = os.fsdecode(body.partition(b"\0")[0])
        parent = self._node(nodeid)
        node = parent.find(name) if isinstance(parent, Directory) else None
        if node is None:
            raise _error(errno.ENOENT)
        path = (*self._known[nodeid].path, name)
        number = self._numbers.get(path)
        if number is None:
            # Never used twice, so the generation can stay 0.
            self._last_number += 1
            number = self._last_number
            self._numbers[path] = number
            self._known[number] = KnownName(path, 0)
        self._known[number].lookups += 1
        return _ENTRY_OUT.pack(number, 0, 0, _FOREVER_S, 0, 0) + self._attr(number, node)

    def _forget(self, nodeid: int, lookups: int) -> None:
        known = self._known[nodeid]
        known.lookups -= lookups
        if known.lookups <= 0 and nodeid != _ROOT:
            del self._known[nodeid]
            del self._numbers[known.path]

    def _attr(self, nodeid: int, node: Node) -> bytes:
        match node:
            case Directory():
                mode, size, links = stat.S_IFDIR | 0o755, 0, 2
            case Link():
                mode, size, links = stat.S_IFLNK | 0o777, 0, 1
            case Attribute():
                mode, size, links = stat.S_IFREG | node.mode, ATTRIBUTE_BYTES, 1
        now = self._now_s
        return _ATTR.pack(nodeid, size, 0, now, now, now, 0, 0, 0, mode, links, 0, 0, 0, ATTRIBUTE_BYTES, 0)

    def _getattr(self, nodeid: int, _body: bytes) -> bytes:
        return _ATTR_OUT.pack(_FOREVER_S, 0, 0) + self._attr(nodeid, self._node(nodeid))

    def _setattr(self, nodeid: int, body: bytes) -> bytes:
        """A file's size may be set, to no effect: that is how `>` begins."""
        valid, _ = _SETATTR_IN.unpack_from(body)
        if valid & ~_FATTR_HARMLESS:
            raise _error(errno.EPERM)
        return self._getattr(nodeid, b"")

    def _readlink(self, nodeid: int, _body: bytes) -> bytes:
        node = self._node(nodeid)
        if not isinstance(node, Link):
            raise _error(errno.EINVAL)
        return os.fsencode(node.target)

    # -- files --------------------------------------------------------------------------------------

    def _open(self, nodeid: int, body: bytes) -> bytes:
        node = self._node(nodeid)
        flags, _ = _OPEN_IN.unpack_from(body)
        if not isinstance(node, Attribute):
            raise _error(errno.EISDIR)
        access = flags & os.O_ACCMODE
        # As kernfs: also root is refused what the file cannot do.
        if access != os.O_WRONLY and not node.mode & 0o444:
            raise _error(errno.EACCES)
        if access != os.O_RDONLY and node.store is None:
            raise _error(errno.EACCES)
        handle = self._new_handle()
        self._files[handle] = OpenFile(node)
        return _OPEN_OUT.pack(handle, _DIRECT_IO, 0)

    def _read(self, _nodeid: int, body: bytes) -> bytes:
        handle, offset, size, *_ = _READ_IN.unpack_from(body)
        file = self._files[handle]
        if offset == 0:
            file.text = file.attribute.show().encode()
        return file.text[offset : offset + size]

    def _write(self, unique: int, body: bytes) -> Pending:
        handle, _offset, size, *_ = _WRITE_IN.unpack_from(body)
        store = self._files[handle].attribute.store
        assert store is not None, "opened for writing without a store"
        text = body[_WRITE_IN.size : _WRITE_IN.size + size].decode(errors="replace")
        return Pending(unique, size, lambda: store(text))

    def _release(self, _nodeid: int, body: bytes) -> bytes:
        handle, *_ = _RELEASE_IN.unpack_from(body)
        del self._files[handle]
        return b""

    # -- directories --------------------------------------------------------------------------------

    def _opendir(self, nodeid: int, _body: bytes) -> bytes:
        node = self._node(nodeid)
        if not isinstance(node, Directory):
            raise _error(errno.ENOTDIR)
        # A listing is of one moment, so that what comes and goes meanwhile shifts nothing in it.
        entries = [(os.fsencode(name), _DT_UNKNOWN) for name in node.names()]
        handle = self._new_handle()
        self._listings[handle] = [(b".", _DT_DIR), (b"..", _DT_DIR), *entries]
        return _OPEN_OUT.pack(handle, 0, 0)

    def _readdir(self, _nodeid: int, body: bytes) -> bytes:
        handle, offset, size, *_ = _READ_IN.unpack_from(body)
        listing = self._listings[handle]
        reply = bytearray()
        for position in range(offset, len(listing)):
            name, kind = listing[position]
            entry = _DIRENT.pack(_UNKNOWN_INO, position + 1, len(name), kind) + name
            entry += bytes(-len(entry) % 8)
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return bytes(reply)

    def _releasedir(self, _nodeid: int, body: bytes) -> bytes:
        handle, *_ = _RELEASE_IN.unpack_from(body)
        del self._listings[handle]
        return b""

    def _new_handle(self) -> int:
        self._last_handle += 1
        return self._last_handle

    # -- the file system ----------------------------------------------------------------------------

    def _init(self, _nodeid: int, body: bytes) -> bytes:
        major, minor = _INIT_IN.unpack_from(body)
        if (major, minor) < (MAJOR, MINOR):
            raise _error(errno.EPROTO)
        # No read-ahead, no flag: each read comes here, with its own offset.
        return _INIT_OUT.pack(MAJOR, MINOR, 0, 0, 16, 12, _MAX_WRITE, 1, 0, 0)

    def _statfs(self, _nodeid: int, _body: bytes) -> bytes:
        return _STATFS_OUT.pack(0, 0, 0, 0, 0, ATTRIBUTE_BYTES, 255, ATTRIBUTE_BYTES, 0)


def _failed(unique: int, error: OSError) -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size, -(error.errno or errno.EIO), unique)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
