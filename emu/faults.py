"""The faults that a machine can be told to have: one table of them, and how a user writes one down.

    NAME[=VALUE][@KEY=VALUE,…]        delay_irq=200us@relid=7      reply.drop@kind=openchannel_result,nth=2

A fault strikes only where the real thing may fail: a host that answers late, twice or not at all, a device that
stalls, an allocation that finds nothing. Nothing is drawn by lot: its filters say where it strikes, and `nth` and
`times` at which of the occasions that pass them. Where it is kept while a machine runs, and how it is looked up
there, is `emu.fault_plan`'s; what it does is done by whoever the table names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from enum import Enum, IntEnum
from functools import cache
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from emu.layout import MAX_VPS
from emu.scenario_text import Nonsense, complaint, guid, nearest, shown
from emu.values import valueclass
from emu.wire.device_classes import BY_NAME

MAX_FAULTS: Final = 64
MAX_TEXT: Final = 200
"""Bytes of one fault, written down."""
MAX_TIME_NS: Final = 3_600_000_000_000
MOST_TIMES: Final = (1 << 32) - 1
LAST_RELID: Final = 2_047
MAX_SLOT_OFFSET: Final = 239
"""The last byte of a message's payload."""
STATUS_UNSUCCESSFUL: Final = 0xC000_0001
_UNITS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_TIME: Final = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,9}))?(ns|us|ms|s)")
_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}")


class FaultKind(IntEnum):
    """Every fault; the numbers are those of recordings (`fault_hit`) and never change."""

    ALLOC_FAIL = 1
    REPLY_HOLD = 2
    REPLY_DROP = 3
    REPLY_DUP = 4
    HOST_REFUSE = 5
    HOST_DUP_RESCIND = 6
    HOST_DUP_RELID = 7
    HOST_MUTATE_SLOT = 8
    HOST_MUTATE_PKT = 9
    HOST_MUTATE_INDEX = 10
    VSP_COMPLETE_UNSENT = 11
    VSP_COMPLETE_TWICE = 12
    VSP_COMPLETE_ZERO = 13
    VSP_FORGET_INFLIGHT = 14
    VSP_EARLY_DATA = 15
    VSP_STALL = 16
    DELAY_IRQ = 17
    IRQ_SPURIOUS = 18
    GUEST_DIE = 19


class Who(Enum):
    """Who looks a fault up and carries it out."""

    HOST = "host"
    GUEST = "guest"
    LAUNCHER = "launcher"


class Form(Enum):
    """What a fault's value is; the text is how a user reads it."""

    NONE = "no value"
    TIME = "a time"
    TIME_OR_NONE = "a time; none: until it is turned off"
    PLACE = "where"
    REQUEST = "gpadl or open"
    POKE = "OFFSET:BYTE"
    NUMBER = "a number"
    NUMBER_OR_NONE = "a number, or none"


PLACES: Final = (
    "alloc_channel",
    "work_alloc",
    "device_create",
    "device_register",
    "add_kobj",
    "probe",
    "probe_hang",
    "message_work",
    "request",
)
"""Where the guest can be told to fail (`alloc.fail`)."""
REQUESTS: Final = ("gpadl", "open")

_COUNTS: Final = ("nth", "times")
_CHANNEL: Final = ("relid", "class", "device")


@valueclass()
class FaultSpec:
    """A row of the table. `keys` are what it takes behind the @; `needs` those of them that must be said.

    `packets`: it is looked for where packets and interrupts pass, and there only by a machine that was made for it.
    """

    kind: FaultKind
    name: str
    who: Who
    form: Form
    keys: tuple[str, ...]
    effect: str
    needs: tuple[str, ...] = ()
    packets: bool = False


