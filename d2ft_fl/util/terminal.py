"""The terminal that everything is printed to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:  # a log or a pipe: do not wrap tables at a width nobody asked for
    console = Console(highlight=False, soft_wrap=True, width=120)


def say(text: str) -> None:
    """Print one line."""
    console.print(text, markup=False)


def progress_bar(hidden: bool = False) -> Progress:
    """Return a bar that shows how far something is, and goes when it is done.

    Args:
        hidden: Whether nothing may be printed but a result; a log gets no bar either.
    """
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=hidden or not console.is_terminal,
    )  # fmt: skip


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far something is, in a terminal; yields what is called with how many more are done.

    Args:
        description: What is being done.
        total: How many there are.
    """
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def busy(description: str) -> Iterator[None]:
    """Show, in a terminal, that something takes its time."""
    if not console.is_terminal:
        yield
        return
    with console.status(description):
        yield
