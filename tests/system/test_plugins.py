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


@pytest.mark.parametrize("fault", [(), ("--fault", "vsp.stall=1us@class=tempsensor,times=1")])
def test_a_forgotten_from_is_told_with_its_line(tmp_path: Path, sensor: Path, fault: tuple[str, ...]) -> None:
    """A back end that yields what would have waited waits for ever otherwise, and says nothing; faults or not."""
    changed(sensor, "yield from channel.wait_for_packets()", "yield channel.wait_for_packets()")
    done = call(tmp_path, "run", "--plugin", "tempsensor.py", "--device", "tempsensor", "--duration", "0.1", *fault)

    assert done.returncode == 1
    assert "refused: backend-error 1\n  backend-error: tempsensor: channel 1: TypeError: " in done.stdout
    assert "    yield channel.wait_for_packets()\n" in done.stderr and "write `yield from`" in done.stderr


def test_answers_that_are_never_sent_are_told_with_their_line(tmp_path: Path, sensor: Path) -> None:
    """`send_all` without `yield from` is a generator that nobody runs: nothing would be sent, and nothing be said."""
    changed(sensor, "yield from channel.send_all(answers)", "channel.send_all(answers)")
    done = call(tmp_path, "run", "--plugin", "tempsensor.py", "--device", "tempsensor", "--duration", "0.1")

    assert done.returncode == 1
    assert "refused: backend-error 1\n  backend-error: tempsensor: channel 1: TypeError: " in done.stdout
    assert "send_all" in done.stdout and "write `yield from` before the call" in done.stdout
    assert f'File "{sensor}"' in done.stderr and "    channel.send_all(answers)\n" in done.stderr


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ("pass", "TypeError: it returned None, which is no generator; `return` what serves the channel"),
        ("return [1]", "TypeError: it returned [1], which is no generator; `return` what serves the channel"),
        ("self.serve(channel)", "it is a generator; write `yield from` before the call, or return it"),
    ],
)
def test_an_open_that_returns_no_generator_refuses_the_channel(
    tmp_path: Path, sensor: Path, instead: str, said: str
) -> None:
    """The guest's probe fails, instead of a driver with an open channel that nobody serves."""
    changed(sensor, "return self.serve(channel)", instead)
    done = call(tmp_path, "run", "--plugin", "tempsensor.py", "--device", "tempsensor", "--duration", "0.1")

    assert done.returncode == 1
    assert "refused: backend-error 1\n  backend-error: tempsensor: open of channel 1: " in done.stdout
    assert said in done.stdout


def test_a_generator_that_ends_is_noted(tmp_path: Path, sensor: Path) -> None:
    """That may be meant, so it is no finding; but nobody reads the guest's packets from then on."""
    changed(sensor, "yield from channel.wait_for_packets()\n                continue", "return")
    done = call(tmp_path, "run", "--plugin", "tempsensor.py", "--device", "tempsensor", "--duration", "0.1")

    assert done.returncode == 0
    assert "noted: backend-ended 1\n" in done.stdout
    assert "its generator has ended; nobody serves channel 1 until the guest closes it\n" in done.stdout


def test_a_callback_that_is_registered_in_a_probe_is_told(tmp_path: Path, sensor: Path) -> None:
    """The channel would be opened without one, and no packet be read; so the probe fails, with place and cure."""
    old = "        callback = tempsensor_onchannelcallback.number\n"
    within = "plugin.channel_callback(lambda current, channel: None)"
    changed(sensor, old, f"        callback = {within}.number\n")
    done = call(tmp_path, "run", "--plugin", "tempsensor.py", "--device", "tempsensor", "--duration", "0.1")

    assert (done.returncode, "plugin errors: 1\n" in done.stdout) == (1, True)
    assert f"plugin {sensor}, line " in done.stderr
    assert "is registered in probe, while the machine runs" in done.stderr


def test_what_a_machines_plugin_prints_is_on_stderr(tmp_path: Path, sensor: Path) -> None:
    """From a probe, a callback and a back end, in three processes; stdout is the command's."""
    for where, word in (
        ("        device.driver_state[READINGS] =", "in the probe"),
        ("        state[READINGS] += 1\n", "in the callback"),
        ("            answers = []\n", "in the back end"),
    ):
        indent = " " * (len(where) - len(where.lstrip()))
        changed(sensor, where, f'{indent}print("{word}")\n{where}')
    words = ("--plugin", "tempsensor.py", "--device", "tempsensor", "--duration", "0.3", "--json")
    done = call(tmp_path, "run", *words)

    assert (done.returncode, report(done.stdout)["plugin_errors"]) == (0, 0)
    assert all(f"in the {where}\n" in done.stderr for where in ("probe", "callback", "back end"))


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
