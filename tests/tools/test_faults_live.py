"""Faults on real machines: from the command line, in a running machine, and what is told of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from emu.mirror import Mirror
from emu.recording import Recording
from emu.scenario import DeviceSpec, Scenario
from tests.conftest import RunCli
from tools.ctl import ask_host, wait_until_open
from tools.debts import debts_of
from tools.draining import recording
from tools.flows import flows_of
from tools.guest_death import replace_guest
from tools.invariant_table import RULES
from tools.invariants import Machine, judge
from tools.launch import RunningMachine, launch
from tools.state_node import find, whole
from tools.state_tree import StateTree
from tools.story import story_of_relid


def hits(running: RunningMachine) -> list[int]:
    """How often each fault struck."""
    return [row.hits for row in running.faults.rows()]


def test_run_tells_its_faults(run_cli: RunCli, tmp_path: Path) -> None:
    """Late interrupts and a doubled answer lose nothing; a guest that died is followed by another; each hit is told."""
    faults = ("delay_irq=1ms@relid=2", "reply.dup@kind=openchannel_result,relid=1,times=1", "guest.die")
    flags = [word for fault in faults for word in ("--fault", fault)]
    done = run_cli("run", "--duration", "0", "--device", "echo:2", "--json", "--record", "a.rec", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)

    assert report["channels_open"] == 2 and report["task_errors"] == 0 and report["leaked"] == 0
    delay, dup, die = report["faults"]
    assert (dup["hits"], die["hits"]) == (1, 1) and delay["hits"] >= 1
    assert [one["fault"] for one in report["faults"]] == [
        "delay_irq=1ms@relid=2",
        "reply.dup@relid=1,kind=openchannel_result,times=1",
        "guest.die",
    ]
    with Recording(tmp_path / "a.rec") as records:
        struck = [record for record in records.records() if record.event.name == "fault_hit"]
    assert len(struck) == delay["hits"] + dup["hits"]  # the launcher, who lets a guest die, records nothing


def test_guest_that_died_is_accused_of_nothing(tmp_path: Path) -> None:
    """It waited for an answer, another message lay in its slot: neither is owed, or held against its successor."""
    scenario = Scenario.default().with_overrides(devices=[DeviceSpec(count=1)])
    with launch(scenario, faults=True, record=True) as running, recording(running, tmp_path / "died.rec"):
        running.wait_ready()
        echo = {"class": "echo", "backend": "echo", "count": 1, "instance": ""}
        held = running.turn_on("reply.hold@kind=openchannel_result")
        ask_host(running.machine, "offer", **echo)
        running.wait_until(lambda: hits(running) == [1], 20, "the answer to be held")
        running.turn_on("delay_irq=60s@sint=2,times=1")
        ask_host(running.machine, "offer", **echo)
        running.wait_until(lambda: hits(running) == [1, 1], 20, "the offer to lie in its slot")
        replace_guest(running)
        running.turn_off(held)
        running.wait_ready()
        running.shut_down_guest()
        running.stop()

    with Recording(tmp_path / "died.rec") as one:
        records, vp_indices = list(one.records()), one.head["vp_indices"]
    flows = flows_of(records, vp_indices)
    verdicts = judge(RULES, records, Machine(vp_indices))
    assert [(one.name, one.violations, one.undecided) for one in verdicts if one.count or one.undecided] == []
    assert debts_of(records, flows) == []
    deaths = [step.record for step in story_of_relid(records, flows, 2) if "the guest is gone" in step.text]
    assert [record.event.name for record in deaths] == ["reset"]


def test_channel_that_a_fault_kept_from_opening_is_a_finding(run_cli: RunCli) -> None:
    """Exit status 1, and the guest's log, when a driver's channel was offered and is not open."""
    done = run_cli("run", "--device", "echo:1", "--duration", "0", "--fault", "alloc.fail=probe")

    assert done.returncode == 1 and "0 of 1 channel open" in done.stdout
    assert "not open: 1 of 1 channel" in done.stdout and "finding kept in" in done.stderr
    assert "probe failed for device" in done.stderr


def test_offer_that_a_fault_dropped_is_a_finding(run_cli: RunCli) -> None:
    """The guest knows nothing of it; the host does, and so `offers` counts it."""
    done = run_cli("run", "--device", "echo:3", "--duration", "0", "--json", "--fault", "reply.drop@kind=offerchannel")
    report = json.loads(done.stdout)

    assert (done.returncode, report["offers"], report["channels_open"], report["devices"]) == (1, 3, 0, [])


def test_device_that_no_driver_takes_stays_closed_rightly(run_cli: RunCli) -> None:
    """No driver of ours is one of sockets: what stays closed for that is no finding, whatever struck beside it."""
    devices = ("--device", "hv_sock:2", "--device", "echo:1")
    done = run_cli("run", *devices, "--duration", "0", "--json", "--fault", "reply.dup@kind=openchannel_result")
    report = json.loads(done.stdout)

    assert (done.returncode, report["offers"], report["channels_open"], report["not_open"]) == (0, 3, 1, 0)
    assert report["faults"][0]["hits"] == 1


def test_stress_finds_what_a_fault_spoilt_and_says_how_to_repeat_it(run_cli: RunCli) -> None:
    """Packets that change in the ring are corrupt: a finding, with the line that has seed and fault."""
    fault = "host.mutate_pkt=40:0xaa"
    flags = ("--duration", "0.3", "--channels", "2", "--mix", "none", "--flight", "0", "--seed", "7")
    done = run_cli("stress", "--json", *flags, "--fault", fault)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)

    assert report["corrupt"] > 0 and report["faults"][0]["hits"] >= report["corrupt"]
    again = shlex.split(report["again"])
    assert again[:2] == ["vmbus-emu", "stress"] and again[-2:] == ["--fault", fault]
    assert again[again.index("--seed") + 1] == "7"


def test_faults_are_turned_on_and_off_in_a_running_machine() -> None:
    """An answer is held for as long as its fault is on; a guest's probe fails; inspect shows both."""
    scenario = Scenario.default().with_overrides(devices=[DeviceSpec(count=1)])
    with launch(scenario, faults=True) as running:
        running.wait_ready()
        machine = running.machine
        hold = running.turn_on("reply.hold@kind=openchannel_result")
        offered = ask_host(machine, "offer", **{"class": "echo", "backend": "echo", "count": 1, "instance": ""})
        name = offered["offered"][0]
        running.wait_until(lambda: hits(running) == [1], 20, "the answer to be held")
        mirror = Mirror(machine.control)
        # The hit is counted within the host's step, the mirror is published behind it.
        running.wait_until(lambda: mirror.head().open == 2, 20, "the host to have opened it")
        running.turn_off(hold)
        wait_until_open(machine, name["relid"], name["generation"])
        running.turn_on("alloc.fail=probe@times=1")
        ask_host(machine, "offer", **{"class": "echo", "backend": "echo", "count": 1, "instance": ""})
        running.wait_until(lambda: hits(running) == [1, 1], 20, "the probe to fail")

        branch = whole(find(StateTree(machine).root(), "faults"))
        assert [one["fault"] for one in branch.values()] == [
            "reply.hold@kind=openchannel_result",
            "alloc.fail=probe@times=1",
        ]
        assert running.shut_down_guest()


def test_fault_that_a_command_cannot_have_is_one_line(run_cli: RunCli) -> None:
    """Exit status 2, and nothing on stdout."""
    done = run_cli("stress", "--fault", "guest.die")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "stress: guest.die would end what is measured" in done.stderr
