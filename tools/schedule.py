"""A schedule: a machine, the mistakes it makes, the steps that show one, and what is to be seen of it; as a TOML file.

    title       one line
    story       plain words: what goes wrong, and the rule that prevents it
    step        a list of lines, each one verb of the director's (see `VERBS`)
    [expect]    invariant = "INV-nn" (or a list): broken with the switches off; nothing is with them on
    [machine] [[device]] [switches]    as in a scenario

What a step may say is checked before anything is launched: a UserError names the file, the step and the cure.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from emu import faults
from emu.errors import UserError, VmbusError
from emu.layout import MAX_VPS
from emu.scenario import MAX_OFFERS, SCENARIO_KEYS, SCHEDULE_KEYS, Scenario
from emu.scenario_text import Nonsense, Table, complaint, nearest, read_toml, shown, type_name
from emu.switches import ALL_FIXED
from emu.syncpoint import BY_TEXT, Point
from emu.task_board import Program
from emu.tracing import EVENTS
from emu.user_calls import DEVICES as CALL_DEVICES
from emu.user_calls import GUID, check_call
from emu.wire.device_classes import BY_NAME
from emu.wire.subchannel_request import MAX_SUBCHANNELS
from tools.invariant_table import titles

_SECONDS: Final = re.compile(r"(\d+(?:\.\d+)?)(s|ms|us)")
_SCALE: Final = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000}
MOST_ADVANCE_NS: Final = 86_400 * _SCALE["s"]
"""A day: nothing in a machine waits that long."""
_NONE: Final[tuple[str, ...]] = ()
_HOW_TO_WRITE_STEPS: Final = 'write it as step = ["arm …", "until …"]'
_INVARIANT: Final = re.compile(r"INV-\d\d")


class NotForced(VmbusError):
    """A schedule that cannot be forced on real processes: which event, and why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its verb, its words, its `key=value` pairs, the label behind `as`, and how it was written."""

    verb: str
    words: tuple[str, ...]
    options: Mapping[str, str]
    label: str
    text: str
    number: int


@dataclass(frozen=True, slots=True)
class Verb:
    """How a verb is written, how many words it takes (least, most), its options (None: any), whether it names (`as`).

    `raw`: its one word is read by somebody else, whatever is in it.
    """

    usage: str
    words: tuple[int, int]
    options: tuple[str, ...] | None = ()
    names: bool = False
    raw: bool = False


FILTERS: Final = ("actor", "cpu", "relid", "skip", "do", "fault")
VERBS: Final[dict[str, Verb]] = {
    "arm": Verb(
        "arm POINT [actor=NAME] [cpu=N] [relid=DEVICE] [skip=N] [do=see | fault=FAULT] as LABEL",
        (1, 1),
        FILTERS,
        names=True,
    ),
    "disarm": Verb("disarm LABEL", (1, 1)),
    "resume": Verb("resume LABEL", (1, 1)),
    "until arrived": Verb("until arrived LABEL", (1, 1)),
    "expect": Verb("expect LABEL", (1, 1)),
    "until event": Verb("until event NAME [argument=value …]", (1, 1), None),
    "until answered": Verb("until answered LABEL", (1, 1)),
    "until settled": Verb("until settled", (0, 0)),
    "advance": Verb("advance DURATION", (1, 1)),
    "check": Verb("check", (0, 0)),
    "fault": Verb("fault NAME[=VALUE][@KEY=WORD,…] [as LABEL]", (1, 1), names=True, raw=True),
    "end": Verb("end LABEL", (1, 1)),
    "offer": Verb("offer CLASS [subchannels=N] [number=N] as LABEL", (1, 1), ("subchannels", "number"), names=True),
    "offer-subchannel": Verb("offer-subchannel DEVICE index=N as LABEL", (1, 1), ("index",), names=True),
    "rescind": Verb("rescind DEVICE", (1, 1)),
    "rescind-again": Verb("rescind-again DEVICE", (1, 1)),
    "send": Verb("send DEVICE [count=N] [size=BYTES] [id=N]", (1, 1), ("count", "size", "id")),
    "run": Verb(
        "run PROGRAM [cpu=N] [relid=DEVICE] [wanted=N] [size=BYTES] [rate=N] [as LABEL]",
        (1, 1),
        ("cpu", "relid", "wanted", "size", "rate"),
        names=True,
    ),
    "until done": Verb("until done LABEL", (1, 1)),
    "call": Verb("call NAME [argument=value …] [as LABEL]", (1, 1), None, names=True),
}
"""The director's verbs; DEVICE is a label of `offer`, `CLASS#N` (the N-th of the scenario's), or a relid."""
_ANY_NUMBER: Final = (0, 999_999_999)
NUMBERS: Final[Mapping[str, tuple[int, int]]] = {
    "cpu": (0, MAX_VPS - 1),
    "skip": _ANY_NUMBER,
    "count": (1, 1_000),
    "size": (0, 65_536),
    "wanted": _ANY_NUMBER,
    "rate": _ANY_NUMBER,
    "subchannels": (0, MAX_SUBCHANNELS),
    "id": _ANY_NUMBER,
    "number": _ANY_NUMBER,
    "index": (1, MAX_SUBCHANNELS),
}
"""Options that are whole numbers, from and to (of `call` and `until event`, options are what the callee says)."""
_WITH_NUMBERS: Final = ("arm", "offer", "offer-subchannel", "send", "run")
_NUMBER: Final = re.compile(r"\d{1,9}", re.ASCII)
_DEVICE: Final = re.compile(r"[^\s#]+#[1-9]\d{0,8}|\d{1,9}", re.ASCII)
_WANTS: Final[dict[str, str]] = {
    "resume": "arm",
    "disarm": "arm",
    "until arrived": "arm",
    "expect": "arm",
    "until answered": "call",
    "until done": "run",
    "end": "fault",
}
"""Verbs about an earlier step, and which verb that one has."""
_DEVICES_ARE_OF: Final = ("offer", "offer-subchannel")
"""Verbs whose label names a device."""
_USES_UP: Final = ("disarm", "until answered", "end")
"""Of these, those after which there is nothing more to say about it."""
_OF_TWO: Final = {name.split()[0] for name in VERBS if " " in name}
_MAY_BE_UNNAMED: Final = {"call", "fault", "run"}


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule that was read and checked; `scenario` has its switches off."""

    name: str
    title: str
    story: str
    scenario: Scenario
    steps: tuple[Step, ...]
    invariants: tuple[str, ...]
    path: Path = field(compare=False)
    document: Mapping[str, Any] = field(compare=False)
    """What the file says, as it stands there."""
    text: str = field(default="", compare=False, repr=False)
    """The file itself, where it was read or made."""

    @classmethod
    def load(cls, path: Path) -> Schedule:
        """Read a schedule file; UserError names the file, the key or step, and the cure."""
        return cls.of_document(read_toml(path), path, path.read_text(encoding="utf-8"))

    @classmethod
    def of_document(cls, whole: Mapping[str, Any], path: Path, text: str = "") -> Schedule:
        """The schedule in what was read from a file already; raises as `load`."""
        document = dict(whole)
        top = Table({key: document.pop(key) for key in SCHEDULE_KEYS if key in document}, str(path), "")
        _refuse_misspelt(document, path)
        title, story = top.take("title", _text, path.stem), top.take("story", _text, "")
        expect = Table(top.take("expect", _anything, {}), str(path), "expect")
        invariants = expect.take("invariant", _invariants, _NONE)
        expect.end()
        scenario = Scenario.of_document(document, str(path), path.parent)
        steps = read_steps(top.take("step", _lines, _NONE), str(path))
        if not steps:
            raise top.complaint("step", Nonsense("it has no steps", _HOW_TO_WRITE_STEPS))
        _check_cpus(steps, scenario.machine.vcpus, str(path))
        return cls(
            path.stem,
            title,
            story.strip(),
            scenario,
            steps,
            invariants,
            path,
            whole,
            text,
        )

    def with_fix(self) -> Schedule:
        """The same schedule for the machine that is right."""
        return replace(self, scenario=replace(self.scenario, fix=ALL_FIXED))


