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
      path: what it is made from, `source` the same below the source: a video, or precomputed latents.
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
    return isinstance(source, Path) and source.is_dir() and any(source.rglob(f"*{LATENTS}"))


def find_clips(source: Path | Sequence[Path]) -> list[Clip]:
    """The clips of a source in natural order (clip2 before clip10).

    Args:
      source: a folder, which is searched with its subfolders; a video; a `.txt` file with a path a line
        (relative to that file); or paths of videos.

    Raises:
      UserError: there is no video, or a path does not exist.
    """
    if is_reference_layout(source):
        assert isinstance(source, Path)
        return _reference_clips(source)
    if isinstance(source, Path) and source.is_dir():
        paths = [path for path in _files(source) if path.suffix.lower() in VIDEO_SUFFIXES]
        base = source
    else:
        paths = _listed(source) if isinstance(source, Path) else list(source)
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


def _files(folder: Path) -> Iterable[Path]:
    """All files below a folder, hidden ones and those in hidden folders aside."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _reference_clips(source: Path) -> list[Clip]:
    """Clips by their latents; their other files have the same path below another top folder."""
    endings = [LATENTS, *EMBEDDINGS.values(), ".npy", *sorted(VIDEO_SUFFIXES)]
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(_files(source)):
        ending = next((e for e in endings if path.name.endswith(e)), None)
        if ending is not None:
            parts = path.relative_to(source).parts
            parts = parts[1:] if parts[0] in REFERENCE_FOLDERS and len(parts) > 1 else parts
            key = "/".join(parts).removesuffix(ending)
            found.setdefault(key, {})["video" if ending in VIDEO_SUFFIXES else ending] = path
    clips = [
        Clip(
            name,
            files[LATENTS],
            files[LATENTS].relative_to(source).as_posix(),
            files.get(".npy"),
            files.get("video"),
            tuple((kind, files[ending]) for kind, ending in EMBEDDINGS.items() if ending in files),
        )
        for name, files in found.items()
        if LATENTS in files
    ]
    return sorted(clips, key=lambda clip: _natural(clip.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """Orders digits by their number; the parts alternate between text and numbers."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
