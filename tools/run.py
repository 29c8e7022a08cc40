"""`vmbus-emu run`: boot a machine, show its devices appear, let packets flow, and take everything away again."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from emu.errors import UserError
from emu.scenario import parse_device
from tools.detach import run_detached
from tools.flight import usual_s
from tools.guest_versions import check_versions
from tools.named_files import check_apart
from tools.options import (
    Seconds,
    fault_option,
    flight_option,
    json_option,
    plugin_option,
    record_option,
    scenario_argument,
)
from tools.plugins import scenario_of
from tools.run_machine import Options, run_here


@click.command()
@scenario_argument
@click.option("--vcpus", type=int, help="Virtual CPUs (1 to 64).")
@click.option(
    "--device", "device_texts", metavar="CLASS[:COUNT]", multiple=True, help="Devices, instead of the file's."
)
@plugin_option
@fault_option
@click.option("--duration", "duration_s", type=Seconds(min=0), help="Seconds to run; default: until Ctrl-C.")
@click.option(
    "--stream", "stream_path", type=click.Path(path_type=Path), help="Send this file through an echo channel."
)
@click.option("--detach", is_flag=True, help="Return when all channels are open; the machine goes on.")
@click.option("--no-guest", is_flag=True, help="No guest of ours: wait for somebody else's, end when it has left.")
@click.option(
    "--guest-timeout",
    "guest_timeout_s",
    type=Seconds(min=0.1),
    default=60.0,
    show_default=True,
    help="With --no-guest: seconds to wait for a guest; status 124 behind them.",
)
@record_option
@flight_option(None, "10; 0 with --record, or where little shared memory is free")
@click.option("--record-bytes", is_flag=True, help="With --record: the bytes of messages and rings, too (for pcapng).")
@click.option(
    "--without",
    metavar="PROCESS",
    multiple=True,
    help="Do not start this inner process (hypervisor, vcpu0, …, workqueue); somebody starts it by hand.",
)
@click.option("--name", help="Name of the machine; default: vm and the process id.")
@click.option("--poll", help="How a halting processor polls: off, microseconds, or adaptive.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Repeats what is random.")
@json_option
def run(
    scenario_path: Path | None,
    vcpus: int | None,
    device_texts: tuple[str, ...],
    plugin_paths: tuple[Path, ...],
    fault_texts: tuple[str, ...],
    duration_s: float | None,
    stream_path: Path | None,
    detach: bool,
    no_guest: bool,
    guest_timeout_s: float,
    record_path: Path | None,
    flight_s: float | None,
    record_bytes: bool,
    without: tuple[str, ...],
    name: str | None,
    poll: str | None,
    seed: int,
    as_json: bool,
) -> int:
    """Boot a machine, show its devices appear, exchange packets, clean up.

    \b
    Example:
      vmbus-emu run --duration 5
      vmbus-emu run scenarios/devices.toml --vcpus 4 --duration 2 --json
      vmbus-emu run --stream /bin/ls
      vmbus-emu run --plugin tempsensor.py --device tempsensor:2
      vmbus-emu run --duration 1 --fault delay_irq=200us@relid=7
    """
    said = click.get_current_context().get_parameter_source("guest_timeout_s")
    if said is ParameterSource.COMMANDLINE and not no_guest:
        raise UserError("--guest-timeout is for somebody else's guest; add --no-guest, or leave it out")
    check_apart({"--record": record_path}, scenario_path, stream_path, *plugin_paths)
    scenario = scenario_of(scenario_path, plugin_paths)
    devices = [parse_device(text, scenario.plugins) for text in device_texts]
    scenario = scenario.with_overrides(name=name, vcpus=vcpus, devices=devices, poll=poll, faults=fault_texts)
    if not no_guest:
        check_versions(scenario)
    options = Options(
        scenario,
        duration_s,
        stream_path,
        no_guest,
        guest_timeout_s,
        record_path,
        usual_s(record_path is not None) if flight_s is None else flight_s,
        record_bytes,
        frozenset(without),
        seed,
        as_json,
    )
    options.check(detach=detach)
    return run_detached(options) if detach else run_here(options)
