"""A prepared dataset on disk: sharded ArrayRecord files, one record a frame, and `manifest.json`.

A record is a small safetensors file, so that any tool can read one:

| name | dtype | shape |
|---|---|---|
| mean, logvar | fp16 | `[h, w, 4]`, posterior over raw latents |
| mean | fp32 | `[h, w, 4]`, alone where the dataset stores samples |
| landmarks | fp32 | `[68, 2]`, (x, y) in pixels of the crop |
| audio_KIND | fp32 | `[2, D]`, of each encoder |
| audio_KIND_pitch+2 | fp32 | `[2, D]`, of the voice shifted by that many semitones; for each shift |
| frame | uint8 | `[bytes]`, the crop as JPEG; absent where the dataset has no pixels |

The records of a clip lie side by side in one shard, in the order of time. The manifest is written last,
so a folder that has one is complete.
"""

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from keysync_jax.config import EncoderKind, from_dict, to_dict
from keysync_jax.errors import UserError
from keysync_jax.files import put, sha256_of, temporary, write_json

FORMAT = "keysync-dataset-1"
MANIFEST = "manifest.json"

SAMPLE_LOGVAR = -30.0
"""Log-variance that stands for a stored sample: nothing is added to it."""

JPEG_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111)
"""4:4:4: the pixel loss compares colours at full resolution."""

# Latents and pictures do not compress; one record a group can be read alone.
_WRITER = "group_size:1,uncompressed"
_READER = "readahead_buffer_size:0"