def _table() -> tuple[FaultSpec, ...]:
    k, host, guest = FaultKind, Who.HOST, Who.GUEST
    message = ("kind", *_CHANNEL, *_COUNTS)
    channel = (*_CHANNEL, *_COUNTS)
    # fmt: off
    return (
        FaultSpec(k.ALLOC_FAIL, "alloc.fail", guest, Form.PLACE, ("relid", *_COUNTS),
                  "the allocation or step there fails"),
        FaultSpec(k.REPLY_HOLD, "reply.hold", host, Form.TIME_OR_NONE, message,
                  "a message of this kind goes out so much later; others overtake it", ("kind",)),
        FaultSpec(k.REPLY_DROP, "reply.drop", host, Form.NONE, message,
                  "a message of this kind is not sent", ("kind",)),
        FaultSpec(k.REPLY_DUP, "reply.dup", host, Form.NONE, message,
                  "a message of this kind is sent twice", ("kind",)),
        FaultSpec(k.HOST_REFUSE, "host.refuse", host, Form.REQUEST, ("status", *channel),
                  "the GPADL or the opening is refused, with this status"),
        FaultSpec(k.HOST_DUP_RESCIND, "host.dup_rescind", host, Form.NONE, channel,
                  "RESCIND_CHANNELOFFER is sent twice"),
        FaultSpec(k.HOST_DUP_RELID, "host.dup_relid", host, Form.NONE, channel,
                  "behind an offer, another device is offered under its relid"),
        FaultSpec(k.HOST_MUTATE_SLOT, "host.mutate_slot", host, Form.POKE, ("vp", "kind", "relid", *_COUNTS),
                  "a byte of a message changes after it was put into its slot; turned on later, of the one that lies "
                  "there", packets=True),
        FaultSpec(k.HOST_MUTATE_PKT, "host.mutate_pkt", host, Form.POKE, channel,
                  "a byte of a packet of the device's changes after it was published; turned on later, of the newest",
                  packets=True),
        FaultSpec(k.HOST_MUTATE_INDEX, "host.mutate_index", host, Form.NUMBER, channel,
                  "the device's write_index becomes this after a packet was published; turned on later, at once",
                  packets=True),
        FaultSpec(k.VSP_COMPLETE_UNSENT, "vsp.complete_unsent", host, Form.NUMBER_OR_NONE, channel,
                  "beside a completion another one is sent, of this transaction id (none: one that nobody uses); "
                  "turned on later, at once", packets=True),
        FaultSpec(k.VSP_COMPLETE_TWICE, "vsp.complete_twice", host, Form.NONE, channel,
                  "a completion is sent twice", packets=True),
        FaultSpec(k.VSP_COMPLETE_ZERO, "vsp.complete_zero", host, Form.NONE, channel,
                  "beside a completion another one is sent, of transaction id 0", packets=True),
        FaultSpec(k.VSP_FORGET_INFLIGHT, "vsp.forget_inflight", host, Form.NONE, channel,
                  "the device takes a packet and forgets it: nothing answers it", packets=True),
        FaultSpec(k.VSP_EARLY_DATA, "vsp.early_data", host, Form.NONE, channel,
                  "the device writes a packet before OPENCHANNEL_RESULT is sent", packets=True),
        FaultSpec(k.VSP_STALL, "vsp.stall", host, Form.TIME_OR_NONE, channel,
                  "the device neither reads nor writes for so long, each time that it is to run", packets=True),
        FaultSpec(k.DELAY_IRQ, "delay_irq", host, Form.TIME, ("relid", "vp", "sint", *_COUNTS),
                  "an interrupt that the host requests comes so much later", packets=True),
        FaultSpec(k.IRQ_SPURIOUS, "irq.spurious", host, Form.TIME, ("vp", *_COUNTS),
                  "an interrupt without any flag or message, again and again after so long", packets=True),
        FaultSpec(k.GUEST_DIE, "guest.die", Who.LAUNCHER, Form.TIME_OR_NONE, _COUNTS,
                  "the guest is killed without UNLOAD, so long after its channels were open, and another one boots; "
                  "once, unless `times` says more"),
    )
    # fmt: on


FAULTS: Final = _table()
BY_FAULT_NAME: Final[Mapping[str, FaultSpec]] = MappingProxyType({spec.name: spec for spec in FAULTS})
_BY_KIND: Final = {spec.kind: spec for spec in FAULTS}

KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "relid": "the channel's number, 1 to 2047",
        "class": "the device's class",
        "device": "the device's instance GUID",
        "vp": "the VP's index",
        "sint": "the interrupt source of the SynIC, 0 to 15: messages and events of VMBus are 2",
        "kind": "the type of the message, such as openchannel_result",
        "status": "the status that the guest is told (not 0)",
        "nth": "strike at this one of the occasions, from 1; without `times`, at no other",
        "times": "strike so often, then no more",
    }
)
"""What may stand behind the @, and what it means."""


