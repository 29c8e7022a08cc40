"""The peers that `bench` compares with: each carries what it is given, and what cannot is left out with a reason."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import psutil
import pytest

from tests.tools.conftest import PEERS
from tools import peers
from tools.peer_links import LINKS, Link, Receiving, Sending
from tools.testing import wait_for
from tools.two_ends import two_cpus

CPUS = two_cpus() or (0, 0)


@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_carries_messages_and_brings_them_back(name: str) -> None:
    """Some messages one way, some there and back; or it is not installed, and that is said with the cure."""
    left_in_shm = set(Path("/dev/shm").iterdir())
    if reason := peers.missing(name):
        assert "pip install" in reason
        with pytest.raises(peers.LeftOut, match="not installed"):
            peers.messages_per_second(name, 64, 100, CPUS)
        return

    assert peers.messages_per_second(name, 64, 100, CPUS) > 0
    times = peers.round_trips(name, 64, 20, CPUS)

    assert len(times) == 20 and all(times)
    assert {one for one in Path("/dev/shm").iterdir() if "vmbus-emu-" in one.name} <= left_in_shm


class Deaf(Link):
    """A peer whose receiver never gets anything."""

    def open(self) -> None:
        """Nothing is made."""

    def sending(self) -> Sending:
        """Send to nobody."""
        return Sending(len)

    def receiving(self) -> Receiving:
        """Wait for ever."""

        def one() -> bytes:
            while True:
                pass

        return Receiving(one)

    def close(self) -> None:
        """Nothing was made."""


class Broken(Deaf):
    """A peer that cannot be sent into."""

    def sending(self) -> Sending:
        """Fail."""
        raise OSError("no such wire")


@pytest.mark.parametrize(
    ("link", "deadline_s", "reason"),
    # One that fails says so at once; how soon it gets a core is the computer's affair.
    [(Deaf, 0.2, "not done after 0.2 s"), (Broken, peers.DEADLINE_S, "OSError: no such wire")],
)
def test_peer_that_hangs_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, link: type[Link], deadline_s: float, reason: str
) -> None:
    """Its deadline passes, or an end fails: named with the reason, both processes gone, nothing fatal."""
    monkeypatch.setattr("tools.peers.LINKS", {**LINKS, "odd": link})

    with pytest.raises(peers.LeftOut, match=reason):
        peers.messages_per_second("odd", 64, 10, CPUS, deadline_s)


@pytest.mark.parametrize("peer", PEERS)
def test_what_a_peer_makes_goes_with_who_was_killed(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill -9` of a measurement leaves neither a folder in the temporary directory nor a file in /dev/shm."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sends = (peer, 64, 10**9, CPUS)
    measuring = multiprocessing.get_context("fork").Process(target=peers.messages_per_second, args=sends)
    measuring.start()
    assert measuring.pid is not None
    of_it = psutil.Process(measuring.pid)

    def made() -> list[Path]:
        return [*tmp_path.iterdir(), *Path("/dev/shm").glob(f"*vmbus-emu-{measuring.pid}-*")]

    try:
        wait_for(lambda: bool(made()) and sum(one.cpu_times().user > 0 for one in of_it.children()) >= 2, "two ends")
    finally:
        measuring.kill()
        measuring.join()

    wait_for(lambda: not made(), "what the peer made to be gone")
