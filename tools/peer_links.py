"""One direction between two processes, over each of the peers: how it is made, sent into, received from.

A link is opened before the two processes are forked, used by each at one end, and closed by who opened it. What
a peer's library makes in the file system has a name of its own, and is removed at `close`, whatever happened to
the ends, and also behind one who was killed before that.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final

import posix_ipc

from emu.errors import VmbusError

BATCH: Final = 32
ROOM: Final = 1 << 20
"""Bytes that a link may hold, where that can be chosen: as many as our ring has."""
WAIT_S: Final = 20.0


class LeftOut(VmbusError):
    """A peer that is not compared with, and why not."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def nothing() -> None:
    """What most ends have to do when they are done."""


@dataclass(frozen=True, slots=True)
class Sending:
    """The sending end: `one` sends a message, `many` a batch (how many it took); both wait for room."""

    one: Callable[[bytes], object]
    many: Callable[[Sequence[bytes]], int] | None = None
    finish: Callable[[], None] = nothing


@dataclass(frozen=True, slots=True)
class Receiving:
    """The receiving end: `one` waits for a message, `some` takes those there are."""

    one: Callable[[], bytes]
    some: Callable[[], Sequence[bytes]] | None = None
    finish: Callable[[], None] = nothing


class Link(ABC):
    """One direction, for messages of `size` bytes."""

    module: ClassVar[str] = ""
    """What must be installed."""
    package: ClassVar[str] = ""
    """What it is called where packages come from."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be used here; None if it can."""
        if cls.module and find_spec(cls.module) is None:
            return f"not installed (pip install {cls.package or cls.module})"
        return None

    @abstractmethod
    def open(self) -> None:
        """Make it; any exception means that it cannot be."""

    @abstractmethod
    def sending(self) -> Sending:
        """Use the sending end, in the process that sends."""

    @abstractmethod
    def receiving(self) -> Receiving:
        """Use the receiving end, in the process that receives."""

    @abstractmethod
    def close(self) -> None:
        """Remove what was made, also after `open` failed half way."""


class _Pipe(Link):
    """`multiprocessing.Pipe`, one way: bytes with a length in front."""

    ends: tuple[Any, Any] | None = None

    def open(self) -> None:
        self.ends = multiprocessing.Pipe(duplex=False)

    def sending(self) -> Sending:
        assert self.ends
        return Sending(self.ends[1].send_bytes)

    def receiving(self) -> Receiving:
        assert self.ends
        return Receiving(self.ends[0].recv_bytes)

    def close(self) -> None:
        for end in self.ends or ():
            end.close()


class _Queue(Link):
    """`multiprocessing.Queue`: pickled by a thread of its own."""

    queue: Any = None

    def open(self) -> None:
        self.queue = multiprocessing.get_context("fork").Queue()

    def sending(self) -> Sending:
        return Sending(self.queue.put)

    def receiving(self) -> Receiving:
        return Receiving(self.queue.get)

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()


class _OsPipe(Link):
    """`os.pipe`: a stream; who reads counts the bytes of each message."""

    fds: tuple[int, ...] = ()

    def open(self) -> None:
        self.fds = os.pipe()

    def sending(self) -> Sending:
        return Sending(partial(os.write, self.fds[1])) if self.size <= _PIPE_BUF else Sending(self._write)

    def receiving(self) -> Receiving:
        return Receiving(partial(os.read, self.fds[0], self.size)) if self.size <= _PIPE_BUF else Receiving(self._read)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def _write(self, message: bytes) -> None:
        """A message that a pipe takes in pieces."""
        rest = memoryview(message)
        while rest:
            rest = rest[os.write(self.fds[1], rest) :]

    def _read(self) -> bytes:
        """A message that comes in pieces."""
        pieces = []
        left = self.size
        while left:
            pieces.append(os.read(self.fds[0], left))
            left -= len(pieces[-1])
        return b"".join(pieces)


class _SeqPacket(Link):
    """A pair of Unix sockets that keep messages apart."""

    ends: tuple[socket.socket, ...] = ()

    def open(self) -> None:
        self.ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def sending(self) -> Sending:
        return Sending(self.ends[0].send)

    def receiving(self) -> Receiving:
        return Receiving(partial(self.ends[1].recv, self.size))

    def close(self) -> None:
        for end in self.ends:
            end.close()