@valueclass()
class Fault:
    """One fault, checked. Fields that it does not filter by are None; `nth` and `times` 0 when they were not said.

    `number` is what its value means: nanoseconds (`until_off`: none were said), an offset shifted left by 8 with the
    byte below it, or the number; `word` is the place or the request. `kind` is a MessageType value.
    """

    spec: FaultSpec
    number: int = 0
    word: str = ""
    has_value: bool = False
    relid: int | None = None
    class_name: str | None = None
    device: UUID | None = None
    vp: int | None = None
    sint: int | None = None
    kind: int | None = None
    status: int = STATUS_UNSUCCESSFUL
    nth: int = 0
    times: int = 0

    @property
    def until_off(self) -> bool:
        """Whether it lasts until somebody turns it off."""
        return not self.has_value

    @property
    def first(self) -> int:
        """The first of the occasions at which it strikes, from 1."""
        return self.nth or 1

    @property
    def last(self) -> int | None:
        """The last one; None: there is none."""
        if self.times:
            return self.first + self.times - 1
        once = self.nth or self.spec.kind is FaultKind.GUEST_DIE
        return self.first if once else None

    def strikes(self, occasion: int) -> bool:
        """Whether it strikes at the `occasion`-th time (from 1) that something passes its filters."""
        last = self.last
        return occasion >= self.first and (last is None or occasion <= last)

    @property
    def text(self) -> str:
        """The fault as `parse` reads it, always written in the same way."""
        value = f"={self._value_text()}" if self.has_value else ""
        keys = ",".join(f"{key}={word}" for key, word in self._key_texts().items())
        return f"{self.spec.name}{value}{'@' if keys else ''}{keys}"

    def table(self) -> dict[str, Any]:
        """The fault as a `[[fault]]` table of a scenario."""
        value = {"value": self._value_text()} if self.has_value else {}
        return {"name": self.spec.name, **value, **self._key_texts()}

    def _value_text(self) -> str:
        match self.spec.form:
            case Form.PLACE | Form.REQUEST:
                return self.word
            case Form.POKE:
                return f"{self.number >> 8}:{self.number & 0xFF:#04x}"
            case Form.TIME | Form.TIME_OR_NONE:
                unit = next(one for one in ("s", "ms", "us", "ns") if not self.number % _UNITS[one])
                return f"{self.number // _UNITS[unit]}{unit}"
            case _:
                return f"{self.number:#x}"

    def _key_texts(self) -> dict[str, str]:
        words: dict[str, str] = {}
        for key, value in (("relid", self.relid), ("vp", self.vp), ("sint", self.sint)):
            if value is not None:
                words[key] = str(value)
        if self.class_name is not None:
            words["class"] = self.class_name
        if self.device is not None:
            words["device"] = str(self.device)
        if self.kind is not None:
            words["kind"] = next(name for name, number in message_kinds().items() if number == self.kind)
        if "status" in self.spec.keys and self.status != STATUS_UNSUCCESSFUL:
            words["status"] = f"{self.status:#x}"
        for key, count in (("nth", self.nth), ("times", self.times)):
            if count:
                words[key] = str(count)
        return words


# -- reading ----------------------------------------------------------------------------------------------


def parse(text: str, *, source: str = "command line: --fault", classes: Collection[str] | None = None) -> Fault:
    """Read one fault; UserError says in one line what is wrong with it, and the cure.

    `classes` are the device classes that there are besides ours; None where that was checked before.
    """
    name, at, rest = text.partition("@")
    name, equals, value = name.partition("=")
    keys: dict[str, str] = {}
    try:
        for pair in rest.split(",") if at else ():
            key, said, word = pair.partition("=")
            if not said or not key or not word:
                raise Nonsense(f"{shown(pair)} is no KEY=VALUE", f"write it like {_example(name)}")
            if key in keys:
                raise Nonsense(f"{key} is said twice", "leave one of them out")
            keys[key] = word
        return _checked(name, value if equals else None, keys, classes)
    except Nonsense as problem:
        raise complaint(source, shown(text).strip('"') or "nothing", problem) from None


def read_table(entries: object, source: str, name: str, classes: Collection[str]) -> Fault:
    """Read one `[[fault]]` table of a scenario, which `name` calls it; UserError as of `parse`."""
    try:
        if not isinstance(entries, dict):
            raise Nonsense(f"{shown(entries)} is no table", "write it as [[fault]]")
        words: dict[str, str] = {}
        for key, value in entries.items():
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise Nonsense(f"{key} is neither a string nor a whole number", "see docs/faults.md")
            words[key] = str(value)
        if "name" not in words:
            raise Nonsense("name is missing", nearest("", BY_FAULT_NAME))
        return _checked(words.pop("name"), words.pop("value", None), words, classes)
    except Nonsense as problem:
        raise complaint(source, name, problem) from None


def check_count(count: int, source: str) -> None:
    """UserError when a machine cannot have so many."""
    if count > MAX_FAULTS:
        problem = Nonsense(
            f"{count} faults are more than the {MAX_FAULTS} that a machine has room for", "leave some out"
        )
        raise complaint(source, "fault", problem)


@cache
def message_kinds() -> Mapping[str, int]:
    """The messages that a host sends, by the name that a fault gives them."""
    from emu.wire.messages import MESSAGES, Direction

    found = (kind for kind, spec in MESSAGES.items() if spec.direction is Direction.HOST_TO_GUEST)
    return {kind.name.lower(): int(kind) for kind in found}


def _example(name: str) -> str:
    return f"{name}@nth=2,times=3" if name in BY_FAULT_NAME else "delay_irq=200us@relid=7"


