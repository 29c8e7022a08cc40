"""`vmbus-emu latency`: figures that add up, formats that other programs read, and limits that are held."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from array import array
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from emu.build_kind import BUILD
from emu.errors import DeadlinePassed, UserError
from tests.conftest import RunCli
from tests.system.commands import ended, start, wait_until_open
from tools import cli, latency
from tools.exit_status import ExitStatus
from tools.histograms import (
    MOST_NS,
    figures_of,
    hgrm_text,
    histogram_of,
    hlog_text,
    nearest_rank,
    regressions,
    spread_of,
    svg_plot,
    terminal_plot,
    too_few,
    within_spread,
)
from tools.latency import RECORDED, Measured, Trips, _cautions, _recorded_s
from tools.latency_stages import DATA_STAGES, DUE_STAGE
from tools.launch import Death, MachineDied
from tools.profile_samples import identity_of
from tools.report_data import stage_of
from tools.testing import assert_gone, wait_for

SAMPLES = [1_000 * n for n in range(1, 1_001)]


def _round_trip_of(*, count: str = "1", spread: str = "{}") -> str:
    """The stages of a report, which has the round trip alone."""
    figures = '"p50_ns": 1, "p90_ns": 1, "p99_ns": 1, "p999_ns": 1'
    return f'{{"round_trip": {{"count": {count}, {figures}, "spread": {spread}}}}}'


def test_figures_keep_the_tail() -> None:
    """Three significant digits at every percentile, and the largest value as it was."""
    figures = figures_of(histogram_of(SAMPLES))

    assert figures["count"] == 1_000
    for name, expected in (("p50", 500_000), ("p90", 900_000), ("p99", 990_000), ("p999", 999_000), ("max", 1_000_000)):
        assert figures[f"{name}_ns"] == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("count", [1, 2, 3, 87, 99, 100, 101, 1_000])
def test_percentiles_are_those_of_a_report(count: int) -> None:
    """The first sample that so many do not exceed, to three digits: of 87 the 99th percentile is the largest."""
    samples = SAMPLES[:count]
    figures, stage = figures_of(histogram_of(samples)), stage_of("round_trip", samples)

    assert figures["count"] == stage["count"] == len(samples)
    for figure, percentile in (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p999", "p99.9"), ("max", "max")):
        assert figures[f"{figure}_ns"] == pytest.approx(stage[percentile], rel=0.001)


def test_rank_is_of_the_decimal_number() -> None:
    """99.9 % of 41,000 are 40,959 samples, although 99.9 as a float is a little more."""
    assert (nearest_rank(41_000, 99.9), nearest_rank(1, 0), nearest_rank(3, 100)) == (40_959, 1, 3)


def test_values_beyond_the_ends_count_as_the_ends() -> None:
    """A clock that stood still, or a minute and more, is no error."""
    figures = figures_of(histogram_of([0, -5, MOST_NS * 2]))

    assert figures["count"] == 3
    assert figures["max_ns"] == pytest.approx(MOST_NS, rel=0.001)


def test_hgrm_ends_with_the_scaled_mean_and_deviation() -> None:
    """The text of HdrHistogram's plotters: a curve that rises to 100 %, and a footer in its unit, microseconds."""
    lines = hgrm_text(histogram_of(SAMPLES)).splitlines()
    curve = [line.split() for line in lines[2:-3]]

    assert lines[0].split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    assert [float(row[1]) for row in curve] == sorted(float(row[1]) for row in curve)
    assert (float(curve[-1][1]), int(curve[-1][2])) == (1.0, 1_000)
    assert lines[-3].startswith("#[Mean    =      500.") and "StdDeviation   =      288." in lines[-3]


def test_hlog_holds_every_histogram() -> None:
    """A tagged line each, which decodes to the histogram that was written."""
    histograms = {"isr": histogram_of(SAMPLES, "isr"), "dpc": histogram_of([5, 6], "dpc")}
    text = hlog_text(histograms, dict.fromkeys(histograms, (1.0, 2.0)))
    lines = [line for line in text.splitlines() if line.startswith("Tag=")]

    assert [line.split(",")[0] for line in lines] == ["Tag=isr", "Tag=dpc"]
    decoded = HdrHistogram.decode(lines[0].split(",")[-1].encode())
    assert decoded.get_total_count() == 1_000


