"""JUnit files: what a command found, as Jenkins, GitLab and others read it.

The elements are those of Jenkins' `junit-10.xsd`: a suite with its counts and its time, in it a case for each verdict,
which failed, could not be told (`error`), was not judged (`skipped`), or none of these: then it passed.
A command that writes one at its end writes one as well when it ends early: what lay there before is of another run, and
a pipeline would take it for this one's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from emu.errors import UserError
from tools.named_files import write_text
from tools.output import say

NO_CHARACTER: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to write (section 2.2, "Char"): file names and tracebacks may have it."""


@dataclass(frozen=True, slots=True)
class JunitCase:
    """One verdict; of `failure`, `error` and `skipped` one at most says what is the matter, and `text` all of it."""

    name: str
    failure: str = ""
    error: str = ""
    skipped: str = ""
    text: str = ""
    seconds: float | None = None


def suite_of(
    name: str, classname: str, cases: Sequence[JunitCase], *, seconds: float | None = None, output: str = ""
) -> str:
    """A file of one suite; `seconds` is the time of all its cases, where they have none of their own.

    `output` is what else whoever reads of a failure wants to know: where it is kept, how to repeat it.
    """
    suite = ElementTree.Element("testsuite", name=_written(name), tests=str(len(cases)))
    suite.set("failures", str(sum(bool(one.failure) for one in cases)))
    suite.set("errors", str(sum(bool(one.error) for one in cases)))
    suite.set("skipped", str(sum(bool(one.skipped) for one in cases)))
    if seconds is not None:
        suite.set("time", f"{seconds:.3f}")
    for one in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=_written(one.name))
        if one.seconds is not None:
            case.set("time", f"{one.seconds:.3f}")
        for kind in ("failure", "error", "skipped"):
            if message := getattr(one, kind):
                ElementTree.SubElement(case, kind, message=_written(message)).text = _written(one.text) or None
    if output:
        ElementTree.SubElement(suite, "system-out").text = _written(output)
    return ElementTree.tostring(suite, encoding="unicode") + "\n"


def write_end(path: Path | None, name: str, classname: str, why: str, *, output: str = "") -> None:
    """The file of a command that something ended before it had its verdicts: one case, an error.

    A file that cannot be written is told; it does not take the place of what ended the command.
    """
    if path is None:
        return
    first, _, rest = why.partition("\n")
    cases = [JunitCase("ran to its end", error=first, text=rest)]
    try:
        write_text(path, suite_of(name, classname, cases, output=output), "--junit")
    except UserError as unwritable:
        say(f"vmbus-emu: {unwritable}")


def _written(text: str) -> str:
    """The text with escapes, as Python writes them, for what XML cannot write; a byte of a file name as that byte."""
    return NO_CHARACTER.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    is_byte = 0xDC80 <= code <= 0xDCFF  # PEP 383
    code = code & 0xFF if is_byte else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
