"""The FUSE protocol, a request's bytes at a time, as the kernel would send them."""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass

import pytest

from tools.sysfs_fuse import ATTRIBUTE_BYTES, FuseServer, Opcode, Pending
from tools.sysfs_nodes import Attribute, FixedDirectory, Link, Node, write_only

ROOT = 1
ROUND_S = 1_700_000_000


@dataclass
class Counter:
    """An attribute that says how often it was made, and fails when told to."""

    reads: int = 0
    error: int = 0

    def show(self) -> str:
        """The next text."""
        self.reads += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return f"read {self.reads}\n"


class Kernel:
    """The kernel's end: sends requests, checks each reply's header, gives back its body or its errno."""

    def __init__(self, entries: dict[str, Node]) -> None:
        self.server = FuseServer(FixedDirectory(entries), now_s=ROUND_S)
        self.unique = 0

    def send(self, opcode: int, nodeid: int, body: bytes = b"") -> bytes | None:
        """Send one request."""
        self.unique += 2
        header = struct.pack("=IIQQIIIHH", 40 + len(body), opcode, self.unique, nodeid, 0, 0, os.getpid(), 0, 0)
        # What lies behind the request in the buffer is none of it.
        reply = self.server.answer(header + body + b"\xff" * 8)
        return reply.finish() if isinstance(reply, Pending) else reply

    def ask(self, opcode: int, nodeid: int, body: bytes = b"") -> bytes:
        """Send a request that succeeds: the reply's body."""
        reply = self.send(opcode, nodeid, body)
        assert reply is not None
        length, error, unique = struct.unpack_from("=IiQ", reply)
        assert (length, unique) == (len(reply), self.unique)
        if error:
            assert length == 16
            raise OSError(-error, os.strerror(-error))
        return reply[16:]

    def errno(self, opcode: int, nodeid: int, body: bytes = b"") -> int | None:
        """Send a request that fails: its errno."""
        with pytest.raises(OSError) as caught:
            self.ask(opcode, nodeid, body)
        return caught.value.errno

    def lookup(self, name: str, parent: int = ROOT) -> int:
        """The node of that name."""
        reply = self.ask(Opcode.LOOKUP, parent, name.encode() + b"\0")
        nodeid, generation, entry_s, _, _, _ = struct.unpack_from("=QQQQII", reply)
        assert (len(reply), generation) == (128, 0)
        assert entry_s == 0, "a name that the kernel may remember can go unnoticed"
        return int(nodeid)

    def attributes(self, nodeid: int) -> tuple[int, int, int]:
        """Mode, size and links of a node."""
        reply = self.ask(Opcode.GETATTR, nodeid, bytes(16))
        assert len(reply) == 104
        ino, size, *_rest = struct.unpack_from("=QQQQQQIIIIIIIIII", reply, 16)
        mode, links = _rest[7], _rest[8]
        assert ino == nodeid
        return mode, size, links

    def open(self, nodeid: int, flags: int = os.O_RDONLY, opcode: int = Opcode.OPEN) -> int:
        """Open a node: its handle."""
        handle, open_flags, _ = struct.unpack("=QIi", self.ask(opcode, nodeid, struct.pack("=II", flags, 0)))
        assert open_flags == (1 if opcode == Opcode.OPEN else 0), "a file is read past the page cache"
        return int(handle)

    def read(self, handle: int, offset: int, size: int = 4096, opcode: int = Opcode.READ) -> bytes:
        """Read from a handle."""
        return self.ask(opcode, ROOT, struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0))


def test_handshake_settles_on_the_version_that_is_spoken() -> None:
    """A newer kernel is told 7.31 and adapts; one that is older is refused."""
    kernel = Kernel({})

    reply = kernel.ask(Opcode.INIT, 0, struct.pack("=IIII", 7, 45, 131072, 0xFFFFFFFF) + bytes(48))

    assert len(reply) == 64
    assert struct.unpack_from("=IIIIHHIIHH", reply) == (7, 31, 0, 0, 16, 12, 4096, 1, 0, 0)
    assert kernel.errno(Opcode.INIT, 0, struct.pack("=IIII", 7, 30, 0, 0)) == errno.EPROTO


