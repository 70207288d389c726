"""The dataset's format: what is written is read, and damage is named."""

import dataclasses
import errno
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.data.arrayrecord import RecordReader
from keysync_jax.data.records import (
    UNGROUPED,
    Dataset,
    EncoderInfo,
    decode_frame,
    decode_record,
    encode_frame,
    encode_record,
    groups_of,
)
from keysync_jax.errors import UserError
from keysync_jax.media.landmarks import runs_without
from keysync_jax.train.config import LossConfig
from keysync_jax.train.fits import check_alike, check_fits
from tests import prepared
from tests.prepared import SETTINGS, record, train_config, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "dataset"
    write_dataset(path, [5, 7, np.array([True] * 3 + [False] * 2 + [True])])
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "dataset"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_record_is_a_safetensors_file() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = record(3, 4)
    data = encode_record(arrays)
    for found in (decode_record(data), safetensors.load(data)):
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert list(decode_record(data, ["landmarks"])) == ["landmarks"]


def test_pictures_keep_their_colours() -> None:
    rows, columns = np.mgrid[:64, :64]
    picture = np.stack([rows * 3, 255 - columns * 2, 90 + rows + columns], axis=-1).astype(np.uint8)
    back = decode_frame(encode_frame(picture)).astype(int)
    assert np.abs(back - picture).max() <= 6


def test_frames_are_read_in_the_order_asked_for(folder: Path) -> None:
    dataset = pickle.loads(pickle.dumps(Dataset(folder)))
    # Four records a frame: latents, two voices, pixels.
    assert [(clip.shard, clip.first, clip.frames) for clip in dataset.clips] == [
        (0, 0, 5), (0, 20, 7), (1, 0, 6),
    ]  # fmt: skip
    for clip in range(3):
        for found, frame in zip(dataset.read(clip, [4, 0, 2]), (4, 0, 2), strict=True):
            for name, array in record(clip, frame).items():
                np.testing.assert_array_equal(found[name], array)
    assert pickle.loads(pickle.dumps(dataset)).read(1, [6], ["mean"])[0].keys() == {"mean"}
    dataset.verify()


GROUPS = (("mean", "logvar", "landmarks"), ("audio_hubert",), ("audio_wavlm",), ("frame",))


def test_a_shard_has_a_clips_groups_one_after_another(folder: Path) -> None:
    dataset = Dataset(folder)
    assert dataset.manifest.groups == GROUPS
    records = RecordReader(folder / "shard-00000.arrayrecord").read(range(12 * 4))
    for clip, first, frames in ((0, 0, 5), (1, 20, 7)):
        for group, names in enumerate(GROUPS):
            for frame in range(frames):
                found = decode_record(records[first + group * frames + frame])
                assert tuple(found) == names
                for name in names:
                    np.testing.assert_array_equal(found[name], record(clip, frame)[name])


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"latents": "sample", "frames": False}, (("mean", "landmarks"), *GROUPS[1:3])),
        ({"latents": "none", "encoders": {}}, (("landmarks",), ("frame",))),
        (
            {"pitch": (-2.0,), "encoders": {"hubert": SETTINGS.encoders["hubert"]}},
            (GROUPS[0], ("audio_hubert",), ("audio_hubert_pitch-2",), ("frame",)),
        ),
    ],
)
def test_groups_follow_from_the_settings(
    changes: dict[str, Any], groups: tuple[tuple[str, ...], ...]
) -> None:
    assert groups_of(dataclasses.replace(SETTINGS, **changes)) == groups


def test_a_dataset_of_whole_records_is_read_too(folder: Path, tmp_path: Path) -> None:
    clips: list[int | np.ndarray] = [5, 7, Dataset(folder).clips[2].present]
    before = write_dataset(tmp_path / "before", clips, format=UNGROUPED)
    assert json.loads((tmp_path / "before/manifest.json").read_text())["format"] == "keysync-dataset-1"
    assert [(clip.shard, clip.first) for clip in before.clips] == [(0, 0), (0, 5), (1, 0)]
    before.verify()
    for names in (None, ["mean", "audio_wavlm"]):
        for clip in range(3):
            pairs = zip(
                before.read(clip, [3, 1], names), Dataset(folder).read(clip, [3, 1], names), strict=True
            )
            for one, other in pairs:
                assert one.keys() == other.keys()
                assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_a_dataset_does_not_hold_is_named(folder: Path, copied: Path) -> None:
    with pytest.raises(UserError, match="dataset: holds no 'audio_wav2vec2'"):
        Dataset(folder).read(0, [0], ["mean", "audio_wav2vec2"])
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["settings"]["pitch"] = [2.0]
    manifest["clips"] = manifest["clips"][:1]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the clip 'clip0' has no 'audio_hubert_pitch\\+2'"):
        Dataset(copied).verify()


