"""What crosses the wire: one safetensors blob per assignment and per result, metadata included.

Nothing is pickled. All back ends send the same blobs, or count what they would be, so all count the
same bytes.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from d2ft_fl.errors import ReplyError
from d2ft_fl.util.strict_json import read_json, write_json

META = "d2ft"
LENGTH_BYTES = 8  # of a header's length, before it; headers are padded to a multiple of it
# Types in the order in which safetensors lays tensors out, and their names there.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_ORDER = tuple(_TYPES)
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}
_MALFORMED = (
    SafetensorError, KeyError, TypeError, ValueError, RecursionError, OSError, ReplyError,
)  # fmt: skip


def encode(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """Return tensors and JSON-able metadata as one safetensors blob."""
    return safetensors.torch.save(dict(tensors), metadata={META: write_json(meta)})


def size(tensors: "Iterable[Described]", meta: Any) -> int:
    """Return the length of :func:`encode`'s blob, without making it.

    Args:
        tensors: Name, shape and type of each.
        meta: Metadata.
    """
    header, order = _header(tensors, meta)
    return len(header) + sum(dtype.itemsize * math.prod(shape) for _, shape, dtype in order)


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write :func:`encode`'s blob into a file, new or in place of what is in it."""
    with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
        append(file, tensors, meta)
        file.truncate()


def append(file: IO[bytes], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> int:
    """Write :func:`encode`'s blob into an open file, from where that is; return its length."""
    parts = _laid_out(tensors, meta)
    for part in parts:
        rest = part.data
        while len(rest):
            rest = rest[file.write(rest) :]
    return sum(map(len, parts))


def fill(
    room: Callable[[int], mmap.mmap], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> int:
    """Put :func:`encode`'s blob at the beginning of memory, and return its length.

    Args:
        room: Gives memory of so many bytes at least.
        tensors: Tensors by name.
        meta: Metadata.
    """
    parts = _laid_out(tensors, meta)
    length, start = sum(map(len, parts)), 0
    memory = np.frombuffer(room(length), dtype=np.uint8)
    for part in parts:
        memory[start : start + len(part)] = part
        start += len(part)
    return length


def _laid_out(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the parts of :func:`encode`'s blob, as bytes."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header, order = _header(((n, tuple(t.shape), t.dtype) for n, t in contiguous.items()), meta)
    bodies = (contiguous[name].flatten().view(torch.uint8).numpy() for name, _, _ in order)
    return [np.frombuffer(header, dtype=np.uint8), *bodies]


Described = tuple[str, tuple[int, ...], torch.dtype]


def _header(tensors: Iterable[Described], meta: Any) -> tuple[bytes, list[Described]]:
    """Return the header of a safetensors blob, and its tensors in the order in which they come."""
    entries: dict[str, Any] = {"__metadata__": {META: write_json(meta)}}
    order, end = sorted(tensors, key=lambda t: (_ORDER.index(t[2]), t[0])), 0
    for name, shape, dtype in order:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = write_json(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // LENGTH_BYTES) * LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, order


def decode(blob: bytes | memoryview | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and metadata of :func:`encode`'s blob.

    Args:
        blob: As bytes; or memory, or a file, where the tensors then stay.

    Raises:
        ReplyError: When it is not a message of this project.
    """
    try:
        if isinstance(blob, Path):
            header, tensors = mapped(blob)
        elif isinstance(blob, memoryview):
            header, tensors = _parsed(blob)
        else:
            end = LENGTH_BYTES + int.from_bytes(blob[:LENGTH_BYTES], "little")
            header, tensors = json.loads(blob[LENGTH_BYTES:end]), safetensors.torch.load(blob)
        text = header["__metadata__"][META]
        return tensors, read_json(text, len(text))
    except _MALFORMED as error:
        raise ReplyError(f"not a safetensors message of this project: {error}") from None


def mapped(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a safetensors file's header, and its tensors mapped copy-on-write into memory.

    safetensors' own ``load_file`` (0.8.0) loses 8 kB of memory for each file of 150 tensors, which
    replies by the thousand are. Python's ``mmap`` keeps a file descriptor for as long as any tensor
    lives, which the files of a large model's heads are too many for.

    Raises:
        KeyError: When an entry of the header is missing.
        TypeError: When the header is of another type.
        ValueError: When the header and the length of the file do not agree.
        OSError: When the file cannot be read.
    """
    with path.open("rb") as file:  # by its number: another may take its place by name
        if not (length := os.fstat(file.fileno()).st_size):
            raise ValueError("it is empty")
        name = f"/dev/fd/{file.fileno()}"
        content = torch.from_file(name, shared=False, size=length, dtype=torch.uint8)
    return _parsed(content.numpy().data)


def _parsed(content: memoryview) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file's content; see :func:`mapped`."""
    start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    if start > len(content):
        raise ValueError(f"a header of {start - LENGTH_BYTES} bytes")
    header, tensors, used = json.loads(bytes(content[LENGTH_BYTES:start])), {}, start
    if not isinstance(header, dict):
        raise TypeError(f"a header that is a {type(header).__name__}")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, places = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, *places)):
            raise ValueError(f"{name!r} has shape {shape} at {places}")
        first, last = (start + place for place in places)
        count = math.prod(shape)
        if not start <= first <= last <= len(content) or last - first != count * dtype.itemsize:
            raise ValueError(f"{name!r} does not lie where it should")
        used += last - first
        tensor = torch.empty(0, dtype=dtype)
        if count:
            tensor = torch.frombuffer(content, dtype=dtype, count=count, offset=first)
        tensors[name] = tensor.view(shape)
    if used != len(content):
        raise ValueError(f"{used} bytes of {len(content)} are accounted for")
    return header, tensors
