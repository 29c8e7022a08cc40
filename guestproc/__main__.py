"""`python -m guestproc vcpu CPU --machine NAME` or `… workqueue --machine NAME`: an inner process by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from emu.by_hand import attach_and_run
from guestproc import vcpu_main, workqueue_main


def main(arguments: Sequence[str] | None = None) -> int:
    """Attach to the named machine and be the process asked for until it stops."""
    parser = argparse.ArgumentParser(prog="python -m guestproc", description=__doc__)
    parser.add_argument("process", choices=("vcpu", "workqueue"))
    parser.add_argument("cpu", type=int, nargs="?", default=0, help="guest CPU number of a vcpu")
    parser.add_argument("--machine", required=True, metavar="NAME")
    asked = parser.parse_args(arguments)
    if asked.process == "workqueue":
        return attach_and_run(asked.machine, "workqueue", workqueue_main.run)
    name = f"vcpu{asked.cpu}"
    return attach_and_run(asked.machine, name, lambda machine, report: vcpu_main.run(machine, asked.cpu, report))


if __name__ == "__main__":
    sys.exit(main())