def test_hlog_is_read_by_the_library_itself(tmp_path: Path) -> None:
    """HdrHistogram's own log reader finds every histogram, with its tag, interval, count and percentiles.

    The two machines of a measurement run one after the other, and not for as long: a count by its interval is a rate.
    """
    histograms = {"isr": histogram_of(SAMPLES, "isr"), "dpc": histogram_of([5_000, 6_000], "dpc")}
    path = tmp_path / "out.hlog"
    path.write_text(hlog_text(histograms, {"isr": (1_000.0, 2.0), "dpc": (1_005.0, 0.5)}), encoding="utf-8")

    reader = HistogramLogReader(str(path), HdrHistogram(1, MOST_NS, 3))
    read = {}
    while (one := reader.get_next_interval_histogram()) is not None:
        read[one.get_tag()] = one
    reader.close()

    assert {tag: one.get_total_count() for tag, one in read.items()} == {"isr": len(SAMPLES), "dpc": 2}
    assert {tag: (one.get_start_time_stamp(), one.get_end_time_stamp()) for tag, one in read.items()} == {
        "isr": (1_000_000, 1_002_000),
        "dpc": (1_005_000, 1_005_500),
    }
    assert read["isr"].get_value_at_percentile(50) == histograms["isr"].get_value_at_percentile(50)


def test_pictures_show_every_stage() -> None:
    """The SVG is well-formed and has a curve for each stage that has samples; the bars rise."""
    histograms = {"isr": histogram_of(SAMPLES), "empty": histogram_of([]), "dpc": histogram_of([500, 900])}
    root = ElementTree.fromstring(svg_plot(histograms, "title"))
    bars = [line.count("█") for line in terminal_plot(histograms["isr"])]

    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert {"isr", "dpc"} <= {one.text for one in root.iter("{http://www.w3.org/2000/svg}text")}
    assert bars == sorted(bars) and bars[-1] == 48
    assert terminal_plot(histogram_of([1_500]))[0].endswith(" 1.5 us")


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_bars_end_where_the_terminal_does(columns: int) -> None:
    """A line of a bar is not folded on a narrow terminal, with round trips of seconds, too."""
    lines = terminal_plot(histogram_of([30_000] * 9 + [9_999_999_999]), columns)

    assert max(map(len, lines)) <= columns
    assert max(line.count("█") for line in lines) == min(48, columns - 26)


@pytest.mark.parametrize(("now", "worse"), [(100, False), (110, False), (111, True), (50, False)])
def test_regression_is_what_passes_its_limit(now: int, worse: bool) -> None:
    """Exactly the limit is still allowed, and better is no regression."""
    old, new = {"isr": {"count": 5, "p99_ns": 100}}, {"isr": {"count": 5, "p99_ns": now}, "other": {"p99_ns": 9}}

    assert bool(regressions(old, new, {"p99": 0.1})) is worse


def test_limit_is_told_as_it_was_typed() -> None:
    """Half a per cent is neither none nor one."""
    old, new = ({"isr": {"count": 2_000, "p99_ns": ns}} for ns in (1_000, 2_000))
    (line,) = regressions(old, new, {"p99": 0.005})

    assert line == "isr p99: 1.0 us before, 2.0 us now (limit +0.5%; 20 samples beyond it)"


