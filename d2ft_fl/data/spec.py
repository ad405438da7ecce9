"""Which data a run has, told without importing what reads it, which takes seconds."""

from dataclasses import dataclass
from typing import Any

SPLIT_SEED = 2504  # one test split for all seeds of a comparison


@dataclass(frozen=True)
class DataSpec:
    """Which data, and how it is shared out. Equal specifications give equal data everywhere."""

    dataset: str
    label_column: str
    image_size: int
    channels: int
    clients: int
    partitioner: str
    partitioner_arguments: tuple[tuple[str, Any], ...]
    train_examples: int
    test_examples: int
    seed: int
    image_column: str = ""
    test_split: str = ""
    classes: tuple[str, ...] = ()
    bad_examples: str = "leave-out"
