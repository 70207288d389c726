"""The safetensors files: bit-exact reading and writing, laziness, and every kind of damage."""

import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.tensorfile import DTYPES, TensorFile, write_tensors


def one_of_each() -> dict[str, np.ndarray]:
    """An array of every dtype, with every bit pattern a random byte can give (NaNs too), and odd shapes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        bits = rng.integers(0, 2 if name == "BOOL" else 256, (3 + i, 5 * dtype.itemsize), np.uint8)
        arrays[f"a.{name}"] = bits.view(dtype)
    arrays["scalar"] = np.float32(3.5).reshape(())
    arrays["empty"] = np.zeros((0, 4), np.float16)
    return arrays


def assert_same_bits(x: np.ndarray, y: np.ndarray) -> None:
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert x.tobytes() == y.tobytes()


def test_round_trip_keeps_every_bit(tmp_path):
    arrays = one_of_each()
    write_tensors(tmp_path / "a.safetensors", arrays, {"stage": "keyframe", "note": "é"})
    read = TensorFile(tmp_path / "a.safetensors")
    assert set(read) == set(arrays)
    assert len(read) == len(arrays)
    assert read.metadata == {"stage": "keyframe", "note": "é"}
    for name, x in arrays.items():
        assert_same_bits(read[name], x)
        assert read.shapes[name] == x.shape
        assert read.dtypes[name] == x.dtype


def test_transposed_arrays_are_written_in_row_order(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    write_tensors(tmp_path / "a.safetensors", {"x": x})
    np.testing.assert_array_equal(TensorFile(tmp_path / "a.safetensors")["x"], x)


def test_the_library_reads_what_we_write(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    arrays = {k: v for k, v in one_of_each().items() if "8" not in k}
    write_tensors(tmp_path / "a.safetensors", arrays)
    for name, x in load_file(tmp_path / "a.safetensors").items():
        assert x.tobytes() == arrays[name].tobytes()
        assert x.shape == arrays[name].shape


def test_we_read_what_the_library_writes(golden):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    theirs = load_file(golden / "tiny.safetensors")
    ours = TensorFile(golden / "tiny.safetensors")
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        assert_same_bits(ours[name], x)


def test_the_checksum_is_that_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    pieces: list[int] = []
    written = write_tensors(path, {"x": np.zeros(700_000, np.float32)})
    assert written == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written == sha256_of(path, pieces.append)
    assert sum(pieces) == path.stat().st_size
    assert len(pieces) == 3


def test_the_bytes_depend_on_the_content_alone(tmp_path):
    first = write_tensors(tmp_path / "a.safetensors", one_of_each(), {"b": "1", "a": "2"})
    second = write_tensors(tmp_path / "b.safetensors", one_of_each(), {"a": "2", "b": "1"})
    assert first == second


def test_arrays_are_aligned_read_only_views_of_the_file(tmp_path):
    arrays = {"bytes": np.zeros(3, np.uint8), "x": np.ones((4, 4), np.float32)}
    write_tensors(tmp_path / "a.safetensors", arrays)
    read = TensorFile(tmp_path / "a.safetensors")
    assert np.shares_memory(read["x"], read["x"])
    assert read["x"].flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        read["x"][0] = 2


class Lazy(Mapping[str, Any]):
    """Many arrays of 4 MiB, each made when it is looked up."""

    def __getitem__(self, name: str) -> np.ndarray:
        return np.full((1024, 1024), int(name), np.float32)

    def __iter__(self) -> Iterator[str]:
        return map(str, range(16))

    def __len__(self) -> int:
        return 16


def test_writing_and_reading_hold_one_tensor_at_a_time(tmp_path):
    tracemalloc.start()
    write_tensors(tmp_path / "a.safetensors", Lazy())
    total = sum(float(x[0, 0]) for x in TensorFile(tmp_path / "a.safetensors").values())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == sum(range(16))
    assert peak < 12 * 2**20


def test_opening_reads_the_header_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    size = 64 * 2**30
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)  # sparse: takes no room
    assert TensorFile(path)["x"][-1] == 0


def entry(dtype: Any = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry()}, bytes(7), r"truncated \(1 bytes of tensors are missing\)"),
        ({"x": entry()}, bytes(9), "bytes after the last tensor"),
        ({"x": entry(), "y": entry()}, bytes(8), "overlap or leave a gap"),
        ({"x": entry(span=(8, 16))}, bytes(16), "overlap or leave a gap"),
        ({"x": entry(shape=(3,))}, bytes(8), "shape and size of tensor 'x' do not agree"),
        ({"x": entry(shape=(-2,), span=(8, 0))}, bytes(8), "shape and size of tensor 'x' do not agree"),
        ({"x": entry(shape=(2.0,))}, bytes(8), "shape and size of tensor 'x' do not agree"),
        ({"x": entry(dtype="Q4")}, bytes(8), "tensor 'x' has the dtype 'Q4'"),
        ({"x": entry(dtype=["F32"])}, bytes(8), "tensor 'x' has the dtype"),
        ({"x": {"dtype": "F32"}}, bytes(8), "the entry of tensor 'x' is incomplete"),
        ({"x": "F32"}, bytes(8), "the entry of tensor 'x' is incomplete"),
        ({"__metadata__": {"a": 1}}, b"", "its metadata is not text"),
        ([], b"", "not a JSON object"),
        (b'{"x": 1', b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"x": 1, "x": 2}', b"", "tensor 'x' is there twice"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path, header, data, message):
    path = tmp_path / "a.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(UserError, match=message) as error:
        TensorFile(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", "not a safetensors file"),
        (b"<!doctype html><html></html>", "not a safetensors file"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TensorFile(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": np.ones(4, np.float32), "y": np.ones(2, ml_dtypes.bfloat16)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            TensorFile(path)


@pytest.mark.parametrize("read", [TensorFile, sha256_of])
def test_files_that_cannot_be_read(tmp_path, read):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "folder", tmp_path / "absent" / "a", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match="cannot be written"):
            write_tensors(path, {"x": np.ones(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_failure_half_way_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": np.ones(3)})
    before = path.read_bytes()

    class Changing(Lazy):
        looks = 0

        def __getitem__(self, name: str) -> np.ndarray:
            self.looks += 1
            return np.zeros(1 + self.looks // 20)

    with pytest.raises(ValueError, match="changed while it was written"):
        write_tensors(path, Changing())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
