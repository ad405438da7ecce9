"""Looking at every image before a run, so that a bad one costs neither a client nor the run.

What was found is kept on the machine, for as long as the images are the ones that were looked at.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from d2ft_fl.data.images import DEEP, LARGEST_16, BadImage, eight_bit, is_constant, opened
from d2ft_fl.data.kept import kept
from d2ft_fl.data.sources import CHUNK, Split
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.terminal import progress

STOP = "stop"  # of bad-examples
SHOWN = 3  # bad images in a note
DARK = 16  # a depth that is used up to a sixteenth shows as black


@dataclass(frozen=True)
class BadExample:
    """An example that is left out.

    Attributes:
        split: Name of its split.
        row: Its row there, counted from 0.
        file: Its file, where it has one, relative to the folder of the data set.
        reason: Why it cannot be used.
    """

    split: str
    row: int
    file: str
    reason: str

    def __str__(self) -> str:
        file = f" ({self.file})" if self.file else ""
        return f"row {self.row} of split {self.split!r}{file}: {self.reason}"


@dataclass(frozen=True)
class Inspected:
    """A split without its bad examples.

    Attributes:
        split: The good ones.
        bad: Those that were left out.
        constant: bool [good examples]: whether an image is of one colour.
        notes: What somebody who runs this may want to know, a line each.
    """

    split: Split
    bad: tuple[BadExample, ...]
    constant: np.ndarray
    notes: tuple[str, ...]


def inspect(split: Split, dataset: str, bad_examples: str) -> Inspected:
    """Look at all images of a split.

    Args:
        split: Which.
        dataset: Name of the data set, for messages.
        bad_examples: ``leave-out`` or ``stop``.

    Raises:
        ConfigError: When a bad example is to stop the run, or none is good.
    """
    if split.identity is None:
        return Inspected(split, (), np.zeros(len(split), dtype=bool), ())
    rows = split.places(np.arange(len(split)))
    packages = [version(name) for name in ("pillow", "datasets")]
    key = ("inspection", 2, split.identity(rows), packages)
    try:
        found = kept(key, lambda: _look(split, rows))
    except _Passing as passing:
        found = passing.found
    reasons = found["reasons"]
    bad = tuple(
        BadExample(
            split.name,
            split.row_of(int(i)),
            str(found["files"][i]).removeprefix(dataset + os.sep),
            str(reasons[i]),
        )
        for i in np.flatnonzero(reasons != "")
    )
    if bad and bad_examples == STOP:
        raise ConfigError(f"dataset {dataset!r}: {bad[0]} (bad-examples = {STOP!r})")
    if len(bad) == len(split):
        raise ConfigError(f"dataset {dataset!r} has no image that can be used: {bad[0]}")
    good = np.flatnonzero(reasons == "")
    notes = _notes(split.name, len(split), bad, int(found["peak"]))
    return Inspected(split.take(good) if bad else split, bad, found["constant"][good], tuple(notes))


class _Passing(Exception):
    """What was found, where some of it may be otherwise the next time."""

    def __init__(self, found: dict[str, np.ndarray]):
        self.found = found


def _look(split: Split, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Decode all images of some rows; return what was found.

    Raises:
        _Passing: With that, where it is not to be kept: the system failed to read some.
    """
    reasons, files, constant, peak, lasting = [], [], [], 0, True
    threads = os.cpu_count() or 1
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(threads) as pool,
        progress("looking at images", len(rows)) as done,
    ):
        warnings.simplefilter("ignore")  # what matters raises
        for values in _chunks(split.values, rows):
            for reason, file, flat, deep, own in pool.map(_look_at, values, chunksize=32):
                reasons.append(reason)
                files.append(file)
                constant.append(flat)
                peak = max(peak, deep)
                lasting = lasting and own
            done(len(values))
    found = {
        "reasons": np.array(reasons, dtype=str),
        "files": np.array(files, dtype=str),
        "constant": np.array(constant, dtype=bool),
        "peak": np.array(peak),
    }
    if not lasting:
        raise _Passing(found)
    return found


def _chunks(values: Callable[[np.ndarray], list[Any]], rows: np.ndarray) -> Iterator[list[Any]]:
    for start in range(0, len(rows), CHUNK):
        yield values(rows[start : start + CHUNK])


def _look_at(value: Any) -> tuple[str, str, bool, int, bool]:
    """Look at an image.

    Returns:
        What is wrong with it, its file, whether it is constant, the most that its 16 bits hold, and
        whether all of this will be the same the next time.
    """
    file = "" if value is None else value["path"] or ""
    try:
        image = opened(value)
        peak = int(np.asarray(image).max()) if image.mode in DEEP else 0
        return "", "", is_constant(eight_bit(image)), peak, True
    except BadImage as error:
        return str(error), file, False, 0, error.lasting


def _notes(name: str, count: int, bad: tuple[BadExample, ...], peak: int) -> Iterator[str]:
    """Yield a line on bad images, and one on images that will look black."""
    if bad:
        shown = "; ".join(str(example) for example in bad[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        yield f"{len(bad)} of {count} examples of split {name!r} are left out: {shown}{more}"
    if 0 < peak * DARK <= LARGEST_16:
        yield (
            f"images of split {name!r} have 16 bits and no value above {peak}: they are dark; "
            f"scale them to the full range, up to {LARGEST_16}"
        )
