"""`vmbus-emu explain`: the story of one device or of one message, out of a recording, in plain lines.

Each line is one step: when, how long after the last, who did it and where, what happened, and the kernel function (or
the host's part) that it stands for. Behind it: who owes whom what, and since when.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from string import digits
from typing import Any

import click

from emu.errors import UserError
from emu.recording import Recording
from tools.debts import Debt, debts_of
from tools.exit_status import ExitStatus
from tools.flows import Flow, flows_of
from tools.invariants import missing_of
from tools.options import json_option
from tools.output import print_json, print_table, say
from tools.story import Told, story_of_flow, story_of_relid


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--relid", type=click.IntRange(1, 2047), help="The story of the device that had this relid.")
@click.option("--message", "message_id", metavar="ID", help="The story of one message: h12, g5 (see without options).")
@json_option
def explain(file: Path, relid: int | None, message_id: str | None, as_json: bool) -> int:
    """Tell what happened to a device or a message, step by step.

    Without --relid and --message: every message, and what is unanswered.

    \b
    Example:
      vmbus-emu record -o boot.rec --duration 1
      vmbus-emu explain boot.rec
      vmbus-emu explain boot.rec --relid 1
      vmbus-emu explain boot.rec --message h2 --json
    """
    if relid is not None and message_id is not None:
        raise UserError("--relid and --message exclude each other; leave one of them out")
    with Recording(file) as recording:
        records = list(recording.records())
        flows = flows_of(records, recording.head.get("vp_indices", ()))
        began_ns = records[0].t_ns if records else 0
        debts = debts_of(records, flows)
        report: dict[str, Any] = {"recording": str(file)}
        if message_id is not None:
            flow = flows.get(message_id) or flows.get(f"h{message_id}")
            if flow is None:
                raise UserError(f"--message {message_id}: {file} has no such message; {ids_of(flows)}")
            told = story_of_flow(records, flow)
            # What its work waits for is its story's end as well.
            about = {flow.id} | {one.id for one in flows if one.cause == flow.id}
            debts = [debt for debt in debts if about & set(debt.messages)]
            report |= {"message": _message(flow), **_story(told, began_ns)}
        elif relid is not None:
            told = story_of_relid(records, flows, relid)
            if not told:
                raise UserError(
                    f"--relid {relid}: {file} has nothing about it; `vmbus-emu explain {file}` lists messages"
                )
            debts = [debt for debt in debts if debt.relid == relid]
            report |= {"relid": relid, **_story(told, began_ns)}
        else:
            told = []
            report["messages"] = [_message(flow) for flow in flows]
        report["owed"] = [debt.report() for debt in debts]
        report["damage"] = recording.damage
        missing = missing_of(recording)
    if as_json:
        print_json("explain", 1, report)
    else:
        _show(report, told, began_ns, debts)
        if not debts:
            # Of what is missing nobody can say whether it was an answer, or asked for one.
            click.echo("nobody owes anybody anything" + (f" in what can be read: {missing}" if missing else ""))
    if recording.damage:
        say(f"vmbus-emu: {recording.damage}")
        return ExitStatus.FINDING
    return ExitStatus.FINE


def ids_of(flows: Iterable[Flow]) -> str:
    """The ids that there are: each end numbers its own messages, and a flight recorder's first is not number 1."""
    numbers: dict[str, list[int]] = {}
    for flow in flows:
        stem = flow.id.rstrip(digits)
        numbers.setdefault(stem, []).append(int(flow.id[len(stem) :]))
    ranges = [
        f"{stem}{min(found)}" + (f" to {stem}{max(found)}" if len(found) > 1 else "")
        for stem, found in sorted(numbers.items())
    ]
    return f"there are {' and '.join(ranges)}" if ranges else "it holds none"


def _message(flow: Flow) -> dict[str, Any]:
    first, last = flow.steps[0].record, flow.steps[-1].record
    return {
        "id": flow.id,
        "message": flow.name,
        "from": "host" if flow.to_guest else "guest",
        "relid": flow.relid,
        "t_ns": first.t_ns,
        "took_ns": last.t_ns - first.t_ns,
        "steps": len(flow.steps),
        "cause": flow.cause,
        "answers": flow.answers,
        "ended": flow.ended,
    }


def _story(told: list[Told], began_ns: int) -> dict[str, Any]:
    steps = []
    before = told[0].record.t_ns if told else began_ns
    for one in told:
        steps.append(one.report(before))
        before = one.record.t_ns
    return {"steps": steps}


def _show(report: dict[str, Any], told: list[Told], began_ns: int, debts: list[Debt]) -> None:
    if "messages" in report:
        rows = [
            (
                one["id"],
                f"{(one['t_ns'] - began_ns) / 1e6:.3f}",
                "host to guest" if one["from"] == "host" else "guest to host",
                one["message"],
                one["relid"] or "-",
                f"{one['took_ns'] / 1e3:,.0f}",
                one["cause"] or "-",
                " ".join(one["answers"][:4]) + (" …" if len(one["answers"]) > 4 else "") or "-",
            )
            for one in report["messages"]
        ]
        print_table(("id", "at ms", "way", "message", "relid", "took us", "caused by", "answers"), rows)
    else:
        _show_story(told, began_ns)
    for debt in debts:
        click.echo(f"owed: {debt.text}")


def _show_story(told: list[Told], began_ns: int) -> None:
    before = told[0].record.t_ns
    for one in told:
        at_ms, later_us = (one.record.t_ns - began_ns) / 1e6, (one.record.t_ns - before) / 1e3
        before = one.record.t_ns
        function = f"  [{one.function}]" if one.function else ""
        click.echo(f"{at_ms:10.3f} ms {later_us:+10,.1f} us  {one.where:<26} {one.text}{function}")
