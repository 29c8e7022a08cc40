"""The `trace-cmd` format: trace.dat, version 6, as `trace-cmd report` and KernelShark read it.

    head        magic, version "6", endianness, size of a long, size of a page
    formats     the ring buffer's page and event headers, then each event's format file, by system
    names       number and name of each thread
    options     the clock; then for each CPU where its data lies, and the clock again
    data        for each CPU pages of 4096 bytes: time, bytes used, entries (delta in 27 bits, type in 5)

The formats are the kernel's interface (Documentation/trace/ftrace.rst, trace-cmd.dat.v6(5)).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct, pack
from typing import Final

from emu.event_fields import EventSpec
from emu.recording import Recording, TraceRecord
from tools.export.events import fields_of, print_line, system_of
from tools.export.threads import Threads

PAGE_BYTES: Final = 4096
FIRST_ID: Final = 1000
"""Numbers of events in the file: this and the event's own; below are the kernel's fixed ones."""

_PAGE_HEAD: Final = Struct("<QQ")
_ENTRY_HEAD: Final = Struct("<I")
_TIME_EXTEND: Final = 30
_MOST_DELTA: Final = (1 << 27) - 1
_COMMON: Final = "HBBi"
_COMMON_BYTES: Final = 8
_IRQS_OFF, _HARDIRQ, _SOFTIRQ = 0x01, 0x08, 0x10
FLAGS: Final = {"ISR": _IRQS_OFF | _HARDIRQ, "TASKLET": _SOFTIRQ}
"""`common_flags` by context."""
_OPTION_DONE, _OPTION_TRACECLOCK, _OPTION_UNAME = 0, 4, 5

_DATA: Final = b"flyrecord\0"
_CLOCK: Final = b"[mono]\0"
"""What the kernel's trace_clock file shows as chosen. In version 6 it stands behind the table of CPUs; see `_head`."""

_HEADER_PAGE: Final = b"""\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:1;
"""
_HEADER_EVENT: Final = b"""\
# compressed entry header
\ttype_len    :    5 bits
\ttime_delta  :   27 bits
\tarray       :   32 bits

\tpadding     : type == 29
\ttime_extend : type == 30
\ttime_stamp : type == 31
\tdata max type_len  == 28
"""
_COMMON_FIELDS: Final = (
    "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
    "\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;\n"
    "\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;\n"
    "\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n"
)


def trace_dat(recording: Recording) -> Iterator[bytes]:
    """A whole trace.dat. Records are held in memory as the pages that they become."""
    return assemble(recording.records(), Threads.of_recording(recording))


def assemble(records: Iterable[TraceRecord], threads: Threads) -> Iterator[bytes]:
    """A trace.dat of records in the order of time."""
    cpus = [CpuBuffer() for _ in range(threads.cpus)]
    writers: dict[int, EntryWriter] = {}
    for record in records:
        writer = writers.get(record.event.number)
        if writer is None:
            writer = writers[record.event.number] = EntryWriter(record.event)
        thread = threads.of(record.actor)
        cpus[thread.cpu].add(record.t_ns, writer.entry(record, thread.tid))
    head = b"".join(_head(writers.values(), threads))
    # The data begins at a page behind the head, the table of CPUs, and the clock.
    at = _page_aligned(len(head) + len(_DATA) + 16 * len(cpus) + len(_sized(_CLOCK)))
    table, data = [], []
    for cpu in cpus:
        pages = cpu.pages()
        table.append(pack("<QQ", at, len(pages)))
        data.append(pages)
        at += len(pages)
    yield (start := head + _DATA + b"".join(table) + _sized(_CLOCK))
    yield bytes(_page_aligned(len(start)) - len(start))
    yield from data


