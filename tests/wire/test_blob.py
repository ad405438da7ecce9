"""Blobs beside safetensors' own, and what is no blob of this project."""

import gc
import io
import json
import mmap
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.errors import ReplyError
from d2ft_fl.wire.blob import append, decode, encode, fill, mapped, size, write


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


TYPES = [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.uint8]


def shapes_of(tensors):
    return [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


@given(
    st.dictionaries(
        st.text("abXY.0_", min_size=1, max_size=8),
        st.tuples(
            st.lists(st.integers(0, 12), max_size=3),
            st.sampled_from(
                [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.uint8]
            ),
        ),
        max_size=12,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_a_message_is_measured_and_written_without_making_it(kinds, meta):
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
    blob = encode(tensors, meta)
    assert size(shapes_of(tensors), meta) == len(blob)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reply")
        write(path, tensors, meta)
        assert path.read_bytes() == blob


def test_a_file_reads_as_its_bytes_do(tmp_path):
    path = tmp_path / "reply"
    path.write_bytes(encode({"a": torch.arange(3.0)}, {"x": 1}))
    tensors, meta = decode(path)
    assert torch.equal(tensors["a"], torch.arange(3.0))
    assert meta == {"x": 1}


@pytest.mark.parametrize("content", [b"", b"garbage", (2**60).to_bytes(8, "little") + b"{}"])
def test_any_other_file_is_refused(tmp_path, content):
    path = tmp_path / "reply"
    path.write_bytes(content)
    with pytest.raises(ReplyError, match="not a safetensors message"):
        decode(path)


ODD = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["header", "entry", "dtype", "shape", "data_offsets"]), ODD)
def test_a_file_that_lies_about_itself_is_refused(where, odd):
    blob = encode({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, {"x": 1})
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    if where == "header":
        header = odd
    elif where == "entry":
        header["a"] = odd
    else:
        header["a"][where] = odd
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + blob[end:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reply")
        path.write_bytes(content)
        for own in (path, memoryview(bytearray(content))):
            with pytest.raises(ReplyError, match="not a safetensors message"):
                decode(own)


def test_reading_files_costs_no_memory(tmp_path):
    path = tmp_path / "reply"
    path.write_bytes(encode({f"tensor {n}": torch.zeros(4) for n in range(150)}, {}))
    decode(path)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(50):
        decode(path)
    gc.collect()
    lost = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert lost < 50 * 500  # safetensors' own way: 8,400 bytes each time


def test_a_mapped_file_keeps_no_descriptor_and_is_not_written_to(tmp_path):
    path = tmp_path / "blob"
    write(path, {"a": torch.arange(4.0)}, {})
    before, content = len(os.listdir("/proc/self/fd")), path.read_bytes()
    tensor = mapped(path)[1]["a"]
    assert len(os.listdir("/proc/self/fd")) == before
    tensor += 1
    assert tensor.tolist() == [1, 2, 3, 4]
    assert path.read_bytes() == content
    path.unlink()
    assert tensor.tolist() == [1, 2, 3, 4]


def test_a_file_of_before_is_replaced_whole(tmp_path):
    path = tmp_path / "reply"
    path.write_bytes(b"x" * 1000)
    place = path.stat().st_ino
    write(path, {"a": torch.arange(3.0)}, {"x": 1})
    assert path.read_bytes() == encode({"a": torch.arange(3.0)}, {"x": 1})
    assert path.stat().st_ino == place


class Slow(io.BytesIO):
    """Takes five bytes at a time."""

    def write(self, content):
        return super().write(content[:5])


def test_what_a_file_takes_in_pieces_is_written_whole():
    tensors, meta = {"b": torch.arange(7.0), "a": torch.ones(2, dtype=torch.uint8)}, {"x": 1}
    file = Slow()
    file.write(b"abc")
    assert append(file, tensors, meta) == len(encode(tensors, meta))
    assert file.getvalue() == b"abc" + encode(tensors, meta)


def test_memory_is_filled_from_its_beginning():
    tensors, meta = {"b": torch.arange(7.0), "a": torch.ones(2, dtype=torch.uint8)}, {"x": 1}
    blob, asked = encode(tensors, meta), []
    memory = mmap.mmap(-1, len(blob) + 100)
    memory[:] = b"y" * len(memory)
    length = fill(lambda length: asked.append(length) or memory, tensors, meta)
    assert asked == [length] == [len(blob)]
    gc.collect()
    assert memory[:] == blob + b"y" * 100


def all_ways(content, folder):
    """What a blob says, as bytes, as memory and as a file."""
    path = folder / "blob"
    path.write_bytes(content)
    return [decode(blob) for blob in (content, memoryview(bytearray(content)), path)]


def test_messages_without_tensors_or_with_empty_ones_are_read(tmp_path):
    for tensors, meta in ({}, all_ways(encode({}, {"x": [1]}), tmp_path)[0][1]), ({}, {}):
        for found in all_ways(encode(tensors, meta), tmp_path):
            assert found == (tensors, meta)
    empty = {"a": torch.zeros(0, 3), "b": torch.zeros(2, 0, dtype=torch.int64), "c": torch.ones(1)}
    for found, _ in all_ways(encode(empty, {}), tmp_path):
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
            n: (t.shape, t.dtype) for n, t in empty.items()
        }
        assert found["c"].tolist() == [1]


def made_blob(tensor, content):
    """A blob of one tensor that is described by hand."""
    header = {"__metadata__": {"d2ft": "{}"}, "a": tensor}
    text = json.dumps(header).encode()
    return memoryview(bytearray(len(text).to_bytes(8, "little") + text + content))


@pytest.mark.parametrize(
    "shape,places,reason",
    [
        ([2**62, 0], [0, 0], "has shape"),
        ([-1, 0], [0, 0], "has shape"),
        ([2], [0, -8], "has shape"),
        ([2.0], [0, 8], "has shape"),
        ([True, 2], [0, 8], "has shape"),
        ([3], [0, 8], "does not lie where it should"),
        ([2], [0, 7], "does not lie where it should"),
        ([2], [8, 16], "does not lie where it should"),
        ([2], [8, 0], "does not lie where it should"),
        ([1], [0, 4], "bytes of .* are accounted for"),
        ([1], [4, 8], "bytes of .* are accounted for"),
    ],
)
def test_a_tensor_that_is_not_where_it_says_is_named(shape, places, reason):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": places}
    with pytest.raises(ReplyError, match=f"not a safetensors message of this project: .*{reason}"):
        decode(made_blob(entry, bytes(8)))


def test_the_largest_shape_of_nothing_is_read():
    entry = {"dtype": "F32", "shape": [2**62 - 1, 0], "data_offsets": [0, 0]}
    assert decode(made_blob(entry, b""))[0]["a"].shape == (2**62 - 1, 0)


def test_types_come_in_the_order_of_safetensors_and_names_within():
    tensors = {
        name: torch.ones(1, dtype=dtype)
        for name, dtype in zip("bacdef", [*TYPES, torch.float16], strict=True)
    }
    tensors["aa"] = torch.zeros(1)
    names = list(json.loads(encode(tensors, {})[8:].split(b"}}")[0] + b"}}"))
    assert names == ["__metadata__", "c", "a", "aa", "b", "d", "f", "e"]
    file = io.BytesIO()
    append(file, tensors, {})
    assert file.getvalue() == encode(tensors, {})
