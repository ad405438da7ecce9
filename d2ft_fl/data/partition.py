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
from d2ft_fl.data.folders import free_name
from d2ft_fl.data.kept import kept
from d2ft_fl.data.sources import Split
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.errors import ConfigError, first_line
from d2ft_fl.util.spelling import meant, unknown

LEAST = "min_partition_size"  # a parameter of partitioners that draw until everyone has as many
SHOWN = 5  # clients in a message
ALL = "all"  # in place of a partitioner: every client has everything, as where data are its own


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
        names = sorted(n.removesuffix("Partitioner") for n in known.values())
        raise ConfigError(unknown("partitioner = ", name, [ALL, *names]))
    return getattr(partitioners, known[key])


def partition_of(spec: DataSpec, train: Split) -> list[np.ndarray]:
    """Share the training examples out: per client, indices into ``train``, seeded."""
    # In random order: some partitioners cut the data as it lies, and folders lie by class.
    chosen = np.random.default_rng([spec.seed, 2]).permutation(len(train))
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

    labels = hashlib.sha256(train.labels.tobytes()).hexdigest()
    packages = [version(name) for name in ("flwr-datasets", "numpy")]
    what = replace(spec, image_size=0, channels=0, test_examples=0)  # which do not matter
    arrays = kept(("partition", what, labels, packages), divide)
    return np.split(arrays["rows"], arrays["ends"][:-1])


def _divided(spec: DataSpec, train: Split, chosen: np.ndarray) -> list[np.ndarray]:
    """Divide chosen examples over clients: per client, indices into ``train``, ascending."""
    import datasets

    datasets.disable_progress_bars()
    kind = partitioner_class(spec.partitioner)
    arguments = _arguments(spec, kind)
    columns = train.table(train.places(chosen))
    index = free_name("index", columns.column_names)
    columns = columns.add_column(index, chosen.tolist())
    try:
        parts = _parts(spec, kind, arguments, columns, index)
    except ConfigError:
        raise
    except Exception as error:  # partitioners validate their own arguments in many ways
        reason = _too_small(spec, kind, arguments, columns, index) or first_line(error)
        if isinstance(error, ZeroDivisionError):
            reason = "some would get a part without examples"
        raise ConfigError(
            f"partitioner {kind.__name__} cannot share {len(chosen)} examples over "
            f"{spec.clients} clients: {reason}"
        ) from None
    if without := [client for client, part in enumerate(parts) if len(part) == 0]:
        raise ConfigError(
            f"client {without[0]} is left with no examples, as {len(without)} of {spec.clients} "
            "are; use fewer clients, more train-examples, or another partitioner"
        )
    return parts


def _arguments(spec: DataSpec, kind: type) -> dict[str, Any]:
    """Return what a partitioner is made with: what is configured, and what a run knows itself.

    Raises:
        ConfigError: For a parameter that it does not have, and for one that it needs.
    """
    accepted = inspect.signature(kind).parameters
    arguments = {n: list(v) if isinstance(v, tuple) else v for n, v in spec.partitioner_arguments}
    for key, value in (
        ("num_partitions", spec.clients),
        ("partition_by", spec.label_column if spec.dataset not in EMBEDDED_DATASETS else "label"),
        ("seed", spec.seed),
    ):
        if key in accepted:
            arguments.setdefault(key, value)
    if strange := sorted(arguments.keys() - accepted.keys()):
        raise ConfigError(
            f"partitioner-args: {strange[0]!r} is not a parameter of {kind.__name__}"
            f"{meant(strange[0], accepted)}; it takes {', '.join(accepted)}"
        )
    needed = [name for name, p in accepted.items() if p.default is inspect.Parameter.empty]
    if missing := [name for name in needed if name not in arguments]:
        raise ConfigError(
            f"partitioner-args lacks {missing[0]!r}, which {kind.__name__} needs; write pairs like "
            '"alpha = 0.5, min_partition_size = 5"'
        )
    return arguments


def _parts(
    spec: DataSpec, kind: type, arguments: dict[str, Any], columns: Any, index: str
) -> list[np.ndarray]:
    """Have a partitioner divide rows; return each client's, ascending."""
    partitioner = kind(**arguments)
    partitioner.dataset = columns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # retries; what matters raises
        made = partitioner.num_partitions
        if made != spec.clients:
            raise ConfigError(
                f"partitioner {kind.__name__} makes {made} parts, not one for each of "
                f"clients = {spec.clients}"
            )
        return [_indices(partitioner, client, index) for client in range(spec.clients)]


def _too_small(
    spec: DataSpec, kind: type, arguments: dict[str, Any], columns: Any, index: str
) -> str:
    """Say which clients get fewer examples than a partitioner wants them to have, if it is that."""
    parameter = inspect.signature(kind).parameters.get(LEAST)
    if parameter is None:
        return ""
    least = arguments.get(LEAST, parameter.default)
    try:
        parts = _parts(spec, kind, arguments | {LEAST: 0}, columns, index)
    except Exception:  # then it is something else
        return ""
    sizes = {client: len(part) for client, part in enumerate(parts) if len(part) < least}
    if not sizes:
        return ""
    some = ", ".join(f"client {client} has {size}" for client, size in list(sizes.items())[:SHOWN])
    return (
        f"{_counted(len(sizes))} fewer than {LEAST} = {least} examples in ten draws (in the "
        f"first {some}{', ...' if len(sizes) > SHOWN else ''}): lower {LEAST} in partitioner-args, "
        f"raise alpha = {arguments.get('alpha')}, or use fewer clients"
    )


def _counted(clients: int) -> str:
    return "1 client has" if clients == 1 else f"{clients} clients have"


def _indices(partitioner: Any, client: int, index: str) -> np.ndarray:
    return np.sort(np.asarray(partitioner.load_partition(client)[index], dtype=np.int64))
