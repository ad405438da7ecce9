"""Compiles the solver in another process, beside what else a command has to do first.

:func:`compiling` starts it as

    python -m d2ft_fl.planning.solver_process LOCK LIFELINE [coupled]

with the file descriptors of the lock of the compile cache, which it holds until it ends, and of its
lifeline. Whoever
wants to plan meanwhile, in any process, waits for that (:mod:`d2ft_fl.util.compile_cache`).
"""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from d2ft_fl.planning import knapsack
from d2ft_fl.util import compile_cache, lifeline

COUPLED = "coupled"


@contextmanager
def compiling(coupled: bool) -> Iterator[bool]:
    """Have the solver compiled where it is not; what is not compiled at the end is given up.

    Yields:
        Whether a process compiles it.

    Args:
        coupled: Whether the solver of coupled clients is needed, too.
    """
    lock = None if knapsack.is_compiled(coupled) else compile_cache.try_lock()
    if lock is None:
        yield False
        return
    reader, writer = lifeline.new()
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(lock), str(reader), *([COUPLED] if coupled else [])],
        pass_fds=(lock, reader),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for handed_over in (lock, reader):
        os.close(handed_over)
    try:
        yield True
    finally:
        lifeline.close(writer)  # no harm where it has ended
        process.wait()


if __name__ == "__main__":
    lifeline.end_with(int(sys.argv[2]))
    compile_cache.compile_here()
    gc.set_threshold(100_000)  # numba makes millions of objects, hardly any in cycles
    knapsack.compile_solver(coupled=COUPLED in sys.argv[3:])
