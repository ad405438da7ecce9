"""Blobs and questions as Flower's records."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from d2ft_fl.util.strict_json import write_json

PLACE: dict[str, Any] = {"clients": None}  # asks a node which clients it serves
BUNDLE_BYTES = 1 << 20
BLOB = "d2ft.blob"  # the arrays' serialization type: no other reader takes them for its own

Index = list[list[tuple[int, int]]]  # of each array, the clients whose blobs are in it, and sizes


def pack_blobs(blobs: Mapping[int, bytes]) -> tuple[ArrayRecord, Index]:
    """Pack clients' blobs as Flower carries them; return the arrays and where each blob is.

    They are the data of arrays, which nothing but :func:`unpack_blobs` reads. Small ones share an
    array: of each array Flower makes several objects, which take 50 kB and two milliseconds.
    """
    index: Index = []
    size = 0
    for client, blob in blobs.items():
        if not index or size + len(blob) > BUNDLE_BYTES:
            index.append([])
            size = 0
        index[-1].append((client, len(blob)))
        size += len(blob)
    arrays = {
        str(number): _array(b"".join(blobs[client] for client, _ in contents))
        for number, contents in enumerate(index)
    }
    return ArrayRecord(arrays), index


def unpack_blobs(arrays: Mapping[str, Array], index: Index) -> Iterator[tuple[int, bytes]]:
    """Yield clients and their blobs, as :func:`pack_blobs` packed them.

    Raises:
        Exception: Of any kind, when the arrays have another form.
    """
    for number, contents in enumerate(index):
        array = arrays[str(number)]
        if array.stype != BLOB or type(array.data) is not bytes:
            raise ValueError(f"an array of {array.stype!r}, not {BLOB!r}")
        if not all(type(n) is int and n >= 0 for pair in contents for n in pair):
            raise ValueError("clients and sizes are no whole numbers from 0 on")
        ends = list(accumulate((size for _, size in contents), initial=0))
        if ends[-1] != len(array.data):
            raise ValueError(f"{ends[-1]} bytes, and {len(array.data)} in the array")
        for (client, size), start in zip(contents, ends, strict=False):
            yield client, array.data[start : start + size]


def _array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=BLOB, data=data)


def query_of(question: Mapping[str, Any]) -> RecordDict:
    """Return a question to a node as the content of a message."""
    return RecordDict({"query": ConfigRecord({"json": write_json(question)})})
