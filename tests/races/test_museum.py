"""Claims about what is told of exhibits: the page agrees with their files, and with what runs show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from emu.tracing import EVENTS
from tests.conftest import SOURCES, RunCli
from tools import cli, museum
from tools.museum import OPENING, WIDTH, head_of, index_of, page
from tools.race_board import BOARDS, Game, head_of_board
from tools.race_rows import TELLINGS
from tools.race_sentences import expected_of, sentence_of
from tools.races import exhibits, find_schedule
from tools.schedule import VERBS, Schedule, read_steps

PAGE = SOURCES / "docs" / "races.md"
REMAKE = "docs/races.md is not of these exhibits; make it again: vmbus-emu races museum -o docs/races.md"


def schedules() -> list[Schedule]:
    """All exhibits, in the order of the page."""
    return [Schedule.load(path) for path in exhibits().values()]


TOLD = re.compile(
    r"^#+ .*|▸ \d+\.|[■□]|(?:held at|goes on from) [\w.]+|INV-\d+ is broken|^With the fix.*|^```", re.MULTILINE
)
"""What every run of an exhibit has."""


def outlines(text: str) -> list[list[str]]:
    """Of each exhibit: its title, and what every run of it has, sorted."""
    return [sorted(TOLD.findall(part)) for part in re.split(r"(?m)^(?=## )", text)]


def test_the_page_is_of_these_exhibits() -> None:
    """Opening, tables, titles, stories, switches, invariants and steps of the page are those of the files, in order."""
    text = PAGE.read_text(encoding="utf-8")
    parts = [OPENING, "\n".join(index_of(schedules())), *("\n".join(head_of(one)) for one in schedules())]
    games = [Game.of(board, find_schedule) for board in BOARDS]
    parts += ["\n".join(head_of_board(game.board, game.schedules, WIDTH)) for game in games]
    at = 0
    for part in parts:
        found = text.find(part, at)
        assert found >= 0, f"{REMAKE} (missing: {part[:80]!r})"
        at = found + len(part)
    assert text.count("\n## ") == len(exhibits()) + len(BOARDS), REMAKE


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_page_is_what_runs_show() -> None:
    """Run and drawn again, each exhibit takes the same steps, is held at the same points and breaks the same rules.

    Between its points it runs freely: which of two things comes first there, and in whose lane, may differ.
    """
    assert outlines(page(schedules())) == outlines(PAGE.read_text(encoding="utf-8")), REMAKE


@pytest.mark.parametrize("exhibit", schedules(), ids=lambda one: one.name)
def test_every_exhibit_can_be_told(exhibit: Schedule) -> None:
    """It has a title, a story that ends with a rule, a sentence for each step; its invariants have titles."""
    assert exhibit.title and exhibit.title != exhibit.name
    assert "The rule: " in exhibit.story.split("\n\n")[-1]
    assert all(sentence_of(step).endswith(".") for step in exhibit.steps)
    assert all(title for _name, title in expected_of(exhibit))


def test_every_verb_has_a_sentence() -> None:
    """None is told as it is written; what it is about is in it."""
    told = {
        step.verb: sentence_of(step)
        for step in read_steps(
            (
                "arm g.isr.enter cpu=1 skip=2 as ISR",
                "until arrived ISR",
                "expect ISR",
                "resume ISR",
                "disarm ISR",
                "offer netlike subchannels=2 as NIC",
                "until event open relid=2",
                "send NIC count=3 size=64",
                "offer-subchannel NIC index=1 as SUB",
                "rescind NIC",
                "rescind-again NIC",
                "call bind device=echo#1 driver=hv_echo as BIND",
                "until answered BIND",
                "run echo_check relid=NIC as PING",
                "until done PING",
                "fault host.dup_rescind as TWICE",
                "end TWICE",
                "advance 5s",
                "check",
                "until settled",
            ),
            "mine.toml",
        )
    }
    assert told.keys() == VERBS.keys()
    assert not [sentence for sentence in told.values() if "The director does" in sentence]
    assert told["arm"] == (
        "Hold whoever comes to g.isr.enter (only CPU 1), after 2 that pass: ISR: entered, nothing read. Call it ISR."
    )
    assert told["send"] == "The device of NIC writes 3 packets of 64 bytes."


def test_every_telling_is_of_an_event() -> None:
    """The table of sentences names events that there are, and arguments that they have."""
    for name, telling in TELLINGS.items():
        words = dict.fromkeys(EVENTS[name].arguments, "x")
        assert telling.guest.format_map(words) or telling.host.format_map(words)


def test_a_run_is_shown_from_its_recording(run_cli: RunCli, tmp_path: Path) -> None:
    """Told, drawn and pictured from the recording alone: steps, lifelines, who is held, and the finding at the end."""
    recording, picture = tmp_path / "a1.rec", tmp_path / "a1.svg"
    assert run_cli("races", "run", "A1", "--record", str(recording)).returncode == 1

    shown = run_cli("races", "show", "--from", str(recording), "--svg", str(picture))
    assert shown.returncode == 0, shown.stderr
    assert "4. The host takes NIC back." in shown.stdout
    assert "held at g.wq.offer.before_map" in shown.stdout
    assert shown.stdout.rstrip().splitlines()[-1].endswith("its offer did not fail")
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")

    told = json.loads(run_cli("races", "show", "A1", "--from", str(recording), "--json").stdout)
    assert told["schema"] == {"name": "vmbus-emu.races-show", "version": 1}
    assert told["lifelines"] == ["host", "vcpu0", "work", "rescind", "pri_chan"]
    held = next(row for row in told["rows"] if row["kind"] == "held")
    assert (held["actor"], len(told["rows"]) <= 40) == ("work", True)
    assert [one["invariant"] for one in told["findings"]] == ["INV-03"]

    other = run_cli("races", "show", "A2", "--from", str(recording))
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "holds a run of a1-offer-rescind-overtake, not of a2-" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "nothing is said to show; name an exhibit (`vmbus-emu races list`) or give --from RECORDING"),
        (["--from", "nothing.rec"], "cannot read nothing.rec: "),
        (["A1", "--svg", "nowhere/a.svg"], "nowhere/a.svg"),
    ],
)
def test_what_cannot_be_shown_is_one_line(run_cli: RunCli, arguments: list[str], line: str) -> None:
    """Exit status 2 before anything is run."""
    done = run_cli("races", "show", *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_museum_tells_programs_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`museum --json`: the page, its bytes, and what is shown on it; without a file for the page nothing is run."""
    monkeypatch.setattr(museum, "page", lambda schedules, _told: "".join(f"§ {one.title}\n" for one in schedules))
    out = tmp_path / "races.md"

    assert cli.main(["races", "museum", "--json", "-o", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == {"name": "vmbus-emu.races-museum", "version": 1}
    assert (told["path"], told["bytes"]) == (str(out), out.stat().st_size)
    assert (told["exhibits"], told["boards"]) == (list(exhibits()), [one.name for one in BOARDS])

    assert cli.main(["races", "museum", "--json"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1) and "name a file with -o OUT" in shown.err