class _MessageQueue(Link):
    """A POSIX message queue, as deep as the system lets an ordinary process have it."""

    queue: Any = None

    def open(self) -> None:
        self.queue = posix_ipc.MessageQueue(
            f"/{_unique()}", posix_ipc.O_CREX, mode=0o600, max_messages=10, max_message_size=max(self.size, 1)
        )
        self.queue.unlink()

    def sending(self) -> Sending:
        return Sending(self.queue.send)

    def receiving(self) -> Receiving:
        receive = self.queue.receive
        return Receiving(lambda: receive()[0])

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()


class _Remover:
    """A process that removes what a peer makes under a name, once who made this has closed it or is gone.

    `name` is that of files in /dev/shm, which may have more around it (cloudtoid's semaphore is `sem.ct3ip.…`);
    `directory` is one that is made here.
    """

    def __init__(self, base: Path) -> None:
        self.name: Final = _unique()
        self.directory: Final = base / self.name
        reading, self._held = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                self._wait_and_remove(reading)
            finally:
                os._exit(0)
        os.close(reading)
        self.directory.mkdir(mode=0o700)

    def _wait_and_remove(self, reading: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # Also the pipe's other end, by whose closing the end of all who have it is known.
        os.closerange(3, reading)
        os.closerange(reading + 1, os.sysconf("SC_OPEN_MAX"))
        os.read(reading, 1)
        shutil.rmtree(self.directory, ignore_errors=True)
        for left in _SHM.glob(f"*{self.name}*"):
            with suppress(OSError):
                left.unlink()

    def close(self) -> None:
        """Have it removed now."""
        os.close(self._held)
        os.waitpid(self._pid, 0)


class _Zmq(Link):
    """pyzmq over ipc, PUSH to PULL."""

    module = "zmq"
    package = "pyzmq"
    made: _Remover | None = None

    def open(self) -> None:
        self.made = _Remover(Path(tempfile.gettempdir()))

    @property
    def _address(self) -> str:
        assert self.made is not None
        return f"ipc://{self.made.directory}/link"

    def _socket(self, kind: str) -> tuple[Any, Any]:
        # A context has threads: it is made in the process that uses it.
        zmq = import_module("zmq")
        context = zmq.Context()
        return context, context.socket(getattr(zmq, kind))

    def sending(self) -> Sending:
        context, sender = self._socket("PUSH")
        sender.connect(self._address)

        def finish() -> None:
            sender.close()
            context.term()  # waits for what is still on its way

        return Sending(partial(sender.send, copy=self.size < _LARGE), finish=finish)

    def receiving(self) -> Receiving:
        context, receiver = self._socket("PULL")
        receiver.bind(self._address)

        def finish() -> None:
            receiver.close()
            context.term()

        return Receiving(receiver.recv, finish=finish)

    def close(self) -> None:
        if self.made is not None:
            self.made.close()


class _FasterFifo(Link):
    """faster-fifo, with nothing pickled."""

    module = "faster_fifo"
    package = "faster-fifo"
    queue: Any = None

    def open(self) -> None:
        self.queue = import_module(self.module).Queue(max_size_bytes=ROOM, loads=bytes, dumps=_itself)

    def sending(self) -> Sending:
        put_many = partial(self.queue.put_many, timeout=WAIT_S)

        def many(messages: Sequence[bytes]) -> int:
            put_many(messages)
            return len(messages)

        # A batch must fit as a whole.
        return Sending(partial(self.queue.put, timeout=WAIT_S), many if self.size * BATCH < ROOM // 2 else None)

    def receiving(self) -> Receiving:
        some = partial(self.queue.get_many, timeout=WAIT_S)
        return Receiving(partial(self.queue.get, timeout=WAIT_S), some)

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()


class _Cloudtoid(Link):
    """cloudtoid-interprocess; a sender that finds no room looks again at once."""

    module = "cloudtoid_interprocess"
    package = "cloudtoid-interprocess"
    made: _Remover | None = None

    def open(self) -> None:
        self.made = _Remover(_SHM if _SHM.is_dir() else Path(tempfile.gettempdir()))
        self.place = self.made.name, ROOM, self.made.directory

    def sending(self) -> Sending:
        publisher = import_module(self.module).Publisher(*self.place)
        try_send = publisher.try_send

        def one(message: bytes) -> None:
            while not try_send(message):
                pass

        return Sending(one, publisher.try_send_batch, publisher.close)

    def receiving(self) -> Receiving:
        subscriber = import_module(self.module).Subscriber(*self.place)
        return Receiving(subscriber.receive, finish=subscriber.close)

    def close(self) -> None:
        if self.made is not None:
            self.made.close()


class _Zeroq(Link):
    """zeroq: slots of one size."""

    module = "zeroq"
    queue: Any = None
    made: _Remover | None = None

    def open(self) -> None:
        slots = 1 << (ROOM // self.size).bit_length() - 1
        self.made = _Remover(Path(tempfile.gettempdir()))
        self.name = self.made.name
        self.queue = import_module(self.module).Queue(self.name, element_size=self.size, capacity=slots, create=True)

    def _attach(self) -> Any:
        return import_module(self.module).Queue(self.name, create=False)

    def sending(self) -> Sending:
        return Sending(self._attach().put)

    def receiving(self) -> Receiving:
        return Receiving(self._attach().get)

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()
        if self.made is not None:
            self.made.close()


class _Iceoryx2(Link):
    """iceoryx2, publish and subscribe; a reader that finds nothing looks again at once."""

    module = "iceoryx2"
    made: _Remover | None = None
    held: tuple[Any, Any] | None = None

    def open(self) -> None:
        self.made = _Remover(Path(tempfile.gettempdir()))
        self.name, self.directory = self.made.name, self.made.directory

    def _service(self) -> tuple[Any, Any]:
        """Node and service; both ends open or create it, whoever comes first."""
        iox2 = import_module(self.module)
        iox2.set_log_level(iox2.LogLevel.Fatal)
        config = iox2.config.default()
        config.global_cfg.root_path = iox2.Path.new(f"{self.directory}/")
        config.global_cfg.prefix = iox2.FileName.new(f"{self.name}_")
        node = iox2.NodeBuilder.new().config(config).create(iox2.ServiceType.Ipc)
        builder = node.service_builder(iox2.ServiceName.new(self.name))
        service = (
            builder.publish_subscribe(iox2.Slice[ctypes.c_uint8])
            .enable_safe_overflow(False)
            .subscriber_max_buffer_size(_SAMPLES)
            .max_publishers(1)
            .max_subscribers(1)
            .open_or_create()
        )
        return node, service

    def sending(self) -> Sending:
        iox2 = import_module(self.module)
        node, service = self._service()
        publisher = (
            service.publisher_builder()
            .initial_max_slice_len(self.size)
            .backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        loan, size, move = publisher.loan_slice_uninit, self.size, ctypes.memmove

        def one(message: bytes) -> None:
            sample = loan(size)
            move(sample.payload_ptr, message, size)
            sample.assume_init().send()

        def finish() -> None:
            # Samples go with who sent them: the other end has them all once it is gone.
            deadline = time.monotonic() + WAIT_S
            while service.dynamic_config.number_of_subscribers and time.monotonic() < deadline:
                os.sched_yield()
            self.held = None

        self.held = node, service
        return Sending(one, finish=finish)

    def receiving(self) -> Receiving:
        node, service = self._service()
        subscriber = service.subscriber_builder().create()
        receive, size, copy = subscriber.receive, self.size, ctypes.string_at

        def one() -> bytes:
            while (sample := receive()) is None:
                pass
            return copy(sample.payload_ptr, size)

        def finish() -> None:
            subscriber.delete()
            self.held = None

        self.held = node, service
        return Receiving(one, finish=finish)

    def close(self) -> None:
        if self.made is not None:
            self.made.close()


def _itself(message: bytes) -> bytes:
    return message


def _unique() -> str:
    return f"vmbus-emu-{os.getpid()}-{uuid.uuid4().hex[:8]}"


_PIPE_BUF: Final = 4096
_LARGE: Final = 1 << 16
# A publisher that finds no room sleeps for milliseconds, so it gets more of it.
_SAMPLES: Final = 256
_SHM: Final = Path("/dev/shm")

LINKS: Final[Mapping[str, type[Link]]] = {
    "multiprocessing.Pipe": _Pipe,
    "multiprocessing.Queue": _Queue,
    "os.pipe": _OsPipe,
    "SEQPACKET pair": _SeqPacket,
    "posix_ipc.MessageQueue": _MessageQueue,
    "pyzmq ipc": _Zmq,
    "faster-fifo": _FasterFifo,
    "cloudtoid-interprocess": _Cloudtoid,
    "iceoryx2": _Iceoryx2,
    "zeroq": _Zeroq,
}
