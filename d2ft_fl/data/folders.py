"""Data sets of a folder or of the hub: which splits, which images, which classes.

Everything is settled here, once: the splits that train and that are held out, the column of images,
and one number for each class in all splits (:mod:`d2ft_fl.data.labels`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from d2ft_fl.config.choices import DIGITS, HUB, MADE_UP
from d2ft_fl.data import image_folder, metadata, tables
from d2ft_fl.data.labels import UNLABELLED, LabelColumn, class_names, listed
from d2ft_fl.data.spec import SPLIT_SEED
from d2ft_fl.errors import ConfigError, first_line
from d2ft_fl.util.terminal import busy

if TYPE_CHECKING:
    import datasets

HELD_OUT = ("test", "validation")  # splits that are held out, the first that has labels
HELD_OUT_SHARE = 0.2  # of the training split, where no split is held out


@dataclass(frozen=True)
class Choice:
    """What of a data set a run uses.

    Attributes:
        dataset: An absolute path, or the name of a data set of the hub.
        label: The column of labels.
        image: The column of images; empty for the only one.
        test_split: The split that is held out; empty for ``test``, else ``validation``, else a
            fifth of the training split.
        classes: Names of all classes in order; empty for those that the data set has.
    """

    dataset: str
    label: str
    image: str = ""
    test_split: str = ""
    classes: tuple[str, ...] = ()


@dataclass
class Loaded:
    """The two splits of a run, with a column of numbered classes and one of undecoded images.

    Attributes:
        train: Examples that clients share.
        test: Examples that are held out.
        image: The column of images.
        row: The column of each example's row in its split, counted from 0.
        names: Names of classes by their numbers.
        splits: Names of the splits that both come from.
        unlabelled: How many examples of each were left out because they have no label.
        notes: What somebody who runs this may want to know, a line each.
    """

    train: "datasets.Dataset"
    test: "datasets.Dataset"
    image: str
    row: str
    names: list[str]
    splits: tuple[str, str]
    unlabelled: tuple[int, int]
    notes: list[str] = field(default_factory=list)


@lru_cache(maxsize=2)
def load(choice: Choice) -> Loaded:
    """Load a data set and settle what of it is used.

    Raises:
        ConfigError: When it cannot be read, or it is not clear which class an example has.
    """
    splits, folder = _splits(choice.dataset)
    splits = {name: data for name, data in splits.items() if len(data)}
    if not splits:
        raise ConfigError(f"dataset {choice.dataset!r} holds no examples")
    if not any(choice.label in data.column_names for data in splits.values()):
        raise ConfigError(_no_labels(choice, splits))
    notes: list[str] = []
    where = f"label-column = {choice.label!r} of dataset {choice.dataset!r}"
    columns = {name: LabelColumn.read(data, choice.label, where) for name, data in splits.items()}
    names = class_names(columns, choice.classes, where)
    numbers = {
        name: column.numbered({n: i for i, n in enumerate(names)})
        for name, column in columns.items()
    }
    train, test = _chosen(choice, numbers, notes)
    used = dict.fromkeys((train, test or train))
    image = _image_column(choice, {name: splits[name] for name in used}, notes)
    row = free_name("row", *(data.column_names for data in splits.values()))
    ready = {}
    for name in used:
        data = tables.with_images(splits[name], image, folder).add_column(
            row, range(len(splits[name]))
        )
        ready[name] = _numbered(data, choice.label, numbers[name], names)
    unlabelled = {name: int((numbers[name] == UNLABELLED).sum()) for name in ready}
    for name, count in unlabelled.items():
        if count:
            notes.append(
                f"{count} of {len(numbers[name])} examples of split {name!r} have no label "
                f"({choice.label!r} is missing, empty or -1) and are left out"
            )
    if test is None:
        halves = _halves(ready[train], choice.label, where)
    else:
        halves = ready[train], ready[test]
    _note_absent(halves[0], choice.label, names, notes)
    return Loaded(
        *halves, image, row, names, (train, test or train),
        (unlabelled[train], unlabelled[test] if test else 0), notes,
    )  # fmt: skip


def check_folder(dataset: str) -> None:
    """Raise ConfigError unless a data set is a folder."""
    if not Path(dataset).is_dir():
        raise ConfigError(
            f"dataset = {dataset!r} is not a folder; use {DIGITS!r}, {MADE_UP!r}, "
            f"'{HUB}OWNER/NAME', or a folder of parquet files or of images in one folder a class"
        )


def free_name(wanted: str, *taken: Iterable[str]) -> str:
    """Return the name of a column that a data set does not have yet."""
    names = {name for columns in taken for name in columns}
    while wanted in names:
        wanted += "_"
    return wanted


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _splits(dataset: str) -> "tuple[Mapping[str, datasets.Dataset], Path | None]":
    """Return all splits, as they lie, and the folder that paths in them are relative to."""
    import datasets

    datasets.disable_progress_bars()
    if dataset.startswith(HUB):
        try:
            return tables.read_hub(dataset), None
        except Exception as error:  # whatever a hub that does not answer brings about
            raise ConfigError(
                f"dataset = {dataset!r} cannot be had from the hub: {_reason(error)}; check the "
                f"name ('{HUB}OWNER/NAME' or '{HUB}OWNER/NAME:CONFIGURATION') and the network, or "
                "use a folder"
            ) from None
    check_folder(dataset)
    folder = Path(dataset)
    try:
        with busy(f"reading {dataset}"):
            return _reader(folder)(), folder
    except ConfigError:
        raise
    except Exception as error:  # datasets raises many kinds for a folder it cannot use
        if str(error).startswith("Config name is missing"):
            raise ConfigError(
                f"dataset {dataset!r} has several configurations by its README.md: make a folder "
                "with the files of one"
            ) from None
        raise ConfigError(f"dataset {dataset!r} cannot be read: {_reason(error)}") from None


def _reader(folder: Path) -> "Callable[[], Mapping[str, datasets.Dataset]]":
    """Return what reads a folder, by the files in it."""
    if tables.is_saved(folder):
        return lambda: tables.read_saved(folder)
    files = tables.files_of(folder)
    strong = [f for f in files if f.suffix in (".parquet", ".arrow") and f.stem != "metadata"]
    images = {} if strong else image_folder.files_below(folder)
    if images:
        return lambda: image_folder.read(folder, images)
    if not files:
        raise ConfigError(
            f"dataset {str(folder)!r} holds no images and no tables; it has to be a folder of "
            "parquet files, of images in one folder a class, or of save_to_disk"
        )
    return lambda: tables.read_folder(folder)


def _no_labels(choice: Choice, splits: "Mapping[str, datasets.Dataset]") -> str:
    """Return the refusal of a data set without the column of labels."""
    columns = next(iter(splits.values())).column_names
    if columns == [metadata.IMAGE]:
        return (
            f"dataset {choice.dataset!r} has images that lie in no folder of their class: put "
            f"those of a class into a folder with its name, or write a metadata.csv with "
            f"{metadata.FILE_NAME} and {choice.label}"
        )
    return (
        f"label-column = {choice.label!r} is not in dataset {choice.dataset!r}; its columns are "
        f"{', '.join(columns)}"
    )


def _image_column(
    choice: Choice, splits: "Mapping[str, datasets.Dataset]", notes: list[str]
) -> str:
    """Return the name of the column of images, which all splits that are used have."""
    data = next(iter(splits.values()))
    found = [name for name in tables.image_columns(data) if name != choice.label]
    if choice.image:
        found = [name for name in data.column_names if name == choice.image]
    columns = f"dataset {choice.dataset!r}: its columns are {', '.join(data.column_names)}"
    if not found:
        asked = f"image-column = {choice.image!r} is not in" if choice.image else "no images in"
        raise ConfigError(f"{asked} {columns}")
    for split, other in splits.items():
        if found[0] not in other.column_names:
            raise ConfigError(
                f"split {split!r} of dataset {choice.dataset!r} has no column {found[0]!r}, which "
                f"has the images elsewhere; its columns are {', '.join(other.column_names)}"
            )
        if not tables.may_hold_images(other.features[found[0]]):
            raise ConfigError(f"image-column = {found[0]!r} holds no images in {columns}")
    if len(found) > 1:
        notes.append(f"images are those of column {found[0]!r}; image-column can name another")
    return found[0]


def _chosen(
    choice: Choice, numbers: Mapping[str, np.ndarray], notes: list[str]
) -> tuple[str, str | None]:
    """Return the splits to train on and to hold out; None for a part of the former."""
    labelled = {name for name, column in numbers.items() if (column != UNLABELLED).any()}
    asked = choice.test_split
    if asked and asked not in numbers:
        raise ConfigError(
            f"test-split = {asked!r} is not in dataset {choice.dataset!r}; its splits are "
            f"{', '.join(numbers)}"
        )
    if asked and asked not in labelled:
        raise ConfigError(f"test-split = {asked!r} has no labels; leave it out, or name another")
    others = [name for name in numbers if name in labelled and name != asked]
    if not others:
        raise ConfigError(
            f"test-split = {asked!r} is the only split of dataset {choice.dataset!r} with labels, "
            "and clients need one to train on: leave test-split empty to hold out a part of it"
        )
    train = "train" if "train" in others else others[0]
    held_out = asked or next((n for n in HELD_OUT if n in labelled and n != train), None)
    if train != "train":
        notes.append(f"there is no split 'train' with labels: clients train on {train!r}")
    for name in HELD_OUT:
        if not asked and name in numbers and name not in labelled:
            instead = repr(held_out) if held_out else f"a fifth of {train!r}"
            notes.append(f"split {name!r} has no labels: {instead} is held out instead")
    if unused := [n for n in numbers if n not in (train, held_out)]:
        notes.append(f"splits that are not used: {listed(unused)}")
    return train, held_out


def _numbered(
    data: "datasets.Dataset", label: str, numbers: np.ndarray, names: list[str]
) -> "datasets.Dataset":
    """Return the examples that have a label, with the number of its class in place of its value."""
    import datasets

    kept = np.flatnonzero(numbers != UNLABELLED)
    if len(kept) < len(numbers):
        data = data.select(kept)
    feature = datasets.ClassLabel(names=names)
    return data.remove_columns([label]).add_column(label, numbers[kept], feature=feature)


def whole_numbers(data: "datasets.Dataset", column: str) -> np.ndarray:
    """Return a column of whole numbers: int64 [examples]."""
    return np.asarray(data.with_format("numpy")[column][:], dtype=np.int64)


def _halves(
    data: "datasets.Dataset", label: str, where: str
) -> "tuple[datasets.Dataset, datasets.Dataset]":
    """Divide a split into what trains and what is held out, every class alike."""
    from datasets.utils.stratify import stratified_shuffle_split_generate_indices

    labels, names = whole_numbers(data, label), data.features[label].names
    counts = np.bincount(labels, minlength=len(names))
    if (alone := np.flatnonzero(counts == 1)).size:
        raise ConfigError(
            f"{where} has one example of class {names[alone[0]]!r}, and a fifth of each class is "
            "held out: add examples, leave the class out, or make a split 'test'"
        )
    held_out = math.ceil(HELD_OUT_SHARE * len(data))
    draw = np.random.default_rng(SPLIT_SEED)
    try:  # what Dataset.train_test_split does, but for reading labels one by one
        split = stratified_shuffle_split_generate_indices(
            labels, len(data) - held_out, held_out, rng=draw
        )
        train, test = next(split)
    except ValueError as error:  # fewer examples than classes
        raise ConfigError(
            f"{where}: no fifth of {len(data)} examples can be held out: {first_line(error)}"
        ) from None
    return data.select(train), data.select(test)


def _note_absent(train: "datasets.Dataset", label: str, names: list[str], notes: list[str]) -> None:
    """Note the classes that no client can learn."""
    there = np.bincount(whole_numbers(train, label), minlength=len(names))
    if absent := [name for name, count in zip(names, there, strict=True) if not count]:
        notes.append(f"no example to train on has the class {listed(absent)}")