class EntryWriter:
    """Packs the entries of one event and writes its format file."""

    def __init__(self, spec: EventSpec) -> None:
        self.number = FIRST_ID + spec.number
        self.spec = spec
        self._fields = fields_of(spec, _COMMON_BYTES)
        layout, end = "<" + _COMMON, _COMMON_BYTES
        for field in self._fields:
            layout += f"{field.offset - end}x{field.code}"
            end = field.offset + field.size
        # An entry is a whole number of 4-byte words.
        self._layout = Struct(layout + f"{-end % 4}x")

    def entry(self, record: TraceRecord, tid: int) -> bytes:
        """The entry of one record."""
        flags = FLAGS.get(record.context, 0)
        members = [field.member(record.values[field.index]) for field in self._fields]
        return self._layout.pack(self.number, flags, 0, tid, *members)

    def format_file(self) -> bytes:
        """What the kernel shows in events/SYSTEM/EVENT/format."""
        spec = self.spec
        lines = [
            f"\tfield:{field.declaration};\toffset:{field.offset};\tsize:{field.size};\tsigned:{int(field.signed)};\n"
            for field in self._fields
        ]
        head = f"name: {spec.name}\nID: {self.number}\nformat:\n{_COMMON_FIELDS}\n"
        return f"{head}{''.join(lines)}\nprint fmt: {print_line(spec)}\n".encode()


class CpuBuffer:
    """One CPU's ring buffer: entries, in the order of time, in pages."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._page = bytearray()
        self._began_ns = self._last_ns = 0

    def add(self, t_ns: int, entry: bytes) -> None:
        """Append an entry of whole words, 112 bytes at most; a new page when it does not fit."""
        delta = t_ns - self._last_ns
        # The head of an entry, and the extension that a long silence needs.
        needed = _ENTRY_HEAD.size + len(entry) + (8 if delta > _MOST_DELTA else 0)
        if not self._page or _PAGE_HEAD.size + len(self._page) + needed > PAGE_BYTES:
            self._close()
            self._began_ns, delta = t_ns, 0
        if delta > _MOST_DELTA:
            self._page += pack("<II", (delta & _MOST_DELTA) << 5 | _TIME_EXTEND, delta >> 27)
            delta = 0
        self._page += _ENTRY_HEAD.pack(delta << 5 | len(entry) // 4) + entry
        self._last_ns = t_ns

    def pages(self) -> bytes:
        """All pages; nothing may be added after."""
        self._close()
        return b"".join(self._done)

    def _close(self) -> None:
        if self._page:
            page = _PAGE_HEAD.pack(self._began_ns, len(self._page)) + self._page
            self._done.append(page.ljust(PAGE_BYTES, b"\0"))
            self._page = bytearray()


def _head(writers: Iterable[EntryWriter], threads: Threads) -> Iterator[bytes]:
    """Everything before the table of CPUs."""
    yield b"\x17\x08\x44tracing6\0" + pack("<BBI", 0, 8, PAGE_BYTES)
    yield b"header_page\0" + _sized(_HEADER_PAGE)
    yield b"header_event\0" + _sized(_HEADER_EVENT)
    yield pack("<I", 0)  # formats of the system "ftrace": none of its entries is here
    systems: dict[str, list[EntryWriter]] = {}
    for one in writers:
        systems.setdefault(system_of(one.spec), []).append(one)
    yield pack("<I", len(systems))
    for system, ones in systems.items():
        yield system.encode() + b"\0" + pack("<I", len(ones))
        yield from (_sized(one.format_file()) for one in ones)
    yield pack("<II", 0, 0)  # no kallsyms, no printk formats
    yield _sized("".join(f"{thread.tid} {thread.comm}\n" for thread in threads).encode())
    yield pack("<I", threads.cpus)
    yield b"options  \0"
    # With the clock in it, as in version 7: trace-cmd parses the option's content here, too, and of an empty one
    # whatever its memory holds, which now and then names another clock: times are then not in ns.
    yield _option(_OPTION_TRACECLOCK, _CLOCK)
    yield _option(_OPTION_UNAME, b"vmbus-emu\0")
    yield pack("<H", _OPTION_DONE)


def _option(number: int, content: bytes) -> bytes:
    return pack("<HI", number, len(content)) + content


def _sized(content: bytes) -> bytes:
    return pack("<Q", len(content)) + content


def _page_aligned(at: int) -> int:
    return at + -at % PAGE_BYTES
