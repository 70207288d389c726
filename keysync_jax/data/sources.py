"""What `prepare` is given: a folder or list of videos, or the reference's own folders."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keysync_jax.config import EncoderKind
from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)

LATENTS = "_video_512_latent.safetensors"
EMBEDDINGS: dict[EncoderKind, str] = {
    "hubert": "_hubert_emb.safetensors",
    "wav2vec2": "_wav2vec2_emb.safetensors",
    "wavlm": "_wavlm_emb.safetensors",
}
REFERENCE_FOLDERS = frozenset({"videos", "audios", "latents", "landmarks"})
"""Top folders of the reference's layout; below them, the files of a clip have the same path."""


@dataclass(frozen=True)
class Clip:
    """One clip to prepare.

    Attributes:
      name: path below the source, without suffix; unique.
      path: what it is made from, `source` the same below the source: a video, or precomputed latents (where
        these are missing, another file of the clip).
      landmarks: a `.npy` file of this clip.
      video: the frames that belong to precomputed latents.
      embeddings: precomputed audio features.
    """

    name: str
    path: Path
    source: str
    landmarks: Path | None = None
    video: Path | None = None
    embeddings: tuple[tuple[EncoderKind, Path], ...] = ()

    @property
    def inputs(self) -> list[Path]:
        """Every file that the clip is made from."""
        optional = [self.landmarks, self.video, *(path for _, path in self.embeddings)]
        return [self.path, *(path for path in optional if path is not None)]


@dataclass(frozen=True)
class FileState:
    """A file that a clip is made from, as it was when it was read.

    Attributes:
      bytes: its size.
      changed: time of its last change, in nanoseconds since 1970.
    """

    name: str
    bytes: int
    changed: int
    sha256: str


def stat_all(clip: Clip) -> list[tuple[str, int, int]]:
    """Name, size and time of the last change of every file of a clip."""
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path in clip.inputs for stat in [path.stat()]]


def states_of(clip: Clip, before: Sequence[tuple[str, int, int]]) -> tuple[FileState, ...]:
    """The state of every file of a clip, the one at `Clip.path` first.

    Args:
      before: `stat_all` from before the files were read.

    Raises:
      UserError: one has changed since.
    """
    hashes = [sha256_of(path) for path in clip.inputs]
    if stat_all(clip) != list(before):
        raise UserError(f"{clip.path}: was changed while it was read")
    return tuple(FileState(*stat, sha256) for stat, sha256 in zip(before, hashes, strict=True))


def is_touched(clip: Clip, states: Sequence[FileState]) -> bool:
    """Whether size or time of a file has changed; its bytes may still be the same."""
    return stat_all(clip) != [(state.name, state.bytes, state.changed) for state in states]


def restated(clip: Clip, states: Sequence[FileState]) -> tuple[FileState, ...]:
    """The states of files that have the same bytes still, with the times that they have now."""
    return tuple(FileState(*stat, state.sha256) for stat, state in zip(stat_all(clip), states, strict=True))


def changed_file(
    clip: Clip, states: Sequence[FileState], progress: Callable[[int], object] | None = None
) -> Path | None:
    """The first file of a clip that is another than it was, None where all are the same.

    Only a file whose time has changed, and its size has not, is read.

    Args:
      progress: is told of each block of bytes that was read.
    """
    if [path.name for path in clip.inputs] != [state.name for state in states]:
        return clip.path
    for path, state in zip(clip.inputs, states, strict=True):
        stat = path.stat()
        if stat.st_size != state.bytes:
            return path
        if stat.st_mtime_ns != state.changed and sha256_of(path, progress) != state.sha256:
            return path
    return None


def is_reference_layout(source: Path | Sequence[Path]) -> bool:
    """Whether a folder holds latents that the reference's scripts computed."""
    return (
        isinstance(source, Path)
        and source.is_dir()
        and any(path.name.endswith(LATENTS) for path in _files(source))
    )


