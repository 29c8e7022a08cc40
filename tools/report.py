"""`vmbus-emu report`: one recording as one page that carries everything, to be opened without a network."""

from __future__ import annotations

import base64
import json
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import click

from emu.errors import UserError
from emu.recording import Recording
from tools.exit_status import ExitStatus
from tools.named_files import check_apart, check_writable, write_text
from tools.nouns import counted
from tools.options import FileToWrite, json_option
from tools.output import print_json, say
from tools.report_data import CURVE, report_of

PARTS: Final = {
    "css": "report.css",
    "js": "report.js",
    "uplot_css": "uPlot.min.css",
    "uplot_js": "uPlot.iife.min.js",
}
"""What the page's template names, and the files in tools/web that stand there."""
LICENCE: Final = "uPlot.LICENSE"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=FileToWrite(allow_dash=True), help="The page; default: FILE with .html behind it; -: stdout."
)
@json_option
def report(file: Path, output: Path | None, as_json: bool) -> int:
    """Make a page of a recording that opens in any browser.

    Topology, the steps of every message with a time scrubber, percentiles by stage, processes over time, findings: in
    one file, without network. Everything can be reached by keyboard: Tab to the list of messages or to the scrubber,
    then the arrows, a step each.

    \b
    Example:
      vmbus-emu run --record machine.rec --duration 1
      vmbus-emu report machine.rec -o report.html
    """
    if output == Path("-"):
        return _to_stdout(file, as_json=as_json)
    if output is None:
        output = file.with_name(file.name + ".html")
        check_writable(output, "-o")
    page = output
    check_apart({"-o": page}, file)
    with Recording(file) as recording:
        found = report_of(recording)
    text = page_of(found)
    write_text(page, text, "-o")
    flows = found["flows"]
    if as_json:
        told = {
            "page": str(page),
            "bytes": len(text.encode()),
            "records": found["meta"]["records"],
            "messages": len(flows["shown"]),
            "messages_left_out": flows["left_out"],
            "findings": found["findings"],
        }
        print_json("report", 1, told)
    else:
        megabytes, messages, findings = len(text.encode()) / 1e6, len(flows["shown"]), len(found["findings"])
        say(f"{page}: {megabytes:.2f} MB, {counted(messages, 'message')}, {counted(findings, 'finding')}")
    return _status(recording)


def _to_stdout(file: Path, *, as_json: bool) -> int:
    if as_json:
        raise UserError("-o - and --json both want stdout; leave one of them out")
    with Recording(file) as recording:
        click.echo(page_of(report_of(recording)), nl=False)
    return _status(recording)


def _status(recording: Recording) -> int:
    """A damaged recording is said: the page says so, too, but whoever asked shall know before it is opened."""
    if recording.damage:
        say(f"vmbus-emu: {recording.damage}")
        return ExitStatus.FINDING
    return ExitStatus.FINE


def page_of(found: dict[str, Any]) -> str:
    """The page: the template with its parts and the data put in."""
    web = files("tools") / "web"
    parts = {name: (web / file).read_text(encoding="utf-8") for name, file in PARTS.items()}
    licence = (web / LICENCE).read_text(encoding="utf-8").strip()
    parts["uplot_js"] = f"/*!\n{licence}\n*/\n{parts['uplot_js']}"
    parts["title"] = f"vmbus-emu: {_escaped(found['meta']['machine'])}"
    # `<` cannot end the element that the data stands in.
    data = {**found, "curve": list(CURVE), "flows": {"left_out": found["flows"]["left_out"]}}
    parts["data"] = _json(data).replace("<", "\\u003c")
    parts["flows"] = base64.b64encode(zlib.compress(_json(found["flows"]["shown"]).encode(), 9)).decode()
    text = (web / "report.html").read_text(encoding="utf-8")
    # By pieces, so that nothing in one part is taken for the place of another.
    pieces = text.split("{{")
    made = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        made += [parts[name], rest]
    return "".join(made)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
