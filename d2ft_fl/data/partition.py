"""Which client has which training examples.

flwr-datasets is imported by what needs it. Who has which of the embedded data is worked out once on
a machine: importing what does it takes seconds, in every worker process.
"""

import hashlib
import inspect
import warnings
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from d2ft_fl.config.choices import EMBEDDED_DATASETS
from d2ft_fl.data.kept import kept
from d2ft_fl.data.sources import Split, first_line
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.errors import ConfigError

ALL = "all"  # in place of a partitioner: every client has everything, as where data are its own


INDEX = "d2ft-index"  # the column that follows an example through partitioning


def partitioner_class(name: str) -> type:
    """Return a partitioner of flwr-datasets by its name, with or without the ending, in any case.

    Raises:
        ConfigError: When there is none.
    """
    from flwr_datasets import partitioner as partitioners

    known = {n.removesuffix("Partitioner").lower(): n for n in partitioners.__all__}
    known.pop("", None)
    key = name.removesuffix("Partitioner").replace("-", "").replace("_", "").lower()
    if key not in known:
        names = ", ".join([ALL, *sorted(n.removesuffix("Partitioner") for n in known.values())])
        raise ConfigError(f"partitioner = {name!r} is unknown; use one of {names}")
    return getattr(partitioners, known[key])


def partition_of(spec: DataSpec, train: Split) -> list[np.ndarray]:
    """Share the training examples out: per client, indices into ``train``, seeded."""
    # In random order: some partitioners cut the data as it lies, and folders lie by class.
    chosen = np.random.default_rng([spec.seed, 2]).permutation(
        train.subset(spec.train_examples, spec.seed)
    )
    if spec.clients > len(chosen) and spec.partitioner.lower() != ALL:
        raise ConfigError(
            f"clients = {spec.clients} is more than the {len(chosen)} training examples; "
            f"ask for at most {len(chosen)}"
        )
    if spec.partitioner.lower() == ALL:
        return [np.sort(chosen)] * spec.clients
    if spec.dataset not in EMBEDDED_DATASETS:
        return _divided(spec, train, chosen)

    def divide() -> dict[str, np.ndarray]:
        parts = _divided(spec, train, chosen)
        return {"rows": np.concatenate(parts), "ends": np.cumsum([len(part) for part in parts])}

    labels = hashlib.sha256(train.labels.tobytes() + chosen.tobytes()).hexdigest()
    packages = [version(name) for name in ("flwr-datasets", "numpy")]
    what = replace(spec, image_size=0, channels=0, test_examples=0)  # which do not matter
    arrays = kept(("partition", what, labels, packages), divide)
    return np.split(arrays["rows"], arrays["ends"][:-1])


def _divided(spec: DataSpec, train: Split, chosen: np.ndarray) -> list[np.ndarray]:
    """Divide chosen examples over clients: per client, indices into ``train``, ascending."""
    import datasets

    datasets.disable_progress_bars()
    kind = partitioner_class(spec.partitioner)
    accepted = inspect.signature(kind).parameters
    arguments = dict(spec.partitioner_arguments)
    for key, value in (
        ("num_partitions", spec.clients),
        ("partition_by", spec.label_column if spec.dataset not in EMBEDDED_DATASETS else "label"),
        ("seed", spec.seed),
    ):
        if key in accepted:
            arguments.setdefault(key, value)
    if unknown := sorted(arguments.keys() - accepted.keys()):
        raise ConfigError(
            f"partitioner-args: {unknown[0]!r} is not a parameter of {kind.__name__}; it takes "
            f"{', '.join(accepted)}"
        )
    columns = train.table().select(chosen)
    columns = columns.add_column(INDEX, chosen.tolist())
    try:
        partitioner = kind(**arguments)
        partitioner.dataset = columns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # retries; what matters raises
            made = partitioner.num_partitions
            if made != spec.clients:
                raise ConfigError(
                    f"partitioner {kind.__name__} makes {made} parts, not one for each of "
                    f"clients = {spec.clients}"
                )
            parts = [_indices(partitioner, client) for client in range(spec.clients)]
    except ConfigError:
        raise
    except Exception as error:  # partitioners validate their own arguments in many ways
        raise ConfigError(
            f"partitioner {kind.__name__} cannot share {len(chosen)} examples over "
            f"{spec.clients} clients: {first_line(error)}"
        ) from None
    for client, part in enumerate(parts):
        if len(part) == 0:
            raise ConfigError(
                f"client {client} is left with no examples; use fewer clients than {spec.clients}, "
                "more train-examples, or another partitioner"
            )
    return parts


def _indices(partitioner: Any, client: int) -> np.ndarray:
    return np.sort(np.asarray(partitioner.load_partition(client)[INDEX], dtype=np.int64))