def test_nodes_are_found_by_name_and_have_the_modes_of_sysfs() -> None:
    """Directories, links and files of every mode; a file is a page long whatever it says."""
    kernel = Kernel(
        {
            "device": FixedDirectory({"id": Attribute(lambda: "3\n"), "cpu": Attribute(str, 0o644)}),
            "link": Link("../over/there"),
        }
    )
    device = kernel.lookup("device")

    assert kernel.attributes(ROOT) == (stat.S_IFDIR | 0o755, 0, 2)
    assert kernel.attributes(device) == (stat.S_IFDIR | 0o755, 0, 2)
    assert kernel.attributes(kernel.lookup("link")) == (stat.S_IFLNK | 0o777, 0, 1)
    assert kernel.attributes(kernel.lookup("id", device)) == (stat.S_IFREG | 0o444, ATTRIBUTE_BYTES, 1)
    assert kernel.attributes(kernel.lookup("cpu", device)) == (stat.S_IFREG | 0o644, ATTRIBUTE_BYTES, 1)
    assert kernel.ask(Opcode.READLINK, kernel.lookup("link")) == b"../over/there"


def test_read_from_the_start_makes_the_text_and_others_go_on_with_it() -> None:
    """As with kernfs, a text is made once for a pass over the file, however small the pieces."""
    counter = Counter()
    kernel = Kernel({"file": Attribute(counter.show)})
    handle = kernel.open(kernel.lookup("file"))

    assert kernel.read(handle, 0, 3) == b"rea"
    assert kernel.read(handle, 3, 100) == b"d 1\n"
    assert kernel.read(handle, 7, 100) == b""
    assert kernel.read(handle, 0) == b"read 2\n"
    assert counter.reads == 2


def test_error_of_an_attribute_is_the_readers_errno() -> None:
    """Opening works, reading says why not; and works again when the reason is gone."""
    counter = Counter(error=errno.EINVAL)
    kernel = Kernel({"file": Attribute(counter.show)})
    handle = kernel.open(kernel.lookup("file"))
    body = struct.pack("=QQIIQII", handle, 0, 4096, 0, 0, 0, 0)

    assert kernel.errno(Opcode.READ, ROOT, body) == errno.EINVAL
    counter.error = errno.ENODEV
    assert kernel.errno(Opcode.READ, ROOT, body) == errno.ENODEV
    counter.error = 0
    assert kernel.read(handle, 0) == b"read 3\n"


