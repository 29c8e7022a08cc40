"""A finding, kept: one folder with what was found, the recording, the scenario, the seed, and the line that repeats it.

Whatever command found it, the folder lies below `$XDG_STATE_HOME/vmbus-emu/findings`, the newest ten of them:

    finding.txt      what was found, an invariant by its number; and what of the rest there is, or why not
    recording.rec    what the command recorded, or its flight recorder; not where the machine did not record
    scenario.toml    builds the same machine, whatever file and flags it came from
    seed             where there is one
    repeat           the one line that repeats it: `sh repeat`
    crash.json       of a machine that died: its crash record, which also stays where those are

Who ends a command by Ctrl-C has found nothing. Nothing is kept of a command that found nothing, either.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from emu.errors import DeadlinePassed, NotOpened, OwnLimit, UserError
from emu.scenario import Scenario
from tools.output import say
from tools.paths import made, state_dir

if TYPE_CHECKING:
    from tools.launch import MachineDied

KEPT: Final = 10
"""Folders that are kept, the newest."""
FINDING, RECORDING, SCENARIO, SEED, REPEAT, CRASH = (
    "finding.txt",
    "recording.rec",
    "scenario.toml",
    "seed",
    "repeat",
    "crash.json",
)
RECENT_S: Final = 3_600.0
"""A finding that makes room and is younger than this was somebody's a moment ago: that it went is told."""
PROGRAM: Final = "vmbus-emu"
MOST_JUDGED: Final = 32 << 20
"""Bytes of a recording that are checked while a finding is kept; a longer one is left to `vmbus-emu check`."""


@dataclass(frozen=True, slots=True)
class InFolder:
    """A word of the line that repeats: a file in the finding's own folder."""

    name: str


