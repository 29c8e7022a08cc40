"""`vmbus-emu trace`: a recording in a format that other tools read.

`FORMATS` is the one table of formats; each writes every record of the recording, in the order of time.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import click

from emu.errors import UserError
from emu.recording import Recording, TraceRecord
from tools.event_names import name_of
from tools.exit_status import ExitStatus
from tools.output import say


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


def write_json(recording: Recording, out: IO[str]) -> int:
    """JSON Lines: one record a line; how many there were."""
    count = 0
    for record in recording.records():
        out.write(json.dumps(as_json(record), separators=(",", ":")) + "\n")
        count += 1
    return count


FORMATS: Final[Mapping[str, Callable[[Recording, IO[str]], int]]] = {
    "json": write_json,
}


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(list(FORMATS)), default="json", show_default=True, help="Which format.")
@click.option("-o", "--output", metavar="OUT", default="-", help="Where to; default: stdout.")
def trace(file: Path, form: str, output: str) -> int:
    """Write a recording in a format that other tools read.

    \b
    Example:
      vmbus-emu run --duration 1 --record boot.rec
      vmbus-emu trace boot.rec --to json | jq -c 'select(.event == "post")'
      vmbus-emu trace boot.rec --to json -o boot.jsonl
    """
    if output != "-" and Path(output).exists() and file.exists() and Path(output).samefile(file):
        raise UserError(f"{output} is the recording itself; write to another file")
    with Recording(file) as recording, opened(output) as out:
        FORMATS[form](recording, out)
        if not recording.damage:
            return ExitStatus.FINE
        # What is whole was written; whoever asked shall know that it is not all.
        say(f"vmbus-emu: {recording.damage}")
        return ExitStatus.FINDING


@contextlib.contextmanager
def opened(output: str) -> Iterator[IO[str]]:
    """stdout for "-", else a file; UserError when it cannot be written."""
    if output == "-":
        yield sys.stdout
        return
    try:
        with Path(output).open("w", encoding="utf-8") as out:
            yield out
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
