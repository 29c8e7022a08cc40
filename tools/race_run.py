"""One run of a schedule: launch its machine, do its steps, let it settle, judge it; what came of that as plain values.

violated       an invariant is broken, or a process died of it
held           all steps were done, the machine settled, nothing is broken
inconclusive   a step or the settling did not come to its end: that says nothing about the machine
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

from emu.errors import DeadlinePassed
from emu.recording import RecordingWriter
from tools.director import Broken, Departed, Director, Inconclusive, Seen
from tools.exit_status import ExitStatus
from tools.invariant_table import RULES
from tools.invariants import Machine, judge
from tools.invariants_settled import judge as judge_state
from tools.launch import Death, MachineDied, RunningMachine, launch
from tools.schedule import Schedule

VIOLATED: Final = "violated"
HELD: Final = "held"
INCONCLUSIVE: Final = "inconclusive"

STATUS: Final = {VIOLATED: ExitStatus.FINDING, HELD: ExitStatus.FINE, INCONCLUSIVE: ExitStatus.TIME_LIMIT}

_DEATHS: Final = {": stale, generation": "INV-13"}
"""What the last line of a process that died says, and the invariant that its assertion guards."""
_NAMED: Final = re.compile(r"INV-\d\d")
_ANY_DEATH: Final = "INV-30"


@dataclass(frozen=True, slots=True)
class RaceRun:
    """What one run came to. `expected`: it is what the schedule says of this machine."""

    name: str
    fix: bool
    verdict: str
    broken: tuple[Broken, ...]
    expected: bool
    reason: str
    seconds: float
    recording: Path
    failed: tuple[str, ...] = ()
    """Calls that came back with an error, which need not be wrong: a device may be gone by then."""

    @property
    def invariant(self) -> str:
        """The invariant to name: the expected one if it is broken, else the first; "" if none is."""
        return self.broken[0].invariant if self.broken else ""

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints of it."""
        return {
            "name": self.name,
            "fix": "on" if self.fix else "off",
            "verdict": self.verdict,
            "invariant": self.invariant,
            "expected": self.expected,
            "violations": [{"invariant": one.invariant, "text": one.text} for one in self.broken],
            "reason": self.reason,
            "failed_calls": list(self.failed),
            "seconds": round(self.seconds, 3),
            "recording": str(self.recording),
        }


@dataclass(slots=True)
class RunNote:
    """What a run's recording says of it beside its records: enough to tell it again, without the exhibit's file.

    `schedule` is what the file says; `began_ns` (CLOCK_MONOTONIC) has an entry for each step that was begun; `relids`
    by label; `ended_ns` is when it was judged.
    """

    schedule: Mapping[str, Any]
    fix: bool
    name: str
    began_ns: list[int] = field(default_factory=list)
    relids: Mapping[str, int] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    reason: str = ""
    ended_ns: int = 0
    settled: bool = False
    """Whether the machine came to rest after the steps: only then is what has not happened by now owed."""
    failed: list[str] = field(default_factory=list)
    """Calls that came back with an error."""

    KIND: ClassVar[str] = "race"

    def to_map(self) -> dict[str, Any]:
        """As a NOTE of a recording holds it."""
        return {
            "kind": self.KIND,
            "schedule": dict(self.schedule),
            "fix": self.fix,
            "name": self.name,
            "began_ns": self.began_ns,
            "relids": dict(self.relids),
            "broken": [[one.invariant, one.text] for one in self.broken],
            "reason": self.reason,
            "ended_ns": time.monotonic_ns(),
            "settled": self.settled,
            "failed": self.failed,
        }

    @classmethod
    def of(cls, notes: Iterable[Mapping[str, Any]]) -> RunNote | None:
        """The note among those of a recording; None if there is none (it is no schedule's)."""
        found = next((note for note in notes if note.get("kind") == cls.KIND), None)
        if found is None:
            return None
        values = {key: value for key, value in found.items() if key != "kind"}
        return cls(**{**values, "broken": [Broken(*one) for one in found["broken"]]})


