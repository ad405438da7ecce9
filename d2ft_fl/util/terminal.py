"""The terminal that everything is printed to."""

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line."""
    console.print(text, markup=False)