def read_steps(lines: tuple[str, ...], source: str) -> tuple[Step, ...]:
    """The steps of these lines, each checked by itself and for the labels that it uses."""
    steps: list[Step] = []
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            step = _read_step(line, number)
            _check_labels(step, labels)
        except Nonsense as problem:
            what = f"step {number} `{line}`: {problem.what}"
            raise UserError(f"{source}: {_in_one_line(what)}; {problem.cure}") from None
        except UserError as error:
            raise UserError(f"{source}: {_in_one_line(str(error))}") from None
        steps.append(step)
        if step.label:
            labels[step.label] = step.verb
        if step.verb in _USES_UP:
            del labels[step.words[0]]
    return tuple(steps)


def _refuse_misspelt(document: Mapping[str, Any], path: Path) -> None:
    """UserError for a key that is none of a scenario's and looks like one of a schedule's."""
    for key in document:
        if key not in SCENARIO_KEYS and get_close_matches(key, SCHEDULE_KEYS, n=1):
            raise complaint(str(path), key, Nonsense("unknown key", nearest(key, (*SCHEDULE_KEYS, *SCENARIO_KEYS))))


def _check_cpus(steps: tuple[Step, ...], vcpus: int, source: str) -> None:
    """UserError for a step about a processor that the machine does not have: nobody would ever come there."""
    for step in steps:
        if step.verb in _WITH_NUMBERS and int(step.options.get("cpu", 0)) >= vcpus:
            what = f"step {step.number} `{step.text}`: the machine has {vcpus} vCPUs, and no {step.options['cpu']}"
            raise UserError(f"{source}: {_in_one_line(what)}; they count from 0, or set machine.vcpus")


