"""The `trace-cmd` format: pages, long silences, and what stands in a format file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from emu.event_fields import EventSpec
from emu.recording import RecordedActor, TraceRecord
from emu.tracing import EVENTS, HYPERV_EVENTS, Side
from tests.tools.export.readers import report, seen_in
from tools.export.threads import Threads
from tools.export.trace_dat import PAGE_BYTES, CpuBuffer, EntryWriter, assemble

ACTOR = RecordedActor(3, "kworker/pri_chan", "WORKER", 77, 5)


def record(t_ns: int, *values: int, event: EventSpec = EVENTS["mask"]) -> TraceRecord:
    """A record of a worker."""
    return TraceRecord(t_ns, 0, ACTOR, 0, "QUEUE", event, values)


def test_format_file_is_the_kernels() -> None:
    """Common fields first, then the event's own behind them, then how they are printed."""
    text = EntryWriter(EVENTS["release"]).format_file().decode()

    assert text.startswith("name: release\nID: 1003\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;")
    assert "\tfield:u32 generation;\toffset:12;\tsize:4;\tsigned:0;\n" in text
    assert "\tfield:int ret;\toffset:16;\tsize:4;\tsigned:1;\n" in text
    assert text.endswith('print fmt: "relid=%u generation=%u ret=%d", REC->relid, REC->generation, REC->ret\n')


def test_numbers_of_our_enums_are_symbolic_and_the_kernels_are_not() -> None:
    """As the kernel's formats name them; its own events are printed as it prints them."""
    ours, kernels = (EntryWriter(EVENTS[name]).format_file().decode() for name in ("mask", "vmbus_on_message"))

    assert ours.endswith(
        'print fmt: "relid=%u side=%s", REC->relid, __print_symbolic(REC->side, { 0, "TO_HOST" }, { 1, "TO_GUEST" })\n'
    )
    assert kernels.endswith('print fmt: "msgtype=%u", REC->msgtype\n')


def test_page_holds_what_fits() -> None:
    """An entry that does not fit whole begins the next page, with that page's time."""
    buffer = CpuBuffer()
    for t_ns in range(100):
        buffer.add(t_ns, bytes(60))
    pages = buffer.pages()

    assert len(pages) == 2 * PAGE_BYTES
    assert int.from_bytes(pages[:8], "little") == 0
    assert int.from_bytes(pages[8:16], "little") == 63 * 64
    assert int.from_bytes(pages[PAGE_BYTES : PAGE_BYTES + 8], "little") == 63


@pytest.mark.parametrize("silence_ns", [1, (1 << 27) - 1, 1 << 27, 10**12])
def test_silence_of_any_length_is_kept(trace_cmd: str, tmp_path: Path, silence_ns: int) -> None:
    """27 bits of ns are 134 ms: a longer pause between two records is said by an entry of its own."""
    records = [record(5, 1, 0), record(5 + silence_ns, 2, 1), record(6 + silence_ns, 3, 0)]
    (tmp_path / "out").write_bytes(b"".join(assemble(records, Threads([ACTOR]))))
    seen = seen_in(report(trace_cmd, tmp_path / "out"))

    assert [one.text for one in seen] == ["relid=1 side=TO_HOST", "relid=2 side=TO_GUEST", "relid=3 side=TO_HOST"]
    nanoseconds = [int(one.t.replace(".", "")) for one in seen]
    assert [later - nanoseconds[0] for later in nanoseconds] == [0, silence_ns, silence_ns + 1]


def test_records_of_one_nanosecond_are_shown_by_processor(trace_cmd: str, tmp_path: Path) -> None:
    """Two processors may record in the same ns: trace-cmd shows the lower one first, and each one's in its order."""
    host = RecordedActor(2, "hypervisor", "HYPERVISOR", 76, 0)
    records = [replace(record(9, 1, 0), actor=host), record(9, 2, 0), replace(record(9, 3, 0), actor=host)]
    (tmp_path / "out").write_bytes(b"".join(assemble(records, Threads([ACTOR, host]))))
    seen = seen_in(report(trace_cmd, tmp_path / "out"))

    assert [(one.cpu, one.text.split()[0]) for one in seen] == [(0, "relid=2"), (1, "relid=1"), (1, "relid=3")]


def test_many_pages_are_read_to_the_end(trace_cmd: str, tmp_path: Path) -> None:
    """No record is lost at the end of a page."""
    records = [record(1_000 * number, number, number & 1) for number in range(500)]
    (tmp_path / "out").write_bytes(b"".join(assemble(records, Threads([ACTOR]))))
    seen = seen_in(report(trace_cmd, tmp_path / "out"))

    assert [one.text for one in seen] == [f"relid={number} side={Side(number & 1).name}" for number in range(500)]
    assert {(one.comm, one.tid, one.cpu) for one in seen} == {("kworker/pri_cha", 77, 0)}


TYPES = {"u8": "u8", "u16": "u16", "u32": "u32", "u64": "u64", "int": "s32", "unsigned int": "uint", "char": "guid"}
"""The kernel's types of fields, and ours; `char` are its arrays of 16 bytes."""


def test_tracepoints_are_the_kernels(hv_trace: str) -> None:
    """Every event of the system `hyperv` in the kernel's own source: its fields in their order, its line."""
    source = hv_trace.replace("\\\n", "")
    bodies = {
        name: body
        for _kind, name, body in re.findall(r"(TRACE_EVENT|DECLARE_EVENT_CLASS)\((\w+),(.*?)\n\s*\);", source, re.S)
    }
    alike = re.findall(r"DEFINE_EVENT\((\w+),\s*(\w+)", source)
    bodies |= {name: bodies[class_name] for class_name, name in alike}
    for class_name, _name in alike:
        bodies.pop(class_name, None)
    declared = {
        name: (
            [(field, TYPES[kind]) for kind, field in re.findall(r"__(?:field|array)\(([^,]+),\s*(\w+)", body)],
            "".join(re.findall(r'"([^"]*)"', body[body.index("TP_printk") :])),
        )
        for name, body in bodies.items()
    }

    ours = {
        spec.name: (
            [(name, next(field.type for field in spec.fields if field.name == name)) for name in spec.declared],
            spec.format,
        )
        for spec in HYPERV_EVENTS
    }
    assert len(ours) == 22
    assert ours == declared