@dataclass(frozen=True, slots=True)
class Case:
    """What a command is about to look at, and how it is told to do so again.

    `words` are its arguments; `label` goes into the folder's name. `same`: it finds the same every time, so that an
    equal finding that is still kept is not kept twice.
    """

    command: tuple[str, ...]
    scenario: Scenario | None
    seed: int | None
    words: tuple[str | InFolder, ...]
    label: str = ""
    same: bool = False

    def keep(
        self,
        found: Sequence[str],
        *,
        recording: Path | None = None,
        no_recording: str = "the machine did not record",
        crash_record: Path | None = None,
        files: Mapping[str, str] | None = None,
        judge: bool = False,
    ) -> Path | None:
        """Keep a finding and say where, in one line; None, and why, when it could not be written.

        `found` is told line by line; `files` come to the others, by name. `judge`: nobody has checked the recording.
        """
        lines = [*found, *(_judged(recording) if judge and recording is not None else ())]
        text = self._text(lines, recording, no_recording, crash_record)
        try:
            folder = self._kept_already(text) or self._write(text, recording, crash_record, files or {})
        except OSError as error:
            why = str(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                why = (
                    f"{error.strerror} below {findings_dir()}; make room there, or set XDG_STATE_HOME to another place"
                )
            say(f"vmbus-emu: the finding was not kept: {why}")
            return None
        say(f"vmbus-emu: finding kept in {folder}; repeat it: sh {shlex.quote(str(folder / REPEAT))}")
        _drop_oldest()
        return folder

    def line(self, folder: Path) -> str:
        """The command line that repeats it, from anywhere."""
        words = (str(folder / word.name) if isinstance(word, InFolder) else word for word in self.words)
        return shlex.join([program(), *self.command, *words])

    def _text(self, found: Sequence[str], recording: Path | None, why_not: str, crash_record: Path | None) -> str:
        rest = [f"recording: {RECORDING}" if recording is not None else f"no recording: {why_not}"]
        if self.seed is not None:
            rest.append(f"seed: {self.seed}")
        if crash_record is not None:
            rest.append(f"crash record: {crash_record}, and {CRASH}")
        return "\n".join([f"vmbus-emu {' '.join(self.command)} found:", "", *found, "", *rest, ""])

    def _kept_already(self, text: str) -> Path | None:
        if not self.same:
            return None
        for folder in reversed(_folders()):
            file = folder / FINDING
            if file.is_file() and file.read_text(encoding="utf-8") == text:
                return folder
        return None

    def _write(self, text: str, recording: Path | None, crash_record: Path | None, files: Mapping[str, str]) -> Path:
        folder = _new_folder("-".join((*self.command, *((self.label,) if self.label else ()))))
        try:
            texts = {**files, FINDING: text, REPEAT: f"{self.line(folder)}\n"}
            if self.scenario is not None:
                texts[SCENARIO] = scenario_text(self.scenario)
            if self.seed is not None:
                texts[SEED] = f"{self.seed}\n"
            for name, content in texts.items():
                (folder / name).write_text(content, encoding="utf-8")
            for path, name in ((recording, RECORDING), (crash_record, CRASH)):
                if path is not None:
                    _have(path, folder / name)
        except BaseException:
            # Half a finding would be taken for a whole one.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder


def program() -> str:
    """How a shell calls this program: by its name, or by its path where that name is not on PATH (a venv's)."""
    called = Path(sys.argv[0])
    if shutil.which(PROGRAM) is None and called.name == PROGRAM and called.is_file():
        return str(called.absolute())
    return PROGRAM


@contextmanager
def kept_if_it_hangs(case: Case, recording: Path | None = None) -> Iterator[None]:
    """A wait in the block that passes its deadline, or ends in vain before, is a finding: kept, and raised on.

    `recording` is what the block writes.
    """
    try:
        yield
    except OwnLimit:
        raise
    except DeadlinePassed as late:
        made = late.recording or _there(recording)
        late.finding = case.keep([f"it did not end: {late}"], recording=made, judge=True)
        raise
    except NotOpened as lost:
        lost.finding = case.keep([str(lost)], recording=_there(recording), judge=True)
        raise


@contextmanager
def kept_if_it_fails(case: Case, recording: Path | None = None) -> Iterator[None]:
    """As `kept_if_it_hangs`, and so is a machine that dies in the block."""
    from tools.launch import MachineDied

    try:
        with kept_if_it_hangs(case, recording):
            yield
    except MachineDied as death:
        death.finding = keep_death(case, death, recording)
        raise


def keep_death(case: Case, death: MachineDied, recording: Path | None = None) -> Path | None:
    """Keep what a machine died of: the deaths, each with the invariant that it broke, and its crash record."""
    from tools.race_run import of_death

    found = []
    for one in death.deaths:
        broken = of_death(one)
        found += [f"{broken.invariant}: {broken.text}", one.report()]
    return case.keep(found, recording=death.flight or _there(recording), crash_record=death.crash_record)


def _there(recording: Path | None) -> Path | None:
    """A recording, unless its machine ended before it was begun."""
    return recording if recording is not None and recording.is_file() else None


def findings_dir() -> Path:
    """Where findings are kept, a folder each."""
    return state_dir() / "findings"


def folder_of(path: Path) -> Path | None:
    """The finding's folder in which a file lies; None if it lies anywhere else."""
    folder = path.absolute().parent
    return folder if folder.parent == findings_dir().absolute() and folder.is_dir() else None


def scenario_text(scenario: Scenario) -> str:
    """A scenario as a file that `Scenario.load` reads back as the same one."""
    import tomli_w

    return tomli_w.dumps(scenario.to_config())


def _judged(recording: Path) -> list[str]:
    """What the invariants say of a recording that nobody has checked yet."""
    from tools.check import check_recording, cut_of, violations_of

    try:
        if recording.stat().st_size > MOST_JUDGED:
            return []
        verdicts, _recording = check_recording(recording)
    except (OSError, UserError) as error:
        return [f"its recording cannot be checked: {error}"]
    return [*(f"{one.name}: {one.text}" for one in violations_of(verdicts)), *cut_of(verdicts)]


def _folders() -> list[Path]:
    """Those that are kept, the oldest first."""
    directory = findings_dir()
    return sorted(one for one in directory.iterdir() if one.is_dir()) if directory.is_dir() else []


def _drop_oldest() -> None:
    """Remove all but the newest; who was told of one just now hears that it is not there any more."""
    recent = []
    for old in _folders()[:-KEPT]:
        try:
            age_s = time.time() - old.stat().st_mtime
        except OSError:  # another command that keeps a finding was quicker
            continue
        shutil.rmtree(old, ignore_errors=True)
        if age_s < RECENT_S:
            recent.append(old.name)
    if recent:
        went = "1 of the last hour was" if len(recent) == 1 else f"{len(recent)} of the last hour were"
        names = ", ".join(recent)
        say(f"vmbus-emu: only the newest {KEPT} findings are kept, {went} removed: {names}; copy what you need")


def _new_folder(name: str) -> Path:
    directory = made(findings_dir())
    while True:
        now = time.time_ns()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(now // 1_000_000_000))
        folder = directory / f"{stamp}.{now // 1000 % 1_000_000:06}-{name}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return folder


def _have(path: Path, copy: Path) -> None:
    """The file under a second name, if it is one of ours, which nobody writes again; else a copy of it."""
    if state_dir() in path.parents:
        try:
            os.link(path, copy)
        except OSError:
            pass  # another file system, or one without links
        else:
            return
    shutil.copyfile(path, copy)