def _in_one_line(text: str) -> str:
    """What somebody wrote, as a terminal may be shown it."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def duration_ns(text: str) -> int:
    """`5s`, `20ms` or `7us` in nanoseconds; Nonsense otherwise."""
    found = _SECONDS.fullmatch(text)
    if found is None:
        raise Nonsense(f"{text!r} is no duration", "write it as 5s, 20ms or 7us")
    if float(found[1]) * _SCALE[found[2]] > MOST_ADVANCE_NS:
        raise Nonsense(f"{text} is too long", f"at most {MOST_ADVANCE_NS // _SCALE['s']}s")
    return int(float(found[1]) * _SCALE[found[2]])


def point_of(text: str) -> Point:
    """A point by its name; Nonsense otherwise."""
    if text not in BY_TEXT:
        raise Nonsense(f"{text!r} is no sync point", nearest(text, BY_TEXT))
    return BY_TEXT[text]


def _read_step(line: str, number: int) -> Step:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise Nonsense(str(error), "close the quote") from None
    verb = " ".join(words[:2] if words and words[0] in _OF_TWO else words[:1])
    if verb not in VERBS:
        raise Nonsense(f"{verb!r} is no verb", nearest(verb, VERBS))
    rest, spec, label = words[len(verb.split()) :], VERBS[verb], ""
    if len(rest) >= 2 and rest[-2] == "as":
        label = rest[-1]
        rest = rest[:-2]
    options = {} if spec.raw else dict(word.split("=", 1) for word in rest if "=" in word)
    plain = tuple(word for word in rest if spec.raw or "=" not in word)
    least, most = spec.words
    named = bool(label) == spec.names or verb in _MAY_BE_UNNAMED
    if not least <= len(plain) <= most or not named:
        raise Nonsense("it has too few words or too many", f"write it as `{spec.usage}`")
    if spec.options is not None and (unknown := options.keys() - set(spec.options)):
        raise Nonsense(f"{min(unknown)}= is nothing of `{verb}`", f"write it as `{spec.usage}`")
    step = Step(verb, plain, options, label, line, number)
    _check_values(step)
    return step


def _check_values(step: Step) -> None:
    """What a step's own words may be."""
    for name, value in step.options.items():
        if name in NUMBERS and step.verb in _WITH_NUMBERS:
            least, most = NUMBERS[name]
            if not _NUMBER.fullmatch(value):
                raise Nonsense(f"{name}={value} is no number", f"write it as {name}=1")
            if not least <= int(value) <= most:
                raise Nonsense(f"{name}={value} is not between {least} and {most}", f"write it as {name}={least}")
    if step.verb == "arm":
        point_of(step.words[0])
        if step.options.get("do", "see") != "see" or {"do", "fault"} <= step.options.keys():
            raise Nonsense("who comes there is held, or seen (do=see), or turns a fault on (fault=…)", "choose one")
        if "fault" in step.options:
            faults.parse(step.options["fault"], source=f"step {step.number}")
    elif step.verb == "offer":
        if step.words[0] not in BY_NAME:
            raise Nonsense(f"{step.words[0]!r} is not a device class", nearest(step.words[0], BY_NAME))
    elif step.verb == "run":
        if step.words[0].upper() not in Program.__members__:
            names = [one.lower() for one in Program.__members__]
            raise Nonsense(f"{step.words[0]!r} is no program of the guest's", nearest(step.words[0], names))
        if Program[step.words[0].upper()] in (Program.BIND, Program.UNBIND) and "relid" not in step.options:
            raise Nonsense("it names no device", f"write it as `run {step.words[0]} relid=CLASS#1`")
    elif step.verb == "fault":
        faults.parse(step.words[0], source=f"step {step.number}")
    elif step.verb == "advance":
        duration_ns(step.words[0])
    elif step.verb == "call":
        check_call(step.words[0], step.options)
    elif step.verb == "until event":
        name = step.words[0]
        if name not in EVENTS:
            raise Nonsense(f"{name!r} is no event", nearest(name, EVENTS))
        if unknown := step.options.keys() - set(EVENTS[name].arguments):
            raise Nonsense(f"{min(unknown)} is no argument of {name}", nearest(min(unknown), EVENTS[name].arguments))


