import pytest
import safetensors.torch
import torch

from d2ft_fl.errors import ReplyError
from d2ft_fl.wire import decode, encode


def test_tensors_and_metadata_come_back_bit_for_bit():
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([float("nan"), -0.0])}
    meta = {"round": 3, "nested": {"x": [1, 2.5, None]}}
    back, again = decode(encode(tensors, meta))
    assert again == meta
    assert torch.equal(back["a"], tensors["a"])
    assert torch.equal(back["b"].view(torch.int32), tensors["b"].view(torch.int32))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"garbage",
        encode({"a": torch.ones(4)}, {})[:-3],
        (2**60).to_bytes(8, "little") + b"{}",
        safetensors.torch.save({"a": torch.ones(2)}),
        safetensors.torch.save({"a": torch.ones(2)}, metadata={"d2ft": "{"}),
    ],
)
def test_anything_else_is_refused(blob):
    with pytest.raises(ReplyError, match="not a safetensors message"):
        decode(blob)
