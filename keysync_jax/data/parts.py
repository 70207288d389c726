"""What `prepare` has done so far: a part file for every finished clip, then shards made of the parts."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keysync_jax.config import from_dict, to_dict
from keysync_jax.data.arrayrecord import RecordReader, RecordWriter
from keysync_jax.data.division import PartOf
from keysync_jax.data.records import (
    FORMAT,
    MANIFEST,
    ClipInfo,
    Manifest,
    Record,
    Settings,
    ShardInfo,
    encode_frame_records,
    groups_of,
)
from keysync_jax.data.sources import Clip, FileState, changed_file
from keysync_jax.errors import UserError
from keysync_jax.files import locked, sha256_of, sweep, write_json

FOLDER = ".work"

_SETTINGS = "settings.json"

_RECORDS_AT_ONCE = 64


@dataclass(frozen=True)
class Part:
    """A finished clip: its place in the dataset is not known yet.

    Attributes:
      bytes: of its records.
      files: that it was made from.
    """

    info: ClipInfo
    bytes: int
    files: tuple[FileState, ...] = ()


Done = tuple[Clip, Part]
Skipped = list[tuple[str, str]]
"""(source, reason) each."""


def write_part(path: Path, info: ClipInfo, frames: Iterable[Record], settings: Settings) -> Part:
    """Writes the part file of a clip: the records of one frame after another.

    Args:
      frames: the arrays of each.
      settings: of the dataset; they say what a frame has.
    """
    groups, size = groups_of(settings), 0
    with RecordWriter(path) as writer:
        for arrays in frames:
            for data in encode_frame_records(arrays, groups):
                writer.write(data)
                size += len(data)
        if writer.records != info.frames * len(groups):
            raise ValueError(f"{info.name}: {writer.records} records for {info.frames} frames")
    return Part(info, size)


def key_of(name: str) -> str:
    """A clip's name as part of a file's name."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def remove_work(output: Path) -> None:
    """Removes what an interrupted run left beside a complete dataset; nothing where another run is at it."""
    with suppress(OSError, UserError), locked(output / FOLDER / "lock", ""):
        known = {shard.file for shard in Manifest.load(output).shards}
        for path in output.glob("shard-*.arrayrecord"):
            if path.name not in known:
                path.unlink()
        sweep(output)
        shutil.rmtree(output / FOLDER, ignore_errors=True)


@contextmanager
def open_work(
    output: Path, settings: Settings, shard_bytes: int, code: str = "", part: PartOf | None = None
) -> "Iterator[Work]":
    """The work folder, made where it is missing and locked until the block or the process ends.

    Args:
      settings, shard_bytes, code, part: as `Work` takes them.

    Raises:
      UserError: the output is something else, cannot be written, was begun with other settings or other code,
        or another run works on it.
    """
    busy = f"{output}: another run is preparing this dataset; wait until it has ended"
    with ExitStack() as stack:
        try:
            _make_folder(output)
            stack.enter_context(locked(output / FOLDER / "lock", busy))
            work = Work(output, settings, shard_bytes, code, part)
        except FileNotFoundError:
            raise UserError(busy) from None  # It has ended, and removed the folder, between the two calls.
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror}); give another name") from None
        yield work


def _make_folder(output: Path) -> None:
    if (output / MANIFEST).is_file() or (output / FOLDER / _SETTINGS).is_file():
        (output / FOLDER).mkdir(exist_ok=True)
        return
    if output.exists() and (not output.is_dir() or set(output.iterdir()) - {output / FOLDER}):
        raise UserError(f"{output}: exists already and is no dataset; give a name for a new folder")
    (output / FOLDER).mkdir(parents=True, exist_ok=True)


