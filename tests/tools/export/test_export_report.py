"""The report: one page that needs nothing else, says what the recording says, and is used by keyboard."""

from __future__ import annotations

import base64
import json
import re
import struct
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.control import ActorKind
from emu.errors import UserError
from emu.recording import Recording
from emu.tracing import EVENTS, Context, refused_words
from tests.system.commands import call, report
from tests.tools.browser import Page
from tests.tools.recordings import recorders
from tools.check import check_recording, run_of, told_of, violations_of
from tools.race_run import RaceMachine
from tools.races import exhibits
from tools.report import page_of
from tools.report_data import BUCKETS, Halts, at_percent, report_of, stage_of
from tools.schedule import Schedule

MOST_BYTES = 2_000_000


class Links(HTMLParser):
    """Everything that a page would fetch, and the text of its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.parts: dict[str, str] = {}
        self._part = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        named = dict(attrs)
        self.fetched += [str(value) for name, value in named.items() if name in ("src", "srcset", "action")]
        self.fetched += [str(named["href"])] if "href" in named and not str(named["href"]).startswith("#") else []
        self._part = str(named.get("id") or "") if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        """The data ends with its element."""
        self._part = ""

    def handle_data(self, data: str) -> None:
        """Keep it."""
        if self._part:
            self.parts[self._part] = self.parts.get(self._part, "") + data


@pytest.fixture(scope="module")
def found(real_recording: Path) -> dict[str, Any]:
    """What the page of a short run is made of."""
    with Recording(real_recording) as recording:
        return report_of(recording)


def test_page_has_what_the_recording_has(found: dict[str, Any], real_recording: Path) -> None:
    """Every record counted, every channel with its class, every message at its end, and nothing found wrong."""
    with Recording(real_recording) as recording:
        counts = recording.counts()
    names = {actor["name"] for actor in found["topology"]["actors"]}
    flows = found["flows"]["shown"]

    assert found["meta"]["records"] == sum(counts.values())
    assert found["meta"]["events"] == dict(counts)
    assert [(one["class"], one["opened"]) for one in found["topology"]["channels"]] == [("echo", True)] * 8
    assert {"hypervisor", "vcpu0", "vcpu1", "kworker/pri_chan"} <= names
    assert sum(one["name"] == "OFFERCHANNEL" for one in flows) == 8
    assert found["flows"]["left_out"] == 0
    assert found["findings"] == []
    assert found["invariants"]["held"] > 10 and found["invariants"]["broken"] == 0
    assert sum(sum(actor["records"]) for actor in found["activity"]["actors"]) == found["meta"]["records"]
    assert all(0 <= share <= 100 for actor in found["activity"]["actors"] for share in actor["busy"] or [])
    assert {stage["name"] for stage in found["stages"]} >= {"post_to_slot", "queue_to_handler"}


def test_page_needs_nothing_but_itself(found: dict[str, Any]) -> None:
    """No address is fetched, its policy forbids it, the licence is in it, and it is below 2 MB."""
    page = page_of(found)
    links = Links(page)

    assert links.fetched == []
    assert "default-src 'none'" in page and "The MIT License" in page
    assert len(page.encode()) < MOST_BYTES
    assert json.loads(links.parts["data"])["meta"] == found["meta"]
    assert json.loads(zlib.decompress(base64.b64decode(links.parts["flows"]))) == found["flows"]["shown"]
    assert not re.search(r"\{\{\w+\}\}", page)


def test_messages_that_do_not_fit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their posts, as many as there is room for; what a machine is called ends no element."""
    monkeypatch.setattr("tools.report_data.FLOW_BYTES", 20_000)
    with recorders(tmp_path / "long.rec", (ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST)) as (host,):
        for serial in range(1, 4_001):
            host.record(EVENTS["message_post"].number, 0, 2, 1, serial)
    with Recording(tmp_path / "long.rec") as recording:
        long = report_of(recording)
    long["meta"]["machine"] = "</script><b>{{js}}"
    links = Links(page_of(long))

    assert 0 < long["flows"]["left_out"] == 4_000 - len(long["flows"]["shown"])
    assert any("4,000 messages did not come to their end" in one["text"] for one in long["findings"])
    assert len(links.parts["flows"]) < 60_000
    assert json.loads(links.parts["data"])["meta"]["machine"] == "</script><b>{{js}}"


