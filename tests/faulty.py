"""A budget source whose clients fail when they work, in ways that only a process can."""

import os
import signal
import time
from pathlib import Path

from d2ft_fl.budgets.budget import ClientDescription


def budget(client: ClientDescription, round_number: int) -> dict[str, str]:
    """A client is asked twice in a round: the first time it answers, the second time it works."""
    asked = Path(os.environ["D2FT_TEST_ASKED"], f"{round_number}-{client.client}")
    how = os.environ.get(f"D2FT_TEST_{round_number}_{client.client}", "")
    with asked.open("a") as file:
        file.write("x")
    if how and asked.stat().st_size % 2 == 0:
        {"hang": lambda: time.sleep(600), "die": die, "raise": fail}[how]()
    return {"flops": "80 %"}


def die() -> None:
    """As when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """As a battery may."""
    raise RuntimeError("no battery")
