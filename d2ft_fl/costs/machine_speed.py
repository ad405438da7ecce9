"""How fast a machine is, as far as seconds of training are predicted from it.

Tables say how fast it multiplies and attends by the shapes of what is multiplied; a few constants,
what all else costs. One curve of this form was measured for each number of threads and precision
and comes with the package (``assets/speeds.json``, which says where and when). Device classes are
that curve scaled to their speed, so that a simulation does not depend on where it is run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.errors import ConfigError

CURVES = Path(__file__).parents[1] / "assets" / "speeds.json"
KINDS = ("forward", "through", "weights")  # of products: ahead, gradients of inputs and of weights
WAYS = ("forward", "backward")  # of attention

Table = tuple[tuple[float, ...], ...]

# Of any figure of a machine or a budget that is not 0: within these, no sum or quotient of figures
# is infinite.
LEAST, MOST = 1e-18, 1e30
MOST_LETTERS = 60  # of a name
MOST_SOURCE = 300  # letters that say where a curve was measured
MOST_PLACES = 100  # of a table, on one axis
MOST_THREADS = 10_000


def is_name(value: Any, most: int = MOST_LETTERS) -> bool:
    """Return whether a value is a short text of letters that can be printed.

    Args:
        value: Any value.
        most: How many letters it may have.
    """
    return isinstance(value, str) and len(value) <= most and value.isprintable()


@dataclass(frozen=True)
class MachineSpeed:
    """How fast one machine trains: what :mod:`d2ft_fl.costs.seconds` multiplies its features by.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of torch.
        source: Which processor it was measured on, with what, and when.
        rows: Rows of the left matrix (examples times tokens) at which products were measured.
        widths: Columns and rows of the right, square, matrix.
        products: FLOP/s of each of ``KINDS``: [kinds][rows * widths].
        tokens: Tokens at which attention was measured.
        head_widths: Widths of a head.
        attention: FLOP/s of each of ``WAYS``: [ways][tokens * head widths].
        product: Time of products within a step, over that by the table.
        weight: The same of products that are gradients of weights.
        attend: The same of attention.
        traffic: Seconds of a byte that what works element by element reads or writes.
        branch: Seconds of a branch through which gradient passes.
        mixed: Seconds more where not all that runs of it is FULL.
        silent: Seconds of a branch that only runs forward.
        group: Seconds of a head group beside others of a branch.
        passes: Seconds of a pass: embedding, classifier, loss, Python.
        step: Seconds of an optimiser step.
        tensor: Seconds of a tensor that is stepped.
        stepped: Seconds of a byte that is stepped: of weights, gradients and moments.
        start: Seconds of beginning to train, for each block that trains and once more.
        coded: Seconds of a number whose change is quantized.
        message: Seconds of a message, down or up, beside those of its bytes.
    """

    device: str
    precision: str
    threads: int
    source: str
    rows: tuple[float, ...]
    widths: tuple[float, ...]
    products: Table
    tokens: tuple[float, ...]
    head_widths: tuple[float, ...]
    attention: Table
    product: float = 1.0
    weight: float = 1.0
    attend: float = 1.0
    traffic: float = 0.0
    branch: float = 0.0
    mixed: float = 0.0
    silent: float = 0.0
    group: float = 0.0
    passes: float = 0.0
    step: float = 0.0
    tensor: float = 0.0
    stepped: float = 0.0
    start: float = 0.0
    coded: float = 0.0
    message: float = 0.0

    @cached_property
    def peak(self) -> float:
        """The most FLOP/s at which it multiplies, forward."""
        return max(self.products[0])

    def product_seconds(
        self, kind: np.ndarray | int, rows: np.ndarray, width: np.ndarray
    ) -> np.ndarray:
        """Return seconds of a FLOP of a product: float64, in the shape that arguments broadcast to.

        Args:
            kind: Indices of ``KINDS``.
            rows: Rows of the left matrix.
            width: Of the right one, the root of its rows times its columns.
        """
        return self._products.at(kind, rows, width)

    def attention_seconds(self, way: int, tokens: int, head_width: int) -> float:
        """Return seconds of a FLOP of attention.

        Args:
            way: An index of ``WAYS``.
            tokens: Of an example.
            head_width: Of one head.
        """
        return float(self._attention.at(way, np.array(tokens), np.array(head_width)))

    @cached_property
    def _products(self) -> "_Grid":
        return _Grid.of(self.rows, self.widths, self.products)

    @cached_property
    def _attention(self) -> "_Grid":
        return _Grid.of(self.tokens, self.head_widths, self.attention)

    def to_json(self) -> dict[str, Any]:
        """Return a form that :meth:`from_json` reads back exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any, where: str) -> "MachineSpeed":
        """Return what :meth:`to_json` wrote.

        Args:
            values: What was read.
            where: What an error message begins with.

        Raises:
            ConfigError: When something is missing, unknown, or no positive number.
        """
        try:
            return cls._read(values)
        except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise ConfigError(
                f"{where} is not what d2ft profile --output writes ({error}); measure it again"
            ) from None

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> "MachineSpeed":
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown: {', '.join(unknown)}")
        if missing := [name for name in known if name not in values]:  # of an older release
            raise ValueError(f"missing: {', '.join(sorted(missing))}")
        read: dict[str, Any] = dict(values)
        for name in ("device", "precision", "source"):
            if not is_name(read[name], MOST_SOURCE):
                raise ValueError(f"{name} must be text of {MOST_SOURCE} letters at most")
        if type(read["threads"]) is not int or not 0 < read["threads"] <= MOST_THREADS:
            raise ValueError(f"threads must be a whole number from 1 to {MOST_THREADS}")
        for name in ("rows", "widths", "tokens", "head_widths"):
            if len(values[name]) > MOST_PLACES:
                raise ValueError(f"{name} has {len(values[name])} places, of at most {MOST_PLACES}")
            read[name] = tuple(float(v) for v in values[name])
            if not read[name] or sorted(set(read[name])) != [*read[name]]:
                raise ValueError(f"{name} must ascend from above 0")
            if not LEAST <= read[name][0] <= read[name][-1] <= MOST:
                raise ValueError(f"{name} must be from {LEAST:g} to {MOST:g}")
        for name, kinds, axes in (
            ("products", KINDS, ("rows", "widths")),
            ("attention", WAYS, ("tokens", "head_widths")),
        ):
            read[name] = tuple(tuple(float(v) for v in table) for table in values[name])
            cells = len(read[axes[0]]) * len(read[axes[1]])
            if [len(table) for table in read[name]] != [cells] * len(kinds):
                raise ValueError(f"{name} must have {len(kinds)} tables of {cells} figures")
            if not all(LEAST <= v <= MOST for table in read[name] for v in table):
                raise ValueError(f"{name} must be from {LEAST:g} to {MOST:g}")
        for f in fields(cls):
            if f.type in (float, "float") and f.name in read:
                read[f.name] = float(read[f.name])
                if not 0 <= read[f.name] <= MOST:
                    raise ValueError(f"{f.name} must be from 0 to {MOST:g}")
        return cls(**read)


