"""What a process takes of a machine's memory beside the tensors of a round.

The cost model counts tensors. A process that trains takes more: the interpreter, PyTorch and this
package, the model as it was built, the client's examples, and the messages that come and go. A
budget of the process (:attr:`.Budget.memory_of`) leaves what remains for tensors.
"""

import json

import psutil

from d2ft_fl.budgets.kept_speeds import folder, keep_text, software
from d2ft_fl.util.strict_json import write_json

GRAIN = 1 << 24  # bytes: what is told is a multiple; processes differ by some megabytes
FIRST_STEP = 128 << 20  # bytes: libraries that the first step loads, freed memory that is kept
MESSAGES = 3  # copies that a process has at once: as it came, taken apart, and the answer
FILE = "worker-memory.json"


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def told(taken: int) -> int:
    """Return what a client says its process takes beside tensors: bytes.

    It is rounded up and has room for the first step, so that what the process has when the plan
    arrives, or another one on the same device, is no more.

    Args:
        taken: What it takes by now.
    """
    return -(-(taken + FIRST_STEP) // GRAIN) * GRAIN


def kept_worker_memory() -> int | None:
    """Return what a worker process took here before any model; None where nobody measured it."""
    try:
        found = json.loads((folder() / FILE).read_text(encoding="utf-8"))
        return int(found["bytes"]) if found["software"] == software() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_worker_memory(size: int) -> None:
    """Keep what a worker process takes before any model, where the cache can be written."""
    keep_text(folder() / FILE, write_json({"software": software(), "bytes": size}))
