"""The host of the explorer: the real VMBus server, and devices that may answer anything at any time.

An input is a message of the guest's, or something that devices and their owner do. What the server wants of a
device stays open until an input answers it, in whatever order. Where the server's state differs from another only
in how often something happened (`NAMES`), the two are one.
"""

from __future__ import annotations

import copyreg
import hashlib
import io
import marshal
import pickle
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import compress
from typing import Any, Final
from uuid import UUID

from emu.scenario import derived_instance
from emu.wire.device_classes import ECHO
from emu.wire.messages import Message, OfferChannel, RescindChannelOffer
from hostproc.protocol.channel_table import ChannelTable
from hostproc.protocol.effects import (
    CloseDevice,
    DropDevice,
    Effect,
    MapGpadl,
    OpenDevice,
    Refused,
    RetargetEvent,
    SendMessage,
    UnmapGpadl,
)
from hostproc.protocol.offers import OfferParameters
from hostproc.protocol.policy import DEFAULT_POLICY
from hostproc.protocol.server import Server
from hostproc.protocol.session import Link
from hostproc.protocol.states import ChannelState, GpadlState
from hostproc.protocol.versions import Limits, Version
from tools.explore_cores import FLAT, Setting
from tools.explore_events import CLASS

CONNECTION: Final = 4
LIVES: Final = 2
"""How often a device comes, at most."""
NAMES: Final = frozenset(
    {
        "_generations",
        "generation",
        "offer_count",
        "release_count",
        "_changed",
        "watcher",
        "limits",
        "policy",
        "_known",
        "identity",
        "page_runs",
    }
)


@dataclass(frozen=True, slots=True)
class HostChannel:
    """A relid as the host has it; GPADLs by handle."""

    state: ChannelState
    gpadls: Mapping[int, GpadlState]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the invariants ask of a state of the host; `open_answers`: what devices still owe the server."""

    channels: Mapping[int, HostChannel]
    link: Link
    open_answers: tuple[str, ...]
    gpadls: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Something that can be offered: device `device`, sub-channel `index` of it."""

    device: int
    index: int


class Host:
    """One server, driven by `do`."""

    server_class: type[Server] = Server

    def __init__(self, setting: Setting) -> None:
        self.server = self.server_class(Limits(vp_count=64, ram_bytes=1 << 24))
        self._slots = [Slot(n, 0) for n in range(setting.devices)]
        self._slots += [Slot(0, n + 1) for n in range(setting.subchannels)]
        self._lives = [0] * len(self._slots)
        self._answers: list[tuple[str, int, int]] = []
        self._twice = setting.twice
        self._once: set[int] = set()
        """Relids whose RESCIND was sent once, if it may be sent twice."""

    def do(self, kind: str, argument: Any) -> tuple[list[bytes], list[str]]:
        """Do one input; what goes to the guest, and which rule was broken."""
        if kind == "rescind-again":
            self._once.discard(argument)
            return [RescindChannelOffer(argument).pack()], []
        try:
            effects = self._effects(kind, argument)
        except AssertionError as error:
            return [], [f"the host broke down: {error!r}"]
        sent: list[bytes] = []
        problems: list[str] = []
        for effect in effects:
            match effect:
                case SendMessage(message):
                    sent.append(message.pack())
                    if self._twice and isinstance(message, RescindChannelOffer):
                        self._once.add(message.child_relid)
                    elif isinstance(message, OfferChannel):
                        self._once.discard(message.child_relid)
                case MapGpadl(key, _relid, gpadl):
                    self._answers.append(("map", key, gpadl))
                case UnmapGpadl(key, gpadl):
                    self._answers.append(("unmap", key, gpadl))
                case OpenDevice(key):
                    self._answers.append(("open", key, 0))
                case CloseDevice(key):
                    self._answers.append(("close", key, 0))
                case RetargetEvent(key):
                    self._answers.append(("retarget", key, 0))
                case DropDevice(key):
                    self._answers = [one for one in self._answers if one[1] != key]
                case Refused(rule, text, legal=False):
                    problems.append(f"INV-30: {text} [{rule}]")
        return sent, problems

    def again(self, kind: str, argument: Any) -> None:
        """Do an input of which it is known what comes of it."""
        self.do(kind, argument)

    def _effects(self, kind: str, argument: Any) -> list[Effect]:
        server = self.server
        if kind == "receive":
            return server.receive(argument, connection_id=CONNECTION)
        if kind == "offer":
            slot = self._slots[argument]
            self._lives[argument] += 1
            instance = derived_instance(CLASS, slot.device)
            return server.offer(self._key(argument), OfferParameters(ECHO.guid, instance, slot.index))
        if kind == "revoke":
            return server.revoke(self._key(argument))
        answer, yes = argument
        self._answers.remove(answer)
        what, key, gpadl = answer
        match what, yes:
            case "map", True:
                return server.gpadl_accepted(key, gpadl)
            case "map", False:
                return server.gpadl_refused(key, gpadl)
            case "unmap", _:
                return server.gpadl_torn_down(key, gpadl)
            case "open", True:
                return server.device_opened(key)
            case "open", False:
                return server.device_refused(key)
            case "close", _:
                return server.device_closed(key)
        return server.event_retargeted(key)

    def _key(self, slot: int) -> int:
        """The key of a slot's present life."""
        return slot * 100 + self._lives[slot]

    # -- looking --------------------------------------------------------------------------------------------

    def actions(self) -> list[tuple[str, Any]]:
        """What devices and their owner may do now."""
        found: list[tuple[str, Any]] = []
        for answer in self._answers:
            found.append(("answer", (answer, True)))
            if answer[0] in ("map", "open"):
                found.append(("answer", (answer, False)))
        # A host that says it again does so before the relid is given back.
        found += [("rescind-again", one.relid) for one in self.server.channels() if one.relid in self._once]
        for number, slot in enumerate(self._slots):
            if self._lives[number] and self.server.has_device(self._key(number)):
                found.append(("revoke", number))
            elif self._lives[number] < (1 if slot.index else LIVES) and self._may_be_offered(slot):
                found.append(("offer", number))
        return found

    def _may_be_offered(self, slot: Slot) -> bool:
        """A sub-channel comes only while its primary is open, as a device grants it over the primary's ring."""
        if not slot.index:
            return True
        parameters = (ECHO.guid, derived_instance(CLASS, slot.device), 0)
        return any(
            (one.if_type, one.if_instance, one.sub_channel_index) == parameters and one.state == ChannelState.OPEN
            for one in self.server.channels()
        )

    def facts(self) -> HostFacts:
        """See `HostFacts`."""
        server = self.server
        channels = {
            one.relid: HostChannel(
                ChannelState(one.state),
                {gpadl.gpadl: GpadlState(gpadl.state) for gpadl in server.gpadls_of(one.relid)},
            )
            for one in server.channels()
            if one.relid
        }
        answers = tuple(" ".join(map(str, one)) for one in self._answers)
        return HostFacts(channels, server.link, answers, server.summary().gpadls)

    def digest(self) -> bytes:
        """What this state has in common with those that are equal to it."""
        values = (self._lives, self._answers, sorted(self._once), _plain(self.server, {}))
        return hashlib.blake2b(marshal.dumps(values, FLAT), digest_size=16).digest()

    def save(self) -> bytes:
        """Everything that changes; what does not is said by a number."""
        file = io.BytesIO()
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump((self.server, self._lives, self._answers, self._once))
        return file.getvalue()

    def restore(self, saved: bytes) -> None:
        """Be in that state; the bytes are our own."""
        self.server, self._lives, self._answers, self._once = _Unpickler(io.BytesIO(saved)).load()

    def close(self) -> None:
        """Nothing to end."""

    def slots(self) -> list[tuple[int, int]]:
        """Device and sub-channel of each number that inputs have."""
        return [(slot.device, slot.index) for slot in self._slots]


