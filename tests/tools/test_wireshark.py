"""`vmbus-emu wireshark`: the dissector comes where Wireshark looks for it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from tools.exit_status import ExitStatus
from tools.wireshark import DISSECTOR, folder_of

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def fake(directory: Path, text: str) -> Path:
    """A program `tshark` that says where its folders are."""
    program = directory / "tshark"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    return program


def test_install_goes_where_wireshark_says(run_cli: RunCli, tmp_path: Path) -> None:
    """The folder of `tshark -G folders`, made if it is not there; the path is what is printed."""
    folder = tmp_path / "lua plugins"
    (tmp_path / "bin").mkdir()
    fake(tmp_path / "bin", f"Temp:\t/tmp\nPersonal Plugins:\t/other\nPersonal Lua Plugins:\t{folder}")
    done = run_cli("wireshark", "install", env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"})

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}/vmbus.lua\n", "")
    assert (folder / "vmbus.lua").read_bytes() == DISSECTOR.read_bytes()


def test_install_chooses_a_folder(run_cli: RunCli, tmp_path: Path) -> None:
    """`--dir`, and once more over what is there; as JSON."""
    for _again in range(2):
        done = run_cli("wireshark", "install", "--dir", tmp_path / "here", "--json")

        assert json.loads(done.stdout)["installed"] == str(tmp_path / "here" / "vmbus.lua")
    assert (tmp_path / "here" / "vmbus.lua").read_bytes() == DISSECTOR.read_bytes()


def test_without_wireshark_it_goes_where_4_0_looks(run_cli: RunCli, tmp_path: Path) -> None:
    """Nobody to ask: the folder below the home directory."""
    done = run_cli("wireshark", "install", env={"PATH": str(tmp_path), "HOME": str(tmp_path)})

    assert done.stdout == f"{tmp_path}/.local/lib/wireshark/plugins/vmbus.lua\n"


def test_folder_that_cannot_be_written_is_one_line(run_cli: RunCli, tmp_path: Path) -> None:
    """The user's to mend."""
    (tmp_path / "file").write_text("")
    done = run_cli("wireshark", "install", "--dir", tmp_path / "file" / "below")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitStatus.USAGE, "", 1)
    assert "--dir" in done.stderr


def test_show_says_where_it_is(run_cli: RunCli) -> None:
    """A path for tshark's -X lua_script."""
    assert run_cli("wireshark", "show").stdout == f"{DISSECTOR}\n"
    assert json.loads(run_cli("wireshark", "show", "--json").stdout)["dissector"] == str(DISSECTOR)


def test_program_that_says_nothing_useful_is_passed_over(tmp_path: Path) -> None:
    """An old one without that line, and one that is not there."""
    assert folder_of(str(fake(tmp_path, "Temp:\t/tmp"))) is None
    assert folder_of(str(tmp_path / "none")) is None


def test_installed_dissector_is_loaded(run_cli: RunCli, tshark: str, tmp_path: Path) -> None:
    """tshark finds it in the folder that it named, and has both protocols."""
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    installed = run_cli("wireshark", "install", env=home)
    done = subprocess.run(
        [tshark, "-G", "protocols"], env={**home, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )

    assert installed.stdout.startswith(str(tmp_path))
    assert {"vmbus", "vmbus_ring"} <= {word for line in done.stdout.splitlines() for word in line.split("\t")}
