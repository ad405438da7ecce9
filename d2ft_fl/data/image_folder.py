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
from typing import TYPE_CHECKING

from d2ft_fl.data.labels import listed
from d2ft_fl.data.metadata import FILE_NAME, IMAGE, Metadata
from d2ft_fl.errors import ConfigError

if TYPE_CHECKING:
    import datasets

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
LABEL = "label"


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
        metadata = Metadata.read(self.folder, self.images)
        columns, paths = metadata.of(paths, self.folder / self.root)
        if LABEL not in columns and (class_of := self._class_folders()):
            columns[LABEL] = [
                class_of.get(Path(os.path.dirname(path)).relative_to(self.folder)) for path in paths
            ]
        data = datasets.Dataset.from_dict({IMAGE: paths, **columns})
        data = data.cast_column(IMAGE, datasets.Image(decode=False))
        for column, names in metadata.declared.items():
            data = data.cast_column(column, datasets.ClassLabel(names=list(names)))
        return data

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
