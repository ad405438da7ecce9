"""Lifelines: what a process starts ends with it, however it ends.

A lifeline is a pipe. Whoever starts a process keeps the writing end, and loses it when it dies, at
the latest; the process has the reading end, where the pipe then ends. The kernel has a signal for
that on Linux, but it comes when the thread that started a process ends, and only to children.

A fork of this process must not keep what says that this process lives: writing ends, and locks.
"""

import os
import threading
from contextlib import suppress

_signs: set[int] = set()  # file descriptors that say that this process lives
CALMLY = b"."  # what is written to a lifeline whose end is meant


def own(descriptor: int) -> int:
    """Have a fork of this process close a file descriptor at once; return it."""
    _signs.add(descriptor)
    return descriptor


def close(descriptor: int) -> None:
    """Close a file descriptor, which may be one of :func:`own`."""
    _signs.discard(descriptor)
    os.close(descriptor)


def new() -> tuple[int, int]:
    """Return the reading and the writing end of a lifeline."""
    reader, writer = os.pipe()
    return reader, own(writer)


def cut(writer: int) -> None:
    """Close the writing end of a lifeline on purpose: this process lives, and sees to the rest."""
    with suppress(BrokenPipeError):  # the process has ended
        os.write(writer, CALMLY)
    close(writer)


def end_with(reader: int) -> None:
    """Have this process end at once, whatever it is doing, when the lifeline does."""
    threading.Thread(target=_end_with, args=(reader,), daemon=True).start()


def _end_with(reader: int) -> None:
    os.read(reader, 1)
    os._exit(1)


def _let_go() -> None:
    for descriptor in _signs:
        os.close(descriptor)
    _signs.clear()


os.register_at_fork(after_in_child=_let_go)
