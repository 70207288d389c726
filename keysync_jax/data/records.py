"""A prepared dataset on disk: sharded ArrayRecord files and `manifest.json`.

A frame has one record of each group of arrays, so that a run reads only what it needs:

| group | name | dtype | shape |
|---|---|---|---|
| latents | mean, logvar | fp16 | `[h, w, C]`, posterior over raw latents |
| | mean | fp32 | `[h, w, C]`, alone where the dataset stores samples |
| | landmarks | fp32 | `[68, 2]`, (x, y) in pixels of the crop |
| one each | audio_KIND | fp32 | `[2, D]`, of each encoder |
| one each | audio_KIND_pitch+2 | fp32 | `[2, D]`, of the voice shifted by so many semitones; for each shift |
| pixels | frame | uint8 | `[bytes]`, the crop as JPEG; absent where the dataset has no pixels |

A record is a small safetensors file of its group's arrays, so that any tool can read one. The records of a
clip lie side by side in one shard, group after group, each in the order of time. The manifest is written
last, so a folder that has one is complete.

In `keysync-dataset-1`, which is read too, a frame is one record of all arrays.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import cv2
import numpy as np

from keysync_jax.config import EncoderKind, from_dict, to_dict
from keysync_jax.data.arrayrecord import RecordReader
from keysync_jax.data.division import PartOf
from keysync_jax.errors import UserError
from keysync_jax.files import fingerprint, sha256_of, write_json

FORMAT = "keysync-dataset-2"
UNGROUPED = "keysync-dataset-1"
"""The format before, in which a frame is one record."""
MANIFEST = "manifest.json"

SAMPLE_LOGVAR = -30.0
"""Log-variance that stands for a stored sample: nothing is added to it."""

JPEG_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111)
"""4:4:4: the pixel loss compares colours at full resolution."""

_DTYPES: dict[str, np.dtype] = {"U8": np.dtype("u1"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_LATER = ("latent_channels", "landmark_model", "model")
"""Settings that the first datasets do not say."""

LatentKind = Literal["posterior", "sample", "none"]
Record = dict[str, np.ndarray]

_RECORDS_AT_ONCE = 64


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
      latent_channels: C of the latents (0 without latents).
      landmark_model: SHA-256 of the detector's model file, where it has one and a clip needed it.
      model: fingerprint of the VAE's and the encoders' settings, which their files' hashes do not cover.

    The last three are None where they are not known; the first datasets do not say them.
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
    latent_channels: int | None = None
    landmark_model: str | None = None
    model: str | None = None

    def agrees(self, other: "Settings") -> bool:
        """Whether all is the same that both know."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return all(a == b or (name in _LATER and None in (a, b)) for name, (a, b) in pairs.items())