class Work:
    """The folder `.work` of a dataset that is being made, or that further clips are added to.

    First every clip becomes a part. Then the list of clips is decided for good (`plan.json`) and shards
    are put together in its order; the parts of a complete shard are deleted, so that the disk holds the
    dataset once and a shard twice.

    Args:
      code: digest of the code that makes parts; those of other code are not mixed with them.
      part: which clips these are of those of several datasets.

    Attributes:
      before: the manifest of the complete dataset that clips are added to; None for a new dataset.
      crops: folder for the crops that workers cut.

    Raises:
      UserError: the output was begun with other settings or other code.
    """

    def __init__(
        self, output: Path, settings: Settings, shard_bytes: int, code: str = "", part: PartOf | None = None
    ):
        self.output, self.settings, self.folder, self.part = output, settings, output / FOLDER, part
        self.crops, self._parts, self._shard_bytes = self.folder / "crops", self.folder / "parts", shard_bytes
        self._plan = self.folder / "plan.json"
        self.before = Manifest.load(output) if (output / MANIFEST).is_file() else None
        self._first_shard = len(self.before.shards) if self.before is not None else 0
        self._settle(
            {
                "format": FORMAT,
                "first_shard": self._first_shard,
                "shard_bytes": shard_bytes,
                "code": code,
                "part": None if part is None else to_dict(part),
                **to_dict(settings),
            }
        )
        for folder in (output, self.folder, self._parts):
            sweep(folder)
        shutil.rmtree(self.crops, ignore_errors=True)
        self.crops.mkdir()

    def _settle(self, wanted: dict[str, Any]) -> None:
        """Marks the folder with what its parts depend on, or checks that it was begun for the same."""
        mark = self.folder / _SETTINGS
        begun = json.loads(mark.read_bytes()) if mark.is_file() else None
        if begun is None or begun.get("first_shard", 0) != wanted["first_shard"]:
            # What was begun is in the dataset, and the run was stopped before it had removed all of it.
            shutil.rmtree(self._parts, ignore_errors=True)
            for path in self.folder.glob("*.json"):
                path.unlink()
            self._parts.mkdir()
            write_json(mark, wanted)
        elif begun.get("code") != wanted["code"]:
            begun_in = self.output if self.before is None else self.folder
            raise UserError(
                f"{begun_in}: was begun by another version of keysync; finish it with that one, delete it or "
                "give another name"
            )
        elif begun != wanted:
            part = "" if begun.get("part") == wanted["part"] else ", or as another part"
            raise UserError(
                f"{self.output}: was begun with another model or other settings{part}; delete it or give "
                "another name"
            )

    def records(self, clip: Clip) -> Path:
        """The part file of a clip."""
        return self._parts / f"{key_of(clip.name)}.arrayrecord"

    def find(self, clip: Clip) -> Part | None:
        """The part of a clip, if an earlier run finished it and its files have not changed since."""
        entry = self._entry(clip)
        if not (entry.is_file() and (self.planned or self.records(clip).is_file())):
            return None
        part = from_dict(Part, json.loads(entry.read_bytes()), str(entry))
        return part if changed_file(clip, part.files) is None else None

    def finish(self, clip: Clip, part: Part) -> None:
        """Notes that a clip's part file is complete."""
        write_json(self._entry(clip), to_dict(part))

    @property
    def planned(self) -> bool:
        """Whether an earlier run had decided on the clips."""
        return self._plan.is_file()

    def decide(self, done: Sequence[Done], skipped: Skipped) -> None:
        """Decides on the clips of the dataset."""
        write_json(self._plan, {"done": [clip.source for clip, _ in done], "skipped": skipped})

    def plan(self, clips: Sequence[Clip]) -> tuple[list[Done], Skipped]:
        """What an earlier run decided on.

        Raises:
          UserError: that was for other clips than these, or one has changed since.
        """
        content = json.loads(self._plan.read_bytes())
        known = set(content["done"])
        parts = [(clip, self.find(clip)) for clip in clips if clip.source in known]
        done = [(clip, part) for clip, part in parts if part is not None]
        skipped = [(source, reason) for source, reason in content["skipped"]]
        same = {clip.source for clip in clips} == known | {source for source, _ in skipped}
        if not same or len(done) != len(known):
            raise UserError(
                f"{self.output}: was already being put together from other clips; repeat it with those, "
                "delete it or give another name"
            )
        return done, skipped

    def assemble(self, done: Sequence[Done], progress: Callable[[int], object]) -> Manifest:
        """Parts to shards, as far as an earlier run has not done it; `progress` is told of clips.

        Returns:
          The dataset's manifest; clips that are added to a dataset lie behind those that it has.
        """
        shards, infos = [], []
        groups = len(groups_of(self.settings))
        for number, group in enumerate(_grouped(done, self._shard_bytes), self._first_shard):
            entry = self.folder / f"shard-{number:05d}.json"
            if not entry.is_file():
                write_json(entry, to_dict(self._shard(number, group)))
            for clip, _ in group:
                self.records(clip).unlink(missing_ok=True)
            shards.append(from_dict(ShardInfo, json.loads(entry.read_bytes()), str(entry)))
            first = 0
            for _, part in group:
                infos.append(replace(part.info, shard=number, first=first))
                first += part.info.frames * groups
            progress(len(group))
        if self.before is None:
            return Manifest(self.settings, tuple(shards), tuple(infos), part=self.part)
        return replace(self.before, shards=(*self.before.shards, *shards), clips=(*self.before.clips, *infos))

    def _shard(self, number: int, group: Sequence[Done]) -> ShardInfo:
        path = self.output / f"shard-{number:05d}.arrayrecord"
        with RecordWriter(path) as writer:
            for clip, part in group:
                for data in _grouped_records(self.records(clip), part.info.frames, self.settings):
                    writer.write(data)
        return ShardInfo(path.name, writer.records, path.stat().st_size, sha256_of(path))

    def discard(self) -> None:
        """Removes the folder, and the output's where there is nothing else."""
        shutil.rmtree(self.folder)
        if not any(self.output.iterdir()):
            self.output.rmdir()

    def _entry(self, clip: Clip) -> Path:
        return self._parts / f"{key_of(clip.name)}.json"


def _grouped(done: Sequence[Done], shard_bytes: int) -> list[list[Done]]:
    """Clips of each shard, in order; a shard is closed once it is full."""
    groups: list[list[Done]] = []
    size = shard_bytes
    for item in done:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item[1].bytes
    return groups


def _grouped_records(path: Path, frames: int, settings: Settings) -> Iterator[bytes]:
    """The records of a part in the order of a shard: those of the first group, then those of the next."""
    reader, groups = RecordReader(path), len(groups_of(settings))
    order = [frame * groups + group for group in range(groups) for frame in range(frames)]
    for start in range(0, len(order), _RECORDS_AT_ONCE):
        yield from reader.read(order[start : start + _RECORDS_AT_ONCE])
