"""The `vmbus-emu` script: gives the zygote a head start where one will be needed, then runs the command line.

Nothing is imported before that: click and what it brings take as long as the zygote takes to warm up.
"""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""`ExitStatus.INTERRUPTED`, for a Ctrl-C before that could be imported."""


def main() -> int:
    """Run the command line of this process; its exit status."""
    asked = sys.argv[1:]
    try:
        if asked[:1] in (["run"], ["demo"]) and not {"--help", "--detach"} & set(asked):
            from tools.zygote_start import start_early

            start_early()
        from tools.cli import main as run_command
    except KeyboardInterrupt:
        return INTERRUPTED
    return run_command(asked)


if __name__ == "__main__":
    sys.exit(main())
