"""Limits of one process: asked before a machine is made, and named where one of them was met."""

from __future__ import annotations

import errno
import os
import resource

import pytest

from emu.errors import MissingPrerequisite
from emu.limits import FILES, FILES_A_VCPU, ROOM_BYTES, check_limits, limit_behind, too_tight

RAM = 1 << 30
NEEDED = {
    resource.RLIMIT_AS: 2 * RAM + ROOM_BYTES,
    resource.RLIMIT_FSIZE: RAM,
    resource.RLIMIT_NOFILE: FILES + 4 * FILES_A_VCPU,
}


class Limits:
    """What `getrlimit` says instead: everything is unlimited but what was set."""

    def __init__(self) -> None:
        self.soft: dict[int, int] = {}

    def getrlimit(self, number: int) -> tuple[int, int]:
        """Soft and hard."""
        return self.soft.get(number, resource.RLIM_INFINITY), resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """A process without limits; a test sets some."""
    limits = Limits()
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    return limits


@pytest.mark.parametrize("number", NEEDED)
def test_a_limit_that_is_just_enough_is_no_trouble(limits: Limits, number: int) -> None:
    """Nor is none at all."""
    check_limits(RAM, 0, 4)
    limits.soft[number] = NEEDED[number]

    check_limits(RAM, 0, 4)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            resource.RLIMIT_AS,
            "the limit on address space (`ulimit -v`) is 3145727 KiB, which is too little for a machine with 1024 MiB "
            "of RAM; raise it to 3145728 KiB, or ask for less RAM",
        ),
        (
            resource.RLIMIT_FSIZE,
            "the limit on the size of a file (`ulimit -f`) is 1048575 KiB, which is too little for a machine with "
            "1024 MiB of RAM; raise it to 1048576 KiB, or ask for less RAM",
        ),
        (
            resource.RLIMIT_NOFILE,
            "the limit on open files (`ulimit -n`) is 55, which is too little for a machine with 4 vCPUs; "
            "raise it to 56 or more",
        ),
    ],
)
def test_a_limit_that_is_too_small_is_named_with_its_cure(limits: Limits, number: int, said: str) -> None:
    """What it is, how the shell calls it, and how much is enough."""
    limits.soft[number] = NEEDED[number] - 1

    with pytest.raises(MissingPrerequisite) as refused:
        check_limits(RAM, 0, 4)

    assert str(refused.value) == said


def test_what_no_machine_fits_into_is_known_beforehand(limits: Limits) -> None:
    """Nothing is started early then: it would end in a traceback before anybody has looked at the scenario."""
    assert not too_tight()
    limits.soft[resource.RLIMIT_AS] = ROOM_BYTES
    assert not too_tight()

    limits.soft[resource.RLIMIT_AS] = ROOM_BYTES - 1

    assert too_tight()


def test_a_segment_that_is_larger_than_ram_counts(limits: Limits) -> None:
    """The recorder's rings are a file, too."""
    limits.soft[resource.RLIMIT_FSIZE] = 1 << 26

    check_limits(1 << 25, 1 << 26, 1)
    with pytest.raises(MissingPrerequisite, match="ulimit -f"):
        check_limits(1 << 25, 1 + (1 << 26), 1)


@pytest.mark.parametrize(
    ("error", "number", "option"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), resource.RLIMIT_AS, "-v"),
        (MemoryError(), resource.RLIMIT_AS, "-v"),
        (MemoryError(), resource.RLIMIT_DATA, "-d"),
        (ImportError("x.so: failed to map segment from shared object"), resource.RLIMIT_AS, "-v"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), resource.RLIMIT_FSIZE, "-f"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), resource.RLIMIT_NOFILE, "-n"),
        # As posix_ipc says it, without a number.
        (OSError("This process already has the maximum number of files open"), resource.RLIMIT_NOFILE, "-n"),
    ],
)
def test_the_limit_behind_an_error_is_named_only_where_there_is_one(
    limits: Limits, error: Exception, number: int, option: str
) -> None:
    """Without a limit the same error comes of something else."""
    assert limit_behind(error) is None
    limits.soft[number] = 4096

    said = limit_behind(error)

    assert said is not None
    assert (f"(`ulimit {option}`) is 4" in said, said.endswith(": raise it")) == (True, True)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), ImportError("no module"), ValueError("4")])
def test_other_errors_come_of_no_limit(limits: Limits, error: Exception) -> None:
    """Whatever limits there are."""
    limits.soft.update(dict.fromkeys(NEEDED, 1))

    assert limit_behind(error) is None