def test_every_group_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for group, name in enumerate(("logvar", "audio_hubert", "audio_wavlm", "frame")):
        spoiled = np.zeros((2, 5), np.float32)
        with monkeypatch.context() as patch:
            if name == "frame":
                spoiled = encode_frame(np.zeros((8, 8, 3), np.uint8))
            patch.setattr(prepared, "record", lambda *at, n=name, x=spoiled: {**record(*at), n: x})
            dataset = write_dataset(tmp_path / f"{group}", [3])
        with pytest.raises(UserError, match="wrong size" if name == "frame" else f"has no sound '{name}'"):
            dataset.verify()


def test_frames_without_a_face_survive_the_manifest(folder: Path) -> None:
    clip = Dataset(folder).clips[2]
    assert clip.without_face == ((3, 2),)
    assert clip.present.tolist() == [True] * 3 + [False] * 2 + [True]


@pytest.mark.parametrize("pattern", ["1", "0", "0110", "1001", "10101"])
def test_runs_are_the_false_stretches(pattern: str) -> None:
    present = np.array([c == "1" for c in pattern])
    rebuilt = np.ones(len(present), bool)
    for first, count in runs_without(present):
        rebuilt[first : first + count] = False
    np.testing.assert_array_equal(rebuilt, present)


def test_a_missing_shard_is_named(copied: Path) -> None:
    (copied / "shard-00001.arrayrecord").unlink()
    with pytest.raises(UserError, match=r"shard-00001.arrayrecord: this shard of the dataset is missing"):
        Dataset(copied)


def test_an_empty_shard_is_named(copied: Path) -> None:
    (copied / "shard-00000.arrayrecord").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-00000.arrayrecord: this shard of the dataset is empty"):
        Dataset(copied)


def test_a_truncated_shard_is_named(copied: Path) -> None:
    path = copied / "shard-00000.arrayrecord"
    path.write_bytes(path.read_bytes()[:-70_000])
    with pytest.raises(UserError, match=r"shard-00000.arrayrecord: this shard is truncated or altered"):
        Dataset(copied)
    with pytest.raises(UserError, match=r"damaged or no ArrayRecord"):
        len(RecordReader(path))


def test_altered_bytes_are_found(copied: Path) -> None:
    path = copied / "shard-00000.arrayrecord"
    data = bytearray(path.read_bytes())
    at = data.index(encode_record({"frame": record(1, 6)["frame"]})[-200:])
    data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000.arrayrecord: was altered"):
        Dataset(copied).verify()
    with pytest.raises(UserError, match=r"shard-00000.arrayrecord: is damaged"):
        Dataset(copied).read(1, [6])


def test_another_format_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"format": "keysync-dataset-0"}))
    with pytest.raises(UserError, match="'keysync-dataset-0', not 'keysync-dataset-2'"):
        Dataset(copied)


@pytest.mark.parametrize(("content", "message"), [("", "cannot be read"), ("[]", "has the format None")])
def test_a_broken_manifest_is_named(copied: Path, content: str, message: str) -> None:
    (copied / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"manifest.json: {message}"):
        Dataset(copied)


@pytest.mark.parametrize("name", ["../other.arrayrecord", "/shard", "deep/shard", ".", "..", ""])
def test_a_shard_outside_the_folder_is_refused(copied: Path, name: str) -> None:
    shutil.copyfile(copied / "shard-00000.arrayrecord", copied.parent / "other.arrayrecord")
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"names the shard '{re.escape(name)}', which is no file of this"):
        Dataset(copied)


@pytest.mark.parametrize("first", [-1, 21])
def test_a_clip_outside_its_shard_is_named(copied: Path, first: int) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["clips"][1]["first"] = first
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the clip 'clip1' lies outside its shard"):
        Dataset(copied)


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(UserError, match="not a prepared dataset"):
            Dataset(path)


