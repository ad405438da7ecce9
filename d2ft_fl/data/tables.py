"""Data sets that are tables: files that Hugging Face's datasets reads, or the hub.

Each split is read by itself: read together, splits get the columns and the class names of the
first, and the numbers of the others are taken over.
"""

import glob
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2ft_fl.config.choices import HUB
from d2ft_fl.data.image_folder import SUFFIXES as IMAGE_SUFFIXES
from d2ft_fl.data.image_folder import files_below
from d2ft_fl.errors import ConfigError

if TYPE_CHECKING:
    import datasets

SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("parquet", "arrow", "csv", "tsv", "json", "jsonl", "ndjson", "zip", "tar", "txt"),
        *("xml", "h5", "hdf5", "lance"),
    )
)
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes


def files_of(folder: Path) -> list[Path]:
    """Return the files of tables in a folder, relative to it."""
    below = files_below(folder, SUFFIXES)
    return [place / name for place, names in below.items() for name in names]


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk`` of Hugging Face's datasets."""
    return any(folder.joinpath(name).is_file() for name in SAVED)


def read_saved(folder: Path) -> "Mapping[str, datasets.Dataset]":
    """Return the splits that ``save_to_disk`` wrote; a single one is called ``train``."""
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def read_folder(folder: Path) -> "dict[str, datasets.Dataset]":
    """Return the splits of a folder of tables."""
    import datasets

    with _view(folder) as view:
        builder = datasets.load_dataset_builder(str(view))
        files = {
            str(split): [folder / Path(path).relative_to(view) for path in paths]
            for split, paths in builder.config.data_files.items()
        }
    _check_schemas(files)
    escaped = {split: [glob.escape(str(p)) for p in paths] for split, paths in files.items()}
    return _each(builder, escaped)


@contextmanager
def _view(folder: Path) -> Iterator[Path]:
    """Lend a folder of links to the tables alone, whose path means nothing else to ``glob``."""
    with tempfile.TemporaryDirectory(prefix="d2ft-view-") as made:
        view = Path(made).resolve()
        for file in [*files_of(folder), *_card(folder)]:
            view.joinpath(file).parent.mkdir(parents=True, exist_ok=True)
            view.joinpath(file).symlink_to(folder / file)
        yield view


def _card(folder: Path) -> list[Path]:
    """Return the card of a data set, which may say what its splits are."""
    return [Path(n) for n in ("README.md", ".huggingface.yaml") if folder.joinpath(n).is_file()]


def read_hub(name: str) -> "Mapping[str, datasets.Dataset]":
    """Return the splits of a data set of the hub.

    Args:
        name: ``hub:OWNER/NAME``, and ``:CONFIGURATION`` where it has several.
    """
    import datasets

    repository, _, configuration = name.removeprefix(HUB).partition(":")
    builder = datasets.load_dataset_builder(repository, configuration or None)
    files = builder.config.data_files or {}
    if len(files) < 2 or _module(builder) != "parquet":
        return datasets.load_dataset(repository, configuration or None)
    return _each(builder, {str(split): list(paths) for split, paths in files.items()})


def _module(builder: Any) -> str:
    return type(builder).__module__.rpartition(".")[2]


def _each(builder: Any, files: Mapping[str, list[str]]) -> "dict[str, datasets.Dataset]":
    """Load splits one by one as a builder would, with the class names that a card declares."""
    import datasets

    splits = {}
    for split, paths in files.items():
        data = datasets.load_dataset(_module(builder), data_files={split: paths}, split=split)
        declared = builder.info.features or {}
        for column, feature in declared.items():
            numbers = column in data.features and not isinstance(
                data.features[column], datasets.ClassLabel
            )
            if isinstance(feature, datasets.ClassLabel) and numbers:
                data = data.cast_column(column, feature)
        splits[split] = data
    return splits


def _check_schemas(files: Mapping[str, Sequence[Path]]) -> None:
    """Raise ConfigError where parquet files of a split declare different names of classes.

    Read together, all would get the names of the first.
    """
    import datasets
    from pyarrow import parquet

    for split, paths in files.items():
        first: tuple[Path, dict[str, list[str]]] | None = None
        for path in paths:
            if path.suffix != ".parquet":
                continue
            features = datasets.Features.from_arrow_schema(parquet.read_schema(path))
            names = {n: f.names for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
            first = first or (path, names)
            if names != first[1]:
                raise ConfigError(
                    f"{str(first[0])!r} and {str(path)!r} of split {split!r} declare different "
                    "names of classes: write both with the same ClassLabel, or labels as texts"
                )


def with_images(data: "datasets.Dataset", column: str, folder: Path | None) -> "datasets.Dataset":
    """Return a data set whose column of bytes, dictionaries or paths holds undecoded images.

    Args:
        data: A split.
        column: Name of its column of images.
        folder: Where relative paths begin; None where there is none.
    """
    import datasets

    if is_paths(data.features[column]) and folder is not None:
        paths = [None if path is None else str(folder / path) for path in data[column]]
        data = data.remove_columns([column]).add_column(column, paths)
    return data.cast_column(column, datasets.Image(decode=False))


def is_paths(feature: Any) -> bool:
    """Return whether a column holds texts, which may be paths."""
    return getattr(feature, "dtype", "") in ("string", "large_string")


def image_columns(data: "datasets.Dataset") -> list[str]:
    """Return the columns that hold images: declared, as dictionaries of bytes, as bytes, as paths.

    Those of the first of these kinds that there is.
    """
    import datasets

    kinds: tuple[Callable[[Any], bool], ...] = (
        lambda f: isinstance(f, datasets.Image),
        lambda f: isinstance(f, dict) and "bytes" in f and set(f) <= {"bytes", "path"},
        lambda f: getattr(f, "dtype", "") in ("binary", "large_binary"),
    )
    for kind in kinds:
        if found := [name for name, feature in data.features.items() if kind(feature)]:
            return found
    texts = [name for name, feature in data.features.items() if is_paths(feature)]
    return [name for name in texts if _name_images(data, name)]


def _name_images(data: "datasets.Dataset", column: str) -> bool:
    """Return whether the first texts of a column are paths of images by their endings."""
    some = [text for text in data[:20][column] if text]
    return bool(some) and all(Path(text).suffix.lower() in IMAGE_SUFFIXES for text in some)
