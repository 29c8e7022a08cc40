"""The C ring of the kernel's `tools/hv`, built here and run between two cores: what our ring is measured
against.

Its sources come from the kernel's source package and stay in the cache; `tools/c/hv_ring.c` is the part of
ours that drives them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite
from tools.c_programs import C_SOURCES, built
from tools.kernel_download import downloaded_tools_hv
from tools.kernel_source import tools_hv

NAME: Final = "C ring of tools/hv"
LIMIT: Final = "C ring of this format"
"""Without our checks and publishing in batches, too: what this machine can do at all."""
_DRIVER: Final = C_SOURCES / "hv_ring.c"
_LIMIT: Final = C_SOURCES / "ring_limit.c"
_TIMEOUT_S: Final = 60


def build(*, fetch: bool) -> Path:
    """Compile the ring and its driver, once for each version of either; MissingPrerequisite says what lacks."""
    sources = kernel_tools(fetch=fetch)
    return built(NAME, [_DRIVER, sources / "vmbus_bufring.c"], [sources / "vmbus_bufring.h"], sources)


def kernel_tools(*, fetch: bool) -> Path:
    """The kernel's `tools/hv`: of an installed source package, else downloaded, now if it may `fetch`."""
    try:
        return tools_hv()
    except MissingPrerequisite:
        return downloaded_tools_hv(fetch=fetch)


def runner(payload_size: int, ring_bytes: int, cpus: tuple[int, int], *, fetch: bool) -> Callable[[int], float]:
    """Return what sends so many packets one by one and gives packets a second.

    The sender runs on the first core, the receiver on the second; both spin. `payload_size` must be a
    multiple of 8, since its sender breaks on others. MissingPrerequisite as `build`.
    """
    assert payload_size % 8 == 0, payload_size
    program = build(fetch=fetch)

    def run(packets: int) -> float:
        arguments = [str(number) for number in (packets, payload_size, ring_bytes, *cpus)]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        return packets * 1e9 / int(done.stdout)

    return run


def limit_runner(payload_size: int, ring_bytes: int, batch: int, cpus: tuple[int, int]) -> Callable[[int], float]:
    """Return what sends so many packets through a C ring of the same format, and gives packets a second.

    It publishes once for each `batch`. MissingPrerequisite when there is no compiler.
    """
    program = built(LIMIT, [_LIMIT])

    def run(packets: int) -> float:
        arguments = [str(number) for number in (packets, payload_size, ring_bytes, batch, *cpus)]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        return packets * 1e9 / int(done.stdout)

    return run
