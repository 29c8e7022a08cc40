"""A counterexample of the explorer as a schedule for real processes: each event by what forces it there.

    deliver   the message tasklet is held with the message that is next (g.msg.taken), and let go
    receive   the host is held with the message that is next (h.ctl.on_message), and let go
    answer    the device's answer is held (h.ctl.before_answer, h.ctl.before_open_result), and let go
    run       a worker is held where it comes out of its sleep (g.turn), and from there from sync point to sync point
    others    are orders of the host's, and calls of the guest's user space

Behind each event the machine settles. What nobody can force is refused (`NotForced`), not left to chance. An interrupt
of a processor is no turn here: it is taken at once. With the switches on the machine goes another way at some step;
`expect` sees that, and the rest of the schedule is passed over.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

from emu.errors import UserError
from emu.wire.messages import OfferChannel, parse
from guestproc.kernel.workqueue import WORKERS, QueueNumber
from tools.explore import read_found
from tools.explore_cores import Setting
from tools.explore_events import CLASS, Event, Names, device_of, same
from tools.explore_guest import PROCESSOR, RING_PAGES
from tools.explore_search import HOST, TO_GUEST, TO_HOST, Explorer, Pair, Transition
from tools.schedule import NotForced, Schedule

DRIVER: Final = "hv_echo"
_OF_ANSWERS: Final = {"open": "h.ctl.before_open_result"}
_ANSWERED: Final = "h.ctl.before_answer"

FAMILIES: Final[Mapping[str, tuple[str, ...]]] = {
    "INV-01": ("INV-01", "INV-02", "INV-03"),
    "INV-12": ("INV-12",),
    "INV-13": ("INV-13",),
    "INV-15": ("INV-15", "INV-06", "INV-27", "INV-03"),
    "INV-28": ("INV-28", "INV-27"),
    "INV-29": ("INV-29",),
    "INV-30": ("INV-30", "INV-02"),
}
"""What a settled machine of processes says where the explorer says this: it also looks at who waits for whom."""
_NAMED: Final = re.compile(r"INV-\d\d")


@dataclass(slots=True)
class _Script:
    """The steps so far, and labels that were not used yet."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    """A step of the director's, and the event that it begins ("": none)."""
    _numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, step: str, why: str = "") -> None:
        """One more step."""
        self.lines.append((step, why))

    def arm(self, letter: str, point: str, *filters: str) -> str:
        """Arm a point; the label."""
        label = f"{letter}{next(self._numbers.setdefault(letter, count(1)))}"
        self.add(" ".join(["arm", point, *filters, "as", label]))
        return label


