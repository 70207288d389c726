"""What `prepare` is given: a folder or list of videos, or the reference's own folders."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keysync_jax.config import EncoderKind
from keysync_jax.errors import UserError

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
    return sorted(clips, key=lambda clip: _natural(clip.name))


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
    """All files below a folder, hidden ones and those in hidden folders aside."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


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
    return sorted(clips, key=lambda clip: _natural(clip.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """Orders digits by their number; the parts alternate between text and numbers."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