def test_broken_invariant_is_a_finding_with_its_messages(tmp_path: Path) -> None:
    """A message written into a slot that is taken: the rule, a sentence, and both messages to look at."""
    host_actor = (ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST)
    with recorders(tmp_path / "broken.rec", host_actor, (ActorKind.VCPU, "vcpu0", 0, Context.TASKLET)) as (host, vcpu):
        for serial in (1, 2):
            host.record(EVENTS["message_post"].number, 0, 2, 1, serial)
            host.record(EVENTS["slot_write"].number, 0, 2, 1, 1, serial, 0)
        vcpu.record(EVENTS["slot_read"].number, 2, 1, 1, 2)
    with Recording(tmp_path / "broken.rec") as recording:
        found = report_of(recording)
    (finding,) = [one for one in found["findings"] if one["kind"].startswith("INV-")]

    assert finding["text"].startswith("message 1 was overwritten before it was read")
    assert finding["flows"] == ["h1", "h2"]
    assert found["invariants"]["broken"] == 1


def test_refusals_are_findings_where_check_says_so(tmp_path: Path) -> None:
    """By whoever refused; a version that only the other end did not know, say, was asked for in good faith."""
    host_actor = (ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST)
    with recorders(tmp_path / "refused.rec", host_actor, (ActorKind.VCPU, "vcpu0", 0, Context.TASKLET)) as (host, vcpu):
        for rule in ("contact-version", "openchannel-revoked", "gpadl-unknown", "gpadl-unknown"):
            host.record(EVENTS["refused"].number, *refused_words(rule))
        vcpu.record(EVENTS["refused"].number, *refused_words("ring-index"))
    with Recording(tmp_path / "refused.rec") as recording:
        found = report_of(recording)["findings"]

    assert sorted(one["text"] for one in found if one["kind"] == "refused") == [
        "the guest refused: ring-index, 1 time",
        "the host refused: gpadl-unknown, 2 times",
    ]
    assert sum(one["kind"] == "INV-30" for one in found) == 3


