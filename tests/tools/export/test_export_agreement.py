"""Every export of a recording holds the same records: other people's readers count what the recording counts.

Perfetto's does, too; it is slow to start, so all that it is asked stands in one place (test_export_perfetto.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from emu.recording import Recording
from tests.tools.export.readers import dissected, expected, report, seen_in, waves, written
from tools.export.pcapng import relids_of
from tools.flows import flows_in


def counts(recording: Path) -> Counter[str]:
    """What the recording itself counts."""
    with Recording(recording) as opened:
        return opened.counts()


def test_json_lines_hold_every_record(recording: Path, tmp_path: Path) -> None:
    """A line a record, with its event's name."""
    lines = written("json", recording, tmp_path / "out").read_text().splitlines()

    assert Counter(json.loads(line)["event"] for line in lines) == counts(recording)


def test_ftrace_text_holds_every_record(recording: Path, tmp_path: Path) -> None:
    """Each line says when, who, where and what, as the kernel's own text does."""
    text = written("ftrace", recording, tmp_path / "out").read_text()

    assert seen_in(text) == expected(recording, digits=6)


def test_trace_cmd_reports_every_record(recording: Path, trace_cmd: str, tmp_path: Path) -> None:
    """`trace-cmd report` shows each record in its order: the ns, thread, processor, event, arguments.

    It has a buffer for each processor: of what two of them recorded in the same ns it shows the lower one's first.
    """
    seen = seen_in(report(trace_cmd, written("trace-cmd", recording, tmp_path / "out")))

    assert seen == sorted(expected(recording, digits=9), key=lambda one: (int(one.t.replace(".", "")), one.cpu))
    assert Counter(one.event for one in seen) == counts(recording)


def test_vcd_fires_every_record(recording: Path, vcd_reader: None, tmp_path: Path) -> None:
    """A signal of kind event for each name, fired once a record, in ns since the first record."""
    signals = waves(written("vcd", recording, tmp_path / "out"))
    fired = {name: wave.changes for name, wave in signals.items() if wave.kind == "event"}

    assert {name.removeprefix("events."): len(changes) for name, changes in fired.items()} == counts(recording)
    with Recording(recording) as opened:
        times = [record.t_ns for record in opened.records()]
    assert sorted(t for changes in fired.values() for t, _value in changes) == [t - times[0] for t in times]


def test_wireshark_lists_every_message_and_publish(recording: Path, tshark: str, tmp_path: Path) -> None:
    """A frame for each post that the host saw, each slot written, each publish, in the order of time, ns kept."""
    frames = dissected(tshark, written("pcapng", recording, tmp_path / "out"))
    seen = [
        (int(layers["frame"]["frame.time_epoch"].replace(".", "")), "vmbus_ring" if "vmbus_ring" in layers else "vmbus")
        for layers in frames
    ]

    with Recording(recording) as opened:
        offset = opened.head["began_unix_ns"] - opened.head["began_ns"]
        kinds = {"ring_publish": "vmbus_ring", "slot_write": "vmbus", "post": "vmbus"}
        expected_frames = [
            (record.t_ns + offset, kinds[record.event.name])
            for record in opened.records()
            if record.event.name in kinds and (record.event.name != "post" or record.context == "HOST")
        ]
    assert seen == expected_frames


def test_wireshark_says_of_each_message_what_explain_does(real_recording: Path, tshark: str, tmp_path: Path) -> None:
    """Its comment has serial and relid, though its bytes were not recorded: the same message about the same channel."""
    seen = {}
    for layers in dissected(tshark, written("pcapng", real_recording, tmp_path / "out"), "-Y", "vmbus"):
        comment = layers["pkt_comment"]["frame.comment"]
        words = dict(re.findall(r"(serial|relid) (\d+)", comment))
        end = "g" if "connection_id" in comment else "h"
        seen[f"{end}{words['serial']}"] = int(words.get("relid", 0))
    with Recording(real_recording) as opened:
        told = {flow.id: flow.relid for flow in flows_in(opened)}

    assert seen == told
    assert any(seen.values())


def test_relids_are_told_by_the_host_where_the_guest_records_nothing(real_recording: Path) -> None:
    """Of a foreign guest's messages, too; and of a message that nobody took the guest alone says it."""
    with Recording(real_recording) as opened:
        records = list(opened.records())
    whole = relids_of(records)

    assert relids_of(one for one in records if one.actor.kind == "HYPERVISOR") == whole
    assert relids_of(one for one in records if one.event.name != "message_take") == whole
    assert any(whole.values())
