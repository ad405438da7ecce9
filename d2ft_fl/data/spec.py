"""Which model and which data. What reads these is in :mod:`.models` and :mod:`.data`.

Those bring in timm and datasets, which take seconds to import; not every command needs them.
"""

from dataclasses import dataclass
from typing import Any


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
