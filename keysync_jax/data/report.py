"""What `prepare` left beside a dataset's shards and manifest: its report, and the state of the sources."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from keysync_jax.config import from_dict, to_dict
from keysync_jax.data.parts import Done
from keysync_jax.data.records import Manifest, Settings
from keysync_jax.data.sources import Clip, FileState, changed_file, is_touched, restated, stat_all
from keysync_jax.errors import UserError
from keysync_jax.files import write_json
from keysync_jax.media.timeline import FPS
from keysync_jax.pipeline.phases import Phases

REPORT = "report.json"

SOURCES = "sources.json"
"""Source of each clip -> the files that it was made from. The first datasets have no such file."""


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did; `report.json` in the dataset says the same.

    Attributes:
      done: clips in the dataset.
      skipped: (source, reason) of the others.
      frames: of them `frames_without_face` have none.
      bytes: of the shards.
    """

    done: int
    skipped: tuple[tuple[str, str], ...]
    frames: int
    frames_without_face: int
    bytes: int

    @classmethod
    def of(cls, manifest: Manifest, skipped: Iterable[tuple[str, str]]) -> "PrepareReport":
        """The report of a dataset."""
        return cls(
            done=len(manifest.clips),
            skipped=tuple(skipped),
            frames=sum(clip.frames for clip in manifest.clips),
            frames_without_face=sum(int((~clip.present).sum()) for clip in manifest.clips),
            bytes=sum(shard.bytes for shard in manifest.shards),
        )

    @property
    def hours(self) -> float:
        return self.frames / FPS / 3600

    def table(self) -> str:
        """The numbers, then each clip that was left out with its reason."""
        per_frame = self.bytes / max(1, self.frames) / 1024
        lines = [
            f"clips      {self.done} prepared, {len(self.skipped)} skipped",
            f"frames     {self.frames} ({self.hours:.2f} hours), {self.frames_without_face} without a face",
            f"bytes      {self.bytes / 2**20:.1f} MiB, {per_frame:.1f} KiB a frame",
        ]
        return "\n".join(lines + [f"skipped    {source}: {reason}" for source, reason in self.skipped])

    def save(self, output: Path) -> None:
        """Writes `report.json`."""
        write_json(output / REPORT, {**asdict(self), "hours": round(self.hours, 4)})


def read_report(output: Path, manifest: Manifest) -> PrepareReport:
    """The report of a complete dataset. Raises UserError where it is damaged."""
    try:
        content = json.loads((output / REPORT).read_bytes())
        content.pop("hours", None)
        found = from_dict(PrepareReport, content, REPORT)
    except (OSError, ValueError) as error:
        raise UserError(f"{output / REPORT}: cannot be read ({error})") from None
    # Of clips that are added the manifest tells first; a run can be stopped before the report does.
    done = {clip.source for clip in manifest.clips}
    report = PrepareReport.of(
        manifest, [(source, why) for source, why in found.skipped if source not in done]
    )
    if report != found:
        report.save(output)
    return report


def add_sources(output: Path, done: Sequence[Done]) -> None:
    """Notes which files clips were made from."""
    write_sources(output, read_sources(output) | {clip.source: part.files for clip, part in done})


def check_same(
    output: Path,
    manifest: Manifest,
    skipped: Iterable[tuple[str, str]],
    settings: Settings,
    clips: Sequence[Clip],
    phases: Phases,
) -> None:
    """Refuses a call that would not make the same dataset as the complete one.

    A file is read only where its time has changed and its size has not.

    Raises:
      UserError: the settings are others, the clips are, or a file that one was made from is.
    """
    sources = {clip.source for clip in manifest.clips} | {source for source, _ in skipped}
    if not manifest.settings.agrees(settings) or sources != {clip.source for clip in clips}:
        raise UserError(f"{output}: holds a dataset of other clips or settings; give a name for a new folder")
    noted = read_sources(output)
    touched = [clip for clip in clips if clip.source in noted and is_touched(clip, noted[clip.source])]
    if not touched:
        return
    with phases.phase("sources", sum(size for clip in touched for _, size, _ in stat_all(clip)), "B") as read:
        for clip in touched:
            changed = changed_file(clip, noted[clip.source], read)
            if changed is not None:
                raise UserError(
                    f"{output}: was made from another {changed} than there is now; put that one back or give "
                    "a name for a new folder"
                )
    with suppress(OSError):  # They would only be read again.
        write_sources(output, noted | {clip.source: restated(clip, noted[clip.source]) for clip in touched})


def read_sources(output: Path) -> dict[str, tuple[FileState, ...]]:
    """The files that each source's clip was made from; nothing of a dataset that does not say."""
    path = output / SOURCES
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return {source: from_dict(tuple[FileState, ...], files, SOURCES) for source, files in content.items()}


def write_sources(output: Path, noted: Mapping[str, Sequence[FileState]]) -> None:
    """Notes the files that each source's clip was made from."""
    write_json(output / SOURCES, {source: [to_dict(file) for file in noted[source]] for source in noted})