@pytest.mark.parametrize(
    ("count", "spreads", "said"),
    [
        (5_000, (0.1, 0.29), "50 samples beyond it; parts of a run differ by 29%"),
        (5_000, (0.1, 0.3), "50 samples beyond it; parts of a run differ by 30%: it may be chance"),
        (5_000, (0.3, 0.1), "50 samples beyond it; parts of a run differ by 30%: it may be chance"),
        (5_000, (None, 0.3), "50 samples beyond it; parts of a run differ by 30%: it may be chance"),
        (5_000, (None, None), "50 samples beyond it"),
        (199, (None, None), "only 1 sample beyond it: it may be chance"),
        (0, (None, None), "only 0 samples beyond it: it may be chance"),
    ],
)
def test_regression_says_how_far_it_can_be_believed(
    count: int, spreads: tuple[float | None, float | None], said: str
) -> None:
    """It stays one; a change that parts of either run show by themselves, or a few samples make, may be chance."""
    old, new = (
        {"isr": {"count": count, "p99_ns": ns, "spread": {"p99": spread}}}
        for ns, spread in zip((1_000, 1_300), spreads, strict=True)
    )

    (line,) = regressions(old, new, {"p99": 0.1})

    assert line == f"isr p99: 1.0 us before, 1.3 us now (limit +10%; {said})"


def test_spread_is_that_of_the_parts_of_a_run() -> None:
    """A run whose last fifth is slower has a median that differs by that; one that repeats itself by nothing."""
    steady = list(range(1, 101)) * 10

    assert spread_of(steady) == {"p50": 0.0, "p90": 0.0, "p99": None, "p999": None}
    slower = [*steady[:800], *(2 * one for one in steady[800:])]
    assert spread_of(slower)["p50"] == spread_of(slower)["p90"] == 1.0


@pytest.mark.parametrize(("count", "parts"), [(0, 0), (1_999, 0), (2_000, 2), (2_999, 2), (3_000, 3), (9_000, 5)])
def test_part_has_ten_samples_beyond_a_percentile(count: int, parts: int) -> None:
    """A part that had fewer would differ by chance; there are five at most, and none where there cannot be two."""
    rising = list(range(1, count + 1))
    spread = spread_of(rising)["p99"]

    if not parts:
        assert spread is None
    else:
        size = count // parts
        first, last = nearest_rank(size, 99.0), (parts - 1) * size + nearest_rank(size, 99.0)
        assert spread == pytest.approx(last / first - 1, abs=1e-4)


def test_limit_below_the_spread_is_told_whether_it_is_passed_or_not() -> None:
    """Not of what is not judged, nor of a run whose parts differ by just the limit, nor where nobody knows."""
    old: dict[str, dict[str, Any]] = {
        stage: {"spread": {"p50": 0.1}} for stage in ("wide", "equal", "unjudged", "unknown", "gone")
    }
    new: dict[str, dict[str, Any]] = {
        "wide": {"spread": {"p50": 0.34}},
        "equal": {"spread": {"p50": 0.2}},
        "unjudged": {"spread": {"p50": 0.34}},
        "unknown": {"spread": {"p50": 0.34}},
        "new": {"spread": {"p50": 0.34}},
    }
    old["unknown"] = new["unknown"] = {}

    assert within_spread(old, new, {"p50": 0.2}, ["unjudged p50"]) == ["wide p50 34%"]


@pytest.mark.parametrize(("name", "sparse"), [("p50", {"a"}), ("p99", {"a", "b"}), ("p999", {"a", "b", "c"})])
def test_percentile_with_nothing_beyond_it_is_chance(name: str, sparse: set[str]) -> None:
    """Ten samples beyond it, in both runs, make it a figure: 20 for p50, 1,000 for p99, 10,000 for p99.9."""
    few = {stage: {"count": count} for stage, count in (("a", 19), ("b", 999), ("c", 9_999), ("d", 10_000))}
    many = {stage: {"count": 1_000_000} for stage in (*few, "gone")}

    expected = [f"{stage} {name}" for stage in few if stage in sparse]
    assert too_few(many, few, [name]) == too_few(few, many, [name]) == expected


