"""The list of clips that systems are judged on, and which voice each is dubbed with.

A CSV file with a header. Columns: `video`; and, as far as there are any, `voice` (a file with sound; empty:
the video's own), `speaker` (clips of one are drawn together; empty: each clip is one), `partner` (name of the
clip whose voice is the foreign one; empty: drawn), `alternative` (number of the alternative reference frame;
empty: 0), `landmarks` (`.npy`, as `keysync dub` takes them) and `truth` (what `keysync synth` knows of it).
Paths are relative to the list. A clip's name is its video's without the suffix. A folder stands for the list
of its videos, with the files beside them that `keysync synth` writes.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.media.writer import SUFFIXES

COLUMNS = ("video", "voice", "speaker", "partner", "alternative", "landmarks", "truth")


@dataclass(frozen=True)
class ListedClip:
    """A line of the list; files are known to exist.

    Attributes:
      alternative: number of the frame that is the alternative reference.
    """

    name: str
    video: Path
    voice: Path
    speaker: str
    partner: str | None = None
    alternative: int = 0
    landmarks: Path | None = None
    truth: Path | None = None


def read_clips(path: Path) -> list[ListedClip]:
    """The clips of a list, or of a folder.

    Raises:
      UserError: it cannot be read, is no such list, or names a file that is not there.
    """
    clips = _of_folder(path) if path.is_dir() else _of_list(path)
    if not clips:
        raise UserError(f"{path}: lists no clip")
    names = [clip.name for clip in clips]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two clips are called {min(twice)}; a clip's name is its video's")
    for clip in clips:
        if clip.partner is not None and (clip.partner not in names or clip.partner == clip.name):
            raise UserError(
                f"{path}: the partner of {clip.name}, {clip.partner}, is no other clip of the list"
            )
    return clips


def _of_folder(folder: Path) -> list[ListedClip]:
    videos = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )
    return [_clip(str(folder), {"video": p.name, **_beside(p)}, folder) for p in videos]


def _beside(video: Path) -> dict[str, str]:
    """What `keysync synth` writes beside a video, as far as it is there."""
    files = {"voice": ".wav", "landmarks": ".npy", "truth": ".truth.npz"}
    places = {column: video.with_suffix(suffix) for column, suffix in files.items()}
    return {column: place.name for column, place in places.items() if place.is_file()}


def _of_list(path: Path) -> list[ListedClip]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = tuple(reader.fieldnames or ())
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV file in UTF-8 ({error})") from None
    unknown = [column for column in header if column not in COLUMNS]
    if "video" not in header or unknown:
        raise UserError(
            f"{path}: its first line names the columns, video and any of {', '.join(COLUMNS[1:])}"
            + (f"; {unknown[0]!r} is none" if unknown else "")
        )
    clips = []
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{path}: line {number} has not as many columns as the first")
        clips.append(_clip(f"{path}: line {number}", row, path.parent))
    return clips


def _clip(place: str, row: Mapping[str, str], folder: Path) -> ListedClip:
    def file(column: str) -> Path | None:
        if not row.get(column):
            return None
        found = folder / row[column]
        if not found.is_file():
            raise UserError(f"{place}: the {column} {found} is not there")
        return found

    video = file("video")
    if video is None:
        raise UserError(f"{place}: names no video")
    alternative = row.get("alternative") or "0"
    if not alternative.isdecimal():
        raise UserError(f"{place}: the alternative reference is a frame's number, not {alternative!r}")
    return ListedClip(
        video.stem,
        video,
        file("voice") or video,
        row.get("speaker") or video.stem,
        row.get("partner") or None,
        int(alternative),
        file("landmarks"),
        file("truth"),
    )


def draw_partners(clips: Sequence[ListedClip], seed: int) -> dict[str, str]:
    """Whose voice each clip is given: the list's partners, the others drawn.

    A derangement of the clips in which nobody gets a clip of the same speaker, as far as there is one; where
    a speaker has more clips than all others together, voices are used more than once.

    Raises:
      UserError: there is a single clip.
    """
    if len(clips) < 2:
        raise UserError("a foreign voice needs a list of two clips or more")
    rng = np.random.default_rng([seed, 0])
    given = {i: _number(clips, clip.partner) for i, clip in enumerate(clips) if clip.partner is not None}
    choices: list[list[int]] = []
    for i, clip in enumerate(clips):
        others = [j for j, other in enumerate(clips) if other.speaker != clip.speaker]
        others = others or [j for j in range(len(clips)) if j != i]
        choices.append([given[i]] if i in given else [int(j) for j in rng.permutation(others)])
    matched = _matching(choices)
    return {clip.name: clips[matched.get(i, choices[i][0])].name for i, clip in enumerate(clips)}


def _number(clips: Sequence[ListedClip], name: str | None) -> int:
    return [clip.name for clip in clips].index(str(name))


def _matching(choices: Sequence[Sequence[int]]) -> dict[int, int]:
    """Gives as many as possible one of their choices each, none twice (augmenting paths)."""
    owner: dict[int, int] = {}
    for start in range(len(choices)):
        # Breadth first, because a path can be longer than Python's stack.
        came: dict[int, int] = {}
        queue = [start]
        while queue:
            i = queue.pop(0)
            for j in choices[i]:
                if j in came:
                    continue
                came[j] = i
                if j not in owner:
                    _augment(owner, came, j, start)
                    queue = []
                    break
                queue.append(owner[j])
    return {i: j for j, i in owner.items()}


def _augment(owner: dict[int, int], came: Mapping[int, int], end: int, start: int) -> None:
    before = {i: j for j, i in owner.items()}
    j = end
    while True:
        i = came[j]
        owner[j] = i
        if i == start:
            return
        j = before[i]
