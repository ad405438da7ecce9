"""Compiles the solver in another process, beside what else a command has to do first.

:func:`compiling` starts it as

    python -m d2ft_fl.planning.solver_process LOCK [coupled]

with the file descriptor of the lock of the compile cache, which it holds until it ends. Whoever
wants to plan meanwhile, in any process, waits for that (:mod:`d2ft_fl.util.compile_cache`).
"""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from d2ft_fl.planning import knapsack
from d2ft_fl.util import compile_cache

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
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(lock), *([COUPLED] if coupled else [])],
        pass_fds=(lock,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(lock)  # the process has it
    try:
        yield True
    finally:
        process.terminate()  # no harm where it has ended
        process.wait()


if __name__ == "__main__":
    compile_cache.compile_here()
    gc.set_threshold(100_000)  # numba makes millions of objects, hardly any in cycles
    knapsack.compile_solver(coupled=COUPLED in sys.argv[2:])