def test_what_is_chance_is_no_regression() -> None:
    """Of one stage the median may be judged, and its 99th percentile not."""
    old, new = ({"isr": {"count": 41, "p50_ns": ns, "p99_ns": ns}} for ns in (100, 900))
    limits = {"p50": 0.1, "p99": 0.1}

    (line,) = regressions(old, new, limits, too_few(old, new, limits))

    assert line.startswith("isr p50")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--closed", "--rate", "5"), "--closed"),
        (("--fail", "p99:+10%"), "--compare"),
        (("--compare", "nothing.json", "--fail", "p98:+10%"), "p98"),
        (("--compare", "nothing.json", "--fail", "p99:ten"), "p99:ten"),
        (("--compare", "nothing.json", "--fail", "p99:nan%"), "p99:nan%: not understood"),
        (("--compare", "nothing.json", "--fail", "p99:+inf%"), "p99:+inf%: not understood"),
        (("--compare", "nothing.json", "--fail", "p99:+5%", "--fail", "p99:+9%"), "p99:+9%: there is another limit"),
        (("--compare", "nothing.json"), "nothing.json: No such file or directory"),
        (("--compare", str(Path(__file__))), "no report; give what `vmbus-emu latency --json` printed"),
        (("--hgrm", "nowhere/x.hgrm"), "--hgrm nowhere/x.hgrm: No such file or directory; choose"),
        (("--plot", "."), "--plot .: Is a directory; choose"),
        (("--plot", "x.png"), "--plot x.png: the curves are written as SVG; name the file x.svg"),
        (("--vcpus", "0"), "--vcpus"),
        (("--size", "9000"), "--size"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(run_cli: RunCli, arguments: tuple[str, ...], word: str) -> None:
    """Nothing is booted for a command that cannot be meant."""
    done = run_cli("latency", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and word in done.stderr


def test_round_trips_have_stages_and_compare_with_an_older_run(run_cli: RunCli, tmp_path: Path) -> None:
    """Real machines: every stage has samples, none is lost; against an impossible past the exit status is 1."""
    done = run_cli("latency", "--duration", "0.3", "--json", "--hgrm", "out.hgrm", timeout_s=60)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == {"name": "vmbus-emu.latency", "version": 1}
    assert told["lost"] == 0 and told["rate"] is None and told["build"] == BUILD
    stages = told["stages"]
    assert {"round_trip", "send_to_host", "signal_to_request", "request_to_isr", "callback_to_task"} <= stages.keys()
    assert {"post_to_slot", "slot_to_isr", "isr_to_dpc", "dpc_to_queue", "queue_to_handler"} <= stages.keys()
    if not told["records_dropped"]:
        assert stages["due_to_send"]["count"] == stages["send_to_host"]["count"] == stages[RECORDED]["count"]
        assert sum(stages[name]["p50_ns"] for name in (DUE_STAGE, *DATA_STAGES)) > 0.8 * stages[RECORDED]["p50_ns"]
    assert all(0 < one["p50_ns"] <= one["p99_ns"] <= one["max_ns"] for one in stages.values())
    assert (tmp_path / "out.hgrm").read_text().count("\n") > 10

    assert all(one["spread"]["p50"] >= 0 for name, one in stages.items() if one["count"] >= 100)
    for figures in stages.values():
        figures["p50_ns"] = 1
        figures["spread"]["p50"] = 0.5
    (tmp_path / "old.json").write_text(json.dumps({**told, "build": "by hand"}))
    again = ("--duration", "0.1", "--rate", "200", "--compare", "old.json", "--fail", "p50:+10%", "--fail", "p999:+0%")
    done = run_cli("latency", *again, timeout_s=60)
    assert done.returncode == 1, done.stderr
    assert "worse: round_trip p50" in done.stdout
    assert re.search("too few samples for --fail, not judged: .*queue_to_handler p999", done.stderr)
    assert "parts of a run differ by more than --fail allows" in done.stderr
    assert "worse: queue_to_handler p999" not in done.stdout
    assert re.search(r"^round_trip +0\.0 +[0-9.]+ +\+[0-9]+% ", done.stdout, re.MULTILINE)
    assert "old.json was measured otherwise: one after the other, build by hand\n" in done.stderr


def test_report_that_does_not_name_its_build_is_of_pure_python(tmp_path: Path) -> None:
    """There was no other when it was made: told where it is compared with a compiled one, and only there."""
    figures = {"count": 1, "p50_ns": 1, "p90_ns": 1, "p99_ns": 1, "p999_ns": 1}
    document = {"schema": {"name": latency.REPORT}, "stages": {"round_trip": figures}, "size": 64}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    before = latency._read_report(path)

    assert before.otherwise({"size": 64, "build": "compiled"}) == "build pure Python"
    assert before.otherwise({"size": 64, "build": "pure Python"}) == ""


def test_latency_that_is_killed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the round trips nor what was recorded of them: `kill -9` in the middle of the recording machine."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with ended(start(tmp_path, "latency", "--duration", "0.3", "--rate", "1")) as process:
        name = f"vm{process.pid}"
        wait_until_open(name, process)
        first = identity_of(name)
        wait_for(lambda: identity_of(name) not in (first, (name, 0)), "the machine that records")
        wait_until_open(name, process)
        os.kill(process.pid, signal.SIGKILL)
    assert_gone(name)

    assert list(temporary.iterdir()) == []


def test_back_end_that_raised_is_told(run_cli: RunCli, tmp_path: Path) -> None:
    """It is a finding, with the newest reasons of both machines, as `run` has it."""
    plugin = Path(__file__).with_name("slammed_echo.py")
    (tmp_path / "m.toml").write_text(f'plugins = ["{plugin}"]\n[[device]]\nclass = "echo"\nbackend = "slammed"\n')
    words = ("latency", "m.toml", "--duration", "0.05")
    people, told = run_cli(*words, timeout_s=60), json.loads(run_cli(*words, "--json", timeout_s=60).stdout)

    assert people.returncode == 1 and "finding kept in " in people.stderr
    assert "\nrefused: backend-error 2\n  backend-error: slammed: close of channel 1: RuntimeError" in people.stdout
    assert (told["refused"], told["lost"]) == ({"backend-error": 2}, 0)
    (refusal,) = told["refusals"]
    assert (refusal["text"], refusal["count"]) == ("slammed: close of channel 1: RuntimeError: the door jams", 2)


def test_rate_that_is_not_reached_is_told() -> None:
    """Its round trips are as long as the backlog, whatever the channel does; one that is reached says nothing."""
    held = {"rate": 1_000, "achieved": 1_000.0, "achieved_recorded": 990.0, "records_dropped": 0, "unjudged": []}
    held["within_spread"] = []

    assert list(_cautions(held)) == list(_cautions({**held, "rate": None})) == []
    (line,) = _cautions({**held, "achieved_recorded": 500.0})
    assert line.startswith("1000 a second were not reached: 500 by the machine that records; the rest")
    (line,) = _cautions({**held, "achieved": 600.0, "achieved_recorded": 500.0})
    assert line.startswith("1000 a second were not reached: 600, and 500 by the machine that records; the rest")
    (line,) = _cautions({**held, "achieved": 600.0, "achieved_recorded": None})
    assert line.startswith("1000 a second were not reached: 600; the rest")
    (line,) = _cautions({**held, "records_dropped": 37_530})
    assert line.startswith("37,530 records were dropped")


@pytest.mark.parametrize(
    ("stages", "said"),
    [(1, ": s0 p99 9%; a wider"), (3, ": s0 p99 9%, s1 p99 9%, s2 p99 9%; a"), (5, ", s2 p99 9%, and 2 more (--json")],
)
def test_figures_that_differ_by_themselves_are_told_in_a_line(stages: int, said: str) -> None:
    """Three by name, the round trip first; how many more there are, and where."""
    report: dict[str, Any] = {
        "rate": None,
        "achieved": 1.0,
        "achieved_recorded": 1.0,
        "records_dropped": 0,
        "unjudged": [],
    }

    (line,) = _cautions({**report, "within_spread": [f"s{n} p99 9%" for n in range(stages)]})

    assert said in line


def test_what_was_achieved_is_counted_from_the_first_due_to_the_last_taken() -> None:
    """A backlog at the end belongs to it; a rate is never passed, as answers come before the next one is due."""
    trips = Trips(array("Q", range(0, 10_000_000, 1_000_000)), array("Q", range(5, 20_000_005, 2_000_000)), 0.0, 1.0)
    quick = Trips(trips.dues, trips.dues, 0.0, 1.0)

    assert trips.achieved(1_000) == pytest.approx(555.56, rel=0.001)
    assert (quick.achieved(1_000), Trips(array("Q"), array("Q"), 0.0, 1.0).achieved(5)) == (1_000, 0.0)
    assert trips.lengths()[-1] == 9_000_005


@pytest.mark.parametrize(
    "stages",
    [
        "5",
        "[1]",
        "{}",
        '{"isr": 5}',
        '{"isr": {"p50_ns": 1}}',
        '{"isr": {"p50_ns": null}}',
        _round_trip_of(count="NaN"),
        _round_trip_of(count="Infinity"),
        _round_trip_of(spread="5"),
        _round_trip_of(spread='{"p99": "wide"}'),
    ],
)
def test_a_report_that_was_spoilt_is_none(run_cli: RunCli, tmp_path: Path, stages: str) -> None:
    """Told in one line before anything is measured, not by an error behind it."""
    (tmp_path / "old.json").write_text(f'{{"schema": {{"name": "vmbus-emu.latency"}}, "stages": {stages}}}')

    done = run_cli("latency", "--compare", "old.json")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--compare old.json: no report" in done.stderr


def test_report_of_another_version_is_not_compared(run_cli: RunCli, tmp_path: Path) -> None:
    """A field of it may mean something else: told in one line before anything is measured."""
    (tmp_path / "old.json").write_text('{"schema": {"name": "vmbus-emu.latency", "version": 2}, "stages": 1}')

    done = run_cli("latency", "--compare", "old.json")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("vmbus-emu: --compare old.json: a report of version 2, where 1 is read; measure it again\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("latency",), "no channel is open to measure on; give a scenario with an echo device"),
        (("stress", "--mix", "none"), "nothing would be sent: give a scenario with an echo device"),
    ],
)
def test_a_machine_without_echo_is_no_finding(
    run_cli: RunCli, tmp_path: Path, command: tuple[str, ...], said: str
) -> None:
    """A netlike channel answers no pings: that is said, rather than that two were lost, or that none was."""
    (tmp_path / "net.toml").write_text('[[device]]\nclass = "netlike"\nbackend = "netlike"\n')

    done = run_cli(*command, "net.toml", "--duration", "0.2")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def trips(length_ns: int) -> Trips:
    """Three round trips, a microsecond apart, each of this length."""
    return Trips(array("Q", range(0, 3_000, 1_000)), array("Q", range(length_ns, length_ns + 3_000, 1_000)), 0.0, 1.0)


def fault(hits: int) -> list[dict[str, Any]]:
    """One that struck so often."""
    return [{"fault": "vsp.stall=1ms", "on": True, "seen": 9, "hits": hits}]


def measured(
    monkeypatch: pytest.MonkeyPatch, state: Path, plain: Measured | Exception, recorded: Measured | BaseException
) -> None:
    """Let the two machines tell this, or end so."""

    def measure(*_arguments: Any, record: bool = False, **options: Any) -> Measured:
        told = recorded if record else plain
        if isinstance(told, BaseException):
            raise told
        if record:
            options["kept"].write_bytes(b"")
        return told

    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    monkeypatch.setattr(latency, "measure", measure)


def test_what_both_machines_tell_is_added_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A round trip that never came back is a finding, whichever lost it; what the second is longer is the recorder."""
    plain = Measured(trips(500), lost=1, faults=fault(2))
    recorded = Measured(trips(2_000), lost=2, dropped=5, faults=fault(3))
    measured(monkeypatch, tmp_path, plain, recorded)

    assert cli.main(["latency", "--size", "77", "--json"]) == ExitStatus.FINDING
    told = json.loads(capsys.readouterr().out)
    assert (told["lost"], told["records_dropped"], told["faults"][0]["hits"]) == (3, 5, 5)
    assert told["recorder_ns"] == pytest.approx(1_500, rel=0.01)
    assert "lost: 3\n" in (Path(told["finding"]) / "finding.txt").read_text()

    figures = {"count": 3, "p50_ns": 0, "p90_ns": 600, "p99_ns": 600, "p999_ns": 600}
    old = {"schema": {"name": latency.REPORT}, "stages": {"round_trip": figures, "gone": figures}, "size": 77}
    (tmp_path / "old.json").write_text(json.dumps(old))
    words = ["--size", "77", "--compare", str(tmp_path / "old.json"), "--fail", "p90:+10%"]
    assert cli.main(["latency", *words]) == ExitStatus.FINDING
    shown = capsys.readouterr().out
    assert f"round trip, 77 bytes, one after the other, 2 vCPUs, poll adaptive, {BUILD}:\n    p50  █" in shown
    assert re.search(r"^p50 in the machine that records: \+1\.5 us; [0-9,]+ round trips a second; 3 lost$", shown, re.M)
    assert "fault vsp.stall=1ms: 5 hits of 18 occasions\n" in shown
    assert re.search(r"^round_trip +0\.0 +0\.5 +- +0\.6 +0\.5 +-17%$", shown, re.M), "of nothing there is no share"
    assert "worse:" not in shown and not re.search("^gone", shown, re.M)


def test_who_is_interrupted_has_found_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the first machine lost something: it is told and not kept."""
    measured(monkeypatch, tmp_path, Measured(trips(500), lost=1), KeyboardInterrupt())

    assert cli.main(["latency", "--json"]) == ExitStatus.INTERRUPTED

    told = json.loads(capsys.readouterr().out)
    assert (told["lost"], told["finding"], told["interrupted"]) == (1, None, True)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MachineDied([Death("vcpu1", 77, 9)]), ExitStatus.FAILED, "vcpu1"),
        (DeadlinePassed("the guest tasks to end", 10**9), ExitStatus.TIME_LIMIT, "the guest tasks to end"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_first_machine_that_does_not_come_to_its_end_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: ExitStatus,
    said: str,
    as_json: bool,
) -> None:
    """There is nothing to show: what ended it, with its own status, and no second machine is begun."""
    measured(monkeypatch, tmp_path, error, AssertionError("a second machine"))

    assert cli.main(["latency", *(["--json"] if as_json else [])]) == status

    shown = capsys.readouterr()
    assert said in shown.err
    assert (json.loads(shown.out)["schema"]["name"] if as_json else shown.out) == (
        "vmbus-emu.latency" if as_json else ""
    )


@pytest.mark.parametrize(
    ("rate", "duration_s", "recorded_s"),
    [(None, 1.0, 1.0), (None, 60.0, 1.5), (1_000, 60.0, 50.0), (1_000_000, 9.0, 1.5)],
)
def test_recorded_part_ends_when_it_has_told_enough(rate: int | None, duration_s: float, recorded_s: float) -> None:
    """After 1.5 s, or 50,000 round trips where these take longer; never later than the rest."""
    assert _recorded_s(rate, duration_s) == recorded_s


@pytest.mark.parametrize("more", [[], ["--record", "kept.rec"]])
def test_no_file_is_left_to_the_collector(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """What the command opened it closes, and opens nothing where it records elsewhere: Python warns under -W error."""
    opened = []
    make = tempfile.TemporaryFile

    def noted() -> IO[bytes]:
        opened.append(make())
        return opened[-1]

    def measure(*_arguments: object, **_options: object) -> None:
        raise UserError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.nameless_file.tempfile.TemporaryFile", noted)
    monkeypatch.setattr(latency, "measure", measure)

    assert cli.main(["latency", *more]) == ExitStatus.USAGE

    assert len(opened) == (0 if more else 1)
    assert all(file.closed for file in opened)
    capsys.readouterr()
