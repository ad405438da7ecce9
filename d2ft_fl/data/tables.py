"""Data sets that are tables: files that Hugging Face's datasets reads, or the hub.

Each split is read by itself: read together, splits get the columns and the class names of the
first, and the numbers of the others are taken over.
"""

import glob
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
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
STRONG = (".parquet", ".arrow")
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
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {name: data.with_format(None) for name, data in splits.items()}


def read_folder(folder: Path) -> "dict[str, datasets.Dataset]":
    """Return the splits of a folder of tables."""
    import datasets
    from pyarrow import parquet

    folder = folder.absolute()
    with _view(folder) as view:
        builder = datasets.load_dataset_builder(str(view))
        files = {
            str(split): [folder / Path(path).relative_to(view) for path in paths]
            for split, paths in builder.config.data_files.items()
        }
    for split, paths in files.items():
        if all(path.suffix == ".parquet" for path in paths):  # datasets refuses those without rows
            files[split] = [p for p in paths if parquet.ParquetFile(p).metadata.num_rows]
    files = {split: paths for split, paths in files.items() if paths}
    _check_schemas(files)
    escaped = {split: [glob.escape(str(p)) for p in paths] for split, paths in files.items()}
    return _each(builder, escaped)


@contextmanager
def _view(folder: Path) -> Iterator[Path]:
    """Lend a folder of links to the tables alone, whose path means nothing else to ``glob``."""
    with tempfile.TemporaryDirectory(prefix="d2ft-view-") as made:
        view = Path(made).resolve()
        files = files_of(folder)
        strong = [file for file in files if file.suffix in STRONG]  # others are notes beside them
        for file in [*(strong or files), *_card(folder)]:
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

    own = {f.name for f in fields(datasets.BuilderConfig)} | {"features"}
    options = {
        f.name: getattr(builder.config, f.name) for f in fields(builder.config) if f.name not in own
    }
    splits = {}
    for split, paths in files.items():
        data = datasets.load_dataset(
            _module(builder), data_files={split: paths}, split=split, **options
        )
        for column, feature in (builder.info.features or {}).items():
            if isinstance(feature, datasets.ClassLabel) and column in data.features:
                data = _declared(data, column, feature)
        splits[split] = data
    return splits


def _declared(data: "datasets.Dataset", column: str, feature: Any) -> "datasets.Dataset":
    """Return a data set whose column of classes has the names that a card declares.

    Texts that are others, and files that declare names of their own, stay as they are.
    """
    import datasets

    if isinstance(data.features[column], datasets.ClassLabel):
        return data
    if not is_paths(data.features[column]):
        return data.cast_column(column, feature)
    place = {name: number for number, name in enumerate(feature.names)}
    texts = data[column][:]
    if any(text and text not in place for text in texts):
        return data
    numbers = [place[text] if text else -1 for text in texts]
    return data.remove_columns([column]).add_column(column, numbers, feature=feature)


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

    undecoded = datasets.Image(decode=False)
    if is_paths(data.features[column]) and folder is not None:
        paths = [None if path is None else _below(folder, path) for path in data[column][:]]
        data = data.remove_columns([column]).add_column(column, paths)
    data = data.cast_column(column, undecoded)
    if folder is None or are_embedded(data, column):
        return data
    images = data[column][:]
    for image in images:
        if image is not None and image["bytes"] is None and image["path"]:
            image["path"] = _below(folder, image["path"])
    return data.remove_columns([column]).add_column(column, images, feature=undecoded)


def are_embedded(data: "datasets.Dataset", column: str) -> bool:
    """Return whether all images of a column, undecoded, are in the data set's own files."""
    import pyarrow.compute as pc

    return not pc.struct_field(data.data.column(column), "bytes").null_count


def _below(folder: Path, path: str) -> str:
    """Return a path that begins in a folder; an address stays one."""
    return path if "://" in path else str(folder / path)


def is_paths(feature: Any) -> bool:
    """Return whether a column holds texts, which may be paths."""
    return getattr(feature, "dtype", "") in ("string", "large_string")


def may_hold_images(feature: Any) -> bool:
    """Return whether a column is of a kind that images can be read from."""
    import datasets

    dictionary = isinstance(feature, dict) and "bytes" in feature
    binary = getattr(feature, "dtype", "") in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or dictionary or binary or is_paths(feature)


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
