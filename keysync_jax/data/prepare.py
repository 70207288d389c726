"""From raw clips to a dataset to train on: the job behind `keysync prepare`.

Worker processes decode, find faces and cut crops (`faces`); this process encodes latents and sound and
writes. A finished clip is a part file in the dataset's `.work` folder, so an interrupted run goes on
behind the clips that are done; at the end the parts are put together to shards, in the order of the clips'
names, and the manifest is written last.
"""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from keysync_jax import __version__
from keysync_jax.backend import computing
from keysync_jax.data.division import PartOf, part_of
from keysync_jax.data.from_precomputed import FromPrecomputed
from keysync_jax.data.from_videos import FramesAlone, FromVideos
from keysync_jax.data.parts import Done, Part, Skipped, Work, open_work, remove_work
from keysync_jax.data.records import FORMAT, MANIFEST, Dataset, Manifest, Settings
from keysync_jax.data.report import PrepareReport, add_sources, check_same, read_report
from keysync_jax.data.settings import PrepareSettings
from keysync_jax.data.sources import Clip, find_clips, is_reference_layout
from keysync_jax.errors import UserError
from keysync_jax.model import Model, model_bytes, model_folder, open_model
from keysync_jax.pipeline.environment import code_digest
from keysync_jax.pipeline.phases import Phases

MIB = 2**20

CODE = ("config", "data", "media", "model", "nn", "pipeline", "tensorfile")
"""Modules and packages of keysync_jax that a part is made by."""


class Maker(Protocol):
    """Makes the records of clips.

    Attributes:
      stored: what the manifest will say of all of them.
    """

    stored: Settings

    def make(self, clips: Sequence[Clip], work: Work) -> Generator[tuple[Clip, Part | str]]:
        """A part, or the reason why there is none, for every clip; in any order."""
        ...


def prepare(
    source: str | Path | Sequence[Path],
    output: str | Path,
    model: str | Path | Model | None = None,
    settings: PrepareSettings | None = None,
    show_progress: bool = False,
    elsewhere: Callable[[Maker], Maker] | None = None,
) -> PrepareReport:
    """Prepares a dataset for training.

    Of every clip: frames at 25 a second, the crop that follows the face, 68 landmarks, the VAE's posterior,
    audio features, and the crop as JPEG. A clip that cannot be used is skipped and the report says why. What
    the machine cannot do (a disk that fails, memory, permissions) ends the call and skips nothing. An
    interrupted call goes on where it was when it is repeated; on a complete dataset it does nothing.

    Args:
      source: a folder of videos (searched with its subfolders), a video, a `.txt` file that lists videos, a
        list of videos and folders, or the reference's own folders with precomputed latents.
      output: folder of the dataset.
      model: a model directory, or one on the hub (`model.model_folder`), for its VAE and audio encoders;
        precomputed latents need none.
      elsewhere: makes of what works here what works on other machines (`launch.ray_prepare.OnRay`).

    Raises:
      UserError: an argument cannot be used, or not one clip can; the dataset is complete, and of other clips,
        settings or files.
      OSError: the machine cannot read a clip, or write.
    """
    source = Path(source) if isinstance(source, str) else source
    output, settings, phases = Path(output), settings or PrepareSettings(), Phases(show=show_progress)
    found = find_clips(source)
    part, clips = (None, found) if settings.part is None else part_of(found, settings.part)
    if isinstance(model, str | Path):
        folder = model_folder(model, settings.allow_download)
        with phases.phase("checking", model_bytes(folder), "B") as advance:
            model = open_model(folder, advance)
    maker: Maker  # Made from all clips, so that the settings of all parts are the same.
    if is_reference_layout(source):
        maker = FromPrecomputed(found, settings, model)
    elif settings.crop is not None:
        if model is not None:
            raise UserError("prepare takes --crop, for frames alone, or --model, whose size the crop has")
        maker = FramesAlone(found, settings, settings.crop)
    elif model is None:
        raise UserError(
            "prepare needs a model directory, for its VAE and audio encoders (or --crop, for frames alone)"
        )
    else:
        maker = FromVideos(found, settings, model)
    if elsewhere is not None:
        maker = elsewhere(maker)
    decided = False
    if not os.path.isfile(output / MANIFEST):  # Not Path.is_file, which fails in a folder without permission.
        with _open_work(output, maker, settings, part) as work, computing(settings.dtype):
            decided = work.planned
            report = _make(clips, maker, work, phases)
        if not (decided and settings.retry_skipped):  # The skipped ones have just been tried otherwise.
            return report
    return _complete(output, clips, part, maker, settings, phases)