def _checked(name: str, value: str | None, keys: Mapping[str, str], classes: Collection[str] | None) -> Fault:
    spec = BY_FAULT_NAME.get(name)
    if spec is None:
        raise Nonsense(f"{shown(name)} is no fault", nearest(name, BY_FAULT_NAME))
    for key in keys:
        if key not in spec.keys:
            what = f"{name} takes no {key}" if key in KEYS else f"{shown(key)} is no key"
            raise Nonsense(what, nearest(key, spec.keys))
    for key in spec.needs:
        if key not in keys:
            raise Nonsense(f"{name} needs {key}", f"add @{key}=…, {KEYS[key]}")
    fault = _with_value(Fault(spec), value)
    for key, word in keys.items():
        fault = replace(fault, **_key(key, word, classes))
    if len(fault.text.encode()) > MAX_TEXT:
        raise Nonsense("too long", f"write it in at most {MAX_TEXT} bytes")
    return fault


def _with_value(fault: Fault, value: str | None) -> Fault:
    form, name = fault.spec.form, fault.spec.name
    if value is None:
        if form in (Form.NONE, Form.TIME_OR_NONE, Form.NUMBER_OR_NONE):
            return fault
        raise Nonsense(f"{name} needs a value", f"write {name}={_value_example(form)}")
    match form:
        case Form.NONE:
            raise Nonsense(f"{name} takes no value", "leave it out; what follows the @ says where it strikes")
        case Form.TIME | Form.TIME_OR_NONE:
            return replace(fault, number=_time(value), has_value=True)
        case Form.PLACE | Form.REQUEST:
            known = PLACES if form is Form.PLACE else REQUESTS
            if value not in known:
                raise Nonsense(f"{shown(value)} is not known", nearest(value, known))
            return replace(fault, word=value, has_value=True)
        case Form.POKE:
            offset, colon, byte = value.partition(":")
            if not colon:
                raise Nonsense(f"{shown(value)} is no OFFSET:BYTE", f"write {name}={_value_example(form)}")
            most = MAX_SLOT_OFFSET if fault.spec.kind is FaultKind.HOST_MUTATE_SLOT else 0xFFFF_FFFF
            number = _number(offset, "the offset", 0, most) << 8 | _number(byte, "the byte", 0, 0xFF)
            return replace(fault, number=number, has_value=True)
        case _:
            most = 0xFFFF_FFFF if form is Form.NUMBER else (1 << 64) - 1
            return replace(fault, number=_number(value, "the value", 0, most), has_value=True)


def _value_example(form: Form) -> str:
    examples = {Form.TIME: "200us", Form.PLACE: PLACES[0], Form.REQUEST: REQUESTS[0], Form.POKE: "4:0xff"}
    return examples.get(form, "0x1000")


def _key(key: str, word: str, classes: Collection[str] | None) -> dict[str, Any]:
    match key:
        case "relid":
            return {"relid": _number(word, key, 1, LAST_RELID)}
        case "vp":
            return {"vp": _number(word, key, 0, MAX_VPS - 1)}
        case "sint":
            return {"sint": _number(word, key, 0, 15)}
        case "status":
            return {"status": _number(word, key, 1, 0xFFFF_FFFF)}
        case "nth" | "times":
            return {key: _number(word, key, 1, MOST_TIMES)}
        case "kind":
            if word not in message_kinds():
                raise Nonsense(f"{shown(word)} is no message of the host's", nearest(word, message_kinds()))
            return {"kind": message_kinds()[word]}
        case "device":
            return {"device": guid(word)}
        case _:
            assert key == "class", key
            known = {*BY_NAME, *(classes or ())}
            if classes is not None and word not in known:
                raise Nonsense(f"{shown(word)} is not a device class", nearest(word, sorted(known)))
            return {"class_name": word}


def _time(text: str) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise Nonsense(f"{shown(text)} is no time", "write a number and ns, us, ms or s, such as 200us")
    whole, fraction, unit = match[1], match[2] or "", match[3]
    scale: int = 10 ** len(fraction)
    scaled, rest = divmod(int(whole + fraction) * _UNITS[unit], scale)
    if rest:
        raise Nonsense(f"{shown(text)} is no whole number of nanoseconds", "write it with fewer digits")
    if not 0 < scaled <= MAX_TIME_NS:
        raise Nonsense(f"{shown(text)} is not between 1ns and 3600s", "write a time such as 200us")
    return scaled


def _number(text: str, what: str, least: int, most: int) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise Nonsense(f"{what}: {shown(text)} is no whole number", f"write one from {least} to {most:#x}")
    value = int(text, 16 if text[:2] in ("0x", "0X") else 10)
    if not least <= value <= most:
        raise Nonsense(f"{what}: {text} is not between {least} and {most}", "choose another")
    return value


def spec_of(kind: FaultKind) -> FaultSpec:
    """The table's row of a fault."""
    return _BY_KIND[kind]
