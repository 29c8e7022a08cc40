"""A transition of the explorer as plain JSON, so that a schedule can be done again, here or on real processes.

    {"do": "offer", "device": "echo/0"}                      also: revoke, rescind-again, bind, unbind; unload
    {"do": "deliver", "message": "OFFERCHANNEL", "device": "echo/0", "subchannel": 1}       the guest takes it
    {"do": "receive", "message": "OPENCHANNEL", "device": "echo/0"}                         the host takes it
    {"do": "answer", "device": "echo/0", "to": "open", "yes": false}                        to: map, unmap, close, ...
    {"do": "run", "thread": "RESCIND", "until": "g.wq.rescind.wait_gate"}                   a point, or "it waits"

A device is named by its class and its number in it, by which `derived_instance` finds it on every machine; `text` says
all of it in words. Relids and GPADLs are said there alone: they follow from the order of the offers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from emu.scenario import derived_instance
from emu.wire.messages import OfferChannel, parse
from tools.explore_cores import Input
from tools.explore_messages import relid_of, text_of

CLASS: Final = "echo"
MOST_DEVICES: Final = 4
WAITS: Final = "it waits"

Event = dict[str, Any]
_DEVICES: Final = {derived_instance(CLASS, number): number for number in range(MOST_DEVICES)}
_ANSWERS: Final = {
    "map": ("GPADL", "accepts", "refuses"),
    "unmap": ("unmapping of GPADL", "confirms", ""),
    "open": ("open", "accepts", "refuses"),
    "close": ("close", "confirms", ""),
    "retarget": ("retarget", "confirms", ""),
}


class Names:
    """Whose a relid is, as the offers along a schedule say it."""

    def __init__(self) -> None:
        self._relids: dict[int, tuple[int, int]] = {}

    def sent(self, payload: bytes) -> None:
        """The host sent a message."""
        message = parse(payload)
        if isinstance(message, OfferChannel):
            self._relids[message.child_relid] = _DEVICES[message.if_instance], message.sub_channel_index

    def of(self, relid: int) -> Event:
        """The device of a relid, as part of an event; nothing for a relid that was never offered."""
        return {} if relid not in self._relids else place(*self._relids[relid])


def device_of(instance: UUID) -> int:
    """The number of the device that has this instance."""
    return _DEVICES[instance]


def place(device: int, subchannel: int) -> Event:
    """A device, or a sub-channel of one, as part of an event."""
    named: Event = {"device": f"{CLASS}/{device}"}
    return {**named, "subchannel": subchannel} if subchannel else named


def of_message(verb: str, payload: bytes, names: Names) -> Event:
    """One end takes a message: `deliver` or `receive`."""
    who = "guest" if verb == "deliver" else "host"
    event: Event = {"do": verb, "message": parse(payload).TYPE.name, **names.of(relid_of(payload))}
    return {**event, "text": f"{who} takes {text_of(payload)}"}


def of_host(what: Input, names: Names, slots: list[tuple[int, int]]) -> Event:
    """Something that devices and their owner do; `slots`: device and sub-channel by number."""
    kind, argument = what
    if kind == "rescind-again":
        where = names.of(argument)
        return {"do": kind, **where, "text": f"host: sends the RESCIND of {_words(where)} again"}
    if kind != "answer":
        where = place(*slots[argument])
        return {"do": kind, **where, "text": f"host: {kind} {_words(where)}"}
    (to, key, gpadl), yes = argument
    where = place(*slots[key // 100])
    thing, yes_word, no_word = _ANSWERS[to]
    about = f" {gpadl:#x}" if gpadl else ""
    text = f"{_words(where)}: {yes_word if yes else no_word} {thing}{about}"
    return {"do": kind, **where, "to": to, "yes": yes, "text": text}


def of_guest(what: Input, names: Names, held: Mapping[str, str]) -> Event:
    """Something that the guest's administrator does, or a turn of one of its threads; `held`: who stands where then."""
    kind, argument = what
    if kind != "run":
        where = names.of(argument)
        return {"do": kind, **where, "text": f"guest: {kind}{' ' if where else ''}{_words(where)}"}
    until = held.get(argument, WAITS)
    return {"do": kind, "thread": argument, "until": until, "text": f"guest: {argument} runs until {until}"}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two events are the same step; where a thread stops is what comes of it."""
    ignored = ("text", "until")
    return {k: v for k, v in one.items() if k not in ignored} == {k: v for k, v in other.items() if k not in ignored}


def _words(where: Event) -> str:
    if not where:
        return ""
    return f"{where['device']} sub-channel {where['subchannel']}" if "subchannel" in where else f"{where['device']}"
