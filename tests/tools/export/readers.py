"""Exports as other people's programs read them: each reader gives what it saw, as plain values."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import tools
from emu.recording import Recording, TraceRecord
from tools.event_names import name_of
from tools.export.threads import Threads
from tools.trace import FORMATS

DISSECTOR = Path(tools.__file__).with_name("lua") / "vmbus.lua"
BRIDGE = Path(__file__).with_name("trace_processor.js")
_LINE = re.compile(
    r"^ *(?P<comm>.+)-(?P<tid>\d+) +\[(?P<cpu>\d+)\] +(?:[^ ]+ +)?(?P<t>[\d.]+): +(?P<event>\w+): +(?P<text>.*)$"
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One record as a tracer shows it."""

    t: str
    comm: str
    tid: int
    cpu: int
    event: str
    text: str


def written(form: str, recording: Path, out: Path) -> Path:
    """Export a recording; the file."""
    with Recording(recording) as opened:
        out.write_bytes(b"".join(FORMATS[form].export(opened)))
    return out


def expected(recording: Path, *, digits: int) -> list[Seen]:
    """What a tracer should show of a recording, with the time in seconds of so many digits."""
    with Recording(recording) as opened:
        threads = Threads.of_recording(opened)
        return [_expected(record, threads, digits) for record in opened.records()]


def _expected(record: TraceRecord, threads: Threads, digits: int) -> Seen:
    thread, event = threads.of(record.actor), record.event
    unit = 10 ** (9 - digits)
    seconds, rest = divmod((record.t_ns + unit // 2) // unit, 10**digits)
    time = f"{seconds}.{rest:0{digits}}"
    return Seen(time, thread.comm, thread.tid, thread.cpu, event.name, _text(record))


def _text(record: TraceRecord) -> str:
    """The kernel's line for its events; ours with symbolic names, and in hex what has none."""
    event = record.event
    if event.format:
        return event.text(record.values)
    return " ".join(
        f"{field.name}={name_of(field, value) or (hex(value) if field.enum else field.show(value))}"
        for field, value in event.pairs(record.values)
    )


def seen_in(text: str) -> list[Seen]:
    """Every line of a tracer's text that is a record."""
    lines = filter(None, map(_LINE.match, text.splitlines()))
    return [
        Seen(one["t"], one["comm"].strip(), int(one["tid"]), int(one["cpu"]), one["event"], one["text"].strip())
        for one in lines
    ]


def report(trace_cmd: str, file: Path) -> str:
    """What `trace-cmd report -t` prints, which has the time in ns."""
    command = [trace_cmd, "report", "-t", "-i", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def ask(
    trace_processor: Path, files: Sequence[Path], statements: Mapping[str, str]
) -> list[dict[str, list[list[Any]]]]:
    """For each file the rows that Perfetto's trace processor gives for each SQL statement, by the statement's name."""
    # To optimise the program would take ten times as long as running it once.
    command = ["node", "--liftoff-only", str(BRIDGE), str(trace_processor), *map(str, files)]
    done = subprocess.run(
        command, input=json.dumps(list(statements.values())), capture_output=True, text=True, timeout=100, check=False
    )
    # A failure prints the whole program before it says what failed.
    assert done.returncode == 0, done.stderr[-800:]
    answers: list[list[dict[str, Any]]] = json.loads(done.stdout)
    assert not any("error" in answer for answer in chain(*answers)), answers
    return [dict(zip(statements, (answer["rows"] for answer in one), strict=True)) for one in answers]


def dissected(tshark: str, file: Path, *options: str) -> list[dict[str, Any]]:
    """The layers of every frame, as tshark sees them with our dissector; a field that occurs twice is a list."""
    command = [tshark, "-X", f"lua_script:{DISSECTOR}", "-r", str(file), "-T", "json", "--no-duplicate-keys", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Lua Error" not in done.stdout + done.stderr, done.stdout[-2_000:]
    packets: list[dict[str, Any]] = json.loads(done.stdout)
    return [packet["_source"]["layers"] for packet in packets]


@dataclass
class Wave:
    """A signal as a VCD reader shows it: what it changed to (None: unknown), and when."""

    kind: str
    bits: int
    changes: list[tuple[int, int | None]]


def waves(file: Path) -> dict[str, Wave]:
    """The signals of a dump by their whole names, as pyvcd reads them."""
    from vcd.reader import TokenKind, tokenize

    found: dict[str, Wave] = {}
    codes: dict[str, Wave] = {}
    scope: list[str] = []
    now = 0
    with file.open("rb") as stream:
        for token in tokenize(stream):
            if token.kind is TokenKind.SCOPE:
                scope.append(token.scope.ident)
            elif token.kind is TokenKind.UPSCOPE:
                scope.pop()
            elif token.kind is TokenKind.VAR:
                wave = codes[token.var.id_code] = Wave(token.var.type_.value, token.var.size, [])
                found[".".join([*scope, token.var.reference])] = wave
            elif token.kind is TokenKind.CHANGE_TIME:
                now = token.time_change
            elif token.kind is TokenKind.CHANGE_SCALAR:
                value = token.scalar_change.value
                codes[token.scalar_change.id_code].changes.append((now, None if value == "x" else int(value)))
            elif token.kind is TokenKind.CHANGE_VECTOR:
                vector = token.vector_change.value
                codes[token.vector_change.id_code].changes.append((now, vector if isinstance(vector, int) else None))
    return found
