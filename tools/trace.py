"""`vmbus-emu trace`: a recording in a format that other tools read.

`FORMATS` is the one table of formats; each is told every record of the recording, in the order of time.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

import click

from emu.errors import UserError
from emu.recording import Recording, TraceRecord
from tools.event_names import name_of
from tools.exit_status import ExitStatus
from tools.named_files import check_apart, whole
from tools.options import FileToWrite, json_option
from tools.output import print_json, say


def as_json(record: TraceRecord) -> dict[str, Any]:
    """One record as an object; a number that has a name is followed by NUMBER_name."""
    arguments: dict[str, Any] = {}
    for field, value in zip(record.event.fields, record.values, strict=False):
        arguments[field.name] = field.show(value) if field.text else value
        if name := name_of(field, value):
            arguments[f"{field.name}_name"] = name
    return {
        "t_ns": record.t_ns,
        "seq": record.seq,
        "actor": record.actor.name,
        "vp": record.vp,
        "context": record.context.lower(),
        "event": record.event.name,
        "args": arguments,
    }


def json_lines(recording: Recording) -> Iterator[bytes]:
    """JSON Lines: one record a line."""
    for record in recording.records():
        yield json.dumps(as_json(record), separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Format:
    """A format: where it is written (MODULE:FUNCTION), whether it is text, and who reads it."""

    function: str
    text: bool
    reader: str

    def export(self, recording: Recording) -> Iterator[bytes]:
        """The bytes of the file, in pieces."""
        module, name = self.function.split(":")
        function: Callable[[Recording], Iterator[bytes]] = getattr(import_module(module), name)
        return function(recording)


FORMATS: Final[Mapping[str, Format]] = {
    "json": Format("tools.trace:json_lines", True, "jq and programs, a line a record"),
    "perfetto": Format("tools.export.perfetto:perfetto", False, "ui.perfetto.dev and trace_processor"),
    "trace-cmd": Format("tools.export.trace_dat:trace_dat", False, "trace-cmd report and KernelShark"),
    "ftrace": Format("tools.export.ftrace:ftrace", True, "people, as in /sys/kernel/tracing/trace"),
    "pcapng": Format("tools.export.pcapng:pcapng", False, "Wireshark and tshark, with `vmbus-emu wireshark install`"),
    "vcd": Format("tools.export.vcd:vcd", True, "GTKWave: slots, masks and ring indices as signals"),
}


def formats_text() -> str:
    """The formats and their readers, for the help."""
    return "\n".join(f"  {name:<11}{form.reader}" for name, form in FORMATS.items())


@click.command(epilog="\b\nFormats:\n" + formats_text())
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(list(FORMATS)), default="json", show_default=True, help="Which format.")
@click.option("-o", "--output", metavar="OUT", type=FileToWrite(allow_dash=True), help="Where to; default: stdout.")
@json_option
def trace(file: Path, form: str, output: Path | None, as_json: bool) -> int:
    """Write a recording in a format that other tools read.

    \b
    Example:
      vmbus-emu run --duration 1 --record boot.rec
      vmbus-emu trace boot.rec --to json | jq -c 'select(.event == "post")'
      vmbus-emu trace boot.rec --to perfetto -o boot.pftrace
      vmbus-emu trace b.rec --to trace-cmd -o b.dat && trace-cmd report -t b.dat
    """
    if output == Path("-"):
        output = None
    check_apart({"-o": output}, file)
    if as_json and output is None:
        raise UserError("--json prints an object on stdout, where the recording would go; name a file with -o OUT")
    if output is None and not FORMATS[form].text and sys.stdout.isatty():
        raise UserError(f"{form} is no text for a terminal; write it to a file with -o OUT")
    with Recording(file) as recording, opened(output) as out:
        for piece in FORMATS[form].export(recording):
            out.write(piece)
    if as_json:
        sizes = {"format": form, "path": str(output), "bytes": output.stat().st_size if output else 0}
        print_json("trace", 1, {"recording": str(file), **sizes, "damage": recording.damage})
    if not recording.damage:
        return ExitStatus.FINE
    # What is whole was written; whoever asked shall know that it is not all.
    say(f"vmbus-emu: {recording.damage}")
    return ExitStatus.FINDING


@contextlib.contextmanager
def opened(path: Path | None) -> Iterator[IO[bytes]]:
    """stdout for None, else a file, which goes away when it is not finished; UserError when it cannot be written."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with whole(path), path.open("wb") as out:
            yield out
    except OSError as error:
        raise UserError(f"-o {path}: {error.strerror}; choose a file that can be written") from None
