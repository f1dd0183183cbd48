"""Another user of the same machine, who can do whatever the system lets them."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NOBODY = 65534
# Helpers of secure sums stand beside their tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "secure"))


@pytest.fixture
def nobody() -> int:
    """The other user's number; only root may give files away."""
    if os.geteuid() != 0:
        pytest.skip("making files of another user needs root")
    return NOBODY


@pytest.fixture
def as_nobody(nobody: int) -> Callable[[Callable[[], object]], bool]:
    """Do something as the other user; whether the system let them."""

    def attempt(act: Callable[[], object]) -> bool:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setgroups([])
                os.setgid(nobody)
                os.setuid(nobody)
                act()
                status = 0
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return attempt


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder like /tmp: everybody may make names in it, and nobody take those of others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)