def check(dataset: str | Path, show_progress: bool = False) -> Dataset:
    """Reads all of a dataset and compares it with its manifest.

    Raises:
      UserError: something is missing, truncated or altered.
    """
    opened = Dataset(dataset)
    total = sum(shard.bytes for shard in opened.manifest.shards)
    with Phases(show=show_progress).phase("checking", total, "B") as advance:
        opened.verify(advance)
    return opened


def content_sha256(dataset: Dataset, show_progress: bool = False) -> str:
    """`Dataset.content_sha256`, with its progress."""
    total = sum(shard.bytes for shard in dataset.manifest.shards)
    with Phases(show=show_progress).phase("reading", total, "B") as advance:
        return dataset.content_sha256(advance)


def _open_work(
    output: Path, maker: Maker, settings: PrepareSettings, part: PartOf | None
) -> AbstractContextManager[Work]:
    return open_work(output, maker.stored, settings.shard_mib * MIB, _code(), part)


def _code() -> str:
    """What parts are made by."""
    return f"{__version__} {code_digest(*CODE)}"


def _make(clips: Sequence[Clip], maker: Maker, work: Work, phases: Phases) -> PrepareReport:
    """A new dataset, or a further piece of a complete one."""
    if work.planned:
        done, skipped = work.plan(clips)
    else:
        done, skipped = _make_parts(clips, maker, work, phases)
        if done or _may_be_empty(work):
            work.decide(done, skipped)
    if done or _may_be_empty(work):
        return _finish(done, skipped, work, phases)
    work.discard()
    if work.before is None:
        raise UserError(f"none of the {len(clips)} clips can be used; the first: {skipped[0][1]}")
    report = PrepareReport.of(work.before, skipped)
    report.save(work.output)
    return report


def _may_be_empty(work: Work) -> bool:
    """One of many parts may have no clip, or none that can be used."""
    return work.part is not None and work.before is None


def _make_parts(
    clips: Sequence[Clip], maker: Maker, work: Work, phases: Phases
) -> tuple[list[Done], Skipped]:
    """Parts of all clips, those of an earlier run included, and the clips that were skipped."""
    parts = {clip.name: part for clip in clips if (part := work.find(clip)) is not None}
    missing = [clip for clip in clips if clip.name not in parts]
    reasons: dict[str, str] = {}
    with (
        phases.phase("clips", len(clips), "clips", len(parts)) as advance,
        closing(maker.make(missing, work)) as results,
    ):
        for clip, made in results:
            if isinstance(made, str):
                reasons[clip.name] = made
            else:
                work.finish(clip, made)
                parts[clip.name] = made
            advance(1)
    done = [(clip, parts[clip.name]) for clip in clips if clip.name in parts]
    return done, [(clip.source, reasons[clip.name]) for clip in clips if clip.name in reasons]


def _finish(done: list[Done], skipped: Skipped, work: Work, phases: Phases) -> PrepareReport:
    """Shards, then the report and the manifest."""
    with phases.phase("shards", len(done), "clips") as advance:
        manifest = work.assemble(done, advance)
    manifest = replace(manifest, code=tuple(dict.fromkeys([*manifest.code, _code()])))
    report = PrepareReport.of(manifest, skipped)
    add_sources(work.output, done)
    if work.before is None:
        report.save(work.output)
        manifest.save(work.output)
    else:  # The manifest says first which clips were added, see read_report.
        manifest.save(work.output)
        report.save(work.output)
    work.discard()
    return report


def _complete(
    output: Path,
    clips: Sequence[Clip],
    part: PartOf | None,
    maker: Maker,
    settings: PrepareSettings,
    phases: Phases,
) -> PrepareReport:
    """The report of a complete dataset that the same call made, after another try of the skipped if asked."""
    manifest = Manifest.load(output)
    report = read_report(output, manifest)
    _check_part(output, manifest, part)
    check_same(output, manifest, report.skipped, maker.stored, clips, phases)
    skipped = {source for source, _ in report.skipped}
    if not (settings.retry_skipped and skipped):
        remove_work(output)
        return report
    if manifest.format != FORMAT:
        raise UserError(
            f"{output}: is of the format {manifest.format}, to which no clips are added; prepare it anew"
        )
    with _open_work(output, maker, settings, part) as work, computing(settings.dtype):
        return _make([clip for clip in clips if clip.source in skipped], maker, work, phases)


def _check_part(output: Path, manifest: Manifest, part: PartOf | None) -> None:
    """Refuses a call for another part than the complete dataset is.

    Raises:
      UserError: it is another one, or one of other clips.
    """
    held = manifest.part
    if held == part:
        return
    if held is not None and part is not None and str(held) == str(part):
        raise UserError(f"{output}: is part {part} of another list of clips; give a name for a new folder")
    is_, wanted = ("the whole dataset" if p is None else f"part {p}" for p in (held, part))
    raise UserError(f"{output}: is {is_}, not {wanted}; give each part a folder of its own")
