"""Values of a label column as numbers of classes: one mapping for all splits of a data set.

A class is known by its name, which is the text of its value. Names are in the order that a data set
declares (``ClassLabel`` of Hugging Face's datasets), else numbers in numeric order and texts in
theirs; -1, a missing value, and an empty text mean that an example has no label.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_fl.errors import ConfigError
from d2ft_fl.util.strict_json import write_json

if TYPE_CHECKING:
    import datasets

UNLABELLED = -1
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split.

    Attributes:
        kind: ``declared`` names, whole ``number``, ``text``, ``truth``; ``none`` has no labels.
        names: The text of each value that occurs, or of each that is declared.
        codes: int64 [examples]: index into ``names``, or -1 of an example without a label.
    """

    kind: str
    names: tuple[str, ...]
    codes: np.ndarray

    @classmethod
    def read(cls, data: "datasets.Dataset", column: str, where: str) -> "LabelColumn":
        """Read a column.

        Args:
            data: The split.
            column: Name of the column; where the split lacks it, no example has a label.
            where: What messages call the column.

        Raises:
            ConfigError: When values are no classes.
        """
        import datasets
        import pyarrow as pa

        if column not in data.column_names:
            return cls("none", (), np.full(len(data), UNLABELLED))
        values = data.with_format("arrow")[column][:]
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        feature = data.features[column]
        if isinstance(feature, datasets.ClassLabel):
            return cls._declared(values, tuple(feature.names), where)
        if pa.types.is_dictionary(values.type):  # a category of pandas
            values = values.cast(values.type.value_type)
        kind = _kind(values.type, where)
        encoded = values.dictionary_encode()
        found = encoded.dictionary.to_pylist() if kind != "none" else []
        texts = [_text(value, where) for value in found]
        codes = np.asarray(encoded.indices.fill_null(UNLABELLED) if found else [], dtype=np.int64)
        if not found:
            codes = np.full(len(data), UNLABELLED)
        return cls._named(kind, texts, codes)

    @classmethod
    def _declared(cls, values: Any, names: tuple[str, ...], where: str) -> "LabelColumn":
        codes = np.asarray(values.fill_null(UNLABELLED), dtype=np.int64)
        outside = codes[(codes < UNLABELLED) | (codes >= len(names))]
        if len(outside):
            raise ConfigError(f"{where} holds {outside[0]}, and declares {len(names)} classes")
        return cls("declared", names, codes)

    @classmethod
    def _named(cls, kind: str, texts: Sequence[str | None], codes: np.ndarray) -> "LabelColumn":
        """Make a column of what values are called; a value without a text is no class."""
        names = tuple(dict.fromkeys(t for t in texts if t is not None))
        place = {name: index for index, name in enumerate(names)}
        number = [UNLABELLED if t is None else place[t] for t in texts] + [UNLABELLED]
        return cls(kind, names, np.asarray(number, dtype=np.int64)[codes])  # [-1] is the last

    @property
    def occurring(self) -> tuple[str, ...]:
        """The names that some example has."""
        return tuple(self.names[code] for code in np.unique(self.codes[self.codes >= 0]))

    def numbered(self, classes: Mapping[str, int]) -> np.ndarray:
        """Return the number of each example's class: int64 [examples], -1 without a label."""
        numbers = [classes.get(name, UNLABELLED) for name in self.names] + [UNLABELLED]
        return np.asarray(numbers, dtype=np.int64)[self.codes]


def _kind(type_: Any, where: str) -> str:
    """Return which kind of classes values of an Arrow type are."""
    import pyarrow as pa

    if pa.types.is_null(type_):
        return "none"
    if pa.types.is_boolean(type_):
        return "truth"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    raise ConfigError(f"{where} has values of type {type_}: classes are whole numbers or texts")


def _text(value: Any, where: str) -> str | None:
    """Return the name of the class that a value stands for; None where it stands for none."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool) or value is None:
        return None if value is None else str(value)
    if value != value:  # NaN, which pandas writes for a missing value
        return None
    if value != int(value) if abs(value) < 2**63 else True:
        raise ConfigError(f"{where} holds {value}: classes are whole numbers or texts")
    if value == UNLABELLED:
        return None
    if value < UNLABELLED:
        raise ConfigError(
            f"{where} holds {int(value)}: -1 means that there is no label, so that other negative "
            "numbers are no classes; write the classes as texts"
        )
    return str(int(value))


def class_names(columns: Mapping[str, LabelColumn], given: Sequence[str], where: str) -> list[str]:
    """Return the names of all classes, in the order of their numbers.

    Args:
        columns: Labels of all splits, by the name of the split.
        given: Names that the options list; where there are some, these are the classes.
        where: What messages call the column.

    Raises:
        ConfigError: When splits cannot be brought together, or there are fewer than two classes.
    """
    used = {split: c for split, c in columns.items() if c.occurring or c.kind == "declared"}
    names = list(given) or _merged(used, where)
    for split, column in used.items():
        if strange := [name for name in column.occurring if name not in set(names)]:
            raise ConfigError(
                f"{where} has the class {strange[0]!r} in split {split!r}, which is not one of the "
                f"{len(names)} that classes lists: {listed(names)}"
            )
    if not any(c.occurring for c in columns.values()):
        raise ConfigError(f"{where} labels no example: every value is missing, empty or -1")
    if len(names) < 2:
        raise ConfigError(
            f"{where} has the one class {names[0]!r}; there is nothing to learn with fewer than two"
            + (" (-1, an empty text and a missing value are no label)" if _drops(used) else "")
        )
    return names


def _drops(columns: Mapping[str, LabelColumn]) -> bool:
    return any((c.codes == UNLABELLED).any() for c in columns.values())


def _merged(columns: Mapping[str, LabelColumn], where: str) -> list[str]:
    """Return the names of all splits: declared ones first, in their order, then the rest sorted."""
    declared = [name for c in columns.values() if c.kind == "declared" for name in c.names]
    names = dict.fromkeys(declared)
    others = {split: c for split, c in columns.items() if c.kind != "declared"}
    found = {name for c in others.values() for name in c.names} - names.keys()
    if declared and found and any(c.kind != "text" for c in others.values()):
        raise ConfigError(
            f"{where} has numbers in split {next(iter(others))!r} and names in another, which do "
            f"not say which is which: {listed(sorted(found))} and {listed(declared)}; write the "
            "same in all splits"
        )
    kinds = {c.kind for c in others.values()}
    plain = all(name.isascii() and name.isdigit() and str(int(name)) == name for name in found)
    if len(kinds) > 1 and not plain:
        raise ConfigError(
            f"{where} has a {' in one split and a '.join(sorted(kinds))} in another: "
            f"{listed(sorted(found))}; write the same in all splits"
        )
    numeric = kinds != {"text"} and kinds != {"truth"}
    return [*names, *sorted(found, key=int if numeric and found else None)]


def digest_of(names: Sequence[str]) -> str:
    """Return a digest of classes and their order, by which two processes know that they agree."""
    return hashlib.sha256(write_json(list(names)).encode()).hexdigest()[:16]


def listed(names: Sequence[str]) -> str:
    """Return names as a message shows them: all of a few, the first of many."""
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
