"""The opt-in build with compiled modules: `VMBUS_EMU_COMPILE=1 pip install .`; all else is in pyproject.toml.

Without the variable nothing is added: a wheel of pure Python, and no requirement. With it mypyc, which comes with mypy,
compiles the modules of `COMPILED` from the same sources, unchanged. The sources are installed beside them, and Python
prefers what is compiled. `emu/build_kind.py` says which build runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, Final, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ASKED: Final = "VMBUS_EMU_COMPILE"

# Hot modules, and every module with a subclass of a class in one of them: an interpreted class cannot inherit from a
# compiled one. Never a module whose loop a signal has to interrupt between two bytecodes, such as guestproc/tasks.py:
# compiled code does not look for signals. `emu/build_kind.py` knows by itself whether it was compiled.
COMPILED: Final = (
    "emu/build_kind.py",
    "emu/counters.py",
    "emu/doorbells.py",
    "emu/gpadl.py",
    "emu/interrupt_trace.py",
    "emu/interrupts.py",
    "emu/ipc/clock.py",
    "emu/ipc/rows.py",
    "emu/memory.py",
    "emu/ring_consumer.py",
    "emu/ring_memory.py",
    "emu/ring_packets.py",
    "emu/ring_producer.py",
    "emu/ring_trace.py",
    "emu/synic.py",
    "emu/vmexit.py",
    "emu/wire/synic.py",
    "guestproc/current.py",
    "guestproc/drivers/echo_inbox.py",
    "guestproc/echo_session.py",
    "guestproc/halt_points.py",
    "guestproc/kernel/actors.py",
    "guestproc/kernel/cpus.py",
    "guestproc/kernel/lists.py",
    "guestproc/kernel/locks.py",
    "guestproc/kernel/pages.py",
    "guestproc/kernel/rcu.py",
    "guestproc/kernel/record_tables.py",
    "guestproc/kernel/tasklet.py",
    "guestproc/kernel/tasklet_trace.py",
    "guestproc/kernel/wait.py",
    "guestproc/kernel/wait_trace.py",
    "guestproc/kernel/workqueue.py",
    "guestproc/pinger.py",
    "guestproc/protocol/devices.py",
    "guestproc/protocol/faults.py",
    "guestproc/protocol/offers.py",
    "guestproc/protocol/opening.py",
    "guestproc/protocol/pending.py",
    "guestproc/protocol/placement.py",
    "guestproc/protocol/posting.py",
    "guestproc/protocol/triage.py",
    "guestproc/protocol/uevents.py",
    "guestproc/ring_points.py",
    "guestproc/run_queue.py",
    "guestproc/vcpu.py",
    "guestproc/vmbus/chan_sched.py",
    "guestproc/vmbus/channel.py",
    "guestproc/vmbus/channel_mgmt.py",
    "guestproc/vmbus/connection.py",
    "guestproc/vmbus/device.py",
    "guestproc/vmbus/event_lane.py",
    "guestproc/vmbus/hv.py",
    "guestproc/vmbus/isr.py",
    "guestproc/vmbus/message_dpc.py",
    "guestproc/vmbus/packets.py",
    "guestproc/vmbus/percpu.py",
    "guestproc/vmbus/requests.py",
    "guestproc/vmbus/ring_buffer.py",
    "guestproc/vmbus/uevents.py",
    "guestproc/vmbus/vector.py",
    "guestproc/workqueue_main.py",
    "hostproc/bus.py",
    "hostproc/control_plane.py",
    "hostproc/devices/channel.py",
    "hostproc/devices/echo.py",
    "hostproc/devices/fault_channel.py",
    "hostproc/devices/unmapped.py",
    "hostproc/event_ports.py",
    "hostproc/fault_bus.py",
    "hostproc/fault_interrupts.py",
    "hostproc/hypervisor_main.py",
    "hostproc/interrupt_page.py",
    "hostproc/loop.py",
    "hostproc/message_queues.py",
    "hostproc/partition.py",
    "hostproc/ports.py",
    "hostproc/protocol/channel_table.py",
    "hostproc/protocol/channels.py",
    "hostproc/protocol/gpadl_ranges.py",
    "hostproc/protocol/gpadls.py",
    "hostproc/protocol/offers.py",
    "hostproc/protocol/openings.py",
    "hostproc/protocol/server.py",
    "hostproc/protocol/session.py",
    "hostproc/protocol/states.py",
    "hostproc/synthetic_timers.py",
    "hostproc/throttle.py",
)

GROUP: Final = "vmbus_emu"
"""Names the shared library that all of them are in: `vmbus_emu__mypyc`."""
COMPILER: Final = "mypy>=2.4.1,<2.5"
"""What it was tried with; a later one generates other C."""


def refuse(line: str) -> NoReturn:
    """End the build with one line."""
    sys.exit(f"vmbus-emu: {line}")


def wanted() -> bool:
    """Whether the environment asks for compiled modules."""
    value = os.environ.get(ASKED, "")
    if value not in ("", "0", "1"):
        refuse(f"{ASKED}={value}: it is 1 (compile the hot modules) or 0 (pure Python, as without it)")
    return value == "1"


def check_toolchain() -> None:
    """Refuse to begin where the end is known: no C compiler, or no headers of this Python."""
    words = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    cure = f"install both (Debian: apt-get install gcc python3-dev), or build without {ASKED}"
    if shutil.which(words[0]) is None:
        refuse(f"{ASKED}=1 needs a C compiler, and there is no {words[0]}; {cure}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        refuse(f"{ASKED}=1 needs Python's C headers, and there is no {header}; {cure}")


def compiled_modules(build_temp: Path) -> list[Any]:
    """Generate C below `build_temp`; the extensions to build of it.

    mypy's options are these and not the project's, which are for checking all of it. Packages of others stay unknown to
    it, whether they are there or not: so what is generated does not depend on where it is.
    """
    try:
        from mypyc.build import mypycify
    except ImportError:
        refuse(f"{ASKED}=1 needs mypyc, which comes with mypy; pip install '{COMPILER}'")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "mypy.ini")
        lines = (
            "[mypy]",
            f"mypy_path = {Path('stubs').resolve()}",
            f"python_version = {sys.version_info.major}.{sys.version_info.minor}",
            "ignore_missing_imports = True",
            "no_site_packages = True",
            f"cache_dir = {folder}",
        )
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        extensions: list[Any] = mypycify(
            ["--config-file", str(config), *COMPILED],
            opt_level="3",
            debug_level="1",
            group_name=GROUP,
            target_dir=str(build_temp),
        )
    for one in extensions:
        # A compiler that warns of more than those it was written with is no reason to have no build. Nobody outside the
        # library calls its functions by their names: those are bound when it is built, not when it is loaded (a round
        # trip takes 4 % less).
        one.extra_compile_args += ["-Wno-error", "-fvisibility=hidden", "-fno-semantic-interposition", "-fno-plt"]
    return extensions


class BuildCompiled(build_ext):
    """Generates the C where it is built only: metadata and a source distribution need none of it."""

    def run(self) -> None:
        """Compile into the build folder, where nothing compiled of an earlier build is left."""
        if self.inplace:
            refuse(f"{ASKED}=1: no build beside the sources, where it would go stale silently; use pip install .")
        for stale in Path(self.build_lib).rglob("*.so"):
            stale.unlink()
        self.distribution.ext_modules = compiled_modules(Path(self.build_temp))
        # It looked at its extensions when it was made ready.
        self.reinitialize_command(self)
        self.ensure_finalized()
        super().run()


class RefuseEditable(editable_wheel):
    """An editable install stays pure Python."""

    def run(self) -> None:
        """Say so."""
        refuse(
            f"{ASKED}=1: an editable install stays pure Python, as compiled modules would go stale silently; "
            f"use pip install . or unset {ASKED}"
        )


def compiling() -> dict[str, Any]:
    """What `setup` is given in addition."""
    check_toolchain()
    return {
        "setup_requires": [COMPILER],
        # Says that the wheel is for one platform; what is really built is known when it is.
        "ext_modules": [Extension(f"{GROUP}__mypyc", [])],
        "cmdclass": {"build_ext": BuildCompiled, "editable_wheel": RefuseEditable},
    }


if __name__ == "__main__":
    setup(**(compiling() if wanted() else {}))
