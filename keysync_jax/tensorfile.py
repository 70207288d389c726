"""Files of named tensors in the safetensors format: lazy reading, streaming writing, checksums.

The format: eight bytes with the header's length (little-endian), the header (JSON: tensor name ->
dtype, shape, first and last byte), then the tensors' bytes, row-major and without gaps. It is read
here without the `safetensors` library because that one gives numpy no bfloat16 and writes only what is
in memory as a whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.files import replacing

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The format's name of each dtype -> numpy's, little-endian."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file, as read-only views of the memory-mapped file.

    Opening reads and checks the header alone; a tensor's bytes are read when its view is used, and the
    system may drop them again, so a file larger than the memory can be walked through.

    Attributes:
      path: the file.
      shapes: tensor name -> shape, in the order of the header.
      dtypes: tensor name -> dtype (bfloat16 and float8 are those of `ml_dtypes`).
      metadata: the header's own text entries.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file.

        Raises:
          UserError: it cannot be read, is truncated, or is no safetensors file.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                header, start = _read_header(file, self.path)
            bytes_ = np.memmap(self.path, np.uint8, mode="r", offset=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise _malformed(self.path, "its metadata is not text")
        self.metadata: dict[str, str] = metadata
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self._bytes = np.asarray(bytes_)[start:]
        for name, entry in header.items():
            self.dtypes[name], self.shapes[name], self._spans[name] = _read_entry(name, entry, self.path)
        self._check_spans()

    def __getitem__(self, name: str) -> np.ndarray:
        first, last = self._spans[name]
        return self._bytes[first:last].view(self.dtypes[name]).reshape(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def _check_spans(self) -> None:
        """The tensors must fill the file from the header to its end, without gap or overlap."""
        end = 0
        for first, last in sorted(self._spans.values()):
            if first != end:
                raise _malformed(self.path, "its tensors overlap or leave a gap")
            end = last
        if end > self._bytes.size:
            raise UserError(
                f"{self.path}: the file is truncated ({end - self._bytes.size} bytes of tensors are missing)"
            )
        if end < self._bytes.size:
            raise _malformed(self.path, "there are bytes after the last tensor")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes a safetensors file, one tensor in memory at a time, and returns its SHA-256 (hex).

    The bytes depend on the arguments alone. The file appears under its name when it is complete.

    Args:
      path: the file to write; one that is there is replaced.
      tensors: name -> array (numpy or JAX). Each is looked up twice, first for its shape and dtype
        and then for its values, so a mapping that reads lazily is never in memory as a whole.
      metadata: text entries for the header.

    Raises:
      UserError: the file cannot be written; nothing is left behind then.
    """
    layout = {name: (_NAMES[np.dtype(x.dtype)], tuple(x.shape)) for name, x in tensors.items()}
    # Widest items first, as the reference implementation writes them: every tensor is aligned.
    order = sorted(layout, key=lambda name: -DTYPES[layout[name][0]].itemsize)
    digest = hashlib.sha256()
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            for block in _blocks(tensors, layout, order, metadata):
                digest.update(block)
                file.write(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return digest.hexdigest()


def _blocks(
    tensors: Mapping[str, Any],
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    order: list[str],
    metadata: Mapping[str, str] | None,
) -> Iterator[memoryview]:
    """The file's bytes in order: the header, then one tensor at a time."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        first, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        dtype, shape = layout[name]
        x = np.asarray(tensors[name])
        if (x.dtype, x.shape) != (DTYPES[dtype], shape):
            raise ValueError(f"tensor {name!r} changed while it was written")
        yield np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the position of the first byte after it."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise UserError(f"{path}: the file is empty")
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > _LONGEST_HEADER:
        raise _malformed(path, "it does not begin with a header")
    if size < 8 + length:
        raise UserError(f"{path}: the file is truncated (inside its header)")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_refuse_doubled)
    except _DoubledError as error:
        raise UserError(f"{path}: tensor {error.args[0]!r} is there twice") from error
    except (ValueError, RecursionError) as error:
        raise _malformed(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(path, "its header is not a JSON object")
    return header, 8 + length


def _read_entry(name: str, entry: Any, path: Path) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape, first and last byte of one tensor."""
    try:
        dtype_name, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(path, f"the entry of tensor {name!r} is incomplete") from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has the dtype {dtype_name!r}, which is not read here")
    dtype = DTYPES[dtype_name]
    if not whole or last - first != math.prod(shape) * dtype.itemsize:
        raise _malformed(path, f"shape and size of tensor {name!r} do not agree")
    return dtype, shape, (first, last)


class _DoubledError(Exception):
    """One JSON object holds the same key twice."""


def _refuse_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise _DoubledError(key)
        entries[key] = value
    return entries


def _malformed(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a safetensors file ({why})")
