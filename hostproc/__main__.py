"""`python -m hostproc --machine NAME`: the hypervisor process of a machine, started by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from emu.by_hand import attach_and_run
from hostproc import hypervisor_main


def main(arguments: Sequence[str] | None = None) -> int:
    """Attach to the named machine and be its hypervisor until it stops."""
    parser = argparse.ArgumentParser(prog="python -m hostproc", description=__doc__)
    parser.add_argument("--machine", required=True, metavar="NAME")
    return attach_and_run(parser.parse_args(arguments).machine, "hypervisor", hypervisor_main.run)


if __name__ == "__main__":
    sys.exit(main())
