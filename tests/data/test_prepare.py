"""From clips to a dataset: what is stored, and what is skipped or refused."""

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.data import parts as parts_module
from keysync_jax.data.faces import Task, cut_all
from keysync_jax.data.prepare import PrepareReport, PrepareSettings, check, prepare
from keysync_jax.data.records import Dataset, audio_name, decode_frame
from keysync_jax.data.sources import Clip
from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.media.audio import RATE, read_audio
from keysync_jax.media.crop import crop_frame, crop_track, landmarks_in_crop
from keysync_jax.media.pitch import shifted
from keysync_jax.media.video import read_frames
from keysync_jax.media.writer import VideoWriter
from keysync_jax.model import Model
from keysync_jax.pipeline.features import audio_features
from keysync_jax.pipeline.latents import encode_frames
from tests.clips import face_landmarks, write_video
from tests.data.preparing import FRAMES, add_clip, contents, kept_model, raise_interrupt, write_good


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return kept_model(tiny_model)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good clips and five bad ones."""
    folder = write_good(tmp_path_factory.mktemp("raw") / "clips")
    add_clip(folder, "faceless", 20, np.full((20, 68, 2), np.nan, np.float32))
    add_clip(folder, "short", 12)
    add_clip(folder, "misfit", 20, face_landmarks(7))
    write_video(folder / "mute.mp4", 20)
    np.save(folder / "mute.npy", face_landmarks(20))
    (folder / "broken.mkv").write_bytes(b"no video at all")
    np.save(folder / "broken.npy", face_landmarks(20))
    (folder / "notes.txt").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good") / "clips")


@pytest.fixture(scope="module")
def prepared(source: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(source, folder, model)
    return folder


@pytest.fixture(scope="module")
def prepared_good(good: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared_good") / "dataset"
    prepare(good, folder, model)
    return folder


def test_good_clips_are_done_and_bad_ones_reported(source: Path, prepared: Path, model: Model) -> None:
    dataset = check(prepared)
    assert [(clip.name, clip.frames) for clip in dataset.clips] == list(FRAMES.items())
    assert [clip.source for clip in dataset.clips] == ["a2.mp4", "a10.mp4", "sub/b.mp4"]
    assert dataset.clips[0].sha256 == sha256_of(source / "a2.mp4")
    report = prepare(source, prepared, model)
    assert report.done == 3
    assert report.frames == 67
    assert report.bytes == (prepared / "shard-00000.arrayrecord").stat().st_size
    reasons = dict(report.skipped)
    assert list(reasons) == ["broken.mkv", "faceless.mp4", "misfit.mp4", "mute.mp4", "short.mp4"]
    for name, text in {
        "broken.mkv": "cannot read the video",
        "faceless.mp4": "no face was found",
        "misfit.mp4": "has landmarks for 7 frames, but the video has 20",
        "mute.mp4": "has no audio stream",
        "short.mp4": "has 12 frames with sound, a sample needs 14",
    }.items():
        assert text in reasons[name]
        assert text in report.table()
    assert "3 prepared, 5 skipped" in report.table()
    assert json.loads((prepared / "report.json").read_text())["frames"] == 67


def test_records_hold_what_a_dub_computes(source: Path, prepared: Path, model: Model) -> None:
    """Crop, landmarks, posterior and features of the same functions that `dub` calls."""
    dataset = Dataset(prepared)
    path, frames, size = source / "a10.mp4", 31, model.config.crop_size
    landmarks = face_landmarks(frames)
    boxes = crop_track(landmarks, np.ones(frames, bool), 80, 96)
    crops = [crop_frame(f, box, size) for f, box in zip(read_frames(path), boxes, strict=True)]
    records = dataset.read(1, range(frames))
    np.testing.assert_allclose(
        [r["landmarks"] for r in records], landmarks_in_crop(landmarks, boxes, size), atol=1e-5
    )
    vae = model.load("vae")
    raw = np.concatenate(list(encode_frames(vae, crops))) / model.config.vae.scale_factor
    stored = np.stack([r["mean"] for r in records])
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, raw, rtol=2**-11, atol=1e-6)
    logvar = np.stack([r["logvar"] for r in records])
    assert logvar.shape == stored.shape
    assert -30 <= logvar.min() < logvar.max() <= 20
    wave_ = read_audio(path)[: frames * 640]
    for kind, config in model.config.encoders.items():
        features = audio_features(config, model.load(f"audio_{kind}").params, wave_, frames)
        np.testing.assert_array_equal([r[f"audio_{kind}"] for r in records], features)
    pixels = np.stack([decode_frame(r["frame"]) for r in records]).astype(int)
    assert np.abs(pixels - np.stack(crops)).mean() < 3


def test_the_manifest_names_its_model(prepared: Path, model: Model) -> None:
    settings, hashes = Dataset(prepared).settings, model.hashes
    assert settings.vae == hashes["vae.safetensors"]
    assert {kind: e.sha256 for kind, e in settings.encoders.items()} == {
        kind: hashes[f"audio_{kind}.safetensors"] for kind in ("hubert", "wavlm")
    }
    assert (settings.crop_size, settings.latent_size, settings.fps) == (16, 8, 25)


def test_workers_make_the_same_bytes(source: Path, prepared: Path, model: Model, tmp_path: Path) -> None:
    prepare(source, tmp_path / "again", model, PrepareSettings(workers=2))
    assert contents(tmp_path / "again") == contents(prepared)


def test_a_stored_sample_is_drawn_from_the_posterior(
    good: Path, prepared_good: Path, model: Model, tmp_path: Path
) -> None:
    settings = PrepareSettings(latents="sample", encoders=("hubert",))
    prepare([good / "a10.mp4"], tmp_path / "dataset", model, settings)
    posterior = [Dataset(prepared_good).read(1, range(31), [name]) for name in ("mean", "logvar")]
    mean, logvar = (np.stack([next(iter(r.values())) for r in part]).astype(np.float32) for part in posterior)
    records = Dataset(tmp_path / "dataset").read(0, range(31))
    assert set(records[0]) == {"mean", "landmarks", "audio_hubert", "frame"}
    noise = (np.stack([r["mean"] for r in records]) - mean) / np.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)


@pytest.fixture(scope="module")
def prepared_voices(good: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good clips with two shifted voices."""
    folder = tmp_path_factory.mktemp("prepared_voices") / "dataset"
    prepare(good, folder, model, PrepareSettings(pitch=(2, -2.5)))
    return folder