def has_latents(clip: Clip) -> bool:
    """Whether a clip of the reference's layout has its latents; it cannot be used without."""
    return clip.path.name.endswith(LATENTS)


def find_clips(source: Path | Sequence[Path]) -> list[Clip]:
    """The clips of a source in natural order (clip2 before clip10).

    Args:
      source: a folder, which is searched with its subfolders; a video; a `.txt` file with a path a line
        (relative to that file); or several videos and folders.

    Raises:
      UserError: there is no video, a path does not exist, or one of several folders holds latents.
    """
    if is_reference_layout(source):
        assert isinstance(source, Path)
        return _reference_clips(source)
    if isinstance(source, Path) and source.is_dir():
        paths, base = _videos_below(source), source
    else:
        listed = _listed(source) if isinstance(source, Path) else source
        paths = [video for path in listed for video in (_videos_below(path) if path.is_dir() else [path])]
        base = Path(os.path.commonpath([path.absolute().parent for path in paths])) if paths else Path()
        paths = list(dict.fromkeys(path.absolute() for path in paths))
    if not paths:
        raise UserError(f"{source}: holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: does not exist; give a folder or a video")
    return _named([(path, path.relative_to(base)) for path in paths])


def _named(paths: list[tuple[Path, Path]]) -> list[Clip]:
    """Clips from (path, path below the source); two files that differ in suffix alone keep it in the name."""
    stems = Counter(relative.with_suffix("") for _, relative in paths)
    clips = []
    for path, relative in paths:
        stem = relative.with_suffix("")
        name = stem.as_posix() if stems[stem] == 1 else relative.as_posix()
        landmarks = path.with_suffix(".npy")
        clips.append(Clip(name, path, relative.as_posix(), landmarks if landmarks.is_file() else None))
    return sorted(clips, key=lambda clip: natural(clip.name))


def _listed(path: Path) -> list[Path]:
    """A video, or the videos that a text file lists."""
    if path.suffix.lower() != ".txt":
        return [path]
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this list of videos cannot be read ({error})") from None
    return [path.parent / line.strip() for line in lines if line.strip()]


def _videos_below(folder: Path) -> list[Path]:
    if is_reference_layout(folder):
        raise UserError(f"{folder}: holds precomputed latents; give this one folder alone")
    paths = [path for path in _files(folder) if path.suffix.lower() in VIDEO_SUFFIXES]
    if not paths:
        raise UserError(f"{folder}: holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return paths


def _files(folder: Path) -> Iterable[Path]:
    """All files below a folder, hidden ones and those in hidden folders aside.

    Raises:
      OSError: a folder cannot be read; its clips would be missing otherwise.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _reference_clips(source: Path) -> list[Clip]:
    """Clips by the files' path below a top folder, those without latents included."""
    endings = [LATENTS, *EMBEDDINGS.values(), ".npy", *sorted(VIDEO_SUFFIXES)]
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(_files(source)):
        relative = path.relative_to(source).with_suffix(path.suffix.lower())
        ending = next((e for e in endings if relative.name.endswith(e)), None)
        if ending is not None:
            parts = relative.parts
            parts = parts[1:] if parts[0] in REFERENCE_FOLDERS and len(parts) > 1 else parts
            key = "/".join(parts).removesuffix(ending)
            found.setdefault(key, {})["video" if ending in VIDEO_SUFFIXES else ending] = path
    clips = [
        Clip(
            name,
            path,
            path.relative_to(source).as_posix(),
            files.get(".npy"),
            files.get("video"),
            tuple((kind, files[ending]) for kind, ending in EMBEDDINGS.items() if ending in files),
        )
        for name, files in found.items()
        for path in [files.get(LATENTS) or files.get("video") or next(iter(files.values()))]
    ]
    return sorted(clips, key=lambda clip: natural(clip.name))


def natural(name: str) -> tuple[list[str | int], str]:
    """Orders digits by their number; the parts alternate between text and numbers."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
