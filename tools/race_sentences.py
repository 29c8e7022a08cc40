"""The words of an exhibit: what its switches do, its steps in a sentence each, what is expected, what was found.

Nothing of it depends on a run but `findings_of`, which takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from emu.switches import SWITCHES
from tools.director import Broken
from tools.invariant_table import titles
from tools.nouns import counted
from tools.schedule import Schedule, Step, point_of


def number_of(schedule: Schedule) -> str:
    """An exhibit's id: `A1`, as its file's name begins."""
    return schedule.name.split("-", 1)[0].upper()


def name_of(schedule: Schedule) -> str:
    """An exhibit's name, without its id."""
    return schedule.name.split("-", 1)[-1]


def paragraphs(schedule: Schedule) -> list[str]:
    """The story, a line a paragraph."""
    return [" ".join(part.split()) for part in schedule.story.split("\n\n") if part.strip()]


def switches_of(schedule: Schedule) -> list[tuple[str, str]]:
    """Each switch that is off, and what happens then."""
    variant = schedule.scenario.fix.variant
    return [
        (f"{name}, variant {variant}" if variant in SWITCHES[name].variants else name, SWITCHES[name].wrong)
        for name in schedule.scenario.fix.off()
    ]


def expected_of(schedule: Schedule) -> list[tuple[str, str]]:
    """Each invariant that is to be broken, and what it says."""
    known = titles()
    return [(name, known.get(name, "")) for name in schedule.invariants]


def findings_of(schedule: Schedule, broken: Iterable[Broken]) -> list[Broken]:
    """What was found of what is expected, in that order; whatever was found, if nothing of that was."""
    found = list(broken)
    wanted = [one for name in schedule.invariants for one in found if one.invariant == name]
    return wanted or found


def finding_text(one: Broken) -> str:
    """A finding in one line: the invariant, what it says, how it is broken."""
    title = titles().get(one.invariant, "")
    return f"{one.invariant} is broken ({title}): {one.text}" if title else f"{one.invariant} is broken: {one.text}"


# -- steps -----------------------------------------------------------------------------------------------


def sentence_of(step: Step) -> str:
    """What a step does, as a sentence."""
    tell = _SENTENCES.get(step.verb)
    return tell(step) if tell is not None else f"The director does `{step.text}`."


def _arm(step: Step) -> str:
    point = point_of(step.words[0])
    who = {"actor": "actor {}", "cpu": "CPU {}", "relid": "relid {}"}
    only = [text.format(step.options[key]) for key, text in who.items() if key in step.options]
    skipped = f", after {step.options['skip']} that pass" if "skip" in step.options else ""
    limits = f" (only {', '.join(only)})" if only else ""
    return f"Hold whoever comes to {point.text}{limits}{skipped}: {point.where}. Call it {step.label}."


def _until_event(step: Step) -> str:
    options = " and ".join(f"{key} {value}" for key, value in step.options.items())
    return f"Wait for a record {step.words[0]}{f' with {options}' if options else ''}."


def _offer(step: Step) -> str:
    count = int(step.options.get("subchannels", 0))
    with_them = f" with {counted(count, 'sub-channel')}" if count else ""
    return f"The host offers a device of class {step.words[0]}{with_them}: {step.label}."


def _send(step: Step) -> str:
    count, size = int(step.options.get("count", 1)), step.options.get("size", "8")
    what = f"a packet of {size} bytes" if count == 1 else f"{count} packets of {size} bytes"
    wants = " and wants to be told when it is done with" if int(step.options.get("id", 0)) else ""
    return f"The device of {step.words[0]} writes {what}{wants}."


def _run(step: Step) -> str:
    cpu, relid = step.options.get("cpu", "0"), step.options.get("relid")
    return (
        f"The guest starts the program {step.words[0]} on CPU {cpu}{f', on {relid}' if relid else ''}{_called(step)}."
    )


def _call(step: Step) -> str:
    options = " and ".join(f"{key} {value}" for key, value in step.options.items())
    given = f" with {options}" if options else ""
    return f"A thread of the guest's user space calls {step.words[0]}{given}{_called(step)}."


def _named(device: str) -> str:
    """A device as a sentence names it: its label, or its relid."""
    return f"relid {device}" if device.isdecimal() else device


def _called(step: Step) -> str:
    return f"; call it {step.label}" if step.label else ""


_SENTENCES: Final[Mapping[str, Callable[[Step], str]]] = {
    "arm": _arm,
    "disarm": lambda step: f"Hold nobody for {step.words[0]} any more.",
    "resume": lambda step: f"Let {step.words[0]} go on.",
    "until arrived": lambda step: f"Wait until {step.words[0]} is held there.",
    "expect": lambda step: f"Wait until {step.words[0]} is held there; who settles without goes another way.",
    "until event": _until_event,
    "until answered": lambda step: f"Wait until the call {step.words[0]} comes back.",
    "until settled": lambda _step: "Wait until nothing more happens by itself.",
    "until done": lambda step: f"Wait until the program {step.words[0]} has ended.",
    "advance": lambda step: f"Machine time jumps by {step.words[0]}.",
    "check": lambda _step: "Judge the machine as it stands.",
    "fault": lambda step: f"From here on the fault {step.words[0]} strikes{_called(step)}.",
    "end": lambda step: f"The fault {step.words[0]} strikes no more.",
    "offer": _offer,
    "offer-subchannel": lambda step: (
        f"The host offers sub-channel {step.options.get('index', 1)} of {step.words[0]}: {step.label}."
    ),
    "rescind": lambda step: f"The host takes {_named(step.words[0])} back.",
    "rescind-again": lambda step: f"The host says once more that it takes {_named(step.words[0])} back.",
    "send": _send,
    "run": _run,
    "call": _call,
}
"""By verb; a verb that is new here is told as it is written."""
