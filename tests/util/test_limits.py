"""How many files may be open."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from d2ft_fl.util import limits

CODE = """
import resource
from d2ft_fl.util import limits
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
limits.raise_descriptors()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize("soft, hard, wanted", [(64, 200, 200), (100, 100, 100), (200, 300, 300)])
def test_as_many_as_the_user_may_have(soft, hard, wanted):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(soft=soft, hard=hard)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(wanted), str(hard)]


def test_no_more_than_programs_that_walk_through_them_can_bear(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    limits.raise_descriptors()
    assert asked == [(limits.MOST, resource.RLIM_INFINITY)]


def test_who_has_too_many_open_is_told_what_to_do():
    assert "ulimit -n" in limits.advice(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert limits.advice(OSError(errno.ENOENT, "gone")) == ""