_DTYPES: dict[str, np.dtype] = {"U8": np.dtype("u1"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

LatentKind = Literal["posterior", "sample", "none"]
Record = dict[str, np.ndarray]


@dataclass(frozen=True)
class EncoderInfo:
    """Which audio features: their width, and the SHA-256 of the encoder's file (None: not known).

    Log-mel, which has no file, has that of its settings.
    """

    dim: int
    sha256: str | None


@dataclass(frozen=True)
class Settings:
    """What every clip of a dataset was prepared with.

    Attributes:
      crop_size, latent_size: sides of the square crop in pixels and of its latent (0 without latents).
      latents: whether the posterior is stored, one sample of it, or nothing (for training a VAE).
      frames: whether the pixels are there.
      vae: SHA-256 of the VAE's file in the model directory; None: not known.
      encoders: audio features by kind of encoder.
      landmarks: the detector, for clips without landmarks of their own.
      dtype: of the VAE's computation.
      seed: of stored samples.
      pitch: semitones by which the voice was shifted for further audio features.
    """

    crop_size: int
    latent_size: int
    latents: LatentKind
    frames: bool
    vae: str | None
    encoders: dict[EncoderKind, EncoderInfo]
    landmarks: str
    dtype: str = "fp32"
    seed: int = 0
    fps: int = 25
    pitch: tuple[float, ...] = ()


@dataclass(frozen=True)
class ShardInfo:
    """One ArrayRecord file."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ClipInfo:
    """One clip.

    Attributes:
      name: its path below the source, without suffix.
      source: path of the file it was made from, below the source; `sha256` of that file.
      shard: number of the shard, `first` its first record there.
      without_face: stretches (first frame, frames) without a face; gaps of up to half a second were
        bridged and do not count.
    """

    name: str
    source: str
    sha256: str
    frames: int
    shard: int
    first: int
    without_face: tuple[tuple[int, int], ...] = ()

    @property
    def present(self) -> np.ndarray:
        """Whether each frame has a face, bool `[frames]`."""
        present = np.ones(self.frames, bool)
        for first, count in self.without_face:
            present[first : first + count] = False
        return present


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says, the format's name apart."""

    settings: Settings
    shards: tuple[ShardInfo, ...]
    clips: tuple[ClipInfo, ...]

    def save(self, folder: Path) -> None:
        """Writes the manifest into a dataset's folder, which completes it."""
        write_json(folder / MANIFEST, {"format": FORMAT, **to_dict(self)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks the manifest of a dataset's folder."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder}: not a prepared dataset (it has no {MANIFEST})") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise UserError(f"{path}: has the format {found!r}, not {FORMAT!r}; prepare the dataset anew")
        return from_dict(cls, content, str(path))


def audio_name(kind: EncoderKind, semitones: float = 0.0) -> str:
    """Name in a record of an encoder's features, of the voice itself or shifted by `semitones`."""
    shift = f"_pitch{semitones:+}".removesuffix(".0") if semitones else ""
    return f"audio_{kind}{shift}"


def runs_without(present: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Stretches (first, count) where a bool `[T]` is false."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], present, [True]])))
    return tuple((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def encode_record(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays of dtype uint8, fp16 or fp32 as the bytes of a safetensors file."""
    header, blocks, end = {}, [], 0
    for name, array in arrays.items():
        block = np.ascontiguousarray(array).tobytes()
        span = [end, end + len(block)]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": span}
        blocks.append(block)
        end += len(block)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *blocks])


def decode_record(data: bytes, names: Iterable[str] | None = None) -> Record:
    """The arrays of a record (those of `names`; all for None), as read-only views of its bytes."""
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, Any]] = json.loads(data[8:start])
    record = {}
    for name in header if names is None else names:
        entry = header[name]
        dtype, first = _DTYPES[entry["dtype"]], start + int(entry["data_offsets"][0])
        flat = np.frombuffer(data, dtype, math.prod(entry["shape"]), first)
        record[name] = flat.reshape(entry["shape"])
    return record


def encode_frame(frame: np.ndarray) -> np.ndarray:
    """A uint8 RGB picture `[S, S, 3]` as the bytes of a JPEG, uint8 `[n]`."""
    done, data = cv2.imencode(".jpg", frame[..., ::-1], JPEG_OPTIONS)
    if not done:
        raise ValueError(f"a picture of shape {frame.shape} cannot be compressed")
    return data.reshape(-1)


def decode_frame(data: np.ndarray) -> np.ndarray:
    """The uint8 RGB picture `[S, S, 3]` of a JPEG's (or PNG's) bytes."""
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("a record's picture cannot be read")
    return np.ascontiguousarray(picture[..., ::-1])


class RecordWriter:
    """Writes an ArrayRecord file, which appears under its name when the block ends without an error."""

    def __init__(self, path: Path):
        self.path, self.records = path, 0
        self._stack = ExitStack()
        partial = self._stack.enter_context(temporary(path))
        self._partial, self._writer = partial, ArrayRecordWriter(str(partial), _WRITER)

    def write(self, data: bytes) -> None:
        """Appends one record."""
        try:
            self._writer.write(data)
        except RuntimeError as error:
            raise self._failed(error) from error
        self.records += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            try:
                self._writer.close()
            except RuntimeError as failure:
                if kind is None:
                    raise self._failed(failure) from failure
            if kind is None:
                put(self._partial, self.path)

    def _failed(self, error: RuntimeError) -> OSError:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        return OSError(number, f"{os.strerror(number)} ({error})", str(self.path))


class RecordReader:
    """Random access to an ArrayRecord file, opened at the first read; picklable, and safe in threads."""

    def __init__(self, path: Path):
        self.path = path
        self._reader: ArrayRecordReader | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        RecordReader.__init__(self, path)

    def __len__(self) -> int:
        return int(self._opened().num_records())

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The bytes of the records at `indices`. Raises UserError where the file is damaged."""
        try:
            return list(self._opened().read([int(i) for i in indices]))
        except RuntimeError as error:
            raise UserError(f"{self.path}: is damaged ({error}); prepare the dataset anew") from None

    def _opened(self) -> ArrayRecordReader:
        with self._lock:
            if self._reader is None:
                reader = ArrayRecordReader(str(self.path), _READER)
                if not reader.ok():
                    raise UserError(
                        f"{self.path}: is damaged or no ArrayRecord file; prepare the dataset anew"
                    )
                self._reader = reader
            return self._reader


class Dataset:
    """Random access to the frames of a prepared dataset; picklable, safe in threads.

    Opening checks the manifest, and that every shard is there with all its bytes; `verify` reads them.

    Raises:
      UserError: the manifest cannot be read or has another format, a shard is missing, empty or truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self._readers = [RecordReader(self.folder / shard.file) for shard in self.manifest.shards]
        for shard in self.manifest.shards:
            self._check_size(shard)
        self._check_places()

    @property
    def settings(self) -> Settings:
        return self.manifest.settings

    @property
    def clips(self) -> tuple[ClipInfo, ...]:
        return self.manifest.clips

    def read(self, clip: int, frames: Sequence[int], names: Iterable[str] | None = None) -> list[Record]:
        """Records of frames of a clip, in the order asked for; of each the arrays `names` (None: all)."""
        info = self.clips[clip]
        data = self._readers[info.shard].read([info.first + frame for frame in frames])
        names = None if names is None else tuple(names)
        return [decode_record(record, names) for record in data]

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Reads all of it: every shard's SHA-256 and number of records, first and last record of each clip.

        Args:
          progress: is told of each block of bytes that was read.

        Raises:
          UserError: something is not what the manifest says.
        """
        for shard, reader in zip(self.manifest.shards, self._readers, strict=True):
            path = self.folder / shard.file
            if sha256_of(path, progress) != shard.sha256:
                raise UserError(
                    f"{path}: was altered after it was prepared (its SHA-256 is not the manifest's)"
                )
            if len(reader) != shard.records:
                raise UserError(f"{path}: holds {len(reader)} records, the manifest says {shard.records}")
        for number, clip in enumerate(self.clips):
            for record in self.read(number, [0, clip.frames - 1]):
                self._check_record(clip, record)

    def _check_size(self, shard: ShardInfo) -> None:
        path = self.folder / shard.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path}: this shard of the dataset is missing") from None
        if size == 0:
            raise UserError(f"{path}: this shard of the dataset is empty")
        if size != shard.bytes:
            raise UserError(
                f"{path}: this shard is truncated or altered ({size} bytes, the manifest says {shard.bytes})"
            )

    def _check_places(self) -> None:
        for clip in self.clips:
            shards = self.manifest.shards
            if not 0 <= clip.shard < len(shards) or clip.first + clip.frames > shards[clip.shard].records:
                raise UserError(f"{self.folder / MANIFEST}: the clip {clip.name!r} lies outside its shard")

    def _check_record(self, clip: ClipInfo, record: Record) -> None:
        settings = self.settings
        latent = (settings.latent_size, settings.latent_size, 4)
        wanted: dict[str, tuple[int, ...]] = {"landmarks": (68, 2)}
        wanted |= {"mean": latent} if settings.latents != "none" else {}
        wanted |= {"logvar": latent} if settings.latents == "posterior" else {}
        for kind, encoder in settings.encoders.items():
            wanted |= {audio_name(kind, shift): (2, encoder.dim) for shift in (0.0, *settings.pitch)}
        for name, shape in wanted.items():
            if name not in record or record[name].shape != shape or not np.isfinite(record[name]).all():
                raise UserError(f"{self.folder}: a record of the clip {clip.name!r} has no sound {name!r}")
        size = (settings.crop_size, settings.crop_size, 3)
        if settings.frames and decode_frame(record["frame"]).shape != size:
            raise UserError(f"{self.folder}: a picture of the clip {clip.name!r} has the wrong size")