def _check_labels(step: Step, labels: Mapping[str, str]) -> None:
    """A label is given once, before it is used, and by a step that it makes sense of."""
    if step.label in labels:
        raise Nonsense(f"there is a {step.label} already", "choose another label")
    if step.verb in _WANTS:
        wanted, named = _WANTS[step.verb], step.words[0]
        # A fault may have been put down by an `arm`.
        wants = (wanted, "arm") if step.verb == "end" else (wanted,)
        fitting = [label for label, verb in labels.items() if verb in wants]
        if named not in labels:
            cure = nearest(named, fitting) if fitting else f"name one with `{wanted} … as LABEL` before it"
            raise Nonsense(f"no earlier step is called {named}", cure)
        if named not in fitting:
            raise Nonsense(f"{named} is a step `{labels[named]}`", f"name one of `{wanted}`")
    devices = [step.options["relid"]] if "relid" in step.options and step.verb in _WITH_NUMBERS else []
    if step.verb == "call":
        devices += [value for name, value in step.options.items() if name in CALL_DEVICES and not GUID.fullmatch(value)]
    if step.verb in ("rescind", "rescind-again", "offer-subchannel", "send"):
        devices.append(step.words[0])
    for device in devices:
        if labels.get(device) not in _DEVICES_ARE_OF and not _DEVICE.fullmatch(device):
            raise Nonsense(
                f"{device} is no device of an earlier step", "name a label of `offer`, CLASS#N (from 1), or a relid"
            )
        if device.isdecimal() and int(device) > MAX_OFFERS:
            raise Nonsense(f"{device} is no relid", f"they go from 1 to {MAX_OFFERS}")


def _anything(value: object) -> Any:
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Nonsense(f"{shown(value)} is {type_name(value)}, not a string", "write it in quotes")
    return value


def _lines(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise Nonsense("it is no list of strings", _HOW_TO_WRITE_STEPS)
    return tuple(value)


def _invariants(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(one, str) and _INVARIANT.fullmatch(one) for one in names):
        raise Nonsense(f"{shown(value)} names no invariant", 'write it as "INV-03", or as a list of such')
    known = titles()
    for one in names:
        if one not in known:
            raise Nonsense(f"there is no {one}", f"known: {', '.join(sorted(known))}")
    return tuple(names)