def test_a_manifest_that_the_system_cannot_read_is_not_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Too many open files"):
        Dataset(folder)


def test_a_dataset_that_fits(folder: Path) -> None:
    hashes = {"vae.safetensors": "a" * 64, "audio_hubert.safetensors": "b" * 64}
    check_fits(Dataset(folder), train_config(), hashes)
    check_fits(Dataset(folder), train_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_encoder": "wav2vec2"}, "prepared with hubert, wavlm features, the config asks for wav2vec2"),
        ({"audio_encoder": "wavlm"}, "audio vectors of 4, the config asks for 6"),
        ({"latent_size": 4}, "latents of side 8, the config asks for 4"),
    ],
)
def test_another_stage_is_refused(folder: Path, changes: dict[str, str], message: str) -> None:
    config = train_config()
    config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, **changes))
    with pytest.raises(UserError, match=message):
        check_fits(Dataset(folder), config)


@pytest.mark.parametrize("file", ["vae.safetensors", "audio_hubert.safetensors"])
def test_another_model_is_refused(folder: Path, file: str) -> None:
    with pytest.raises(UserError, match=f"prepared with another {file}"):
        check_fits(Dataset(folder), train_config(), {file: "d" * 64})


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"vae": "d" * 64}, "vae.safetensors"),
        ({"encoders": {"hubert": EncoderInfo(6, "d" * 64)}}, "audio_hubert.safetensors"),
    ],
)
def test_datasets_of_different_models_are_refused(tmp_path: Path, changes: dict[str, Any], file: str) -> None:
    unknown = dataclasses.replace(SETTINGS, vae=None, encoders={"hubert": EncoderInfo(6, None)})
    other = dataclasses.replace(SETTINGS, **changes)
    a, b, c = (
        write_dataset(tmp_path / n, [2], s) for n, s in zip("abc", (unknown, SETTINGS, other), strict=True)
    )
    check_alike([a, b, b], "hubert")
    check_alike([a, c], "hubert")
    with pytest.raises(UserError, match=f"/b and .*/c: were prepared with different {file}"):
        check_alike([a, b, c], "hubert")


def test_another_encoder_of_another_kind_does_not_matter(tmp_path: Path) -> None:
    encoders = {**SETTINGS.encoders, "hubert": EncoderInfo(6, "d" * 64)}
    other = dataclasses.replace(SETTINGS, encoders=encoders)
    check_alike([write_dataset(tmp_path / "a", [2]), write_dataset(tmp_path / "b", [2], other)], "wavlm")


@pytest.mark.parametrize(("channels", "known"), [(8, True), (8, False), (4, False)])
def test_latents_have_the_channels_that_the_settings_say(tmp_path: Path, channels: int, known: bool) -> None:
    """Where they do not say it, as in the first datasets, any number will do."""
    said = dataclasses.replace(SETTINGS, latent_channels=channels if known else None)
    write_dataset(tmp_path / "d", [5, 3], said, channels=channels).verify()


@pytest.mark.parametrize("said", [4, 6])
def test_other_channels_than_the_settings_say_are_found(tmp_path: Path, said: int) -> None:
    settings = dataclasses.replace(SETTINGS, latent_channels=said)
    with pytest.raises(UserError, match="a record of the clip 'clip0' has no sound 'mean'"):
        write_dataset(tmp_path / "d", [5], settings, channels=8).verify()


def test_a_run_with_other_channels_is_refused(tmp_path: Path) -> None:
    eight = dataclasses.replace(SETTINGS, latent_channels=8)
    dataset = write_dataset(tmp_path / "eight", [20], eight, channels=8)
    config = train_config()
    with pytest.raises(UserError, match="holds latents with a channel count of 8, the config asks for 4"):
        check_fits(dataset, config)
    wider = dataclasses.replace(config, vae=dataclasses.replace(config.vae, latent_channels=8))
    check_fits(dataset, wider)
    unknown = write_dataset(tmp_path / "unknown", [20], SETTINGS, channels=8)
    check_fits(unknown, config)


def test_the_pixel_loss_needs_pixels(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [20], dataclasses.replace(SETTINGS, frames=False))
    check_fits(dataset, train_config(loss=LossConfig(pixel="none")))
    with pytest.raises(UserError, match="has no pixels"):
        check_fits(dataset, train_config())
