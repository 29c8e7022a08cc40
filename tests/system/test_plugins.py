"""Plugins in whole machines: what only real processes show. The page docs/writing-a-driver.md is a test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.test_writing_a_driver import write_files
from tests.system.commands import assert_gone, call, report
from tools.testing import MachineDied, running

RESCINDS = 5


@pytest.fixture
def sensor(tmp_path: Path) -> Path:
    """The plugin of docs/writing-a-driver.md."""
    write_files(tmp_path)
    return tmp_path / "tempsensor.py"


def changed(path: Path, old: str, new: str) -> Path:
    """The same plugin with a mistake in it."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_a_plugin_that_cannot_be_makes_nothing(tmp_path: Path, sensor: Path) -> None:
    """One line that names file and line, exit code 2, no object of a machine, no process."""
    changed(sensor, "from struct import Struct", "import nonesuch")
    done = call(tmp_path, "run", "--plugin", "tempsensor.py", "--name", "t-bad-plugin", "--duration", "0")

    what = "line 1: ModuleNotFoundError: No module named 'nonesuch'; mend it"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"vmbus-emu: plugin {sensor}: {what}\n")
    assert_gone("t-bad-plugin")


@pytest.mark.parametrize(
    ("behind", "counted", "said"),
    [
        ("        channel = current.channel(device.channel)\n", "plugin_errors", "driver hv_tempsensor: probe"),
        ("            answers = []\n", "backend-error", "back end tempsensor, channel 1"),
    ],
    ids=["probe", "back end"],
)
def test_a_machine_survives_what_a_plugin_raises_where_it_may_sleep(
    tmp_path: Path, sensor: Path, behind: str, counted: str, said: str
) -> None:
    """The other devices echo, the count and the traceback are there, exit code 1, nothing leaks."""
    indent = " " * (len(behind) - len(behind.lstrip()))
    changed(sensor, behind, f"{behind}{indent}raise ValueError(1)\n")
    arguments = ("--plugin", "tempsensor.py", "--device", "tempsensor", "--device", "echo", "--name", "t-raises")
    done = call(tmp_path, "run", *arguments, "--duration", "0.5", "--json")

    assert done.returncode == 1, done.stderr
    told = report(done.stdout)
    assert told["plugin_errors"] == 1 and told["leaked"] == 0 and told["deaths"] == []
    assert told["counters"]["plugin_errors"] + told["refused"].get("backend-error", 0) == 1
    assert (counted in told["refused"]) == (counted == "backend-error")
    assert told["packets"] > 0 and told["task_errors"] == 0
    log = "\n".join(told["log"])
    assert "ValueError: 1" in log and str(sensor) in log and said in log
    assert_gone("t-raises")


def test_a_callback_that_raises_stops_the_machine_by_name(sensor: Path) -> None:
    """As a panic in interrupt context would: the processor's process ends, the report names plugin and callback."""
    changed(sensor, "        state[READINGS] += 1\n", "        raise ValueError(1)\n")

    with (
        pytest.raises(
            MachineDied, match=r"PluginFault: plugin callback tempsensor\.tempsensor_on.* on relid 1: ValueError: 1"
        ),
        running(plugins=[sensor], devices=["tempsensor"], name="t-callback", wait=False) as machine,
    ):
        machine.wait_for(lambda: False, "the machine to stop")
    assert_gone("t-callback")


def test_sensors_that_are_rescinded_amid_their_readings_leak_nothing(sensor: Path) -> None:
    """Hot add and remove with packets in flight, again and again: the driver's calls fail as they should."""
    with running(plugins=[sensor], devices=["echo"]) as machine:
        for _ in range(RESCINDS):
            for added in machine.offer("tempsensor:2"):
                machine.rescind(added.relid)

        machine.wait_for(lambda: [one.class_name for one in machine.devices()] == ["echo"], "the sensors to be gone")
        assert machine.counters()["plugin_errors"] == 0
