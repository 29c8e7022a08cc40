"""The sysfs tree of a whole machine: what its guest's kernel did is there to be read, until it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RunCli = Callable[..., subprocess.CompletedProcess[str]]

SOURCES = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0

READ_TREE = """
import json, os, pathlib
def read(path):
    return path.read_text().strip()
tree = []
for device in sorted(pathlib.Path("/sys/bus/vmbus/devices").iterdir(), key=lambda device: int(read(device / "id"))):
    channels = sorted((device / "channels").iterdir(), key=lambda channel: int(channel.name))
    tree.append({
        "relid": int(read(device / "id")),
        "class_id": read(device / "class_id")[1:-1],
        "instance": device.name,
        "driver": (device / "driver").resolve().name,
        "bound": (device / "driver" / device.name).resolve() == device.resolve(),
        "state": read(device / "state"),
        "vp": [read(channel / "cpu") for channel in channels],
        "written": [int(read(device / "out_write_index")), int(read(device / "in_read_index"))],
        "interrupts": [int(read(channel / "interrupts")) for channel in channels],
    })
print(json.dumps(tree))
"""
WAIT_FOR_THE_END = """
import pathlib
devices = pathlib.Path("/sys/bus/vmbus/devices")
print(len(list(devices.iterdir())), flush=True)
while list(devices.iterdir()):
    pass
print("empty")
"""


@pytest.fixture
def machine(run_cli: RunCli) -> Iterator[str]:
    """A machine with a few echo devices, all channels open, that went through its exercise."""
    name = f"test-{os.getpid()}-sysfs"
    done = run_cli("run", "--detach", "--name", name, "--device", "echo:3", timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    yield name
    run_cli("stop", "--machine", name, timeout_s=DEADLINE_S)


def test_tree_is_the_machines_while_it_lives(machine: str, run_cli: RunCli) -> None:
    """Devices, drivers, CPUs and rings are those of `ls`; when the machine stops, the bus is empty, not torn."""
    done = run_cli("sysfs", "--machine", machine, "--", sys.executable, "-c", READ_TREE, timeout_s=DEADLINE_S)
    listed = json.loads(run_cli("ls", "--json", "--machine", machine).stdout)["devices"]
    tree: list[dict[str, Any]] = json.loads(done.stdout)

    assert done.stderr == ""
    assert [(one["relid"], one["class_id"], one["instance"], one["driver"], one["vp"]) for one in tree] == [
        (
            one["relid"],
            one["class_id"],
            one["instance"],
            one["driver"],
            [str(channel["vcpu"]) for channel in one["channels"]],
        )
        for one in listed
    ]
    assert len(tree) == 3
    assert all(one["bound"] and one["state"] == "3" for one in tree)
    # Readable at all means that the rings are there; their indices are those of whole packets.
    assert all(index % 8 == 0 for one in tree for index in one["written"])
    assert all(count >= 0 for one in tree for count in one["interrupts"])

    told = run_cli("sysfs", "--machine", machine, "--json", "--", "sh", "-c", "exit 5", timeout_s=DEADLINE_S)
    assert told.returncode == 5
    schema = {"name": "vmbus-emu.sysfs", "version": 1}
    assert json.loads(told.stdout) == {
        "schema": schema,
        "machine": machine,
        "command": ["sh", "-c", "exit 5"],
        "status": 5,
    }

    command = ("sysfs", "--machine", machine, "--", sys.executable, "-c", WAIT_FOR_THE_END)
    with subprocess.Popen(
        [sys.executable, "-m", "tools.cli", *command],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "3\n"

        stopped = run_cli("stop", "--machine", machine, timeout_s=DEADLINE_S)

        out, err = session.communicate(timeout=DEADLINE_S)
    assert (stopped.returncode, out, err, session.returncode) == (0, "empty\n", "", 0)