def test_listing_comes_in_pieces_that_hold_whole_entries() -> None:
    """However small the reader's buffer, each name comes once, and what vanishes meanwhile shifts none."""
    entries: dict[str, Node] = {f"{'x' * number}{number}": Link("") for number in range(1, 40)}
    kernel = Kernel(entries)
    handle = kernel.open(ROOT, opcode=Opcode.OPENDIR)
    names, offset = [], 0

    while piece := kernel.read(handle, offset, 100, Opcode.READDIR):
        at = 0
        while at < len(piece):
            ino, offset, length, _kind = struct.unpack_from("=QQII", piece, at)
            assert ino, "0 would be no entry"
            names.append(piece[at + 24 : at + 24 + length].decode())
            at += 24 + -(-length // 8) * 8
        assert at == len(piece)
        entries.pop(next(iter(entries)))

    assert names == [".", "..", *(f"{'x' * number}{number}" for number in range(1, 40))]


def test_what_is_wrong_is_refused_with_its_errno() -> None:
    """No such name, the wrong kind of node, a write where none is possible, and what nobody implements."""
    entries: dict[str, Node] = {"file": Attribute(str, 0o644), "link": Link("x")}
    kernel = Kernel(entries)
    file, flags = kernel.lookup("file"), struct.pack("=II", os.O_RDWR, 0)

    assert kernel.errno(Opcode.LOOKUP, ROOT, b"no\0") == errno.ENOENT
    assert kernel.errno(Opcode.LOOKUP, file, b"no\0") == errno.ENOENT
    assert kernel.errno(Opcode.OPEN, file, flags) == errno.EACCES
    assert kernel.errno(Opcode.OPEN, ROOT, bytes(8)) == errno.EISDIR
    assert kernel.errno(Opcode.OPENDIR, file, bytes(8)) == errno.ENOTDIR
    assert kernel.errno(Opcode.READLINK, file) == errno.EINVAL
    assert kernel.errno(38_000, file) == errno.ENOSYS
    entries.clear()
    assert kernel.errno(Opcode.GETATTR, file, bytes(16)) == errno.ENOENT


def write(kernel: Kernel, handle: int, text: str, offset: int = 0) -> int:
    """Write to a handle: how many bytes were taken."""
    head = struct.pack("=QQIIQII", handle, offset, len(text), 0, 0, 0, 0)
    taken, _ = struct.unpack("=II", kernel.ask(Opcode.WRITE, ROOT, head + text.encode()))
    return int(taken)


def test_each_write_is_a_store() -> None:
    """Whatever its offset, with the text as it was written; `>` first sets the size, to no effect."""
    stored: list[str] = []
    kernel = Kernel({"new_id": write_only(stored.append)})
    file = kernel.lookup("new_id")
    size = struct.pack("=IIQQ", 1 << 3, 0, 0, 0) + bytes(64)
    assert len(kernel.ask(Opcode.SETATTR, file, size)) == 104
    handle = kernel.open(file, os.O_WRONLY)

    assert write(kernel, handle, "one\n") == 4
    assert write(kernel, handle, "two", offset=4) == 3
    assert stored == ["one\n", "two"]
    assert kernel.errno(Opcode.OPEN, file, struct.pack("=II", os.O_RDONLY, 0)) == errno.EACCES
    assert kernel.errno(Opcode.SETATTR, file, struct.pack("=II", 1, 0) + bytes(80)) == errno.EPERM


def test_store_that_fails_is_the_writers_errno() -> None:
    """As a read's is the reader's; the next write is a new one."""
    errors = [errno.EEXIST]

    def store(text: str) -> None:
        if errors:
            raise OSError(errors.pop(), "no")

    kernel = Kernel({"bind": write_only(store)})
    handle = kernel.open(kernel.lookup("bind"), os.O_WRONLY)
    with pytest.raises(OSError) as caught:
        write(kernel, handle, "x")

    assert caught.value.errno == errno.EEXIST
    assert write(kernel, handle, "x") == 1


def test_write_does_not_run_before_it_is_finished() -> None:
    """So that a store which takes its time holds up no other request."""
    stored: list[str] = []
    kernel = Kernel({"bind": write_only(stored.append)})
    handle = kernel.open(kernel.lookup("bind"), os.O_WRONLY)
    body = struct.pack("=QQIIQII", handle, 0, 1, 0, 0, 0, 0) + b"x"
    header = struct.pack("=IIQQIIIHH", 40 + len(body), Opcode.WRITE, 99, ROOT, 0, 0, 1, 0, 0)

    pending = kernel.server.answer(header + body)

    assert isinstance(pending, Pending)
    assert stored == []
    assert len(pending.finish()) == 24
    assert stored == ["x"]


@pytest.mark.parametrize(
    ("opcode", "number"),
    [
        (Opcode.CREATE, errno.EACCES),
        (Opcode.MKNOD, errno.EACCES),
        (Opcode.MKDIR, errno.EPERM),
        (Opcode.UNLINK, errno.EPERM),
        (Opcode.RMDIR, errno.EPERM),
        (Opcode.SYMLINK, errno.EPERM),
        (Opcode.LINK, errno.EPERM),
        (Opcode.RENAME, errno.EPERM),
        (Opcode.RENAME2, errno.EPERM),
    ],
)
def test_tree_is_not_the_users_to_shape(opcode: Opcode, number: int) -> None:
    """Nothing is made, removed or renamed, as in sysfs."""
    assert Kernel({"file": Attribute(str)}).errno(opcode, ROOT, b"file\0") == number


def test_forgotten_nodes_and_closed_files_are_not_held() -> None:
    """A node is known as long as the kernel counts look-ups of it, one by one or in a batch; then it is new."""
    kernel = Kernel({"a": Attribute(str), "b": Attribute(str)})
    empty = kernel.server.known
    first, second = kernel.lookup("a"), kernel.lookup("b")
    assert kernel.lookup("a") == first != second
    handle, listing = kernel.open(first), kernel.open(ROOT, opcode=Opcode.OPENDIR)

    kernel.ask(Opcode.RELEASE, first, struct.pack("=QIIQ", handle, 0, 0, 0))
    kernel.ask(Opcode.RELEASEDIR, ROOT, struct.pack("=QIIQ", listing, 0, 0, 0))
    assert kernel.send(Opcode.FORGET, first, struct.pack("=Q", 1)) is None
    assert kernel.lookup("a") == first
    batch = struct.pack("=IIQQQQQQ", 3, 0, first, 2, second, 1, ROOT, 5)
    assert kernel.send(Opcode.BATCH_FORGET, 0, batch) is None

    assert kernel.server.known == empty
    assert kernel.lookup("a") > second


def test_file_system_says_its_size_and_its_end() -> None:
    """statfs and the last goodbye have an answer."""
    kernel = Kernel({})

    assert len(kernel.ask(Opcode.STATFS, ROOT)) == 80
    assert kernel.ask(Opcode.DESTROY, 0) == b""
