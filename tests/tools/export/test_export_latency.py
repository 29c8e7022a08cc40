"""The stages that `latency --record` prints, and what SQL in Perfetto makes of the recording that it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.system.commands import call
from tests.tools.export.readers import ask, written
from tools.latency_stages import CONTROL_STAGES, DATA_STAGES

SHARES = {"p50_ns": 0.5, "p90_ns": 0.9, "p99_ns": 0.99}
SCENARIO = """
[machine]
vcpus = 1
[[device]]
class = "echo"
count = 1
"""
"""One processor, one channel with packets: whatever happens between two steps of a packet is of that packet."""
RELID, VECTOR, ON_EVENT = 1, 0xF3, 2

PACKET = (
    "ring_publish0",
    "ring_release0",
    "ring_publish1",
    "flag_set",
    "irq_raise",
    "isr_enter",
    "tasklet_run",
    "ring_release1",
    "task_take",
)
"""The steps of a packet there and back: each two neighbours are a stage."""

PLACES = ", ".join(
    f"({at}, '{step}', '{stage}')" for at, (step, stage) in enumerate(zip(PACKET[1:], DATA_STAGES, strict=True), 2)
)
"""SQL: the how many-th record of its packet each stage ends with, which one that is, and the stage."""

SQL = f"""
    with raw as (
        select ts, name, extract_arg(arg_set_id, 'debug.side') as side,
            coalesce(extract_arg(arg_set_id, 'debug.flag'), extract_arg(arg_set_id, 'debug.relid')) as relid,
            extract_arg(arg_set_id, 'debug.vector') as vector,
            coalesce(extract_arg(arg_set_id, 'debug.tasklet'), {ON_EVENT}) as tasklet,
            extract_arg(arg_set_id, 'debug.serial') as serial
        from slice where category = 'record' and name in ('ring_publish', 'ring_release', 'flag_set', 'irq_raise',
            'isr_enter', 'tasklet_run', 'task_take', 'message_post', 'slot_write', 'slot_read', 'work_queue',
            'work_run')
    ), place(at, step, stage) as (values {PLACES}
    ), numbered as (
        select ts, name || coalesce(side, '') as step,
            sum(name = 'ring_publish' and side = 0) over (order by ts) as packet
        from raw where serial is null and coalesce(relid, {RELID}) = {RELID} and coalesce(vector, {VECTOR}) = {VECTOR}
            and tasklet = {ON_EVENT}
    ), packet as (
        select packet as number, step, ts - lag(ts) over one as ns, row_number() over one as at
        from numbered window one as (partition by packet order by ts)
    ), taken as (
        select *, min(case when name = 'isr_enter' and vector = {VECTOR} then ts end)
            over (order by ts rows between current row and unbounded following) as isr
        from raw
    ), message as (
        select name as a, lead(name) over one as b, lag(name) over one as before, ts, isr, lead(ts) over one as next
        from taken where serial > 0 window one as (partition by serial order by ts)
    ), stage as (
        select stage, ns from packet join place using (at, step) where number > 0
        union all
        select case a when 'message_post' then 'post_to_slot' when 'slot_read' then 'dpc_to_queue'
            else 'queue_to_handler' end, next - ts
        from message where (a, b) in (values ('message_post', 'slot_write'), ('slot_read', 'work_queue'),
            ('work_queue', 'work_run')) and (a <> 'work_queue' or before = 'slot_read')
        union all
        select 'slot_to_isr', isr - ts from message where a = 'slot_write' and b = 'slot_read' and isr < next
        union all
        select 'isr_to_dpc', next - isr from message where a = 'slot_write' and b = 'slot_read' and isr < next
    ), ranked as (
        select stage, ns, row_number() over (partition by stage order by ns) as rank,
            count(*) over (partition by stage) as total
        from stage where stage is not null
    )
    select stage, total, {
    ", ".join(f"min(case when rank >= total * {share} - 1e-6 then ns end)" for share in SHARES.values())
} from ranked group by stage"""
"""Of each stage the count and the percentiles."""


def test_percentiles_by_sql_are_those_that_latency_prints(trace_processor: Path, tmp_path: Path) -> None:
    """Every stage of a packet and of a message: as many, and as long, within 1 %."""
    (tmp_path / "one.toml").write_text(SCENARIO)
    done = call(tmp_path, "latency", "one.toml", "--duration", "0.05", "--record", "latency.rec", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["records_dropped"] == 0
    trace = written("perfetto", tmp_path / "latency.rec", tmp_path / "latency.pftrace")
    (answer,) = ask(trace_processor, [trace], {"stages": SQL})

    assert {stage for stage, *_figures in answer["stages"]} == {*DATA_STAGES, *CONTROL_STAGES}
    for stage, count, *figures in answer["stages"]:
        expected = printed["stages"][stage]
        assert count == pytest.approx(expected["count"], rel=0.01), stage
        assert figures == pytest.approx([expected[name] for name in SHARES], rel=0.01), stage
