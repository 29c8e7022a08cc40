"""Writes to the sysfs tree of a whole machine: its guest's kernel does them, or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

RunCli = Callable[..., subprocess.CompletedProcess[str]]

DEADLINE_S = 60.0
ECHO = "6563686f-766d-4275-9d2d-656d752d3031"
WRITES = """
import errno, os, pathlib
bus = pathlib.Path("/sys/bus/vmbus")
device = min(bus.joinpath("devices").iterdir()).name
uio, echo, here = bus / "drivers/uio_hv_generic", bus / "drivers/hv_echo", bus / "devices" / device
def store(path, text):
    try:
        path.write_text(text + "\\n")
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
def driver():
    return (here / "driver").resolve().name if (here / "driver").exists() else "none"
print(store(echo / "unbind", device), driver())
print(store(uio / "bind", device), driver())
print(store(here / "driver_override", "uio_hv_generic"), (here / "driver_override").read_text().strip())
print(store(uio / "bind", device), driver())
print(store(uio / "bind", device), driver())
print(store(uio / "new_id", "ECHO"), store(uio / "new_id", "ECHO"), store(uio / "new_id", "nonsense"))
print(store(uio / "remove_id", "ECHO"), store(uio / "remove_id", "ECHO"))
print(store(here / "uevent", "change"), store(here / "uevent", "moved"), store(here / "id", "9"))
print(store(here / "driver_override", ""), (here / "driver_override").read_text().strip())
print(store(echo / "unbind", device), store(uio / "unbind", device), driver())
print(store(echo / "bind", "3"), store(echo / "bind", device), driver(), (here / "state").read_text().strip())
print(store(bus / "drivers_autoprobe", "0"), (bus / "drivers_autoprobe").read_text().strip())
print(store(echo / "unbind", device), store(bus / "drivers_probe", "3"), store(bus / "drivers_probe", device), driver())
channel = here / "channels" / (here / "id").read_text().strip()
cpu = channel / "cpu"
print(store(cpu, "1"), cpu.read_text().strip(), (here / "channel_vp_mapping").read_text().strip())
print(store(cpu, "0"), store(cpu, "77"), store(cpu, "x"), store(channel / "events", "1"))
print(store(bus / "drivers_autoprobe", "1"), store(bus / "uevent", "change"), store(bus / "uevent", "moved"))
print(store(echo / "uevent", "change"), store(echo / "uevent", "moved"))
""".replace("ECHO", ECHO)


@pytest.fixture
def machine(run_cli: RunCli) -> Iterator[str]:
    """A machine with a few echo devices."""
    name = f"test-{os.getpid()}-writes"
    done = run_cli("run", "--detach", "--name", name, "--device", "echo:2", timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    yield name
    run_cli("stop", "--machine", name, timeout_s=DEADLINE_S)


def test_writes_are_done_by_the_guests_kernel(machine: str, run_cli: RunCli, fuse: None, namespaces: None) -> None:
    """Unbind, bind, override, ids, uevents: each returns when the kernel has done it, or with its errno."""
    options = ("--machine", machine, "--technique", "fuse")
    done = run_cli("sysfs", *options, "--", sys.executable, "-c", WRITES, timeout_s=DEADLINE_S)
    uevents = json.loads(run_cli("ctl", "uevents", "--json", "--machine", machine).stdout)["uevents"]

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "ok none",
        "ENODEV none",  # it does not match yet
        "ok uio_hv_generic",
        "ok uio_hv_generic",
        "EBUSY uio_hv_generic",
        "ok EEXIST EINVAL",
        "ok ENODEV",
        "ok EINVAL EACCES",
        "ok (null)",
        "ENODEV ok none",  # the other driver has it
        "ENODEV ok hv_echo 3",  # a device is named by its instance there
        "ok 0",
        "ok ENODEV ok hv_echo",
        "ok 1 1:1",
        "ok EINVAL EIO EACCES",
        "ok ok EINVAL",
        "ok EINVAL",
    ]
    asked = [one["variables"] for one in uevents if one["variables"]["ACTION"] == "change"]
    assert {one["SYNTH_UUID"] for one in asked} == {"0"}
    assert [one.get("DRIVER") for one in asked] == ["uio_hv_generic", None, None]
    assert [one["DEVPATH"] for one in asked[1:]] == ["/bus/vmbus", "/bus/vmbus/drivers/hv_echo"]