class Translation:
    """The steps that force a counterexample, found by doing it once more in the explorer."""

    def __init__(self, setting: Setting) -> None:
        self._setting: Final = setting
        self._explorer: Final = Explorer(setting)
        self._names: Final = Names()
        self._script: Final = _Script()
        self._to_guest = ""
        self._to_host = ""
        """Labels of the message that is held at either end."""
        self._answers: Final[dict[str, str]] = {}
        self._held: Final[dict[str, str]] = {}
        """Label at which a thread is held, if it is at a sync point."""
        self._turns: Final[dict[str, str]] = {}
        """Label at which it will be held when it is woken."""
        self._slots: Final[dict[int, str]] = {}
        self._keys: Final[dict[int, str]] = {}
        self._relids: Final[dict[int, str]] = {}
        """Label of a device: by what can be offered, by its key, and by its relid."""
        self._lives = count(1)

    def close(self) -> None:
        """Let go of the explorer."""
        self._explorer.close()

    def steps(self, schedule: Sequence[Event]) -> list[tuple[str, str]]:
        """The director's steps, each with what it stands for. NotForced; UserError: not a schedule of this world."""
        for device in range(self._setting.devices):
            self._script.add(f"rescind {CLASS}#{device + 1}", "" if device else "As the explorer's, the bus is empty.")
        self._script.add("until settled")
        if self._setting.threads:
            for queue in QueueNumber:
                for worker in range(WORKERS[queue]):
                    self._await_turn(queue.name if WORKERS[queue] == 1 else f"{queue.name}/{worker}")
        pair: Pair = (0, 0, (), ())
        for number, wanted in enumerate(schedule, 1):
            explorer = self._explorer
            possible = ((one, explorer.event_of(pair, one, self._names)) for one in explorer.transitions(pair))
            transition = next((one for one, event in possible if same(event, wanted)), None)
            if transition is None:
                raise UserError(f"schedule, step {number}: {wanted.get('text', wanted)!r} is not possible there")
            after, problems = explorer.follow(pair, transition)
            try:
                self._force(pair, transition, wanted, after, last=bool(problems))
            except NotForced as why:
                raise NotForced(f"step {number}, {wanted.get('text', wanted)!r}, cannot be forced: {why}") from None
            self._offered(after[2][len(pair[2]) - (transition[0] == TO_GUEST) :])
            pair = explorer.told(pair, transition, self._names)[0]
        return self._script.lines

    # -- one event ------------------------------------------------------------------------------------------

    def _force(self, pair: Pair, transition: Transition, event: Event, after: Pair, *, last: bool) -> None:
        """Arm what will be come to, act, let the machine settle, and see that it came there."""
        who = transition[0]
        to_guest, to_host = self._to_guest, self._to_host
        expected: list[str] = []
        if not last:
            expected += self._arm_messages(pair, after, who)
            if who in (HOST, TO_HOST):
                expected += self._arm_answers(pair[0], after[0])
        why = str(event.get("text", ""))
        if who == TO_GUEST:
            self._script.add(f"resume {to_guest}", why)
        elif who == TO_HOST:
            self._script.add(f"resume {to_host}", why)
        elif who == HOST:
            self._host(transition, why)
        else:
            expected += self._guest(transition, after, why, last=last)
        self._script.add("until settled")
        for label in expected:
            self._script.add(f"expect {label}")

    def _arm_messages(self, pair: Pair, after: Pair, who: str) -> list[str]:
        """Hold the message that is next at either end, once there is one."""
        armed = []
        if who == TO_GUEST or not pair[2]:
            self._to_guest = self._script.arm("R", "g.msg.taken") if after[2] else ""
            armed += [self._to_guest] if after[2] else []
        if who == TO_HOST or not pair[3]:
            self._to_host = self._script.arm("M", "h.ctl.on_message") if after[3] else ""
            armed += [self._to_host] if after[3] else []
        return armed

    def _arm_answers(self, before: int, after: int) -> list[str]:
        """Hold what a device answers from here on."""
        host = self._explorer.host
        new = [one for one in host.facts(after).open_answers if one not in host.facts(before).open_answers]
        armed = []
        for answer in new:
            what, key, _gpadl = answer.split()
            point = _OF_ANSWERS.get(what, _ANSWERED)
            label = self._script.arm("A", point, f"relid={self._keys[int(key)]}")
            self._answers[answer] = label
            armed.append(label)
        return armed

    # -- who acts -------------------------------------------------------------------------------------------

    def _host(self, transition: Transition, why: str) -> None:
        """Something that devices and their owner do."""
        assert transition[1] is not None
        kind, argument = transition[1]
        add = self._script.add
        if kind == "offer":
            self._offer(argument, why)
        elif kind == "revoke":
            add(f"rescind {self._slots[argument]}", why)
        elif kind == "rescind-again":
            add(f"rescind-again {self._relids[argument]}", why)
        else:
            answer, yes = argument
            if not yes:
                raise NotForced("devices of processes do what they are asked")
            add(f"resume {self._answers.pop(' '.join(map(str, answer)))}", why)

    def _offer(self, slot: int, why: str) -> None:
        device, index = self._explorer.slots[slot]
        primary = self._slots.get(device, "")
        label = self._slots[slot] = f"D{next(self._lives)}"
        self._keys[slot * 100 + sum(key // 100 == slot for key in self._keys) + 1] = label
        if index:
            self._script.add(f"offer-subchannel {primary} index={index} as {label}", why)
        else:
            self._script.add(f"offer {CLASS} number={device} as {label}", why)

    def _guest(self, transition: Transition, after: Pair, why: str, *, last: bool) -> list[str]:
        """A turn of a thread, or what the administrator does; where somebody must arrive then."""
        assert transition[1] is not None
        kind, argument = transition[1]
        held: Mapping[str, str] = self._explorer.guest.facts(after[1]).held
        if kind in ("bind", "unbind"):
            if PROCESSOR in held:
                raise NotForced("a caller who is held in the middle is not followed")
            driver = f" driver={DRIVER}" if kind == "bind" else ""
            self._script.add(f"call {kind} device={self._relids[argument]}{driver}", why)
            return []
        if kind != "run":
            raise NotForced("a guest of processes unloads only as it ends")
        if argument == PROCESSOR:
            if "a task" in self._explorer.guest.facts(after[1]).busy:
                raise NotForced("a caller who is held in the middle is not followed")
            self._script.add("until settled", why)  # its interrupt was taken at once
            return []
        return self._turn(argument, "" if last else held.get(argument, ""), why)

    def _turn(self, thread: str, point: str, why: str) -> list[str]:
        """A worker goes on to a sync point ("": until it sleeps)."""
        label = self._held.pop(thread, None)
        if label is None:
            label = self._turns.pop(thread)
            self._script.add(f"expect {label}")
        arrives = []
        if point:
            self._held[thread] = self._script.arm("T", point, f"actor={_worker(thread)}")
            arrives.append(self._held[thread])
        else:
            self._await_turn(thread)
        self._script.add(f"resume {label}", why)
        return arrives

    def _await_turn(self, thread: str) -> None:
        self._turns[thread] = self._script.arm("W", "g.turn", f"actor={_worker(thread)}")

    def _offered(self, sent: Iterable[int]) -> None:
        """Learn which relid a device got."""
        for number in sent:
            message = parse(self._explorer.messages.payloads[number])
            if isinstance(message, OfferChannel):
                place = device_of(message.if_instance), message.sub_channel_index
                self._relids[message.child_relid] = self._slots[self._explorer.slots.index(place)]


def _worker(thread: str) -> str:
    """The actor of a machine of processes that is this thread of the explorer's guest."""
    return f"kworker/{thread.lower()}"


def invariants_of(problems: Iterable[str]) -> list[str]:
    """What processes may be found to break where the explorer found these problems."""
    found: dict[str, None] = {}
    for problem in problems:
        named = _NAMED.search(problem)
        family = FAMILIES.get(named[0], (named[0],)) if named else ("INV-13", "INV-30")
        found |= dict.fromkeys(family)
    return list(found)


def schedule_of(path: Path) -> Schedule:
    """The schedule of a counterexample in a file of `explore --json`. NotForced; UserError: it holds none."""
    setting, problems, schedule = read_found(path)
    text = schedule_text(setting, problems, schedule, path.stem)
    return Schedule.of_document(tomllib.loads(text), path, text)


def schedule_text(setting: Setting, problems: Sequence[str], schedule: Sequence[Event], title: str) -> str:
    """A schedule file (`tools.schedule`). NotForced: which event cannot be forced, and why."""
    translation = Translation(setting)
    try:
        steps = translation.steps(schedule)
    finally:
        translation.close()
    lines = [f"title = {_quoted(title)}", f"story = {_quoted(f'The explorer found: {problems[0]}.')}", "step = ["]
    for step, why in steps:
        if why:
            lines.append(f"    # {why}")
        lines.append(f"    {_quoted(step)},")
    lines += ["]", "", "[expect]", f"invariant = [{', '.join(map(_quoted, invariants_of(problems)))}]", ""]
    lines += ["[machine]", "vcpus = 1", f"era = {_quoted(setting.era)}", ""]
    lines += _devices(setting)
    lines += ["[switches]", *(f"{name} = false" for name in setting.without), ""]
    return "\n".join(lines)


def _devices(setting: Setting) -> list[str]:
    """Tables of the devices, of which the first has sub-channels: what their driver knows of them is here."""
    alike = [f"class = {_quoted(CLASS)}", f"ring_pages = {RING_PAGES}"]
    counts = [(1, setting.subchannels), (setting.devices - 1, 0)]
    tables = [["[[device]]", *alike, f"count = {n}", f"subchannels = {subs}", ""] for n, subs in counts if n]
    return [line for table in tables for line in table]


def _quoted(text: str) -> str:
    """A string of TOML; of what JSON escapes it reads all."""
    return json.dumps(text, ensure_ascii=False)
