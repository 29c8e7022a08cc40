"""The stages that `latency --record` prints, and what SQL in Perfetto makes of the recording that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu.scenario import Scenario, parse_device
from tests.tools.export.readers import ask, written
from tools.histograms import figures_of, histogram_of
from tools.latency import measure

SHARES = {"p50_ns": 0.5, "p90_ns": 0.9, "p99_ns": 0.99}
SQL = f"""
    with step as (
        select ts, name || coalesce(extract_arg(arg_set_id, 'debug.side'), '') as step,
            coalesce(extract_arg(arg_set_id, 'debug.flag'), extract_arg(arg_set_id, 'debug.relid')) as relid
        from slice where category = 'record' and name in ('ring_publish', 'ring_release', 'flag_set')
    ), pair as (
        select step || ' ' || lead(step) over (partition by relid order by ts) as pair,
            lead(ts) over (partition by relid order by ts) - ts as ns
        from step
    ), stage as (
        select case pair when 'ring_publish0 ring_release0' then 'send_to_host'
            when 'ring_release0 ring_publish1' then 'host_service'
            when 'ring_publish1 flag_set' then 'answer_to_signal' end as stage, ns
        from pair
    ), ranked as (
        select stage, ns, row_number() over (partition by stage order by ns) as rank,
            count(*) over (partition by stage) as total
        from stage where stage is not null
    )
    select stage, total, {
    ", ".join(f"max(case when rank <= total * {share} + 0.5 then ns end)" for share in SHARES.values())
} from ranked group by stage"""
"""Each packet is alone on its channel, so its steps follow one another; of each stage the count and the percentiles."""


def test_percentiles_by_sql_are_those_that_latency_prints(trace_processor: Path, tmp_path: Path) -> None:
    """A packet's way to the host, through it, and to the signal: as many, and as long, within 1 %."""
    scenario = Scenario.default().with_overrides(devices=[parse_device("echo:1")])
    measured = measure(scenario, 0, 64, 0.05, record=True, kept=tmp_path / "latency.rec")
    assert measured.dropped == 0
    printed = {name: figures_of(histogram_of(samples, name)) for name, samples in measured.stages.items()}
    trace = written("perfetto", tmp_path / "latency.rec", tmp_path / "latency.pftrace")
    (answer,) = ask(trace_processor, [trace], {"stages": SQL})

    assert {stage for stage, *_figures in answer["stages"]} == {"send_to_host", "host_service", "answer_to_signal"}
    for stage, count, *figures in answer["stages"]:
        expected = printed[stage]
        assert count == pytest.approx(expected["count"], rel=0.01), stage
        assert figures == pytest.approx([expected[name] for name in SHARES], rel=0.01), stage
