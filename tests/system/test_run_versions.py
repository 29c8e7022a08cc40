"""The guest falls back, version by version, to what the host speaks; over real processes.

Every version of the host is in `tests/system/test_eras.py`; here is what the host says of the way down.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.commands import assert_gone, call, report

VERSIONS = ("2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3")


@pytest.mark.parametrize("version", ["2.4", "5.1"])
def test_guest_falls_back_to_the_hosts_version(tmp_path: Path, version: str) -> None:
    """Versions above the host's are refused cleanly; the host's own is negotiated and every channel opens."""
    scenario = tmp_path / "old.toml"
    scenario.write_text(f'[machine]\nhost_version = "{version}"\n[[device]]\nclass = "echo"\ncount = 3\n')
    name = f"t-v{version.replace('.', '-')}"

    done = call(tmp_path, "run", str(scenario), "--name", name, "--duration", "0", "--json")

    assert done.returncode == 0, done.stderr
    told = report(done.stdout)
    assert (told["version"], told["channels_open"], told["leaked"]) == (version, 3, 0)
    # Connection 4 came with 5.0: on an older host the four newest versions find no connection at all.
    nowhere = 4 if version < "5.0" else 0
    assert told["refused"].get("unknown-message-connection", 0) == nowhere
    assert told["refused"].get("contact-version", 0) == len(VERSIONS) - 1 - VERSIONS.index(version) - nowhere
    assert_gone(name)
