"""A folder of image files, one folder a class, as data sets: one a split.

The first level may be splits (``train``, ``test``, ...), as Hugging Face's ``imagefolder`` has
them; the folder that an image lies in is its class. A ``metadata`` file (CSV, JSON lines, parquet)
beside images may give them labels and other columns, with ``file_name`` relative to the file.
``imagefolder`` itself takes a minute for each 60,000 files, in every process, and leaves out what
does not lie in a split that it sees.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2ft_fl.data.labels import listed
from d2ft_fl.errors import ConfigError, first_line

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# Names of folders that are splits, as Hugging Face's datasets understands them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("png", "jpg", "jpeg", "jfif", "jpe", "bmp", "dib", "gif", "webp", "tif", "tiff", "ppm"),
        *("pgm", "pbm", "pnm", "tga", "jp2", "avif", "ico", "pcx", "sgi"),
    )
)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME, IMAGE, LABEL = "file_name", "image", "label"


Images = Mapping[Path, Sequence[str]]  # folder, relative to the data set's -> names of its files


def files_below(folder: Path, suffixes: frozenset[str] = SUFFIXES) -> dict[Path, list[str]]:
    """Return the files with some endings, by their folders; hidden ones are left out.

    Args:
        folder: Where to look; folders of the result are relative to it.
        suffixes: The endings, in lower case.
    """
    found: dict[Path, list[str]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        here = [n for n in names if os.path.splitext(n)[1].lower() in suffixes and n[0] != "."]
        if here:
            found[Path(place).relative_to(folder)] = sorted(here)
    return found


def read(folder: Path, images: Images) -> "dict[str, datasets.Dataset]":
    """Return a data set for each split, with the columns ``image`` and, where known, ``label``.

    Args:
        folder: The folder of the data set.
        images: Its image files.

    Raises:
        ConfigError: When it is not clear which split or class an image belongs to.
    """
    return {
        split: _Split(folder, root, members).read()
        for split, (root, members) in _splits(folder, images).items()
    }


def _children(folders: Iterable[Path], root: Path) -> set[str]:
    """Return the names of the folders in ``root`` with images; empty for images right in it."""
    inner = (folder.relative_to(root).parts for folder in folders)
    return {parts[0] if parts else "" for parts in inner}


def _splits_among(names: Iterable[str]) -> dict[str, str]:
    """Return those of some folders' names that are splits: name -> split."""
    return {name: SPLITS[name.lower()] for name in sorted(names) if name.lower() in SPLITS}


def _root(folders: Iterable[Path]) -> Path:
    """Return the folder that holds the splits: an archive may have been unpacked into its own."""
    root = Path()
    names = _children(folders, root)
    while len(names) == 1 and "" not in names and not _splits_among(names):
        root /= names.pop()
        names = _children(folders, root)
    return root if _splits_among(names) else Path()


def _splits(folder: Path, images: Images) -> dict[str, tuple[Path, Images]]:
    """Return split -> its folder and its images, relative to the data set's folder."""
    root = _root(images)
    children = _children(images, root)
    named = _splits_among(children)
    if not named:
        return {"train": (root, images)}
    if others := sorted(children - named.keys()):
        split, place = next(iter(named)), root / others[0]
        example = next(p / names[0] for p, names in images.items() if p.is_relative_to(place))
        raise ConfigError(
            f"dataset {str(folder)!r} has images beside its split {split!r}, like "
            f"{str(example)!r}: put those to train on into a folder 'train'; if {split!r} is a "
            "class, put all classes into 'train'"
        )
    if len(set(named.values())) < len(named):
        raise ConfigError(
            f"dataset {str(folder)!r} has the folders {listed(list(named))}, of which two are one "
            "split: rename or remove one"
        )
    return {
        split: (root / name, {p: n for p, n in images.items() if p.is_relative_to(root / name)})
        for name, split in named.items()
    }


