"""The terminal that everything is printed to."""

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:  # a log or a pipe: do not wrap tables at a width nobody asked for
    console = Console(highlight=False, soft_wrap=True, width=120)


def say(text: str) -> None:
    """Print one line."""
    console.print(text, markup=False)