def test_findings_that_do_not_fit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gravest are shown, and behind them stands how many more there are."""
    monkeypatch.setattr("tools.report_data.MOST_FINDINGS", 3)
    path = tmp_path / "refused.rec"
    with recorders(path, (ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST)) as (host,):
        for _ in range(4):
            host.record(EVENTS["refused"].number, *refused_words("gpadl-unknown"))
    with Recording(path) as recording:
        found = report_of(recording)["findings"]

    assert [one["kind"] for one in found] == ["INV-30", "INV-30", "INV-30", "more"]
    # The fourth of the rule, and how often it was refused.
    assert found[-1]["text"].startswith("2 more are not shown")


def test_page_finds_what_check_finds(tmp_path: Path) -> None:
    """Of the run of a schedule as well, whose end is judged otherwise, and which saw more than its records tell."""
    path = tmp_path / "a1.rec"
    with RaceMachine(Schedule.load(exhibits()["offer-rescind-overtake"]), fix=False) as machine:
        machine.run(path)
    verdicts, _recording = check_recording(path)
    with Recording(path) as recording:
        found = report_of(recording)
        told = [name for name, _text in told_of(verdicts, run_of(recording))]
    broken = [one.name for one in violations_of(verdicts)]

    assert broken and told and not found["invariants"]["undecided"]
    assert [one["kind"] for one in found["findings"] if one["kind"].startswith("INV-")] == broken + told


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50), st.integers(0, 100))
def test_percentile_is_a_sample_that_so_many_do_not_exceed(samples: list[int], percent: int) -> None:
    """The nearest rank, the least and the greatest at the ends."""
    ordered = sorted(samples)
    value = at_percent(ordered, percent)

    assert sum(one <= value for one in ordered) * 100 >= percent * len(ordered)
    assert value in ordered
    assert (stage_of("x", samples)["curve"][0], stage_of("x", samples)["max"]) == (ordered[0], ordered[-1])


def test_halts_are_no_work() -> None:
    """Halted in the second and fourth quarter, the last one to the end of the recording."""
    halts = Halts(40 * BUCKETS)
    quarter = 10 * BUCKETS
    for begin, end in ((quarter, 2 * quarter), (3 * quarter, 4 * quarter)):
        halts.begin(begin)
        halts.end(end)
    busy = halts.busy()
    quarters = [sum(busy[n * BUCKETS // 4 : (n + 1) * BUCKETS // 4]) for n in range(4)]

    assert quarters == [25.0 * BUCKETS, 0, 25.0 * BUCKETS, 0]
    assert halts.count == 2


@pytest.mark.parametrize("length", [BUCKETS, 1_001, 99_999, 10**9])
def test_piece_that_is_halted_throughout_is_idle(length: int) -> None:
    """However short the time is: no piece has a share that is only rounding."""
    halts = Halts(length)
    halts.begin(0)
    halts.end(length)

    assert halts.busy() == [0.0] * BUCKETS


def test_who_halts_last_is_idle_until_the_end(tmp_path: Path) -> None:
    """A processor without a task leaves no more records; the others' say how long it has none."""
    path = tmp_path / "halts.rec"
    vcpus = [(ActorKind.VCPU, f"vcpu{cpu}", cpu, Context.TASK) for cpu in range(2)]
    with recorders(path, *vcpus) as (halted, at_work):
        halted.record(EVENTS["halt"].number)
        began_ns = time.monotonic_ns()
        while time.monotonic_ns() < began_ns + 1_000_000:
            at_work.record(EVENTS["irq_raise"].number, 0, 0xF3)
    with Recording(path) as recording:
        busy = {one["name"]: one["busy"] for one in report_of(recording)["activity"]["actors"]}

    assert busy == {"vcpu0": [0.0] * BUCKETS, "vcpu1": None}


def test_command_writes_the_page(real_recording: Path, tmp_path: Path) -> None:
    """Beside the recording unless told otherwise; one JSON object; wrong files are one line."""
    done = call(tmp_path, "report", str(real_recording), "-o", "out.html", "--json")
    itself = call(tmp_path, "report", str(real_recording), "-o", str(real_recording))
    none = call(tmp_path, "report", "out.html")

    assert done.returncode == 0, done.stderr
    assert report(done.stdout)["bytes"] == (tmp_path / "out.html").stat().st_size
    assert (itself.returncode, none.returncode) == (2, 2)
    assert itself.stderr.count("\n") == none.stderr.count("\n") == 1


def test_page_through_a_pipe(real_recording: Path, tmp_path: Path) -> None:
    """`-o -` gives the page to stdout and writes no file; the object of --json would stand in its midst."""
    done = call(tmp_path, "report", str(real_recording), "-o", "-")
    both = call(tmp_path, "report", str(real_recording), "-o", "-", "--json")

    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert done.stdout.startswith("<!doctype html>") and done.stdout.rstrip().endswith("</html>")
    assert (both.returncode, both.stderr.count("\n")) == (2, 1)


def test_title_is_text(found: dict[str, Any]) -> None:
    """A machine's name cannot be markup."""
    assert "<title>vmbus-emu: &lt;b>" in page_of({**found, "meta": {**found["meta"], "machine": "<b>"}})