def test_shifted_voices_are_stored_beside_the_plain_one(
    good: Path, prepared_voices: Path, prepared_good: Path, model: Model
) -> None:
    dataset, plain = check(prepared_voices), Dataset(prepared_good)
    assert dataset.settings.pitch == (-2.5, 2.0)
    assert json.loads((prepared_voices / "manifest.json").read_bytes())["settings"]["pitch"] == [-2.5, 2.0]
    records, frames = dataset.read(1, range(31)), 31
    for found, expected in zip(records, plain.read(1, range(31)), strict=True):
        assert set(found) - set(expected) == {
            f"audio_{kind}_pitch{shift}" for kind in ("hubert", "wavlm") for shift in ("+2", "-2.5")
        }
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    wave_ = read_audio(good / "a10.mp4")[: frames * 640]
    for kind, config in model.config.encoders.items():
        params = model.load(f"audio_{kind}").params
        for shift in (-2.5, 2.0):
            features = audio_features(config, params, shifted(wave_, shift), frames)
            np.testing.assert_array_equal([r[audio_name(kind, shift)] for r in records], features)


def test_a_run_with_shifted_voices_goes_on(
    good: Path, prepared_voices: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PrepareSettings(pitch=(-2.5, 2.0), workers=1)
    monkeypatch.setattr(parts_module.Work, "decide", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(good, tmp_path / "dataset", model, settings)
    monkeypatch.undo()
    with pytest.raises(UserError, match="was begun with another model or other settings"):
        prepare(good, tmp_path / "dataset", model, PrepareSettings(pitch=(-2.5,)))
    prepare(good, tmp_path / "dataset", model, settings)
    assert contents(tmp_path / "dataset") == contents(prepared_voices)
    with pytest.raises(UserError, match="holds a dataset of other clips or settings"):
        prepare(good, tmp_path / "dataset", model)


def test_a_missing_shifted_voice_is_noticed(prepared_good: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared_good, tmp_path / "dataset")
    manifest = json.loads((tmp_path / "dataset/manifest.json").read_bytes())
    manifest["settings"]["pitch"] = [2.0]
    manifest["clips"] = manifest["clips"][:1]
    (tmp_path / "dataset/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no 'audio_hubert_pitch\\+2'"):
        check(tmp_path / "dataset")


def test_a_dataset_from_before_there_were_shifted_voices_opens(prepared_good: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared_good, tmp_path / "dataset")
    manifest = json.loads((tmp_path / "dataset/manifest.json").read_bytes())
    del manifest["settings"]["pitch"]
    (tmp_path / "dataset/manifest.json").write_text(json.dumps(manifest))
    assert check(tmp_path / "dataset").settings.pitch == ()


@pytest.mark.parametrize(
    ("pitch", "sentence"),
    [
        ("-2,two", "--pitch takes semitones, as --pitch=-2,2, not '-2,two'"),
        ("13", "a pitch shift is up to 12 semitones up or down, not 13"),
        ("0", "a pitch shift is up to 12 semitones up or down, not 0"),
        ("nan", "a pitch shift is up to 12 semitones up or down, not nan"),
    ],
)
def test_a_pitch_that_cannot_be_used(
    good: Path, tmp_path: Path, pitch: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(good), "-o", str(tmp_path / "dataset"), f"--pitch={pitch}"]) == 2
    assert sentence in capsys.readouterr().err


def test_sound_that_starts_before_the_picture_is_cut(good: Path, tmp_path: Path) -> None:
    """Frame 0 goes with the sound at its own time, not with the file's first sample."""
    late = tmp_path / "late.mp4"
    remux_with_delay(good / "a10.mp4", late, seconds=0.4)
    np.save(tmp_path / "late.npy", face_landmarks(31))
    waves = []
    for path in (good / "a10.mp4", late):
        clip = Clip("x", path, path.name, path.with_suffix(".npy"))
        found = next(cut_all([Task(clip, tmp_path / path.stem, 16, 14, "mediapipe", None)], 0))[1]
        assert not isinstance(found, str), found
        waves.append(found.wave)
    count = round(0.7 * RATE)
    assert len(waves[1]) >= count
    later = waves[0][round(0.4 * RATE) :][:count]
    assert np.abs(waves[1][:count] - later).max() < 0.02


def remux_with_delay(source: Path, target: Path, seconds: float) -> None:
    """The same packets, the picture later."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        streams = {s.index: write.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if packet.dts is None:
                continue
            if packet.stream.type == "video":
                delay = round(seconds / packet.time_base)
                packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
            packet.stream = streams[packet.stream.index]
            write.mux(packet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"landmarks": "eyes"}, "there is no landmark detector eyes"),
        ({"latents": "mean"}, "stored as posterior or sample, not mean"),
        ({"dtype": "fp16"}, "the dtype is one of fp32, tf32, bf16, not fp16"),
        ({"seed": -1}, "the seed is 0 or more, not -1"),
        ({"workers": -1}, "the number of workers is 0 or more"),
        ({"shard_mib": 0}, "at least 1 MiB"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrepareSettings(**changes)


def test_arguments_that_cannot_be_used(good: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no video"):
        prepare(tmp_path / "empty", tmp_path / "out", model)
    with pytest.raises(UserError, match=r"nothing\.mp4: does not exist"):
        prepare([tmp_path / "nothing.mp4"], tmp_path / "out", model)
    with pytest.raises(UserError, match="prepare needs a model directory"):
        prepare(good, tmp_path / "out")
    with pytest.raises(UserError, match="has no wav2vec2 encoder, only hubert, wavlm"):
        prepare(good, tmp_path / "out", model, PrepareSettings(encoders=("wav2vec2",)))
    with pytest.raises(UserError, match="exists already and is no dataset"):
        prepare(good, good, model)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        prepare(good, tmp_path / "file/out", model)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.mp4").write_bytes(b"x")
    np.save(tmp_path / "bad/x.npy", face_landmarks(20))
    with pytest.raises(UserError, match="none of the 1 clips can be used; the first: cannot read the video"):
        prepare(tmp_path / "bad", tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_clip_without_landmarks_needs_its_detector(
    good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mediapipe")
    monkeypatch.setenv("KEYSYNC_CACHE", str(tmp_path / "cache"))
    shutil.copy(good / "a2.mp4", tmp_path / "x.mp4")
    with pytest.raises(UserError, match="Face Landmarker is missing"):
        prepare(tmp_path / "x.mp4", tmp_path / "out", model)


@pytest.fixture(scope="module")
def real_clip(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two seconds of the real clip, at a quarter of its size."""
    folder = tmp_path_factory.mktemp("real") / "clips"
    folder.mkdir()
    samples = read_audio(real / "demo1_video.mp4")[: 2 * RATE]
    with wave.open(str(folder.parent / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    with VideoWriter(folder / "demo1.mp4", 270, 480, folder.parent / "voice.wav") as writer:
        for _, frame in zip(range(50), read_frames(real / "demo1_video.mp4"), strict=False):
            writer.write(cv2.resize(frame, (270, 480), interpolation=cv2.INTER_AREA))
    np.save(folder / "demo1.npy", np.load(real / "demo1_landmarks.npy")[:50] / 4)
    return folder


def test_the_real_clip(real_clip: Path, model: Model, tmp_path: Path) -> None:
    report: PrepareReport = prepare(real_clip, tmp_path / "dataset", model)
    assert (report.done, report.frames, report.frames_without_face) == (1, 50, 0)
    records = check(tmp_path / "dataset").read(0, range(50))
    landmarks = np.stack([r["landmarks"] for r in records])
    assert 0 < landmarks.min() < landmarks.max() < 16
    means = np.stack([r["mean"] for r in records]).astype(np.float32)
    assert np.abs(means - means[:1])[1:].max() > 0
    features = np.stack([r["audio_hubert"] for r in records])
    assert np.isfinite(features).all()
    assert features.std() > 0.1


def test_the_real_clips_face_is_found(real: Path, real_clip: Path, model: Model, tmp_path: Path) -> None:
    pytest.importorskip("mediapipe")
    shutil.copy(real_clip / "demo1.mp4", tmp_path / "demo1.mp4")
    settings = PrepareSettings(landmark_model=real / "face_landmarker.task", encoders=("hubert",))
    report = prepare(tmp_path / "demo1.mp4", tmp_path / "dataset", model, settings)
    assert (report.frames, report.frames_without_face) == (50, 0)
    prepare(real_clip, tmp_path / "given", model, PrepareSettings(encoders=("hubert",)))
    found, given = (
        np.stack([r["landmarks"] for r in Dataset(tmp_path / name).read(0, range(50), ["landmarks"])])
        for name in ("dataset", "given")
    )
    assert np.abs(found - given).mean() < 0.5
