"""What `keysync prepare` takes: lists, folders, and the reference's own with their latents and features."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.config import VAEConfig
from keysync_jax.data.prepare import PrepareSettings, check, prepare
from keysync_jax.data.records import Dataset, decode_frame
from keysync_jax.data.sources import find_clips
from keysync_jax.errors import UserError
from keysync_jax.media.video import read_frames
from keysync_jax.tensorfile import write_tensors
from tests.clips import face_landmarks, write_video
from tests.data.preparing import write_good


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good") / "clips")


def write_reference_layout(folder: Path, clips: dict[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """The reference's folders, with 64 x 64 crops of 8 x 8 latents."""
    rng, arrays = np.random.default_rng(0), {}
    for name, frames in clips.items():
        for kind in ("videos", "audios", "landmarks"):
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
        latents = rng.normal(size=(frames, 4, 8, 8)).astype(np.float16)
        audio = rng.normal(size=(frames + 1, 2, 768)).astype(np.float32)
        landmarks = face_landmarks(frames, 512, 512)
        write_tensors(folder / "videos" / f"{name}_video_512_latent.safetensors", {"latents": latents})
        write_tensors(folder / "audios" / f"{name}_hubert_emb.safetensors", {"audio": audio})
        np.save(folder / "landmarks" / f"{name}.npy", landmarks)
        write_video(folder / "videos" / f"{name}.mp4", frames, 64, 64)
        arrays[name] = {"latents": latents, "audio": audio, "landmarks": landmarks}
    return arrays


def test_the_references_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    arrays = write_reference_layout(folder, {"c1": 20, "deep/c2": 18, "c3": 20})
    (folder / "audios" / "c3_hubert_emb.safetensors").unlink()
    report = prepare(folder, tmp_path / "dataset")
    assert report.done == 2
    ((source, reason),) = report.skipped
    assert source == "videos/c3_video_512_latent.safetensors"
    assert "has no hubert features" in reason
    dataset = check(tmp_path / "dataset")
    assert (dataset.settings.crop_size, dataset.settings.latent_size) == (64, 8)
    assert dataset.settings.encoders["hubert"].sha256 is None
    assert [clip.name for clip in dataset.clips] == ["c1", "deep/c2"]
    for clip, name in enumerate(("c1", "deep/c2")):
        given, frames = arrays[name], dataset.clips[clip].frames
        records = dataset.read(clip, range(frames))
        raw = np.stack([r["mean"] for r in records])
        back = (raw * np.float32(VAEConfig().scale_factor)).transpose(0, 3, 1, 2).astype(np.float16)
        np.testing.assert_array_equal(back, given["latents"])
        np.testing.assert_array_equal([r["audio_hubert"] for r in records], given["audio"][:frames])
        np.testing.assert_allclose(
            [r["landmarks"] for r in records], given["landmarks"] / 8, rtol=1e-6, atol=1e-5
        )
        pixels = list(read_frames(folder / "videos" / f"{name}.mp4"))
        stored = np.stack([decode_frame(r["frame"]) for r in records]).astype(int)
        assert np.abs(stored - np.stack(pixels)).mean() < 2


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    """Without a model they are SVD's, with 4 channels."""
    folder = tmp_path / "reference"
    arrays = write_reference_layout(folder, {"c1": 20})
    wide = np.concatenate([arrays["c1"]["latents"]] * 2, axis=1)
    write_tensors(folder / "videos/c1_video_512_latent.safetensors", {"latents": wide})
    with pytest.raises(UserError, match=r"have shape \[20, 8, 8, 8\], not \[T, 4, h, h\]"):
        prepare(folder, tmp_path / "dataset")


def test_clips_without_latents_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    write_reference_layout(folder, {"c1": 20, "c2": 20})
    (folder / "videos/c2_video_512_latent.safetensors").unlink()
    (folder / "raw").mkdir()
    (folder / "raw/a.MP4").touch()
    (folder / "audios/c4_wavlm_emb.safetensors").write_bytes(b"")
    report = prepare(folder, tmp_path / "dataset")
    assert report.done == 1
    reasons = dict(report.skipped)
    assert list(reasons) == ["videos/c2.mp4", "audios/c4_wavlm_emb.safetensors", "raw/a.MP4"]
    assert all("has no latents" in reason for reason in reasons.values())
    assert set(Dataset(tmp_path / "dataset").settings.encoders) == {"hubert"}
    assert prepare(folder, tmp_path / "dataset") == report


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"landmarks": "face_alignment"}, "--landmarks"),
        ({"landmark_model": Path("model.task")}, "--landmark-model"),
        ({"allow_download": True}, "--allow-download"),
        ({"latents": "sample"}, "--latents"),
        ({"seed": 1}, "--seed"),
        ({"dtype": "bf16"}, "--dtype"),
        ({"workers": 2}, "--workers"),
    ],
)
def test_precomputed_latents_refuse_settings_of_videos(
    tmp_path: Path, changes: dict[str, Any], flag: str
) -> None:
    (tmp_path / "c1_video_512_latent.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"precomputed latents take no {flag}; leave it out"):
        prepare(tmp_path, tmp_path / "dataset", settings=PrepareSettings(**changes))


def test_the_references_features_cannot_be_shifted(tmp_path: Path) -> None:
    write_reference_layout(tmp_path / "reference", {"c1": 20})
    with pytest.raises(UserError, match="have no shifted voices"):
        prepare(tmp_path / "reference", tmp_path / "dataset", settings=PrepareSettings(pitch=(2,)))


def test_landmarks_of_another_frame_size_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    arrays = write_reference_layout(folder, {"c1": 20})
    np.save(folder / "landmarks" / "c1.npy", arrays["c1"]["landmarks"] * 3)
    with pytest.raises(UserError, match="lie outside of a 512 x 512 frame"):
        prepare(folder, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_lists_of_videos(good: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{good / 'sub/b.mp4'}\n\n{good / 'a2.mp4'}\n")
    assert [clip.name for clip in find_clips(listed)] == ["a2", "sub/b"]
    assert [clip.name for clip in find_clips([good / "a10.mp4", good / "a2.mp4"])] == ["a2", "a10"]
    assert [clip.source for clip in find_clips(good / "a2.mp4")] == ["a2.mp4"]
    shutil.copy(good / "a2.mp4", tmp_path / "x.mp4")
    shutil.copy(good / "a2.mp4", tmp_path / "x.mov")
    assert [clip.name for clip in find_clips(tmp_path)] == ["x.mov", "x.mp4"]


def test_several_folders_and_videos(tmp_path: Path) -> None:
    for name in ("one/a.mp4", "two/deep/a.mp4", "two/.hidden/b.mp4", "c.mp4", "latents/x.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    given = [tmp_path / "one", tmp_path / "two", tmp_path / "c.mp4", tmp_path / "one/a.mp4"]
    assert [clip.name for clip in find_clips(given)] == ["c", "one/a", "two/deep/a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no video"):
        find_clips([*given, tmp_path / "empty"])
    (tmp_path / "latents/x_video_512_latent.safetensors").touch()
    with pytest.raises(UserError, match="holds precomputed latents; give this one folder alone"):
        find_clips([*given, tmp_path / "latents"])
