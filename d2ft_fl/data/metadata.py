"""Metadata of images: files beside them that give them labels and other columns.

A ``metadata`` file (CSV, JSON lines or parquet) has a row for each image, whose ``file_name`` is
relative to the file, as Hugging Face's ``imagefolder`` has it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2ft_fl.data.labels import UNLABELLED, listed
from d2ft_fl.errors import ConfigError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME, IMAGE = "file_name", "image"


@dataclass(frozen=True)
class Metadata:
    """All rows of a folder's metadata files.

    Attributes:
        files: Absolute path of each row's image.
        columns: The other columns, by name: [rows].
        declared: Names of classes, of columns of their numbers that declare them.
    """

    files: Sequence[str]
    columns: Mapping[str, list[Any]]
    declared: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path, places: Iterable[Path]) -> "Metadata":
        """Read all metadata files at and above some folders.

        Args:
            folder: The folder of the data set, above which none is looked for.
            places: Folders with images, relative to it.

        Raises:
            ConfigError: When one cannot be read, or two do not go together.
        """
        import pyarrow as pa

        above = sorted({p for place in places for p in (place, *place.parents)})
        paths = [folder / place / name for place in above for name in FILES]
        found = [path for path in paths if path.is_file()]
        if not found:
            return cls((), {}, {})
        tables = [_table(path) for path in found]
        names = [str(path) for path in found]
        declared = _declared(tables[0])
        if any(_declared(table) != declared for table in tables):
            raise ConfigError(f"metadata files {listed(names)} declare different names of classes")
        try:
            table = pa.concat_tables(tables, promote_options="default")
        except pa.ArrowInvalid as error:
            raise ConfigError(
                f"metadata files {listed(names)} have columns of different types: "
                f"{first_line(error)}"
            ) from None
        columns = {name: table[name].to_pylist() for name in table.column_names}
        return cls(columns.pop(FILE_NAME), columns, declared)

    def of(self, paths: list[str], root: Path) -> tuple[dict[str, list[Any]], list[str]]:
        """Return the columns in the order of the images of a split, and these images.

        Files that rows name are images also where they are missing, so that this comes out.

        Args:
            paths: The images that there are.
            root: The folder of the split; rows of other splits are not its own.

        Raises:
            ConfigError: When two rows are of one file.
        """
        row: dict[str, int] = {}
        for index, name in enumerate(self.files):
            if not Path(name).is_relative_to(root):
                continue
            if name in row:
                raise ConfigError(f"metadata has two rows of {name!r}: leave one")
            row[name] = index
        paths = sorted({*paths, *row})
        order = [row.get(path) for path in paths]
        return {
            name: [self._missing(name) if index is None else values[index] for index in order]
            for name, values in self.columns.items()
        }, paths

    def _missing(self, column: str) -> int | None:
        """Return what a column holds of an image that no row names."""
        return UNLABELLED if column in self.declared else None


def _table(path: Path) -> "pa.Table":
    """Return one file's rows, with absolute paths."""
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
    return table.set_column(table.column_names.index(FILE_NAME), FILE_NAME, pa.array(names))


def _declared(table: "pa.Table") -> dict[str, tuple[str, ...]]:
    """Return the names of classes of columns that declare them."""
    import datasets

    features = datasets.Features.from_arrow_schema(table.schema)
    return {n: tuple(f.names) for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