@dataclass(frozen=True)
class _Split:
    """The images of one split.

    Attributes:
        folder: The folder of the data set.
        root: The folder of the split, relative to it.
        images: The image files of the split.
    """

    folder: Path
    root: Path
    images: Images

    def read(self) -> "datasets.Dataset":
        """Return the split as a data set: labels of the metadata, else the class folders."""
        import datasets

        paths = sorted(
            f"{self.folder / place}{os.sep}{name}"
            for place, names in self.images.items()
            for name in names
        )
        table = self._metadata()
        columns: dict[str, list[Any]] = {}
        if table is not None:
            columns, paths = _by_file(table, paths, self.folder / self.root)
        if LABEL not in columns and (class_of := self._class_folders()):
            columns[LABEL] = [
                class_of.get(Path(os.path.dirname(path)).relative_to(self.folder)) for path in paths
            ]
        data = datasets.Dataset.from_dict({IMAGE: paths, **columns})
        return data.cast_column(IMAGE, datasets.Image(decode=False))

    def _class_folders(self) -> dict[Path, str]:
        """Return folder -> class; nothing where images lie right in the folder of the split.

        Raises:
            ConfigError: When folders lie within folders so that more than one could be the class.
        """
        folders = sorted(self.images)
        if folders == [self.root]:
            return {}
        by_name: dict[str, Path] = {}
        above = {ancestor: folder for folder in folders for ancestor in folder.parents}
        for folder in folders:
            other = above.get(folder) or by_name.get(folder.name)
            by_name[folder.name] = folder
            if other is not None:
                one, two = (str(place) for place in sorted((folder, other)))
                raise ConfigError(
                    f"dataset {str(self.folder)!r} has images in {one!r} and in {two!r}, so that "
                    "it is not clear which folder is their class: put all images of a class into "
                    f"one folder, or write a metadata.csv with {FILE_NAME} and {LABEL}"
                )
        return {folder: folder.name for folder in folders}

    def _metadata(self) -> "pa.Table | None":
        """Return the rows of metadata files, ``file_name`` absolute; None where there are none."""
        import pyarrow as pa

        places = sorted({p for place in self.images for p in (place, *place.parents)})
        paths = [self.folder / place / name for place in places for name in METADATA]
        found = [path for path in paths if path.is_file()]
        tables = [_metadata_table(path) for path in found]
        try:
            return pa.concat_tables(tables, promote_options="default") if tables else None
        except pa.ArrowInvalid as error:
            raise ConfigError(
                f"metadata files {listed([str(path) for path in found])} have columns of different "
                f"types: {first_line(error)}"
            ) from None


def _metadata_table(path: Path) -> "pa.Table":
    import datasets
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    read = {".csv": csv.read_csv, ".jsonl": json.read_json, ".parquet": parquet.read_table}
    try:
        table = read[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {first_line(error)}") from None
    if FILE_NAME not in table.column_names:
        raise ConfigError(
            f"{str(path)!r} has no column {FILE_NAME!r}, which says to which image a row belongs; "
            f"its columns are {', '.join(table.column_names)}"
        )
    if IMAGE in table.column_names:
        raise ConfigError(
            f"{str(path)!r} has a column {IMAGE!r}, which is the name of the images themselves: "
            "rename it"
        )
    names = [os.path.normpath(path.parent / str(name)) for name in table[FILE_NAME].to_pylist()]
    table = table.set_column(table.column_names.index(FILE_NAME), FILE_NAME, pa.array(names))
    features = datasets.Features.from_arrow_schema(table.schema)
    for place, (name, feature) in enumerate(features.items()):
        if isinstance(feature, datasets.ClassLabel):
            texts = [None if n in (None, -1) else feature.names[n] for n in table[name].to_pylist()]
            table = table.set_column(place, name, pa.array(texts, type=pa.string()))
    return table


def _by_file(
    table: "pa.Table", paths: list[str], root: Path
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the other columns of metadata in the order of all images, and these images.

    Files that rows name are images also where they are missing, so that this comes out.

    Args:
        table: Rows of metadata, perhaps of other splits too.
        paths: The images that there are.
        root: The folder of the split.

    Raises:
        ConfigError: When two rows are of one file.
    """
    columns = {name: table[name].to_pylist() for name in table.column_names}
    row: dict[str, int] = {}
    for index, name in enumerate(columns.pop(FILE_NAME)):
        if not Path(name).is_relative_to(root):
            continue
        if name in row:
            raise ConfigError(f"metadata has two rows of {name!r}: leave one")
        row[name] = index
    paths = sorted({*paths, *row})
    order = [row.get(path) for path in paths]
    return {
        name: [None if index is None else values[index] for index in order]
        for name, values in columns.items()
    }, paths
