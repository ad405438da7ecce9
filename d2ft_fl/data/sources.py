"""Where examples come from: embedded, made up, a folder or the Hugging Face hub.

scikit-learn and ``datasets`` are imported by what needs them: a worker process with embedded data
does without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_fl.config.choices import DIGITS, HUB, MADE_UP
from d2ft_fl.data.kept import kept
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.errors import ConfigError

if TYPE_CHECKING:
    import datasets

SPLIT_SEED = 2504  # one test split for all seeds of a comparison


@dataclass
class Split:
    """One split: labels and other columns at once, images decoded on demand.

    Attributes:
        table: Makes a light data set of everything but the image, label included.
        labels: int64 [examples].
        decode: Indices to raw images (PIL or arrays).
        names: Class names.
    """

    table: Callable[[], "datasets.Dataset"]
    labels: np.ndarray
    decode: Callable[[np.ndarray], list[Any]]
    names: list[str]

    def subset(self, count: int, seed: int) -> np.ndarray:
        """Return indices of ``count`` seeded random examples (0: all), ascending."""
        if count == 0 or count >= len(self.labels):
            return np.arange(len(self.labels))
        order = np.random.default_rng(seed).permutation(len(self.labels))
        return np.sort(order[:count])


def digits() -> tuple[Split, Split]:
    """Return scikit-learn's 1,797 digits (UCI), 8 x 8 pixels; two fifths are held out."""
    arrays = kept((DIGITS, SPLIT_SEED, version("scikit-learn")), _read_digits)
    pixels, labels = arrays["pixels"], arrays["labels"]
    names = [str(digit) for digit in range(10)]

    def split(rows: np.ndarray) -> Split:
        return Split(
            lambda: _labels_alone(labels[rows]),
            labels[rows],
            lambda index: list(pixels[rows[index]]),
            names,
        )

    return split(arrays["train"]), split(arrays["test"])


def _read_digits() -> dict[str, np.ndarray]:
    """Return pixels, uint8 [n, 8, 8, 1], labels, and the rows of both splits, ascending."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.4, random_state=SPLIT_SEED, stratify=labels
    )
    return {"pixels": pixels, "labels": labels, "train": np.sort(train), "test": np.sort(test)}


def _labels_alone(labels: np.ndarray) -> "datasets.Dataset":
    """Return a data set of one column."""
    import datasets

    return datasets.Dataset.from_dict({"label": labels})


def made_up(spec: DataSpec) -> tuple[Split, Split]:
    """Return noise of the model's size, ten classes: to measure speed with any number of examples.

    As many as are asked for; else 32 for each client, and 256 to test on.
    """

    def split(number: int, count: int) -> Split:
        labels = np.random.default_rng([spec.seed, number]).integers(0, 10, count)

        def decode(indices: np.ndarray) -> list[np.ndarray]:
            shape = spec.image_size, spec.image_size, spec.channels
            draws = (np.random.default_rng([spec.seed, number, 1, int(i)]) for i in indices)
            return [draw.integers(0, 256, shape, dtype=np.uint8) for draw in draws]

        names = [str(label) for label in range(10)]
        return Split(lambda: _labels_alone(labels), labels, decode, names)

    return split(0, spec.train_examples or 32 * spec.clients), split(1, spec.test_examples or 256)


def folder_splits(spec: DataSpec) -> tuple[Split, Split]:
    """Return the training and the held-out split of a folder, or of a data set of the hub."""
    train, test = hub_or_folder(spec.dataset, spec.label_column)
    return _split(train, spec.label_column), _split(test, spec.label_column)


def _split(data: "datasets.Dataset", label: str) -> Split:
    image = _image_column(data)
    labels = np.asarray(data.with_format("numpy")[label][:], dtype=np.int64)
    names = list(data.features[label].names)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise ConfigError(
            f"column {label!r} holds no labels, or some outside its {len(names)} classes"
        )
    return Split(
        lambda: data.remove_columns([image]),
        labels,
        lambda index: data[index.tolist()][image],
        names,
    )


def _image_column(data: "datasets.Dataset") -> str | None:
    import datasets

    return next((n for n, f in data.features.items() if isinstance(f, datasets.Image)), None)


def check_folder(dataset: str) -> None:
    """Raise ConfigError unless a data set is a folder."""
    if not Path(dataset).is_dir():
        raise ConfigError(
            f"dataset = {dataset!r} is not a folder; use {DIGITS!r}, {MADE_UP!r}, "
            f"'{HUB}OWNER/NAME', or a folder of parquet files or of images in one folder a class"
        )


def _load(dataset: str) -> "datasets.DatasetDict":
    """Return all splits of a data set of the hub, or of a local folder."""
    import datasets

    datasets.disable_progress_bars()
    if dataset.startswith(HUB):
        name, _, configuration = dataset.removeprefix(HUB).partition(":")
        try:
            return datasets.load_dataset(name, configuration or None)
        except Exception as error:  # whatever a hub that does not answer brings about
            raise ConfigError(
                f"dataset = {dataset!r} cannot be had from the hub: {first_line(error)}; check the "
                f"name ('{HUB}OWNER/NAME' or '{HUB}OWNER/NAME:CONFIGURATION') and the network, or "
                "use a folder"
            ) from None
    check_folder(dataset)
    try:
        return datasets.load_dataset(dataset)
    except Exception as error:  # datasets raises many kinds for a folder it cannot use
        raise ConfigError(
            f"dataset {dataset!r} holds no images that can be read: {first_line(error)}"
        ) from None


@lru_cache(maxsize=2)
def hub_or_folder(path: str, label: str) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """Return train and test of a data set with images."""
    import datasets

    loaded = _load(path)
    name = "train" if "train" in loaded else next(iter(loaded))
    train = loaded[name]
    image = _image_column(train)
    if image is None:
        raise ConfigError(
            f"dataset {path!r} holds no images: its columns are {', '.join(train.column_names)}"
        )
    if label not in train.column_names:
        raise ConfigError(
            f"label-column = {label!r} is not in dataset {path!r}; its columns are "
            f"{', '.join(train.column_names)}"
        )
    held_out = next((loaded[n] for n in ("test", "validation") if n in loaded and n != name), None)
    try:
        if not isinstance(train.features[label], datasets.ClassLabel):
            train = train.class_encode_column(label)
        if held_out is None:
            parts = train.train_test_split(test_size=0.2, seed=SPLIT_SEED, stratify_by_column=label)
            train, held_out = parts["train"], parts["test"]
        else:  # the same numbers for the same names
            held_out = held_out.cast_column(label, train.features[label])
        rgb = datasets.Image(mode="RGB")
        return train.cast_column(image, rgb), held_out.cast_column(image, rgb)
    except Exception as error:  # as above
        raise ConfigError(
            f"labels {label!r} of dataset {path!r} cannot be used: {first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