_CONSTANTS: Final[list[Any]] = []
"""Values that do not change, by the number that stands for them in what is saved."""
_NUMBERS: Final[dict[tuple[type, Any], int]] = {}
LIVES_OF_RELIDS: Final = "_generations"
_CONSTANT: Final = (UUID, Enum, Version, OfferParameters, Limits)


class _Pickler(pickle.Pickler):
    """Says what does not change by a number."""

    def persistent_id(self, obj: Any) -> int | None:
        """The number of a constant, None for what is to be written."""
        if obj is DEFAULT_POLICY:
            return -1
        if not isinstance(obj, _CONSTANT):
            return None
        key = type(obj), obj  # an IntEnum equals the number, and the member of another one
        number = _NUMBERS.get(key)
        if number is None:
            number = _NUMBERS[key] = len(_CONSTANTS)
            _CONSTANTS.append(obj)
        return number

    def reducer_override(self, obj: Any) -> Any:
        """The table of channels counts the lives of 2,048 relids, of which a few have had any."""
        if type(obj) is not ChannelTable:
            return NotImplemented
        values = {name: getattr(obj, name) for name in ChannelTable.__slots__}
        lives = values.pop(LIVES_OF_RELIDS)
        values[LIVES_OF_RELIDS] = len(lives), [*compress(enumerate(lives), lives)]
        return copyreg.__newobj__, (ChannelTable,), values, None, None, _fill_table  # type: ignore[attr-defined]


def _fill_table(table: ChannelTable, values: dict[str, Any]) -> None:
    """What `reducer_override` took apart."""
    size, some = values[LIVES_OF_RELIDS]
    lives = [0] * size
    for relid, count in some:
        lives[relid] = count
    for name, value in {**values, LIVES_OF_RELIDS: lives}.items():
        setattr(table, name, value)


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote in this process."""

    def persistent_load(self, pid: int) -> Any:
        """A constant by its number."""
        return DEFAULT_POLICY if pid < 0 else _CONSTANTS[pid]


_WORDS: Final[dict[Any, str]] = {}
"""What was once said of a value that does not change: enum members, GUIDs, versions."""
_SLOTS: Final[dict[type, tuple[str, ...]]] = {}
"""Slots of a class that are state, once an object of it was met."""
_ATOMS: Final = frozenset({type(None), bool, int, str, bytes})


def _plain(value: Any, seen: dict[int, int]) -> Any:
    """An object as nested lists of plain values; one that was met before is its number."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is bytearray:
        return bytes(value)
    if isinstance(value, (Enum, UUID, type, Version, OfferParameters)):
        key = kind, value  # an IntEnum equals the number, and the member of another one
        words = _WORDS.get(key)
        if words is None:
            words = _WORDS[key] = str(value)
        return words
    if isinstance(value, Message):
        return value.pack()
    known = seen.get(id(value))
    if known is not None:
        return known, "met"
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return [(_plain(key, seen), _plain(one, seen)) for key, one in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [_plain(one, seen) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(marshal.dumps(_plain(one, seen), FLAT) for one in value)
    names = _SLOTS.get(kind)
    if names is None:
        slots = {name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ())}
        names = _SLOTS[kind] = tuple(sorted(slots - NAMES))
    others = sorted(vars(value).keys() - NAMES) if hasattr(value, "__dict__") else ()
    return [_plain(getattr(value, name), seen) for name in (*names, *others)]
