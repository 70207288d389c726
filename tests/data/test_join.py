"""A dataset in parts: each clip in one of them, and joined they are the dataset that is made at once."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keysync_jax.cli import main
from keysync_jax.data import parts as parts_module
from keysync_jax.data.division import number_of, parse_part
from keysync_jax.data.join import join
from keysync_jax.data.prepare import PrepareSettings, check, prepare
from keysync_jax.data.records import Dataset
from keysync_jax.data.report import read_report
from keysync_jax.data.sources import find_clips
from keysync_jax.errors import UserError
from tests.data.preparing import add_clip, contents, raise_interrupt, write_good

COUNT = 4


def part(number: int, count: int = COUNT, crop: int = 16) -> PrepareSettings:
    return PrepareSettings(crop=crop, part=(number, count))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good clips and two bad ones; of four parts one is empty, and one has bad ones alone."""
    folder = write_good(tmp_path_factory.mktemp("raw") / "clips")
    for name in ("a1", "c"):
        add_clip(folder, name, 15)
    for name in ("short", "d"):
        add_clip(folder, name, 9)
    return folder


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    prepare(clips, folder, settings=PrepareSettings(crop=16))
    return folder


@pytest.fixture(scope="module")
def made(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("parts") / f"part-{number}" for number in range(COUNT)]
    for number, folder in enumerate(folders):
        prepare(clips, folder, settings=part(number))
    return folders


@pytest.fixture
def parts(made: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that a test may alter."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made]


def test_joined_parts_equal_the_dataset_made_at_once(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    report = join(list(reversed(parts)), tmp_path / "sub" / "joined")
    found, wanted = check(tmp_path / "sub" / "joined"), check(whole)
    assert replace(report, bytes=0) == replace(read_report(whole, wanted.manifest), bytes=0)
    assert found.content_sha256() == wanted.content_sha256()
    assert found.settings == wanted.settings
    assert [clip.name for clip in found.clips] == ["a1", "a2", "a10", "c", "sub/b"]
    for number, clip in enumerate(wanted.clips):
        for ours, theirs in zip(*(d.read(number, range(clip.frames)) for d in (found, wanted)), strict=True):
            assert {name: a.tobytes() for name, a in ours.items()} == {
                name: a.tobytes() for name, a in theirs.items()
            }
    names = {path.name for path in (tmp_path / "sub" / "joined").iterdir()}
    assert names == {"manifest.json", "report.json", "sources.json"}  # No record is copied.
    before = contents(tmp_path / "sub" / "joined")
    assert join(parts, tmp_path / "sub" / "joined") == report
    assert contents(tmp_path / "sub" / "joined") == before


def test_every_clip_is_in_the_part_of_its_name(clips: Path, made: list[Path]) -> None:
    names = [[clip.name for clip in Dataset(folder).clips] for folder in made]
    for number, held in enumerate(names):
        assert all(number_of(name, COUNT) == number for name in held)
    skipped = [json.loads((folder / "report.json").read_text())["skipped"] for folder in made]
    assert sum(map(len, names)) + sum(map(len, skipped)) == len(find_clips(clips))
    assert [] in names  # A part without a clip is a dataset all the same, and no error of its job.


def test_a_joined_dataset_moves_with_its_parts(
    parts: list[Path], clips: Path, whole: Path, tmp_path: Path
) -> None:
    join(parts, tmp_path / "joined")
    (tmp_path / "elsewhere").mkdir()
    for folder in (*parts, tmp_path / "joined"):
        folder.rename(tmp_path / "elsewhere" / folder.name)
    joined = tmp_path / "elsewhere" / "joined"
    assert check(joined).content_sha256() == Dataset(whole).content_sha256()
    # The call that made the whole finds it done.
    assert prepare(clips, joined, settings=PrepareSettings(crop=16)).done == 5
    moved = [joined.parent / folder.name for folder in parts]
    shutil.rmtree(next(folder for folder in moved if Dataset(folder).clips))
    with pytest.raises(UserError, match="this shard of the dataset is missing"):
        Dataset(joined)


def _twice(parts: list[Path]) -> list[Path]:
    return [*parts, parts[1]]


def _missing(parts: list[Path]) -> list[Path]:
    return [parts[0], parts[2]]


def _altered(change: Callable[[dict[str, Any]], object]) -> Callable[[list[Path]], list[Path]]:
    """A change to the manifest of the last part that has clips."""

    def alter(parts: list[Path]) -> list[Path]:
        folder = [p for p in parts if Dataset(p).clips][-1]
        content = json.loads((folder / "manifest.json").read_bytes())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))
        return parts

    return alter