def test_page_works_in_a_browser(chromium: Page, found: dict[str, Any], tmp_path: Path) -> None:
    """It draws everything without an error or a request, the scrubber goes step by step by keyboard, dark is dark."""
    page = tmp_path / "report.html"
    page.write_text(page_of(found), encoding="utf-8")
    chromium.open(page.as_uri())
    rows = chromium.ask("document.querySelectorAll('#sequence .step').length")
    offer = next(one for one in found["flows"]["shown"] if one["name"] == "OFFERCHANNEL")

    chromium.ask("document.getElementById('time').focus()")
    said = []
    for _ in range(3):
        chromium.press("ArrowLeft")
        said.append(chromium.ask("document.getElementById('said').textContent"))
    later = chromium.ask("document.querySelectorAll('#sequence .step.later').length")
    wide = chromium.ask(
        "document.getElementById('sequence').scrollWidth - document.getElementById('sequence').clientWidth"
    )
    cut = chromium.ask(
        "(() => { const edge = document.querySelector('#sequence svg').getBoundingClientRect().right;"
        "return [...document.querySelectorAll('#sequence text')]"
        ".filter((one) => one.getBoundingClientRect().right > edge).length; })()"
    )
    light = chromium.ask("getComputedStyle(document.body).backgroundColor")
    picture = chromium.screenshot(tmp_path / "light.png")
    chromium.open(page.as_uri(), dark=True)
    dark = chromium.ask("getComputedStyle(document.body).backgroundColor")

    assert (chromium.errors, set(chromium.requests)) == ([], {page.as_uri()})
    assert rows == len(offer["steps"])
    assert [text.split(" in ")[0] for text in said] == [step[0] for step in offer["steps"][-2:-5:-1]]
    assert later == 3
    assert chromium.ask("document.querySelectorAll('canvas').length") == 3
    assert chromium.ask("document.getElementById('flow').options.length") == len(found["flows"]["shown"])
    assert (wide, cut) == (0, 0)
    assert light != dark
    assert struct.unpack(">II", picture[16:24]) == (1280, 900)


def test_page_that_is_dark_is_printed_dark_on_white(chromium: Page, found: dict[str, Any], tmp_path: Path) -> None:
    """Paper has no background: text and charts have the light page's colours there, the screen its own again."""
    page = tmp_path / "report.html"
    page.write_text(page_of(found), encoding="utf-8")
    text = "getComputedStyle(document.body).color"
    chromium.open(page.as_uri())
    light = chromium.ask(text)
    chromium.open(page.as_uri(), dark=True)
    dark = chromium.ask(text)
    chromium.ask(
        "window.seen = []; for (const name of ['beforeprint', 'afterprint']) window.addEventListener(name, () =>"
        " seen.push(document.documentElement.classList.contains('dark')))"
    )

    chromium.call("Page.printToPDF")
    after = chromium.ask(text)
    drawn = chromium.ask("seen")
    chromium.call("Emulation.setEmulatedMedia", media="print", features=[])
    chromium.ask("document.documentElement.classList.add('dark')")

    assert (drawn, after) == ([False, True], dark)
    assert chromium.ask(text) == light != dark
    chromium.call("Emulation.setEmulatedMedia", media="")


def test_recording_that_is_none_is_refused(tmp_path: Path) -> None:
    """One line of the recording's own."""
    (tmp_path / "none").write_text("nothing")

    with pytest.raises(UserError), Recording(tmp_path / "none") as recording:
        report_of(recording)


def test_damage_is_told_before_the_page_is_opened(tmp_path: Path, real_recording: Path) -> None:
    """Half a recording gives a page of what is whole, a word about the rest, and status 1."""
    half = tmp_path / "half.rec"
    half.write_bytes(real_recording.read_bytes()[:-7])

    done = call(tmp_path, "report", str(half), "-o", "half.html")

    assert (done.returncode, done.stdout) == (1, "")
    assert (tmp_path / "half.html").stat().st_size > 10_000
    assert "the file ends in the middle of a" in done.stderr.splitlines()[-1]
