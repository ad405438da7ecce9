"""Units, labels and words of everything that is shown: once."""

from collections.abc import Mapping
from typing import Any

from d2ft_fl.budgets.budget import DEADLINE
from d2ft_fl.config.renamed import policy_entries

LABELS = {"flops": "FLOPs", "memory": "memory", "bytes_up": "up", "bytes_down": "down"}


USED = {
    "flops": "FLOPs, all clients and rounds",
    "memory": "peak memory, mean client",
    "bytes_up": "bytes up, all clients and rounds",
    "bytes_down": "bytes down, all clients and rounds",
}


PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float, unit: str) -> str:
    """A number with a prefix and its unit: 1.23 GFLOP."""
    for factor, prefix in PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def unit_of(resource: str) -> str:
    """What a resource is counted in."""
    return "FLOP" if resource == "flops" else "B"


def policy_words(entries: Mapping[str, Any]) -> str:
    """How a client runs its schedule, where that is not as it is configured, in few words.

    Args:
        entries: Of an :class:`~d2ft_fl.config.training_options.ExecutionPolicy`, as
            ``clients.jsonl`` has them.
    """
    entries = policy_entries(entries)
    batch = entries.get("batch")
    tokens, micro_batches = entries.get("tokens"), entries.get("micro_batches") or 1
    up, down = entries.get("bits_up"), entries.get("bits_down")
    said = [
        f"batch {batch}" * bool(batch),
        f"{tokens} tokens" * bool(tokens),
        f"{micro_batches} passes" * (micro_batches > 1),
        "again" * bool(entries.get("checkpointing")),
        f"{up} bits both ways" if up and up == down else f"{up} bits up" * bool(up),
        f"{down} bits down" * bool(down and up != down),
    ]
    return ", ".join(filter(None, said))


LIMIT_LABELS = {**LABELS, DEADLINE: "deadline"}


OPERATIONS = {"full": "FULL", "frozen": "FROZEN", "forward_only": "FWD", "shortcut": "SKIP"}


def seconds(value: float) -> str:
    """Three digits, or whole seconds where there are more."""
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


UNNAMED = "unnamed"  # devices without a name
