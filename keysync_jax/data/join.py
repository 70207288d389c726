"""One dataset over the shards of its parts: `keysync prepare --join`.

Nothing is copied: the manifest names the parts' shards by paths relative to its own folder. What comes out
equals the dataset that is made without parts: the same settings, the same clips in the same order (that of
their names, `sources.find_clips`), and of every clip the same records, byte for byte. So is what
`Dataset.content_sha256` says of it; only where a record lies differs.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from keysync_jax.data.division import digest_of, number_of
from keysync_jax.data.records import MANIFEST, ClipInfo, Dataset, Manifest, Settings, ShardInfo
from keysync_jax.data.report import PrepareReport, read_report, read_sources, write_sources
from keysync_jax.data.sources import FileState, natural
from keysync_jax.errors import UserError
from keysync_jax.files import check_new_folder, new_folder


def join(parts: Sequence[Path], output: Path) -> PrepareReport:
    """Makes one dataset of all parts of a division, over their shards, which stay where they are.

    Where `output` is the dataset that these parts give, nothing is done.

    Args:
      parts: the datasets of `prepare` with `PrepareSettings.part`, all of them, in any order.

    Raises:
      UserError: one is no such part, or was made from other clips, with other settings or another encoder
        than the others; one is missing or given twice; a clip is there twice, or not at all; the output is
        something else.
    """
    datasets = _in_order([Dataset(part) for part in parts])
    settings = _settings(datasets)
    reports = [read_report(dataset.folder, dataset.manifest) for dataset in datasets]
    sources = [read_sources(dataset.folder) for dataset in datasets]
    for dataset, noted in zip(datasets, sources, strict=True):
        _check_clips(dataset, noted)
    skipped = [item for report in reports for item in report.skipped]
    _check_complete(datasets, [source for source, _ in skipped])
    manifest = _manifest(datasets, settings, output)
    report = PrepareReport.of(manifest, sorted(skipped, key=lambda item: natural(item[0])))
    if (output / MANIFEST).is_file():
        if Manifest.load(output) != manifest:
            raise UserError(f"{output}: holds another dataset; give a name for a new folder")
        return report
    check_new_folder(output)
    with new_folder(output) as folder:
        write_sources(folder, {source: files for noted in sources for source, files in noted.items()})
        report.save(folder)
        manifest.save(folder)
    return report


def _in_order(datasets: Sequence[Dataset]) -> list[Dataset]:
    """All parts of one division, by their numbers."""
    found: dict[int, Dataset] = {}
    for dataset in datasets:
        part, first = dataset.manifest.part, datasets[0].manifest.part
        if part is None or first is None:
            whole = dataset if part is None else datasets[0]
            raise UserError(
                f"{whole.folder}: is a whole dataset and not one of several parts; a training's data.paths "
                "takes several as they are"
            )
        if part.count != first.count:
            raise UserError(f"{dataset.folder}: is part {part}, and {datasets[0].folder} part {first}")
        if part.clips != first.clips:
            raise UserError(
                f"{dataset.folder}: was made from another list of clips than {datasets[0].folder}; a video "
                "was added or taken away between the two"
            )
        if part.number in found:
            raise UserError(f"{dataset.folder}: is part {part} again, as {found[part.number].folder} is")
        found[part.number] = dataset
    if not found:
        raise UserError("--join takes the datasets that --part made")
    count = len(found)
    if datasets[0].manifest.part is not None:
        count = datasets[0].manifest.part.count
    missing = [f"{number}/{count}" for number in range(count) if number not in found]
    if missing:
        raise UserError(
            f"of {count} parts {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    return [found[number] for number in range(count)]


def _settings(datasets: Sequence[Dataset]) -> Settings:
    """The settings of all parts; what the first do not know the others may."""
    settings = datasets[0].settings
    for dataset in datasets[1:]:
        held = {f.name: getattr(settings, f.name) for f in fields(Settings)}
        if not settings.agrees(dataset.settings):
            names = [name for name in held if held[name] != getattr(dataset.settings, name)]
            raise UserError(
                f"{dataset.folder}: was prepared with another model or other settings than "
                f"{datasets[0].folder} ({', '.join(names)})"
            )
        unknown = [name for name, value in held.items() if value is None]
        settings = replace(settings, **{name: getattr(dataset.settings, name) for name in unknown})
    return settings


def _check_clips(dataset: Dataset, noted: dict[str, tuple[FileState, ...]]) -> None:
    """That the clips of a part are of it, each once, from the file that was noted."""
    part, seen = dataset.manifest.part, set[str]()
    assert part is not None
    for clip in dataset.clips:
        if clip.name in seen or number_of(clip.name, part.count) != part.number:
            why = "twice" if clip.name in seen else "and belongs to another part"
            raise UserError(
                f"{dataset.folder / MANIFEST}: the clip {clip.name!r} is there {why}; it was altered"
            )
        if clip.source in noted and noted[clip.source][0].sha256 != clip.sha256:
            raise UserError(
                f"{dataset.folder}: the clip {clip.name!r} was made from another file than was noted"
            )
        seen.add(clip.name)


def _check_complete(datasets: Sequence[Dataset], skipped: Iterable[str]) -> None:
    """That every clip of the source was prepared or skipped, once."""
    part = datasets[0].manifest.part
    assert part is not None
    done = [clip.source for dataset in datasets for clip in dataset.clips]
    if digest_of([*done, *skipped]) != part.clips:
        raise UserError(
            f"{datasets[0].folder} and the others: their clips together are not those that were divided; a "
            "manifest or a report was altered"
        )


def _manifest(datasets: Sequence[Dataset], settings: Settings, output: Path) -> Manifest:
    """The clips in the order of their names, wherever they lie."""
    shards, clips, folders = list[ShardInfo](), list[ClipInfo](), list[str]()
    for dataset in datasets:
        folder = Path(os.path.relpath(dataset.folder.resolve(), output.resolve())).as_posix()
        folders.append(folder)
        clips += [replace(clip, shard=len(shards) + clip.shard) for clip in dataset.clips]
        shards += [replace(shard, file=f"{folder}/{shard.file}") for shard in dataset.manifest.shards]
    code = dict.fromkeys(text for dataset in datasets for text in dataset.manifest.code)
    return Manifest(
        settings,
        tuple(shards),
        tuple(sorted(clips, key=lambda clip: natural(clip.name))),
        code=tuple(code),
        joined=tuple(folders),
    )