@dataclass(frozen=True, eq=False)
class _Grid:
    """Tables over two axes, between whose points it interpolates, by logarithms."""

    first: np.ndarray
    second: np.ndarray
    values: np.ndarray  # of seconds, base 2: [tables, first, second]

    @classmethod
    def of(cls, first: tuple[float, ...], second: tuple[float, ...], rates: Table) -> "_Grid":
        values = -np.log2(np.array(rates)).reshape(len(rates), len(first), len(second))
        return cls(np.log2(first), np.log2(second), values)

    def at(self, table: np.ndarray | int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return seconds of one unit; outside of a table what is nearest in it."""
        i, down = _place(self.first, first)
        j, right = _place(self.second, second)
        columns = len(self.second)
        place = (table * len(self.first) + i) * columns + j
        below = np.where(i + 1 < len(self.first), columns, 0)
        beside = np.where(j + 1 < columns, 1, 0)
        values = self.values.ravel()
        corner, lower = values[place], values[place + below]
        upper = corner + right * (values[place + beside] - corner)
        lower += right * (values[place + below + beside] - lower)
        return np.asarray(np.exp2(upper + down * (lower - upper)))


def _place(axis: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return between which points of an axis numbers lie: the index below, and how far above."""
    place = np.interp(np.log2(np.maximum(at, 1e-9)), axis, np.arange(len(axis)))
    index = place.astype(np.int64)
    return index, place - index


def read_curve(path: Path | str, where: str) -> MachineSpeed:
    """Read a curve that ``d2ft profile --output`` wrote.

    Args:
        path: Of the file.
        where: What an error message begins with.

    Raises:
        ConfigError: When there is none, or it is wrong.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {path} is not JSON: {error}") from None
    return MachineSpeed.from_json(values, f"{where}: {path}")


@lru_cache
def standard(precision: str = "fp32", threads: int = 1) -> MachineSpeed:
    """Return a curve that comes with the package: what device classes have unless they say.

    Args:
        precision: ``fp32`` or ``bf16``.
        threads: Threads; 1 or 2 were measured.
    """
    for values in json.loads(CURVES.read_text(encoding="utf-8")):
        if (values["precision"], values["threads"]) == (precision, threads):
            return MachineSpeed.from_json(values, str(CURVES))
    raise ConfigError(f"{CURVES} has no curve of {precision} and {threads} threads")