@dataclass(frozen=True)
class ShardInfo:
    """One ArrayRecord file; `file` is its name, in a joined dataset its path from there."""

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
    """What `manifest.json` says.

    Attributes:
      format: `FORMAT`, or `UNGROUPED`.
      code: version and digest of the code that made the clips, for the reader; more where clips were added.
      part: which of several datasets of the same clips it is; None: it is the whole.
      joined: folders of the parts whose shards these are, relative to this one; none where it has its own.
    """

    settings: Settings
    shards: tuple[ShardInfo, ...]
    clips: tuple[ClipInfo, ...]
    format: str = FORMAT
    code: tuple[str, ...] = ()
    part: PartOf | None = None
    joined: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the arrays in each record of a frame."""
        groups = groups_of(self.settings)
        return (tuple(chain(*groups)),) if self.format == UNGROUPED else groups

    def save(self, folder: Path) -> None:
        """Writes the manifest into a dataset's folder, which completes it."""
        write_json(folder / MANIFEST, {"format": self.format, **to_dict(self)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks the manifest of a dataset's folder.

        Raises:
          UserError: there is none, it is damaged, or has another format.
          OSError: the system cannot read it.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: not a prepared dataset (it has no {MANIFEST})") from None
        except ValueError as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found not in (FORMAT, UNGROUPED):
            raise UserError(f"{path}: has the format {found!r}, not {FORMAT!r}; prepare the dataset anew")
        manifest = from_dict(cls, content, str(path))
        for part in manifest.joined:
            if Path(part).is_absolute():
                raise UserError(
                    f"{path}: names the folder {part!r} of a part, which is not relative to this one"
                )
        for shard in manifest.shards:
            part, slash, name = shard.file.rpartition("/")
            if name in ("", ".", "..") or (slash and part not in manifest.joined):
                raise UserError(f"{path}: names the shard {shard.file!r}, which is no file of this folder")
        return manifest


def groups_of(settings: Settings) -> tuple[tuple[str, ...], ...]:
    """Names of the arrays in each record of a frame; a run that has no use for a group does not read it."""
    latents = {"posterior": ("mean", "logvar"), "sample": ("mean",), "none": ()}[settings.latents]
    voices = [audio_name(kind, shift) for kind in settings.encoders for shift in (0.0, *settings.pitch)]
    pixels = [("frame",)] if settings.frames else []
    return ((*latents, "landmarks"), *((voice,) for voice in voices), *pixels)


def encode_frame_records(arrays: Record, groups: Iterable[Iterable[str]]) -> list[bytes]:
    """A frame's arrays as the bytes of its records, one a group.

    Raises:
      KeyError: an array of a group is not there.
    """
    return [encode_record({name: arrays[name] for name in group}) for group in groups]


def audio_name(kind: EncoderKind, semitones: float = 0.0) -> str:
    """Name in a record of an encoder's features, of the voice itself or shifted by `semitones`."""
    shift = f"_pitch{semitones:+}".removesuffix(".0") if semitones else ""
    return f"audio_{kind}{shift}"


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


class Dataset:
    """Random access to the frames of a prepared dataset; picklable, safe in threads.

    Opening checks the manifest, and that every shard is there with all its bytes; `verify` reads them.

    Raises:
      UserError: the manifest is damaged or has another format, a shard is missing, empty or truncated.
      OSError: the system cannot read the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self._groups = self.manifest.groups
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

    @property
    def sha256(self) -> str:
        """Of the manifest, which has that of every shard: of the whole dataset."""
        return sha256_of(self.folder / MANIFEST)

    def content_sha256(self, progress: Callable[[int], object] | None = None) -> str:
        """Of settings, clips and records in their order: the same however these are divided into shards.

        All of it is read. Two datasets are equal where this is: the same settings, the same clips in the same
        order, and of each the same records, byte for byte.

        Args:
          progress: is told of each block of bytes that was read.

        Raises:
          UserError, OSError: as `read`.
        """
        clips = []
        for info in self.clips:
            digest = hashlib.sha256()
            for start in range(0, info.frames * len(self._groups), _RECORDS_AT_ONCE):
                end = min(start + _RECORDS_AT_ONCE, info.frames * len(self._groups))
                for data in self._readers[info.shard].read(range(info.first + start, info.first + end)):
                    digest.update(len(data).to_bytes(8, "little") + data)
                    if progress is not None:
                        progress(len(data))
            clips.append([to_dict(replace(info, shard=0, first=0)), digest.hexdigest()])
        return fingerprint({"settings": to_dict(self.settings), "clips": clips})

    def read(self, clip: int, frames: Sequence[int], names: Iterable[str] | None = None) -> list[Record]:
        """The arrays `names` (None: all) of frames of a clip, in the order asked for.

        Raises:
          UserError: the shard is damaged, or has no such array.
          OSError: the system cannot open or read the shard.
        """
        info, found = self.clips[clip], [Record() for _ in frames]
        groups = self._groups_with(names)
        places = [info.first + group * info.frames + frame for group in groups for frame in frames]
        data = iter(self._readers[info.shard].read(places))
        for held in groups.values():
            for record in found:
                try:
                    record |= decode_record(next(data), held)
                except KeyError as missing:
                    raise UserError(f"{self.folder}: the clip {info.name!r} has no {missing}") from None
        return found

    def _groups_with(self, names: Iterable[str] | None) -> dict[int, list[str]]:
        """Number -> names, of the groups that hold some of these names."""
        known = tuple(chain(*self._groups))
        wanted = known if names is None else tuple(names)
        if unknown := set(wanted) - set(known):
            raise UserError(f"{self.folder}: holds no {min(unknown)!r}")
        held = {number: [n for n in group if n in wanted] for number, group in enumerate(self._groups)}
        return {number: some for number, some in held.items() if some}

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Reads all of it: every shard's SHA-256 and number of records, first and last frame of each clip.

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
            records = clip.frames * len(self._groups)
            if (
                not 0 <= clip.shard < len(shards)
                or not 0 <= clip.first <= shards[clip.shard].records - records
            ):
                raise UserError(f"{self.folder / MANIFEST}: the clip {clip.name!r} lies outside its shard")

    def _check_record(self, clip: ClipInfo, record: Record) -> None:
        settings = self.settings
        channels = settings.latent_channels
        if channels is None and "mean" in record:
            channels = record["mean"].shape[-1]
        latent = (settings.latent_size, settings.latent_size, channels)
        wanted: dict[str, tuple[int | None, ...]] = {"landmarks": (68, 2)}
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
