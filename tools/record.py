"""`vmbus-emu record`: a run whose every event goes into a file; `run --record` with the file in front."""

from __future__ import annotations

from pathlib import Path

import click

from emu.errors import UserError
from tools.options import FileToWrite, json_option


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-o", "--output", metavar="FILE", type=FileToWrite(), required=True, help="The recording to write.")
@json_option
@click.argument("run_arguments", metavar="[RUN ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED)
def record(output: Path, as_json: bool, run_arguments: tuple[str, ...]) -> int:
    """Boot a machine, record every event of it, clean up.

    What comes behind FILE is given to `vmbus-emu run`; its --help lists it. The
    object of --json is a run's, too: `recording` is the file, in numbers.

    \b
    Example:
      vmbus-emu record -o boot.rec --duration 1
      vmbus-emu record -o boot.rec scenarios/devices.toml --duration 2 --json
      vmbus-emu explain boot.rec --relid 1
    """
    from tools.run import run

    if any(one == "--record" or one.startswith("--record=") for one in run_arguments):
        raise UserError("record: the recording is what -o names; leave --record out")
    words = ["--record", str(output), *(["--json"] if as_json else []), *run_arguments]
    with run.make_context("vmbus-emu record", words) as ctx:
        status: int = run.invoke(ctx)
        return status
