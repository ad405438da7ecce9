"""What crosses the wire: one safetensors blob per assignment and per result, metadata included.

Nothing is pickled. Both back ends send the same blobs, so both count the same bytes.
"""

import json
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from d2ft_fl.errors import ReplyError


def encode(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    """Tensors and JSON-able metadata as one safetensors blob."""
    return safetensors.torch.save(tensors, metadata={"d2ft": json.dumps(meta)})


def decode(blob: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of :func:`encode`.

    Raises:
        ReplyError: When the blob is not one of ours.
    """
    try:
        tensors = safetensors.torch.load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        meta = json.loads(header["__metadata__"]["d2ft"])
        if not isinstance(meta, dict):
            raise TypeError(f"metadata is a {type(meta).__name__}")
        return tensors, meta
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"not a safetensors message of this project: {error}") from None