class RaceMachine:
    """A machine on which a schedule is run, as often as you like; a context manager. Reset between two runs."""

    def __init__(self, schedule: Schedule, *, fix: bool, seed: int = 0) -> None:
        self._told = schedule
        self._seed: Final = seed
        self._stack: Final = ExitStack()
        self._running: RunningMachine | None = None
        self._schedule = schedule.with_fix() if fix else schedule
        self._fix = fix

    def __enter__(self) -> RaceMachine:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def take(self, schedule: Schedule, *, fix: bool) -> None:
        """From now on another schedule, of a machine with the same processors and memory."""
        self._told = schedule
        self._schedule = schedule.with_fix() if fix else schedule
        self._fix = fix

    def run(self, recording: Path, *, fix: bool | None = None) -> RaceRun:
        """Once, recorded into a file; from now on with or without the fix. UserError: a step that cannot be meant."""
        began = time.monotonic()
        if fix is not None:
            self._schedule, self._fix = self._told.with_fix() if fix else self._told, fix
        schedule = self._schedule
        note = self._run(recording)
        broken, reason = note.broken, note.reason
        broken.sort(key=lambda one: (one.invariant not in schedule.invariants, one.invariant))
        verdict = VIOLATED if broken else INCONCLUSIVE if reason else HELD
        # A schedule that expects nothing to break is one in which nothing is to break, whatever its switches are.
        if self._fix or not schedule.invariants:
            expected = verdict == HELD
        else:
            expected = bool(broken) and broken[0].invariant in schedule.invariants
        seconds = time.monotonic() - began
        failed = tuple(note.failed)
        return RaceRun(schedule.name, self._fix, verdict, tuple(broken), expected, reason, seconds, recording, failed)

    def _booting(self) -> RunningMachine:
        """The machine, launched or reset."""
        scenario = self._schedule.scenario
        if self._running is None:
            launched = launch(scenario, record=True, races=True, faults=True, seed=self._seed)
            self._running = self._stack.enter_context(launched)
        else:
            self._running.power_cycle(None if scenario == self._running.scenario else scenario)
        return self._running

    def _run(self, recording: Path) -> RunNote:
        """What came of it: what is broken, or why the run says nothing."""
        seen, running = Seen(), self._booting()
        note = RunNote(self._schedule.document, self._fix, self._schedule.name)
        with _recorded(running, recording, seen, note):
            note.broken, note.reason = self._steps(running, seen, note)
        return note

    def _steps(self, running: RunningMachine, seen: Seen, note: RunNote) -> tuple[list[Broken], str]:
        try:
            running.wait_ready()
            director = Director(running, seen)
            director.judge = judged
            note.relids = director.relids
            self._follow(director, note)
            director.release_all()
            director.settle()
            note.settled = True
            found = list(dict.fromkeys([*director.checked, *judged(director)]))
            note.failed = director.failed_calls()
        except MachineDied as died:
            return outcome_of(died.deaths)
        except (Inconclusive, DeadlinePassed) as why:
            return [], str(why)
        return found, ""

    def _follow(self, director: Director, note: RunNote) -> None:
        """Every step; a machine that is right may go another way than the one that a schedule was found in."""
        try:
            for step in self._schedule.steps:
                note.began_ns.append(time.monotonic_ns())
                director.do(step)
        except Departed:
            if not self._fix:
                raise


def judged(director: Director) -> list[Broken]:
    """What is broken in a machine that is settled: by its records so far, and by its state.

    While somebody is held (`check` in the middle) only what is wrong already counts: more is to come.
    """
    director.running.pump(0)
    records = sorted(director.seen.records, key=lambda record: record.t_ns)
    machine = director.machine
    vp_indices = tuple(machine.vp_index(position) for position in range(machine.vp_count))
    over = not director.tickets.parked()
    verdicts = judge(RULES, records, Machine(vp_indices), settled=over)
    found = [finding for verdict in verdicts for finding in verdict.violations[:1]]
    state = judge_state(director.settling.view) if over else []
    return [Broken(one.name, one.text) for one in (*found, *state)]


def outcome_of(deaths: Sequence[Death]) -> tuple[list[Broken], str]:
    """What is broken by deaths in a run; or, if somebody outside ended all who died, why it says nothing."""
    if all(killed_from_outside(death) for death in deaths):
        return [], "; ".join(f"{death.name} was {death.how} from outside" for death in deaths)
    return [of_death(death) for death in deaths], ""


def killed_from_outside(death: Death) -> bool:
    """Whether it died of a signal that no process of a machine sends to another in a run."""
    return os.WIFSIGNALED(death.status) and os.WTERMSIG(death.status) in (signal.SIGKILL, signal.SIGTERM)


def of_death(death: Death) -> Broken:
    """The invariant that a process died of: the one that its last line names, or whose assertion it was."""
    last = death.traceback.rstrip().rsplit("\n", 1)[-1]
    named = _NAMED.search(last)
    invariant = named[0] if named else next((name for text, name in _DEATHS.items() if text in last), _ANY_DEATH)
    return Broken(invariant, f"{death.name} died: {last or death.how}")


@contextmanager
def _recorded(running: RunningMachine, path: Path, seen: Seen, note: RunNote) -> Iterator[None]:
    """Drain what the processes record into a file, and decode it as it comes; the note goes in at the end."""
    writer = RecordingWriter(path, running.machine, tee=seen.take)
    running.on_pump = writer.poll
    try:
        yield
    finally:
        running.on_pump = None
        writer.note(note.to_map())
        writer.close()