def _of_encoders(parts: list[Path]) -> list[Path]:
    """Parts without a clip, of two encoders."""
    for number, folder in enumerate(parts):
        content = json.loads((folder / "manifest.json").read_bytes())
        content |= {"clips": [], "shards": []}
        content["settings"]["encoders"] = {"hubert": {"dim": 8, "sha256": f"{number // 2}" * 64}}
        (folder / "manifest.json").write_text(json.dumps(content))
    return parts


REFUSED = {
    "no parts": (lambda parts: [], "--join takes the datasets that --part made"),
    "missing": (_missing, "of 4 parts 1/4, 3/4 are missing"),
    "twice": (_twice, "is part 1/4 again, as .*part-1 is"),
    "whole": (_altered(lambda m: m.update(part=None)), "is a whole dataset and not one of several parts"),
    "another count": (_altered(lambda m: m["part"].update(count=5)), r"is part \d/5, and .* part 0/4"),
    "another list": (_altered(lambda m: m["part"].update(clips="f" * 64)), "made from another list of clips"),
    "another encoder": (_of_encoders, r"another model or other settings than .* \(encoders\)"),
    "another VAE": (_altered(lambda m: m["settings"].update(vae="1" * 64)), r"settings than .* \(vae\)"),
    "a clip twice": (_altered(lambda m: m["clips"].append(m["clips"][0])), "is there twice"),
    "a strange clip": (
        _altered(lambda m: m["clips"][0].update(name="of another part", source="x.mp4")),
        "is there and belongs to another part",
    ),
    "another file": (_altered(lambda m: m["clips"][0].update(sha256="2" * 64)), "another file than"),
    "a clip lost": (
        _altered(lambda m: m["clips"].pop()),
        "their clips together are not those that were divided",
    ),
    "a path": (
        _altered(lambda m: m["shards"][0].update(file="../../x.arrayrecord")),
        "which is no file of this folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_belong_together_are_refused(parts: list[Path], tmp_path: Path, case: str) -> None:
    change, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        join(change(parts), tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_what_is_there_is_not_overwritten(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "joined")
    before = contents(tmp_path / "joined")
    with pytest.raises(UserError, match="holds another dataset"):
        join(parts, tmp_path / "joined")
    assert contents(tmp_path / "joined") == before


def test_a_part_goes_on_and_is_no_other_part(
    clips: Path, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = number_of("a10", COUNT)
    monkeypatch.setattr(parts_module.Work, "decide", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(clips, tmp_path / "begun", settings=part(number))
    monkeypatch.undo()
    with pytest.raises(UserError, match="other settings, or as another part"):
        prepare(clips, tmp_path / "begun", settings=part((number + 1) % COUNT))
    prepare(clips, tmp_path / "begun", settings=part(number))
    assert contents(tmp_path / "begun") == contents(made[number])
    with pytest.raises(UserError, match=f"is part {number}/4, not part {number}/5"):
        prepare(clips, tmp_path / "begun", settings=part(number, 5))
    with pytest.raises(UserError, match=f"is part {number}/4, not the whole dataset"):
        prepare(clips, tmp_path / "begun", settings=PrepareSettings(crop=16))
    more = Path(shutil.copytree(clips, tmp_path / "more"))
    add_clip(more, "new", 15)
    with pytest.raises(UserError, match=f"is part {number}/4 of another list of clips"):
        prepare(more, tmp_path / "begun", settings=part(number))


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "1/0", "-1/4", "1/2/3"])
def test_a_part_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match=r"numbered from 0|takes a number and a count"):
        parse_part(text)


def test_the_commands(clips: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        command = ["prepare", str(clips), "--crop", "16", "-o", str(tmp_path / f"p{number}")]
        assert main([*command, "--part", f"{number}/2"]) == 0
    joined = str(tmp_path / "joined")
    assert main(["prepare", "--join", str(tmp_path / "p0"), str(tmp_path / "p1"), "-o", joined]) == 0
    assert "5 prepared, 2 skipped" in capsys.readouterr().out
    for folder in (joined, str(whole)):
        assert main(["prepare", "--check", folder, "--content"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("content")]
    assert len(printed) == 2
    assert len(set(printed)) == 1
    assert main(["prepare", "--join", joined, "-o", str(tmp_path / "again")]) == 2
    assert "is a whole dataset" in capsys.readouterr().err
