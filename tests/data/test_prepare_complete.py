"""Preparing what is complete: nothing to do, clips that are tried again, and inputs that are others now."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.data import faces as faces_module
from keysync_jax.data import from_videos
from keysync_jax.data import parts as parts_module
from keysync_jax.data import prepare as prepare_module
from keysync_jax.data import report as report_module
from keysync_jax.data import sources as sources_module
from keysync_jax.data.prepare import PrepareSettings, check, prepare
from keysync_jax.data.records import Manifest
from keysync_jax.errors import UserError
from keysync_jax.files import write_json
from keysync_jax.model import Model
from tests.clips import face_landmarks
from tests.data.preparing import add_clip, contents, kept_model, raise_interrupt, write_good
from tests.data.test_prepare_sources import write_reference_layout

CROPS = PrepareSettings(crop=16)
RETRY = PrepareSettings(crop=16, retry_skipped=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good") / "clips")


@pytest.fixture
def clips(good: Path, tmp_path: Path) -> Path:
    """Three good clips, and c5 and c9 that cannot be used."""
    folder = tmp_path / "clips"
    shutil.copytree(good, folder)
    for name in ("c5", "c9"):
        (folder / f"{name}.mp4").write_bytes(b"no video at all")
        np.save(folder / f"{name}.npy", face_landmarks(18))
    return folder


@pytest.fixture
def dataset(clips: Path, tmp_path: Path) -> Path:
    """A dataset of these clips."""
    prepare(clips, tmp_path / "dataset", settings=CROPS)
    return tmp_path / "dataset"


def test_skipped_clips_are_tried_again_behind_the_others(clips: Path, dataset: Path) -> None:
    before = contents(dataset)
    add_clip(clips, "c9", 18)
    assert [source for source, _ in prepare(clips, dataset, settings=CROPS).skipped] == ["c5.mp4", "c9.mp4"]
    assert contents(dataset) == before
    report = prepare(clips, dataset, settings=RETRY)
    assert (report.done, [source for source, _ in report.skipped]) == (4, ["c5.mp4"])
    assert report.frames == 20 + 31 + 16 + 18
    found = check(dataset)
    # A frame has two records: landmarks, and the picture.
    assert [(clip.name, clip.shard, clip.first) for clip in found.clips] == [
        ("a2", 0, 0), ("a10", 0, 2 * 20), ("sub/b", 0, 2 * 51), ("c9", 1, 0),
    ]  # fmt: skip
    after = contents(dataset)
    assert after["shard-00000.arrayrecord"] == before["shard-00000.arrayrecord"]
    assert json.loads(after["report.json"])["done"] == 4
    assert prepare(clips, dataset, settings=CROPS) == report
    add_clip(clips, "c5", 16)
    assert prepare(clips, dataset, settings=RETRY).skipped == ()
    assert [clip.name for clip in check(dataset).clips] == ["a2", "a10", "sub/b", "c9", "c5"]
    assert prepare(clips, dataset, settings=RETRY).done == 5


def test_the_command_tries_them_again(clips: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_clip(clips, "c5", 16)
    command = ["prepare", str(clips), "-o", str(dataset), "--crop", "16"]
    assert main(command) == 0
    assert "3 prepared, 2 skipped" in capsys.readouterr().out
    assert main([*command, "--retry-skipped"]) == 0
    assert "4 prepared, 1 skipped" in capsys.readouterr().out


def test_skipped_clips_that_still_cannot_be_used_get_their_reason(clips: Path, dataset: Path) -> None:
    add_clip(clips, "c9", 12)
    before = contents(dataset)
    report = prepare(clips, dataset, settings=RETRY)
    assert "has 12 frames with sound, a sample needs 14" in dict(report.skipped)["c9.mp4"]
    assert prepare(clips, dataset, settings=CROPS) == report
    after = contents(dataset)
    assert {name for name in after if after[name] != before.get(name)} == {"report.json"}


def test_precomputed_clips_are_tried_again(tmp_path: Path) -> None:
    folder, output = tmp_path / "reference", tmp_path / "dataset"
    write_reference_layout(folder, {"c1": 20, "c2": 20})
    features = folder / "audios/c2_hubert_emb.safetensors"
    data = features.read_bytes()
    features.write_bytes(data[:100])
    assert len(prepare(folder, output).skipped) == 1
    features.write_bytes(data)
    assert prepare(folder, output, settings=PrepareSettings(retry_skipped=True)).done == 2
    assert [clip.name for clip in check(output).clips] == ["c1", "c2"]


STEPS = [
    (parts_module.Work, "finish"),
    (parts_module.Work, "decide"),
    (parts_module.Work, "assemble"),
    (prepare_module, "add_sources"),
    (Manifest, "save"),
    (report_module.PrepareReport, "save"),
    (parts_module.Work, "discard"),
]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_another_try_that_is_interrupted_goes_on(
    clips: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, step: int, behind: bool
) -> None:
    """Before or behind any of its steps; and the dataset is whole at any time, with or without it."""
    for name in ("c5", "c9"):
        add_clip(clips, name, 18)
    shutil.copytree(dataset, dataset.with_name("whole"))
    prepare(clips, dataset.with_name("whole"), settings=RETRY)
    owner, name = STEPS[step]
    function = getattr(owner, name)

    def interrupt(*arguments: Any) -> None:
        if behind:
            function(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(clips, dataset, settings=RETRY)
    check(dataset)
    shutil.copytree(dataset, dataset.with_name("plain"))
    plain = prepare(clips, dataset.with_name("plain"), settings=CROPS)
    assert plain.done in (3, 5)
    assert {path.name for path in dataset.with_name("plain").iterdir()} == {
        *(shard.file for shard in check(dataset.with_name("plain")).manifest.shards),
        "manifest.json",
        "report.json",
        "sources.json",
    }
    assert prepare(clips, dataset, settings=RETRY).done == 5
    assert contents(dataset) == contents(dataset.with_name("whole"))


def test_clips_that_were_decided_on_are_finished_before_others_are_tried_again(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.Work, "assemble", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(clips, output, settings=CROPS)
    add_clip(clips, "c5", 18)
    report = prepare(clips, output, settings=RETRY)
    assert (report.done, [source for source, _ in report.skipped]) == (4, ["c9.mp4"])
    assert [clip.name for clip in check(output).clips] == ["a2", "a10", "sub/b", "c5"]


def test_another_run_at_the_skipped_clips_is_left_alone(
    clips: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_clip(clips, "c5", 18)
    decide, seen = parts_module.Work.decide, []

    def meet_a_second(work: Any, *decided: Any) -> None:
        seen.append(prepare(clips, dataset, settings=CROPS).done)
        with pytest.raises(UserError, match="another run is preparing this dataset"):
            prepare(clips, dataset, settings=RETRY)
        decide(work, *decided)

    monkeypatch.setattr(parts_module.Work, "decide", meet_a_second)
    assert prepare(clips, dataset, settings=RETRY).done == 4
    assert seen == [3]


@pytest.mark.parametrize("name", ["a10.mp4", "a10.npy"])
@pytest.mark.parametrize("same_size", [False, True])
def test_a_file_that_was_replaced_is_noticed(clips: Path, dataset: Path, name: str, same_size: bool) -> None:
    path = clips / name
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data if same_size else data + b"more")
    before = contents(dataset)
    for settings in (CROPS, RETRY):
        with pytest.raises(UserError, match=rf"was made from another \S*{name} than there is now"):
            prepare(clips, dataset, settings=settings)
    assert contents(dataset) == before


def test_landmarks_that_were_not_there_are_noticed(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    write_reference_layout(folder, {"c1": 20})
    video = (folder / "videos/c1.mp4").read_bytes()
    (folder / "videos/c1.mp4").unlink()
    prepare(folder, tmp_path / "dataset")
    (folder / "landmarks/c1.mp4").write_bytes(video)
    with pytest.raises(UserError, match="other clips or settings"):
        prepare(folder, tmp_path / "dataset")


def test_files_are_read_again_only_where_their_time_has_changed(
    clips: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counting(path: Path, *progress: Any) -> str:
        read.append(path.name)
        return sha256_of(path, *progress)

    sha256_of = sources_module.sha256_of
    monkeypatch.setattr(sources_module, "sha256_of", counting)
    prepare(clips, dataset, settings=CROPS)
    assert read == []
    os.utime(clips / "a10.mp4")
    for _ in range(2):
        assert prepare(clips, dataset, settings=CROPS).done == 3
    assert read == ["a10.mp4"]


def test_a_dataset_from_before_sources_were_noted_is_complete(clips: Path, dataset: Path) -> None:
    (dataset / "sources.json").unlink()
    manifest = json.loads((dataset / "manifest.json").read_bytes())
    del manifest["code"]
    for name in ("latent_channels", "landmark_model", "model"):
        del manifest["settings"][name]
    write_json(dataset / "manifest.json", manifest)
    add_clip(clips, "c5", 18)
    assert prepare(clips, dataset, settings=CROPS).done == 3
    assert prepare(clips, dataset, settings=RETRY).done == 4
    assert [clip.name for clip in check(dataset).clips] == ["a2", "a10", "sub/b", "c5"]


def test_another_model_file_of_the_detector_is_noticed(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seeing:
        """Sees the face that is drawn, in every frame at the same place."""

        def detect(self, _: np.ndarray) -> np.ndarray:
            return face_landmarks(1)[0]

        def close(self) -> None:
            pass

    for module in (faces_module, from_videos):
        monkeypatch.setattr(module, "make_detector", lambda *_: Seeing())
    shutil.copy(good / "a2.mp4", tmp_path / "a2.mp4")
    weights = tmp_path / "face.task"
    settings = dataclasses.replace(CROPS, landmark_model=weights)
    refusals = {"done": "holds a dataset of other clips or settings", "begun": "was begun with another model"}
    weights.write_bytes(b"first")
    prepare(tmp_path / "a2.mp4", tmp_path / "done", settings=settings)
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.Work, "decide", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "a2.mp4", tmp_path / "begun", settings=settings)
    weights.write_bytes(b"second")
    for name, refusal in refusals.items():
        with pytest.raises(UserError, match=refusal):
            prepare(tmp_path / "a2.mp4", tmp_path / name, settings=settings)
    weights.write_bytes(b"first")
    for name in refusals:
        assert prepare(tmp_path / "a2.mp4", tmp_path / name, settings=settings).done == 1


def test_settings_of_the_model_that_no_file_has_are_noticed(
    good: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = kept_model(tiny_model), PrepareSettings(encoders=("hubert",))
    prepare(good / "a2.mp4", tmp_path / "done", model, settings)
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.Work, "decide", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(good / "a2.mp4", tmp_path / "begun", model, settings)
    config = model.config
    vae = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scale_factor=1.0))
    hubert = dataclasses.replace(config.encoders["hubert"], normalise_wave=False)
    encoder = dataclasses.replace(config, encoders={**config.encoders, "hubert": hubert})
    for changed in (vae, encoder):
        other = Model(model.folder, changed, model.hashes)
        with pytest.raises(UserError, match="holds a dataset of other clips or settings"):
            prepare(good / "a2.mp4", tmp_path / "done", other, settings)
        with pytest.raises(UserError, match="was begun with another model or other settings"):
            prepare(good / "a2.mp4", tmp_path / "begun", other, settings)
    # What prepare does not use may be another.
    unused = Model(model.folder, dataclasses.replace(config, steps=3), model.hashes)
    assert prepare(good / "a2.mp4", tmp_path / "done", unused, settings).done == 1


def test_the_scale_of_precomputed_latents_is_noticed(tiny_model: Path, tmp_path: Path) -> None:
    write_reference_layout(tmp_path / "reference", {"c1": 20})
    model = kept_model(tiny_model)
    prepare(tmp_path / "reference", tmp_path / "dataset", model)
    vae = dataclasses.replace(model.config.vae, scale_factor=1.0)
    other = Model(model.folder, dataclasses.replace(model.config, vae=vae), model.hashes)
    with pytest.raises(UserError, match="holds a dataset of other clips or settings"):
        prepare(tmp_path / "reference", tmp_path / "dataset", other)


def test_parts_of_other_code_are_not_mixed_and_datasets_of_other_code_are_complete(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(good, tmp_path / "done", settings=CROPS)
    (code,) = Manifest.load(tmp_path / "done").code
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.Work, "decide", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(good, tmp_path / "begun", settings=CROPS)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "code_digest", lambda *_: "f" * 64)
        with pytest.raises(
            UserError, match="was begun by another version of keysync; finish it with that one"
        ):
            prepare(good, tmp_path / "begun", settings=CROPS)
        assert prepare(good, tmp_path / "done", settings=CROPS).done == 3
    prepare(good, tmp_path / "begun", settings=CROPS)
    assert Manifest.load(tmp_path / "begun").code == (code,)


def test_the_manifest_names_the_code_of_clips_that_were_added(
    clips: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_clip(clips, "c5", 18)
    monkeypatch.setattr(prepare_module, "code_digest", lambda *_: "f" * 64)
    prepare(clips, dataset, settings=RETRY)
    assert [text.split()[1] == "f" * 64 for text in Manifest.load(dataset).code] == [False, True]
