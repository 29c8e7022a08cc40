"""Sub-channels and the netlike device over real processes: spread, polled, taken away at any moment, given back."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from emu.machine import Machine
from emu.mirror import Mirror
from emu.task_board import Program, TaskBoard, TaskState
from hostproc.protocol.states import ChannelState
from tests.system.commands import ROOT, assert_gone, call, ended, report, start, wait_for, wait_until_open
from tools.ctl import ask_host

SCENARIO = ROOT / "scenarios" / "netlike.toml"


def test_every_channel_carries_packets_on_its_own_processor(tmp_path: Path) -> None:
    """4 sub-channels and 3, opened before `run` calls the machine open, spread over 4 vCPUs, frames without a gap."""
    done = call(tmp_path, "run", str(SCENARIO), "--name", "t-subs", "--duration", "0", "--json", "--seed", "3")

    assert done.returncode == 0, done.stderr
    told = report(done.stdout)
    by_class = {device["class"]: device for device in told["devices"]}
    indices = {
        name: sorted(channel["sub_channel_index"] for channel in device["channels"])
        for name, device in by_class.items()
    }
    assert indices == {"netlike": [0, 1, 2, 3, 4], "echo": [0, 1, 2, 3]}
    assert {device["driver"] for device in told["devices"]} == {"hv_netlike", "hv_echo"}
    for device in told["devices"]:
        assert {channel["vcpu"] for channel in device["channels"]} == {0, 1, 2, 3}
        assert {channel["state"] for channel in device["channels"]} == {"opened"}
    # Each echo channel took its packets, and each of five netlike channels 200 frames both ways.
    assert told["packets"] >= 5 * 2 * 200 + 4 * 32
    assert (told["task_errors"], told["leaked"], told["refused"]) == (0, 0, {})
    assert_gone("t-subs")


def test_devices_go_under_traffic(tmp_path: Path) -> None:
    """Both devices are taken back while frames and echoes flow: each relid is released, and nothing stalls."""
    with ended(start(tmp_path, "run", str(SCENARIO), "--name", "t-subgo", "--json")) as process:
        wait_until_open("t-subgo", process)
        machine = Machine.attach("t-subgo")
        try:
            board, mirror = TaskBoard(machine.control), Mirror(machine.control)
            rows = [board.order(Program.NET_CHECK, cpu, wanted=1 << 15) for cpu in range(4)]
            rows += [board.order(Program.ECHO_CHECK, cpu, wanted=1 << 20) for cpu in range(4)]
            wait_for(lambda: any(board.row(row).state == TaskState.RUNNING for row in rows), "traffic")
            for relid in (2, 1):
                ask_host(machine, "rescind", relid=relid, instance="")
            wait_for(lambda: not list(mirror.channels()), "nine relids to be released")
            wait_for(lambda: all(board.row(row).state == TaskState.DONE for row in rows), "the programs to end")
            assert sum(board.row(row).errors for row in rows) == 0
        finally:
            machine.close()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 143, errors
    told = report(output)
    assert (told["leaked"], told["deaths"], wrongs(told)) == (0, [], {})
    assert_gone("t-subgo")


@pytest.mark.parametrize("seed", [1])
def test_netlike_devices_come_and_go_in_a_storm(tmp_path: Path, seed: int) -> None:
    """Each with three sub-channels, taken back at any moment of its opening: every relid is released exactly once."""
    storm(tmp_path, seed, orders=60)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 6))
def test_netlike_devices_come_and_go_in_a_storm_for_long(tmp_path: Path, seed: int) -> None:
    """The same, for the rare orders."""
    storm(tmp_path, seed, orders=2_000)


def storm(tmp_path: Path, seed: int, orders: int) -> None:
    """Offer and rescind netlike devices at random moments; afterwards everything is given back."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    name = f"t-substorm{seed}"
    with ended(start(tmp_path, "run", str(SCENARIO), "--name", name, "--json")) as process:
        wait_until_open(name, process)
        machine = Machine.attach(name)
        try:
            mirror = Mirror(machine.control)
            there: list[str] = []
            for _ in range(orders):
                if len(there) < 6 and rng.random() < 0.6:
                    arguments = {"class": "netlike", "backend": "", "count": 1, "instance": None}
                    there += [one["instance"] for one in ask_host(machine, "offer", **arguments)["offered"]]
                elif there:
                    gone = there.pop(rng.randrange(len(there)))
                    ask_host(machine, "rescind", relid=0, instance=gone)
                _spin(rng.random() * 0.03)
            for instance in there:
                ask_host(machine, "rescind", relid=0, instance=instance)
            wait_for(lambda: len(list(mirror.channels())) == 9, "all but the scenario's devices to be released")
            assert {channel.state for channel in mirror.channels()} == {int(ChannelState.OPEN)}
        finally:
            machine.close()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 143, errors
    told = report(output)
    assert (told["leaked"], told["task_errors"], told["deaths"], wrongs(told)) == (0, 0, [], {})
    assert_gone(name)


def wrongs(told: dict[str, Any]) -> dict[str, int]:
    """What was refused: a relid that was released twice would be."""
    return dict(told["refused"])


def _spin(seconds: float) -> None:
    """Let a random moment pass; nothing is waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0)
